"""Sweeps through the command line: every run once, what fails, what is missing, and what a sweep leaves behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Answer, Setting, cli, finish, results, rows, same_weights, snapshot, start, strict_json, weights

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = ["fusion=gain,gated", "sweep.name=two"]
SHORT = ["trainer.max_steps=3", "trainer.eval_every=3"]


def records(root: Path) -> dict[str, dict[str, Any]]:
    """The summaries of a sweep by folder name."""
    return {path.parent.name: strict_json(path.read_text()) for path in sorted(root.glob("*/summary.json"))}


def plan_of(root: Path) -> dict[str, Any]:
    return strict_json((root / "sweep.json").read_text())


# ---- one true multirun in processes of its own


@dataclass(frozen=True)
class Sweep:
    """The same sweep three times, the last time with one more seed."""

    root: Path
    first: Answer
    after_first: dict[str, tuple[int, int, bytes]]
    plan: dict[str, Any]
    again: Answer
    after_again: dict[str, tuple[int, int, bytes]]
    more: Answer
    setting: Setting


@pytest.fixture(scope="module")
def sweep(shared: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    out = tmp_path_factory.mktemp("sweep")
    setting = Setting((*shared, f"out={out}"), out)
    root = out / "two"
    command = setting.with_(*TWO)
    first = finish(start([*command, "sweep.seeds=[0,1]"], "-m"))
    after_first, plan = snapshot(root), plan_of(root)
    again = finish(start([*command, "sweep.seeds=[0,1]"], "--multirun"))
    after_again = snapshot(root)
    more = cli([*command, "sweep.seeds=[0,1,2]"], "-m")
    return Sweep(root, first, after_first, plan, again, after_again, more, setting)


def test_a_multirun_makes_a_folder_per_run(sweep: Sweep) -> None:
    assert (sweep.first.code, sweep.first.err) == (0, "")
    folders = {name.split("/")[0] for name in sweep.after_first if name != "sweep.json"}
    assert len(folders) == 4
    for name in folders:
        assert re.fullmatch(r"(gain|gated)-[0-9a-f]{8}", name)
        summary = json.loads(sweep.after_first[f"{name}/summary.json"][2])
        assert summary["status"] == "completed" and name == f"{summary['variant']}-{summary['run_id'][:8]}"
        assert summary["seed_init"] == summary["seed_data"]
        for part in ("config.yaml", "metrics.jsonl", "log.txt", "checkpoints/final.safetensors"):
            assert f"{name}/{part}" in sweep.after_first
    assert not list(sweep.root.parent.glob("single")) and {path.name for path in sweep.root.parent.iterdir()} == {"two"}


def test_a_multirun_says_which_run_of_how_many(sweep: Sweep) -> None:
    lines = sweep.first.out.splitlines()
    assert lines[0] == f"two: 4 runs (2 arms x 2 seeds) -> {sweep.root}"
    for number, run in enumerate(("gain seed 0", "gain seed 1", "gated seed 0", "gated seed 1"), start=1):
        assert sum(line.startswith(f"run {number}/4 {run}: step ") for line in lines) == 3
    assert "sweep 0:" in sweep.first.out and lines[-1] == "4 of 4 runs have a record"


def test_sweep_json_lists_what_the_sweep_consists_of(sweep: Sweep) -> None:
    plan = sweep.plan
    assert (plan["schema"], plan["name"]) == ("groundthink.sweep/1", "two")
    assert plan["arms"] == ["gain", "gated"] and plan["seeds"] == [0, 1]
    assert [(run["variant"], run["seed_init"], run["seed_data"]) for run in plan["runs"]] == [
        ("gain", 0, 0), ("gain", 1, 1), ("gated", 0, 0), ("gated", 1, 1),
    ]  # fmt: skip
    for run in plan["runs"]:
        summary = json.loads(sweep.after_first[f"{run['folder']}/summary.json"][2])
        asked = {override for override in run["overrides"] if not override.startswith("sweep.name=")}
        assert summary["run_id"] == run["run_id"] and asked == set(summary["overrides"])


def test_an_arm_differs_from_another_in_what_its_name_says(sweep: Sweep) -> None:
    found = [json.loads(sweep.after_first[f"{run['folder']}/summary.json"][2]) for run in sweep.plan["runs"]]
    gain, gated = found[0], found[2]
    assert gain["data"] == gated["data"] and gain["tokens"] == gated["tokens"]
    assert {key for key in gain["params"] if gain["params"][key] != gated["params"][key]} == {"fusion", "total"}
    assert gain["params"]["fusion"] == 64 and gated["params"]["fusion"] == 65


def test_a_run_of_a_sweep_is_the_run_alone(sweep: Sweep) -> None:
    """Nothing of the runs before it in the process shows in its results."""
    name = sweep.plan["runs"][3]["folder"]
    folder, summary = sweep.setting.run("fusion=gated", "seed_init=1", "seed_data=1", "stopping.act=false")
    assert results(strict_json((sweep.root / name / "summary.json").read_text())) == results(summary)
    assert rows(sweep.root / name) == rows(folder)
    assert same_weights(weights(sweep.root / name), weights(folder))


def test_the_same_multirun_again_repeats_nothing(sweep: Sweep) -> None:
    assert (sweep.again.code, sweep.again.err) == (0, "")
    assert sweep.again.out.splitlines() == [
        f"two: 4 runs (2 arms x 2 seeds), 4 already done -> {sweep.root}",
        "4 of 4 runs have a record",
    ]
    changed = {name for name, state in sweep.after_first.items() if sweep.after_again[name] != state}
    assert changed <= {"sweep.json"} and sweep.after_again.keys() == sweep.after_first.keys()
    assert sweep.after_again["sweep.json"][2] == sweep.after_first["sweep.json"][2]


def test_one_more_seed_runs_only_what_is_missing(sweep: Sweep) -> None:
    assert (sweep.more.code, sweep.more.err) == (0, "")
    assert f"two: 6 runs (2 arms x 3 seeds), 4 already done -> {sweep.root}" in sweep.more.out
    begun = re.findall(r"^run (\d/\d) (\w+ seed \d): step  0/12", sweep.more.out, re.MULTILINE)
    assert begun == [("1/2", "gain seed 2"), ("2/2", "gated seed 2")]
    now = snapshot(sweep.root)
    assert all(now[name] == state for name, state in sweep.after_first.items() if name != "sweep.json")
    assert len(records(sweep.root)) == 6
    plan = plan_of(sweep.root)
    assert plan["seeds"] == [0, 1, 2] and {run["folder"] for run in plan["runs"]} == records(sweep.root).keys()


# ---- in this process


def test_a_named_sweep_written_with_a_plus(tmp_path: Path, small: Setting) -> None:
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    (tmp_path / "conf" / "sweep" / "mine.yaml").write_text(
        "# @package _global_\n"
        "sweep:\n"
        "  name: mine\n"
        "  question: Is one better?\n"
        "  baseline: half-pattern=P\n"
        "  arms: {half: [fusion=gain], most: [fusion=gain, 'fusion.gain_init=[0.7,0.3]']}\n"
        "  grid: {model.pattern: [P, R P]}\n"
        "  seeds: [4]\n"
        "trainer: {max_steps: 3}\n"
    )
    config = f"--config-dir={tmp_path}/conf"
    overrides = [line for line in small.with_() if not line.startswith(("trainer.max_steps", "model.pattern"))]
    answer = cli([*overrides, "+sweep=mine", "fusion.branch_norm=rms"], "-m", config)
    assert (answer.code, answer.err) == (0, "")
    plan = plan_of(small.out / "mine")
    assert (plan["name"], plan["question"], plan["baseline"]) == ("mine", "Is one better?", "half-pattern=P")
    assert plan["arms"] == ["half-pattern=P", "half-pattern=_R_P", "most-pattern=P", "most-pattern=_R_P"]
    found = records(small.out / "mine")
    assert len(found) == 4 and {record["sweep"] for record in found.values()} == {"mine"}
    assert all((record["seed_init"], record["seed_data"], record["steps"]) == (4, 4, 3) for record in found.values())
    folder = next(name for name in found if name.startswith("most-pattern=_R_P"))
    text = (small.out / "mine" / folder / "config.yaml").read_text()
    assert "pattern: R P" in text and re.search(r"gain_init:\n  - 0.7\n  - 0.3", text) and "branch_norm: rms" in text


def test_the_sweeps_seeds_can_be_replaced(small: Setting) -> None:
    named = ["sweep=smoke", "data=text", "data.works=null", "model.target_params=null", "trainer.eval_batch_size=8"]
    answer = cli(small.with_(*named, *SHORT, "sweep.only=[weighted]", "sweep.seeds=[7]"), "-m")
    assert (answer.code, answer.err) == (0, "")
    (record,) = records(small.out / "smoke").values()
    assert (record["seed_init"], record["seed_data"]) == (7, 7)
    answer = cli(small.with_(*named, *SHORT, "sweep.only=[weighted]", "seed_init=8,9", "seed_data=3"), "-m")
    assert answer.code == 0
    seeds = {(record["seed_init"], record["seed_data"]) for record in records(small.out / "smoke").values()}
    assert seeds == {(7, 7), (8, 3), (9, 3)}


def test_an_axis_of_lists(small: Setting) -> None:
    answer = cli(small.with_(*SHORT, "fusion=gain", "fusion.gain_init=[0.5,0.5],[0.7,0.3]"), "-m")
    assert (answer.code, answer.err) == (0, "")
    found = records(small.out / "multirun-gain_init")
    assert len(found) == 2 and len({record["variant"] for record in found.values()}) == 2
    for name in found:
        text = (small.out / "multirun-gain_init" / name / "config.yaml").read_text()
        first = re.search(r"gain_init:\n  - (0.\d)", text).group(1)
        assert first in name


def test_only_seeds_is_one_arm_named_by_its_configuration(small: Setting) -> None:
    answer = cli(small.with_(*SHORT, "seed_init=0,1", "variant=mine"), "-m")
    assert (answer.code, answer.err) == (0, "")
    assert {record["variant"] for record in records(small.out / "multirun").values()} == {"mine"}
    assert "multirun: 2 runs (1 arms x 2 seeds)" in answer.out


@pytest.mark.parametrize("axis", ["fusion=gain,gain", "seed_init=0,0", "optim.lr=0.001,1e-3"])
def test_the_same_value_twice_is_refused(small: Setting, axis: str) -> None:
    answer = cli(small.with_(axis), "-m")
    assert answer.code == 2 and answer.err.startswith("error: two runs of this sweep are the same: ")
    assert answer.err.count("\n") == 1 and not small.out.exists()


def test_one_run_that_cannot_start_stops_the_sweep_before_its_first(small: Setting) -> None:
    for axes in (["fusion=gain,gated", "model.d_model=32,33"], ["data.seq_len=32,100000"], ["data.val_fraction=0.1,2"]):
        answer = cli(small.with_(*axes), "-m")
        assert answer.code == 2 and answer.err.count("\n") == 1 and not small.out.exists()


@pytest.mark.parametrize(
    "axes",
    [
        ["fusion=weighted,concat", "model.target_params=16K"],  # concat alone is larger
        ["model.vocab_size=100,10"],
    ],
)
def test_one_run_of_impossible_size_stops_the_sweep_before_its_first(small: Setting, axes: list[str]) -> None:
    answer = cli(small.with_(*SHORT, *axes), "-m")
    assert answer.code == 2 and answer.err.count("\n") == 1 and not small.out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["fusion=concat,residual", "fusion.proj_init=random"],  # no option of fusion=gated, the default
        ["schedule.warmup_steps=1,2"],  # the default is 2000, and trainer.max_steps=3
    ],
)
def test_a_sweep_is_refused_only_for_what_it_would_run(small: Setting, arguments: list[str]) -> None:
    keys = {argument.split("=")[0] for argument in arguments}
    own = [line for line in small.with_(*SHORT) if line.split("=")[0] not in keys]
    answer = cli([*own, *arguments], "-m")
    assert (answer.code, answer.err) == (0, "")


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, BaseException], None]:
    """Make the runs of one fusion raise at their second step."""
    from hybrid.training.loop import Trainer

    original = Trainer._update

    def spoil(fusion: str, error: BaseException) -> None:
        def update(self: Trainer, step: int) -> Any:
            if self.cfg.fusion.name == fusion and step == 2:
                raise error
            return original(self, step)

        monkeypatch.setattr(Trainer, "_update", update)

    return spoil


def test_a_failing_run_does_not_stop_the_others(
    small: Setting, spoilt: Callable[[str, BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt("gain", RuntimeError("no luck today"))
    command = small.with_(*SHORT, "fusion=gain,gated,weighted", "sweep.name=three")
    answer = cli(command, "-m")
    root = small.out / "three"
    assert answer.code == 1
    assert answer.err == "error: 1 of 3 runs failed, diverged or are unfinished\n"
    assert "2 of 3 runs have a record" in answer.out and "Traceback" not in answer.out
    found = {record["variant"]: record for record in records(root).values()}
    assert {arm: record["status"] for arm, record in found.items()} == {
        "gain": "failed", "gated": "completed", "weighted": "completed",
    }  # fmt: skip
    assert found["gain"]["stop_reason"] == "RuntimeError: no luck today"
    (log,) = root.glob("gain-*/log.txt")
    assert "Traceback" in log.read_text() and 'RuntimeError("no luck' not in answer.out
    table = answer.out[answer.out.index("2 of 3 runs") :]
    row = next(line for line in table.splitlines() if "failed" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][:4] == [
        "gain", "0", "failed", "RuntimeError: no luck today",
    ]  # fmt: skip

    before = snapshot(root)
    monkeypatch.undo()
    again = cli(command, "-m")
    assert again.code == 1 and "three: 3 runs (3 arms x 1 seeds), 3 already done" in again.out
    assert "only with sweep.retry_failed=true" in again.out
    assert {name for name, state in snapshot(root).items() if before.get(name) != state} <= {"sweep.json"}

    again = cli([*command, "sweep.retry_failed=true"], "-m")
    assert again.code == 0 and "three: 3 runs (3 arms x 1 seeds), 2 already done" in again.out
    assert records(root).keys() == {f"{record['variant']}-{record['run_id'][:8]}" for record in found.values()}
    after = snapshot(root)
    assert all(after[name] == state for name, state in before.items() if name.startswith(("gated", "weighted")))


def test_a_diverged_run_is_counted_and_not_repeated(small: Setting) -> None:
    command = small.with_("optim.grad_clip=0", "schedule.warmup_steps=0", "optim.lr=1e-3,1e9", "sweep.name=lr")
    for done in ("", ", 2 already done"):
        answer = cli(command, "-m")
        assert answer.code == 1 and "1 of 2 runs failed, diverged or are unfinished" in answer.err
        assert f"lr: 2 runs (2 arms x 1 seeds){done} ->" in answer.out
        assert re.search(r"lr=1000000000.0 +│ 0 +│ diverged +│ training loss not finite", answer.out)


def test_a_run_that_another_process_is_at_is_left_to_it(small: Setting) -> None:
    busy = small.plan("fusion=gated", *SHORT, "sweep.name=two", "variant=gated")
    with busy.folder.lock():
        answer = cli(small.with_(*SHORT, *TWO), "-m")
        assert answer.code == 0 and "1 of 2 runs have a record" in answer.out
        assert re.search(r"gated +│ 0 +│ elsewhere +│ another process is running it", answer.out)
    assert [record["variant"] for record in records(small.out / "two").values()] == ["gain"]
    assert [path.name for path in busy.folder.path.iterdir()] == ["lock"]
    assert cli(small.with_(*SHORT, *TWO), "-m").code == 0


def test_a_dry_run_lists_the_runs_and_does_none(small: Setting) -> None:
    command = small.with_(*TWO, "sweep.seeds=[0,1]")
    answer = cli(command, "-m", "--dry-run")
    assert (answer.code, answer.err) == (0, "") and not small.out.exists()
    assert len(re.findall(r"│ (?:gain|gated) +│ +[01] │ +[\d,]+ │ +1,536 │ +\d+:\d\d │ to do +│", answer.out)) == 4
    assert re.search(r"about \d+:\d\d left", answer.out)
    assert cli([*small.with_(*TWO, "sweep.seeds=[0]")], "-m").code == 0
    before = snapshot(small.out)
    answer = cli(command, "-m", "sweep.dry_run=true")
    assert answer.out.count("completed") == 2 and answer.out.count("to do") == 2 and snapshot(small.out) == before


@pytest.mark.slow
def test_killed_at_random_moments_a_sweep_ends_as_if_it_had_not_been(sweep: Sweep, tmp_path: Path) -> None:
    """kill -9 of the whole sweep ten times; then every run is there once, with the numbers of the undisturbed one."""
    command = [*sweep.setting.with_(*TWO), "sweep.seeds=[0,1]", f"out={tmp_path}"]
    moments = random.Random(0)
    for _ in range(10):
        process = start(command, "-m")
        reached = time.monotonic() + 120
        while not (tmp_path / "two" / "sweep.json").exists() and time.monotonic() < reached:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 12))
        process.kill()
        process.wait()
    assert finish(start(command, "-m")).code == 0
    found, expected = (
        records(tmp_path / "two"),
        {name: record for name, record in records(sweep.root).items() if record["seed_init"] in (0, 1)},
    )
    assert {name: results(record) for name, record in found.items()} == {
        name: results(record) for name, record in expected.items()
    }
    for name in expected:
        assert rows(tmp_path / "two" / name) == rows(sweep.root / name)
        assert same_weights(weights(tmp_path / "two" / name), weights(sweep.root / name))


def signalled(step: int) -> Callable[..., Any]:
    """``Trainer._update`` that gets a Ctrl-C during one step of a gain run."""
    from hybrid.training.loop import Trainer

    original = Trainer._update

    def update(self: Trainer, current: int) -> Any:
        if self.cfg.fusion.name == "gain" and current == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, current)

    return update


def test_ctrl_c_ends_the_sweep_and_the_same_command_goes_on(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.training.loop import Trainer

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", signalled(5))
        answer = cli(small.with_(*TWO), "-m")
    assert (answer.code, answer.err) == (130, "stopped after step 5; the same command goes on from there\n")
    assert records(small.out / "two") == {} and not list((small.out / "two").glob("gated-*"))
    assert plan_of(small.out / "two")["arms"] == ["gain", "gated"]  # analysis can tell what is missing
    answer = cli(small.with_(*TWO), "-m")
    assert answer.code == 0 and "run 1/2 gain seed 0: resumes after step 5" in answer.out
    assert len(records(small.out / "two")) == 2


def test_ctrl_c_in_the_last_step_of_a_run_ends_the_sweep(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.training.loop import Trainer

    monkeypatch.setattr(Trainer, "_update", signalled(3))
    assert cli(small.with_(*TWO, *SHORT), "-m").code == 130
    assert not list((small.out / "two").glob("gated-*"))


@pytest.mark.parametrize("where", ["reason", "out"])
def test_brackets_in_what_a_sweep_prints(
    small: Setting, spoilt: Callable[[str, BaseException], None], where: str
) -> None:
    if where == "reason":
        spoilt("gain", RuntimeError("cannot open [/tmp/x]"))
        answer = cli(small.with_(*TWO, *SHORT), "-m")
        assert answer.code == 1 and "cannot open [/tmp/x]" in answer.out
    else:
        answer = cli(small.with_(*TWO, *SHORT, f"out='{small.out}[old]'"), "-m")
        assert answer.code == 0 and f"{small.out}[old]/two" in answer.out


def test_the_table_shows_the_whole_path_of_a_log(small: Setting, spoilt: Callable[[str, BaseException], None]) -> None:
    spoilt("gain", RuntimeError("no luck today"))
    answer = cli(small.with_(*TWO, *SHORT), "-m", columns=80)  # what rich takes where there is no terminal
    (log,) = (small.out / "two").glob("gain-*/log.txt")
    table = answer.out[answer.out.index("runs have a record") :]
    assert str(log) in re.sub(r"[\s│]", "", table)


def test_a_sweep_narrowed_to_one_value_finds_its_runs(sweep: Sweep, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sweep.root, tmp_path / "two"))
    before = records(root).keys()
    answer = cli(sweep.setting.with_("fusion=gain", "sweep.name=two", "sweep.seeds=[0]", f"out={tmp_path}"), "-m")
    assert "1 runs (1 arms x 1 seeds), 1 already done" in answer.out and records(root).keys() == before


def test_a_part_of_a_sweep_does_not_forget_the_rest(sweep: Sweep, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sweep.root, tmp_path / "two"))
    assert cli(sweep.setting.with_(*TWO, "sweep.seeds=[1]", f"out={tmp_path}"), "-m").code == 0
    assert {run["seed_init"] for run in plan_of(root)["runs"]} == {0, 1, 2}


def test_a_baseline_that_is_no_arm_is_refused(small: Setting) -> None:
    assert cli(small.with_(*SHORT, *TWO, "sweep.baseline=concat"), "-m").code == 2


@pytest.mark.parametrize("axis", ["fusion=null,gain", "fusion=true,gain"])
def test_no_choice_in_an_axis_is_one_line(small: Setting, axis: str) -> None:
    answer = cli(small.with_(axis), "-m")
    assert answer.code == 2 and answer.err.count("\n") == 1


def test_the_configuration_of_a_multirun_cannot_be_printed(small: Setting) -> None:
    answer = cli(small.with_(), "-m", "--cfg", "job")
    assert answer.code == 2 and answer.err.count("\n") == 1


def test_a_sweep_with_other_settings_has_one_run_per_arm_and_seed(small: Setting) -> None:
    for steps in (3, 4):
        assert cli(small.with_(*TWO, f"trainer.max_steps={steps}"), "-m").code == 0
    runs = [(run["variant"], run["seed_init"], run["seed_data"]) for run in plan_of(small.out / "two")["runs"]]
    assert sorted(runs) == [("gain", 0, 0), ("gated", 0, 0)]
