"""``python -m hybrid.train``: help, mistakes, exit codes, and runs that are killed, interrupted, resumed, repeated."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hybrid.records import RunFolder
from tests.runs import (
    ROOT,
    Answer,
    Setting,
    cli,
    command,
    finish,
    results,
    rows,
    same_weights,
    snapshot,
    start,
    strict_json,
    wait_for,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- mistakes: one line, exit code 2, before torch is imported

TEXT = ["data=text", "data.path={text}"]
SHORT = ["trainer.max_steps=10", "schedule.warmup_steps=2"]
# What a person types -> what the answer must say.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown key": (["trainer.max_step=5"], "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
    "unknown axis": (["fusoin=gated"], "unknown key 'fusoin'; did you mean 'fusion'?"),
    "key under another name": (["max_steps=5"], "did you mean 'trainer.max_steps'?"),
    "added key": (["+fusion.gait=1"], "unknown key 'fusion.gait'"),
    "unknown choice": (["fusion=gatd"], "fusion=gatd: no such choice; did you mean gated? (there are concat, "),
    "number for a choice": (["model=3"], "model=3: no such choice (there are hybrid_5m, "),
    "unknown sweep": (["-m", "sweep=smok"], "sweep=smok: no such choice; did you mean smoke?"),
    "text for a number": (["model.d_model=wide"], "model.d_model: Value 'wide' of type 'str'"),
    "fraction for a whole number": (["trainer.max_steps=10.5"], "trainer.max_steps: Value '10.5'"),
    "infinity for a whole number": (["trainer.max_steps=inf"], "trainer.max_steps: Value 'inf'"),
    "number for a list": (["optim.betas=3"], "optim.betas"),
    "text for a switch": (["trainer.compile=maybe"], "trainer.compile: Value 'maybe'"),
    "nothing for a name": (["out=null"], "out: "),
    "not a number": (["optim.lr=nan"], "optim.lr must be above 0, got nan"),
    "negative": (["optim.lr=-1"], "optim.lr must be above 0, got -1"),
    "no steps": (["trainer.max_steps=0", "schedule.warmup_steps=0"], "trainer.max_steps must be at least 1, got 0"),
    "several values": (["seed_init=0,1"], "To sweep over it, add --multirun"),
    "no value": (["trainer.max_steps"], "trainer.max_steps"),
    "unknown flag": (["--fast"], "unrecognized arguments: --fast"),
    "flag without its value": (["--cfg"], "--cfg"),
    "two flags that exclude each other": (["--run", "--cfg=job"], "only one of --run and --cfg"),
    "flag for what the command does anyway": (["--experimental-rerun", "x"], "the same command finds its run"),
    "torn quotes": (["variant='x"], "variant='x"),
    "heads and width": (["model.d_model=130"], "model.rwkv.expand_k=0.5 gives key width 65"),
    "Mamba heads": (["model.mamba.head_dim=48"], "model.mamba.head_dim=48 does not divide expand*d_model=256"),
    "attention heads": (["model=transformer", "model.attention.num_heads=3"], "model.attention.num_heads=3"),
    "unknown block": (["model.pattern=PX"], "model.pattern: unknown block 'X'"),
    "no block": (["model.pattern='P*0'"], "model.pattern"),
    "target too small": ([*TEXT, "data.seq_len=8", "model.target_params=10K"], "target_params=10,000 cannot be met"),
    "no target": (["model.target_params=many"], "model.target_params must be a number of parameters"),
    "two widths": (["model.target_params=4M", "model.ffn_hidden=9"], "model.ffn_hidden and model.target_params"),
    "small vocabulary": ([*TEXT, *SHORT, "data.seq_len=8", "model.vocab_size=2"], "model.vocab_size=2 is below"),
    "warmup": (["trainer.max_steps=10"], "schedule.warmup_steps=2000 must be below trainer.max_steps=10"),
    "minimum above peak": (["schedule.min_lr=1"], "schedule.min_lr must be in [0, optim.lr=0.0003], got 1.0"),
    "option of another fusion": (["fusion=gain", "fusion.gate_init=0.5"], "fusion.gate_init has no effect with"),
    "gate start of another fusion": (["fusion=gain", "gate_init=balanced"], "fusion.gate_init=0.5 has no effect with"),
    "certain gate": (["fusion.gate_init=1"], "fusion.gate_init must be strictly between 0 and 1, got 1.0"),
    "unknown device": (["trainer.device=gpu"], "trainer.device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    "unknown precision": (["trainer.dtype=float16"], "trainer.dtype must be one of auto, float32, bfloat16"),
    "no such file": (["data=text", "data.path=/no/such/file"], "data.path=/no/such/file: there is no such file"),
    "no file": (["data=text"], "data=text needs a text file: set data.path=FILE"),
    "folder for a file": (["data=text", "data.path={folder}"], "is a directory"),
    "empty file": (["data=text", "data.path={empty}"], "is empty"),
    "text too short": ([*TEXT, "data.seq_len=5000"], "fewer than data.seq_len + 1 = 5001"),
    "unknown work": (["data.works=[hamlett]"], "there is no work 'hamlett'; the nearest names are hamlet"),
    "sweep's name": (["-m", "sweep.name=a/b"], "sweep.name must be letters, digits and '._+-', got 'a/b'"),
    "what arms set": (["-m", "--config-dir={conf}", "sweep=arms", "fusion=gain"], "fusion is what arm 'one' of sweep"),
    "what arms set, swept": (["-m", "--config-dir={conf}", "sweep=arms", "fusion=gain,concat"], "fusion is what arm"),
    "arm of no choice": (["-m", "--config-dir={conf}", "sweep=wrong"], "fusion=nope: no such choice"),
    "one mistake in many": (["-m", "fusion=gated,gain", "model.d_model=128,130"], "model.rwkv.expand_k=0.5"),
}  # fmt: skip

# Calls main for each list of arguments on stdin; says what came of it and whether torch was imported by then.
PROBE = """
import contextlib, io, json, sys, time
from hybrid.train import main

for arguments in json.load(sys.stdin):
    out, err, code, began = io.StringIO(), io.StringIO(), 0, time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = repr(error)
    seconds, imported = time.monotonic() - began, [name in sys.modules for name in ("torch", "fla")]
    print(json.dumps([code, out.getvalue(), err.getvalue(), seconds, *imported]))
"""


@dataclass(frozen=True)
class Probed(Answer):
    seconds: float
    torch: bool
    fla: bool


def probe(calls: list[list[str]]) -> list[Probed]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=json.dumps(calls), cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return [Probed(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Probed]:
    """The answer to every mistake, all of one process: each is answered before torch is imported, or none after is."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "text.txt").write_text("to be or not to be " * 50)
    (folder / "empty.txt").touch()
    (folder / "conf" / "sweep").mkdir(parents=True)
    for name, choice in (("arms", "gated"), ("wrong", "nope")):
        arms = f"arms: {{one: [fusion={choice}], two: [fusion=residual]}}"
        (folder / "conf" / "sweep" / f"{name}.yaml").write_text(
            f"# @package _global_\nsweep: {{name: {name}, {arms}}}\n"
        )
    places = {"text": folder / "text.txt", "empty": folder / "empty.txt", "folder": folder, "conf": folder / "conf"}
    more = [f"data.cache_dir={folder}/cache", f"out={folder}/out"]
    calls = []
    for arguments, _ in MISTAKES.values():
        options = [argument for argument in arguments if argument.startswith("-")]
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        own = [] if any(override.startswith("out=") for override in overrides) else more
        calls.append([argument.format(**places) for argument in (*options, *own, *overrides)])
    found = probe([*calls, ["--help"], ["-h"], ["--cfg", "job", "fusion=gain"]])
    assert not (folder / "out").exists()  # a mistake leaves nothing behind
    return dict(zip([*MISTAKES, "--help", "-h", "--cfg"], found, strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line_at_once(answers: dict[str, Probed], mistake: str) -> None:
    answer = answers[mistake]
    assert answer.code == 2, answer
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1 and answer.err.endswith("\n")
    assert MISTAKES[mistake][1] in answer.err
    assert "Traceback" not in answer.err and answer.out == ""
    assert not answer.torch and not answer.fla and answer.seconds < 5


def test_help_names_every_axis_choice_and_key(answers: dict[str, Probed]) -> None:
    for option in ("--help", "-h"):
        answer = answers[option]
        assert (answer.code, answer.err, answer.torch) == (0, "", False) and answer.seconds < 5
        for group in ("model", "fusion", "init", "data", "optim", "schedule", "trainer", "sweep"):
            choices = [path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")]
            assert choices and all(re.search(rf"^ +\*? {choice} +\S", answer.out, re.MULTILINE) for choice in choices)
        for key in (
            "gate_init", "branch_norm", "pattern", "d_model", "target_params", "seq_len", "tokenizer", "lr",
            "rwkv_lr_mult", "mamba_lr_mult", "warmup_steps", "max_steps", "batch_size", "grad_accum", "eval_every",
            "device", "dtype", "compile", "seed_init", "seed_data", "out",
        ):  # fmt: skip
            assert re.search(rf"^ +{key}: ", answer.out, re.MULTILINE), key
        assert "-m sweep=" in answer.out


def test_the_configuration_can_be_printed(answers: dict[str, Probed]) -> None:
    answer = answers["--cfg"]
    assert (answer.code, answer.err, answer.torch) == (0, "", False)
    assert "gain_init:" in answer.out and "hydra:" not in answer.out


@pytest.mark.parametrize("arguments", [["--help"], ["trainer.max_step=5"], ["-m", "sweep=smok"]])
def test_a_process_answers_within_seconds(arguments: list[str]) -> None:
    began = time.monotonic()
    answer = finish(start(arguments))
    assert time.monotonic() - began < 5
    assert answer.code == (0 if arguments == ["--help"] else 2) and "Traceback" not in answer.err


@pytest.mark.parametrize("override", ["fusion=null", "model=null", "fusion=true"])
def test_no_choice_is_answered_in_one_line(override: str) -> None:
    answer = cli([override])
    assert answer.code == 2 and answer.err.count("\n") == 1


def test_options_may_stand_between_overrides() -> None:
    answer = finish(start(["fusion=gated", "-m", "model.d_model=130,131"]))
    assert answer.code == 2 and "model.rwkv.expand_k=0.5" in answer.err


@pytest.mark.parametrize(
    "arguments", [["--multi", "model.d_model=130,131"], ["hydra.mode=MULTIRUN", "model.d_model=130"]]
)
def test_every_way_to_ask_for_a_multirun(arguments: list[str]) -> None:
    answer = cli(arguments)
    assert answer.code == 2 and "model.rwkv.expand_k=0.5" in answer.err


def test_help_into_a_closed_pipe() -> None:
    process = subprocess.Popen(
        command([], "--help"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # as `| head` does once it has seen enough
    process.stdout = None
    assert "Traceback" not in finish(process).err


@pytest.mark.parametrize("options", [(), ("-m",)])
def test_an_out_that_cannot_be_written(small: Setting, tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    answer = cli(small.with_(f"out={tmp_path}/file"), *options)
    assert answer.code == 2 and answer.err.count("\n") == 1 and f"{tmp_path}/file" in answer.err


@pytest.mark.parametrize(
    "override", ["seed_data=-1", "seed_data=99999999999999999999", "seed_init=99999999999999999999"]
)
def test_seeds_that_no_run_could_use(small: Setting, override: str) -> None:
    answer = cli(small.with_(override))
    assert answer.code == 2 and answer.err.count("\n") == 1 and not small.out.exists()


def test_kernels_that_the_device_does_not_have(small: Setting) -> None:
    answer = cli(small.with_("kernels.wkv6=fla"))
    assert answer.code == 2 and answer.err.count("\n") == 1 and not small.out.exists()


def test_a_device_that_is_not_there(small: Setting) -> None:
    answer = cli(small.with_("trainer.device=cuda:99"))
    assert answer.code == 2 and re.fullmatch(r"error: trainer.device=cuda:99: .*; use cpu or auto\n", answer.err)
    assert not small.out.exists()


# ---- one run


def only_folder(out: Path) -> Path:
    (folder,) = (out / "single").iterdir()
    return folder


def test_a_run_says_where_its_record_is(small: Setting) -> None:
    answer = cli(small.with_("variant=one", "trainer.max_steps=3", "trainer.eval_every=3"))
    folder = only_folder(small.out)
    summary = strict_json((folder / "summary.json").read_text())
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert re.fullmatch(r"one seed 0: step 0/3  val \d\.\d{4}", lines[0])
    assert re.match(
        r"one seed 0: step 3/3  train \d\.\d{4}  val \d\.\d{4}  RWKV/Mamba \d\.\d\d  [\d,]+ tok/s", lines[1]
    )
    best = f"best validation loss {summary['best_val_loss']:.4f} nats at step {summary['best_step']}"
    assert lines[2] == f"completed: {summary['params']['total']:,} parameters, {best}; record in {folder}"
    assert len(lines) == 3


def test_progress_off_is_silent(small: Setting) -> None:
    for _ in range(2):
        assert cli(small.with_("trainer.max_steps=3", "display.progress=off")) == Answer(0, "", "")


def test_the_same_run_as_in_this_process(small: Setting) -> None:
    """What the command line trains is what ``hybrid.run`` trains of the same overrides."""
    cli(small.with_())
    _, summary = small.run(f"out={small.out}2")
    assert results(strict_json((only_folder(small.out) / "summary.json").read_text())) == results(summary)


def test_paths_with_spaces_quotes_and_other_scripts(small: Setting, tmp_path: Path) -> None:
    text = tmp_path / "ein tést, [b] 文.txt"
    text.write_bytes(Path(small.config().data.path).read_bytes())
    out = tmp_path / "o u't, (ü) 出"
    quoted = str(out).replace("'", "\\'")
    answer = cli(small.with_(f"data.path='{text}'", f"out='{quoted}'", "variant='a/b: ü'", "trainer.max_steps=3"))
    assert (answer.code, answer.err) == (0, "")
    folder = only_folder(out)
    assert re.fullmatch(r"a_b_ü-[0-9a-f]{8}", folder.name) and str(folder) in answer.out
    again = cli(small.with_(f"data.path='{text}'", f"out='{quoted}'", "variant='a/b: ü'", "trainer.max_steps=3"))
    assert "already there" in again.out


def test_a_diverged_run_says_so(small: Setting) -> None:
    answer = cli(small.with_("optim.lr=1e9", "optim.grad_clip=0", "schedule.warmup_steps=0"))
    assert answer.code == 1 and "diverged: training loss not finite at step " in answer.out
    assert answer.err.startswith("error: the run diverged: ") and answer.err.count("\n") == 1
    assert strict_json((only_folder(small.out) / "summary.json").read_text())["status"] == "diverged"


def test_a_failing_run_is_one_line_and_exit_code_1(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.training.loop import Trainer

    def fail(*_: object) -> None:
        raise RuntimeError("no luck today")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", fail)
        answer = cli(small.with_("variant=bad"))
    folder = only_folder(small.out)
    assert answer.code == 1
    assert answer.err == f"error: the run failed: RuntimeError: no luck today (log: {folder}/log.txt)\n"
    assert "Traceback" in (folder / "log.txt").read_text() and "Traceback" not in answer.out
    assert cli(small.with_("variant=bad")).code == 0  # it is tried again


def test_a_busy_run_is_one_line(small: Setting) -> None:
    with small.plan("variant=x").folder.lock():
        answer = cli(small.with_("variant=x"))
    assert answer.code == 2 and re.fullmatch(r"error: .*/x-[0-9a-f]{8} is being run by another process\n", answer.err)


# ---- one run of several processes: killed, interrupted, finished, asked for again


@dataclass(frozen=True)
class Story:
    """What became of one run, started again and again with the same command."""

    folder: Path
    busy: Answer  # a second process while the first was at it
    busy_changed: bool
    killed: Answer
    resumed_from: int  # the step of the checkpoint that kill -9 left
    record_after_kill: bool
    interrupted: Answer
    stopped_after: int  # the step of the checkpoint that Ctrl-C left
    finished: Answer
    again: Answer
    again_changed: bool
    reference: tuple[RunFolder, dict[str, Any]]


def checkpoint_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")), default=0)


@pytest.fixture(scope="module")
def story(shared: tuple[str, ...], one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Story:
    out = tmp_path_factory.mktemp("story")
    options = ("model.dropout=0.1", "trainer.max_steps=200", "trainer.log_every=10", "trainer.eval_every=50",
               "trainer.checkpoint_every=5", "variant=story", f"out={out}")  # fmt: skip
    setting = Setting((*shared, *options), out)
    folder = setting.plan().folder.path

    first = start(setting.with_())
    wait_for(lambda: checkpoint_step(folder) > 0, first)
    first.send_signal(signal.SIGSTOP)  # so that it is at work for as long as the second process takes
    before = snapshot(folder)
    busy = cli(setting.with_())
    busy_changed = snapshot(folder) != before
    first.send_signal(signal.SIGKILL)
    killed = finish(first)
    resumed_from, record_after_kill = checkpoint_step(folder), (folder / "summary.json").exists()
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"kind": "train", "step": 11, "lo')  # a line that death tore

    second = start(setting.with_())
    wait_for(lambda: checkpoint_step(folder) > resumed_from + 10, second)
    second.send_signal(signal.SIGINT)
    interrupted = finish(second)
    stopped_after = checkpoint_step(folder)

    finished = cli(setting.with_())
    before = snapshot(folder)
    again = cli(setting.with_())
    return Story(
        folder, busy, busy_changed, killed, resumed_from, record_after_kill, interrupted, stopped_after, finished,
        again, snapshot(folder) != before, setting.run(f"out={out}/undisturbed"),
    )  # fmt: skip


def test_a_second_process_on_one_folder_is_told_so_and_changes_nothing(story: Story) -> None:
    assert (story.busy.code, story.busy.out) == (2, "")
    assert story.busy.err == f"error: {story.folder} is being run by another process\n"
    assert not story.busy_changed


def test_kill_9_leaves_a_checkpoint_and_no_record(story: Story) -> None:
    assert story.killed.code == -signal.SIGKILL and 0 < story.resumed_from < 200
    assert not story.record_after_kill


def test_ctrl_c_saves_and_says_how_to_go_on(story: Story) -> None:
    assert story.interrupted.code == 130
    assert f"story seed 0: resumes after step {story.resumed_from}" in story.interrupted.out
    message = f"stopped after step {story.stopped_after}; the same command goes on from there\n"
    assert story.interrupted.err == message
    assert story.resumed_from < story.stopped_after < 200


def test_the_same_command_finishes_the_run(story: Story) -> None:
    assert (story.finished.code, story.finished.err) == (0, "")
    assert f"resumes after step {story.stopped_after}" in story.finished.out
    assert f"record in {story.folder}" in story.finished.out
    assert not list(story.folder.glob("checkpoints/step-*"))


def test_a_disturbed_run_equals_an_undisturbed_one_bit_by_bit(story: Story) -> None:
    folder, summary = story.reference
    assert results(strict_json((story.folder / "summary.json").read_text())) == results(summary)
    assert rows(story.folder) == rows(folder)
    assert [row["step"] for row in rows(folder) if row["kind"] == "train"] == list(range(10, 201, 10))
    for name in ("final", "best"):
        assert same_weights(weights(story.folder, name), weights(folder, name))


def test_an_ended_run_is_not_repeated(story: Story) -> None:
    assert (story.again.code, story.again.err) == (0, "") and not story.again_changed
    assert story.again.out.startswith(f"already there: {story.folder}\ncompleted: ")


def test_time_is_counted_over_all_processes(story: Story) -> None:
    lines = [json.loads(line) for line in (story.folder / "metrics.jsonl").read_text().splitlines()]
    walls = [row["wall_seconds"] for row in lines]
    assert walls == sorted(walls)
    assert strict_json((story.folder / "summary.json").read_text())["wall_seconds"] >= walls[-1]
