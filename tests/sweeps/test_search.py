"""A search through the command line: every trial once, pruned, failed and interrupted ones, and what it leaves."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from hybrid.schema import Config
from sweeps import worker
from sweeps.outcome import fresh_seeds
from tests.processes import holder, metrics_steps
from tests.runs import Answer, Setting, cli, finish, results, rows, snapshot, start, strict_json, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")

LR = "optim.lr=tag(log,interval(1e-5,1e-1))"
MEDIAN = ["pruner=median", "sweep.search.pruner.n_startup_trials=1", "sweep.search.pruner.n_warmup_steps=0"]
EVALUATED = ["trainer.eval_every=3"]
N = 5  # trials of the search that most tests look at
SEARCH = ["sweep.name=s", LR, "fusion=choice(gain,gated)", "sampler=random", *EVALUATED]


def without_lr(small: Setting, *more: str) -> list[str]:
    """The small run's overrides with the learning rate left to the search."""
    return [line for line in small.with_(*more) if not line.startswith("optim.lr=0")]


def trials_of(root: Path, arm: str = "") -> list[dict[str, Any]]:
    return strict_json((root / f"search{arm}.json").read_text())["trials"]


def record_of(root: Path, trial: dict[str, Any]) -> dict[str, Any]:
    return strict_json((root / trial["folder"] / "summary.json").read_text())


# ---- one search, and the same command again


@dataclass(frozen=True)
class Search:
    root: Path
    command: list[str]
    answer: Answer
    found: dict[str, Any]
    after: dict[str, tuple[int, int, bytes]]


@pytest.fixture(scope="module")
def search(shared: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Search:
    out = tmp_path_factory.mktemp("search")
    command = without_lr(Setting((*shared, f"out={out}"), out), *SEARCH, *MEDIAN)
    answer = cli([*command, f"sweep.search.n_trials={N}"], "-m")
    root = out / "s"
    return Search(root, command, answer, strict_json((root / "search.json").read_text()), snapshot(root))


def test_a_search_says_what_it_found(search: Search) -> None:
    assert (search.answer.code, search.answer.err) == (0, "")
    found, lines = search.found, search.answer.out.splitlines()
    assert lines[0] == f"s: a search of {N} trials -> {search.root}"
    states = [trial["state"] for trial in found["trials"]]
    assert set(states) == {"COMPLETE", "PRUNED"} and len(states) == N
    assert f"s: {states.count('COMPLETE')} complete, {states.count('PRUNED')} pruned of {N} trials" in lines
    assert f"best configuration: {search.root}/best.yaml" in lines and f"all trials: {search.root}/search.json" in lines


def test_seeds_to_confirm_with_had_no_part() -> None:
    for init, data in ((0, 0), (2, 4), (9, 9)):
        seeds = fresh_seeds(Config(seed_init=init, seed_data=data))
        assert len(set(seeds)) == 5 and not {init, data} & set(seeds)


def best_so_far(folder: Path) -> dict[str, float]:
    """By step, the lowest validation loss up to it."""
    evaluated = {str(row["step"]): row["val_loss"] for row in rows(folder) if row["kind"] == "eval" and row["step"] > 0}
    return dict(zip(evaluated, itertools.accumulate(evaluated.values(), min), strict=True))


def test_a_pruner_judges_what_the_search_looks_for(small: Setting) -> None:
    """Of the best loss the best so far, where the loss rises again; of the final one the loss itself."""
    rest = [line for line in small.with_() if not line.startswith(("optim.", "schedule.", "trainer.eval_every"))]
    lines = ["optim.lr=interval(0.5,0.6)", "schedule.warmup_steps=1", "sweep.search.n_trials=1", "optim.grad_clip=0.0",
             "trainer.eval_every=1", "pruner=median"]  # fmt: skip
    for metric in ("best_val_loss", "final_val_loss"):
        assert cli([*rest, *lines, f"sweep.name={metric}", f"sweep.search.metric={metric}"], "-m").code == 0
        root = small.out / metric
        (trial,) = trials_of(root)
        losses = [row["val_loss"] for row in rows(root / trial["folder"]) if row["kind"] == "eval" and row["step"] > 0]
        told = list(trial["intermediate"].values())
        assert losses != sorted(losses, reverse=True)  # it rises
        assert told == (list(itertools.accumulate(losses, min)) if metric == "best_val_loss" else losses)


def test_a_patient_pruner_sees_the_losses_themselves(small: Setting) -> None:
    """It waits for them to fall, which a best so far never stops doing."""
    rest = [line for line in small.with_() if not line.startswith(("optim.", "schedule.", "trainer.eval_every"))]
    lines = ["optim.lr=interval(0.5,0.9)", "schedule.warmup_steps=1", "sweep.search.n_trials=1", "optim.grad_clip=0.0",
             "trainer.eval_every=1", "pruner=patient", "sweep.search.pruner.wrapped_pruner=null", "sweep.name=p",
             "sweep.search.pruner.patience=1"]  # fmt: skip
    assert cli([*rest, *lines], "-m").code == 0
    (trial,) = trials_of(small.out / "p")
    assert trial["state"] == "PRUNED" and list(trial["intermediate"].values()) != sorted(trial["intermediate"].values())


def test_others_are_held_against_known_points(small: Setting) -> None:
    """A known point has its place on the rungs of successive halving."""
    known = "sweep.search.enqueue=[{optim.lr: 1.0e-9},{optim.lr: 1.0e-2}]"
    rungs = ["pruner=sha", *EVALUATED, "sweep.search.pruner.min_resource=3", "sweep.search.pruner.reduction_factor=2"]
    lines = without_lr(small, "sweep.name=k", "optim.lr=interval(1e-9,1e-2)", "sweep.search.n_trials=2", known, *rungs)
    assert cli(lines, "-m").code == 0
    assert [trial["state"] for trial in trials_of(small.out / "k")] == ["COMPLETE"] * 2
    storage = JournalStorage(JournalFileBackend(str(small.out / "k" / "study.journal")))
    for trial in optuna.load_study(study_name=None, storage=storage).trials:
        assert trial.system_attrs["completed_rung_0"] == trial.intermediate_values[3]


def test_every_trial_has_its_run_and_every_run_its_trial(search: Search) -> None:
    trials = search.found["trials"]
    assert [trial["number"] for trial in trials] == list(range(N))
    assert len({trial["folder"] for trial in trials}) == N == len(list(search.root.glob("*/summary.json")))
    for trial in trials:
        record = record_of(search.root, trial)
        assert record["trial"] == {"study": "s", "number": trial["number"]} and record["run_id"] == trial["run_id"]
        assert trial["folder"] == f"trial-{trial['number']:03d}-{record['run_id'][:8]}"
        config = yaml.safe_load((search.root / trial["folder"] / "config.yaml").read_text())
        assert config["optim"]["lr"] == trial["params"]["optim.lr"]
        assert config["fusion"]["name"] == trial["params"]["fusion"]
        assert trial["intermediate"] == best_so_far(search.root / trial["folder"])
        assert trial["steps"] == record["steps"]


def test_a_pruned_run_keeps_its_record_and_saves_steps(search: Search) -> None:
    pruned = [trial for trial in search.found["trials"] if trial["state"] == "PRUNED"]
    for trial in pruned:
        record = record_of(search.root, trial)
        assert (record["status"], record["stop_reason"]) == ("stopped", "pruned") and record["steps"] < 12
        assert not list((search.root / trial["folder"] / "checkpoints").glob("step-*"))
    run = sum(trial["steps"] for trial in search.found["trials"])
    assert search.found["steps"] == {"run": run, "without_pruning": 12 * N} and run < 12 * N
    assert f"({run} instead of {12 * N})" in search.answer.out


def test_a_trial_is_pruned_by_the_rule_and_not_otherwise(search: Search) -> None:
    """The median rule by hand: worse at a step than the median of what the earlier complete trials had reached."""
    best_so_far: list[dict[int, float]] = []
    for trial in search.found["trials"]:
        curve = {int(step): value for step, value in trial["intermediate"].items()}
        last = max(curve)
        for step in sorted(curve):
            reference = sorted(other[step] for other in best_so_far if step in other)
            if best_so_far and reference and step < 12:
                middle = len(reference) // 2
                median = reference[middle] if len(reference) % 2 else (reference[middle - 1] + reference[middle]) / 2
                worse = min(value for s, value in curve.items() if s <= step) > median
                assert worse == (trial["state"] == "PRUNED" and step == last)
        if trial["state"] == "COMPLETE":
            best_so_far.append(curve)


def test_the_best_configuration_is_the_best_trials_run(search: Search) -> None:
    complete = [trial for trial in search.found["trials"] if trial["state"] == "COMPLETE"]
    best = min(complete, key=lambda trial: trial["values"])
    assert search.found["best"] == [best["number"]]
    assert (
        f"--config-name best 'sweep.seeds={search.found['fresh_seeds']}'".replace(", ", ",")
        in (search.root / "best.yaml").read_text()
    )
    assert best["values"] == [record_of(search.root, best)["best_val_loss"]]
    options = [f"--config-dir={search.root}", "--config-name=best"]
    own = [f"out={search.root.parent}", "trainer.device=cpu"]
    answer = cli([*own, "sweep.name=s"], *options)
    assert answer.code == 0 and f"already there: {search.root}/{best['folder']}" in answer.out
    answer = cli([*own, "sweep.seeds=[0,1]", "trainer.max_steps=3"], "-m", *options)
    assert answer.code == 0 and "s-best: 2 runs (1 arms x 2 seeds)" in answer.out
    other = next(fusion for fusion in ("gain", "gated") if fusion != best["params"]["fusion"])
    answer = cli([*own, f"fusion={other}", "schedule=linear", "trainer.max_steps=3"], *options)
    (config,) = (search.root.parent / "s-best").glob(f"*{other}*/config.yaml")
    chosen = yaml.safe_load(config.read_text())  # another choice on the command line is not undone by the file
    assert (chosen["fusion"]["name"], chosen["schedule"]["name"]) == (other, "linear")
    assert chosen["optim"]["lr"] == best["params"]["optim.lr"]


def test_the_same_search_again_repeats_nothing(search: Search) -> None:
    answer = cli([*search.command, f"sweep.search.n_trials={N}"], "-m")
    assert answer.code == 0 and f"a search of {N} trials, {N} already done" in answer.out
    now = snapshot(search.root)
    written = {"search.json", "best.yaml", "study.journal", "study.lock", "study.journal-lock"}
    assert {
        name for name in now if now[name] != search.after.get(name)
    } <= written and now.keys() == search.after.keys()
    assert now["search.json"][2] == search.after["search.json"][2]


def test_a_dry_run_of_a_search_writes_nothing(search: Search) -> None:
    before = snapshot(search.root)
    answer = cli([*search.command, f"sweep.search.n_trials={N + 2}"], "-m", "--dry-run")
    assert answer.code == 0 and f"2 of {N + 2} trials left" in answer.out and "optim.lr: {'type': 'float'" in answer.out
    assert snapshot(search.root) == before


# ---- trials that come to nothing


def test_a_diverging_trial_is_no_end_and_no_failure(small: Setting) -> None:
    known = "sweep.search.enqueue=[{optim.lr: 1.0e9},{optim.lr: 1.0e-3}]"
    line = "optim.lr=tag(log,interval(1e-3,1e10))"
    answer = cli(without_lr(small, line, "sweep.name=d", "sweep.search.n_trials=2", "pruner=none", known), "-m")
    assert (answer.code, answer.err) == (0, "")
    bad, good = trials_of(small.out / "d")
    assert bad["state"] == "FAIL" and bad["reason"].startswith("diverged: training loss not finite") and bad["enqueued"]
    assert good["state"] == "COMPLETE" and good["params"] == {"optim.lr": 1e-3}
    assert f"trial 0 failed: {bad['reason']} (log: {small.out}/d/{bad['folder']}/log.txt)" in answer.out


def test_a_raising_trial_is_counted_and_tried_again_on_request(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.training.loop import Trainer

    original = Trainer._update

    def update(self: Trainer, step: int) -> Any:
        if step == 2 and self.cfg.fusion.name == "gated":
            raise RuntimeError("no luck today")
        return original(self, step)

    monkeypatch.setattr(Trainer, "_update", update)
    known = "sweep.search.enqueue=[{fusion: gated},{fusion: gain}]"
    command = without_lr(
        small, "fusion=choice(gain,gated)", "sweep.name=r", "sweep.search.n_trials=2", "pruner=none", known
    )
    answer = cli(command, "-m")
    assert answer.code == 1 and answer.err == "error: trials of the search: 1 failed\n"
    failed, fine = trials_of(small.out / "r")
    assert (failed["state"], failed["reason"]) == ("FAIL", "failed: RuntimeError: no luck today")
    assert fine["state"] == "COMPLETE" and "retry_failed=true" in answer.out
    monkeypatch.undo()
    assert cli(command, "-m").code == 1  # nothing is tried again unasked
    answer = cli([*command, "sweeps.retry_failed=true"], "-m")
    assert answer.code == 0
    fine_again, once_more = trials_of(small.out / "r")
    assert fine_again == fine and once_more["state"] == "COMPLETE" and once_more["params"] == failed["params"]
    assert once_more["folder"] == failed["folder"]


def test_a_combination_that_is_no_configuration_fails_alone(small: Setting) -> None:
    """Both ends of both ranges are fine, one of their combinations is not."""
    lines = ["model.d_model=choice(32,48)", "model.rwkv.num_heads=choice(2,3)"]
    known = "sweep.search.enqueue=[{model.d_model: 32, model.rwkv.num_heads: 3}]"
    rest = [line for line in small.with_() if not line.startswith(("model.d_model", "model.rwkv.num_heads"))]
    answer = cli([*rest, *lines, known, "sweep.name=c", "sweep.search.n_trials=1"], "-m")
    assert answer.code == 0 and "trial 0 failed: model.rwkv.expand_k" in answer.out
    assert trials_of(small.out / "c")[0]["state"] == "FAIL"


def test_a_known_baseline_runs_to_its_end(small: Setting) -> None:
    """Whatever the pruner thinks of it: others are compared with it."""
    strict = ["pruner=median", "sweep.search.pruner.n_startup_trials=0", "sweep.search.pruner.n_warmup_steps=0"]
    known = "sweep.search.enqueue=[{optim.lr: 1.0e-2},{optim.lr: 1.0e-5}]"
    assert (
        cli(without_lr(small, LR, "sweep.name=k", "sweep.search.n_trials=2", *EVALUATED, *strict, known), "-m").code
        == 0
    )
    good, bad = trials_of(small.out / "k")
    assert (good["state"], bad["state"]) == ("COMPLETE", "COMPLETE") and bad["values"] > good["values"]


# ---- several


def test_each_arm_has_a_study(small: Setting) -> None:
    answer = cli(without_lr(small, "fusion=gain,gated", LR, "sweep.name=a", "sweep.search.n_trials=2"), "-m")
    assert (answer.code, answer.err) == (0, "") and "a search of 2 studies, 4 trials" in answer.out
    for arm in ("gain", "gated"):
        found = strict_json((small.out / "a" / f"search-{arm}.json").read_text())
        assert (found["arm"], found["study_name"]) == (arm, f"a-{arm}")
        for trial in found["trials"]:
            assert trial["folder"].startswith(f"{arm}-trial-00")
            assert record_of(small.out / "a", trial)["variant"] == f"{arm}-trial-{trial['number']:03d}"
        defaults = yaml.safe_load((small.out / "a" / f"best-{arm}.yaml").read_text())["defaults"]
        assert {"override fusion": arm} in defaults


def test_what_is_searched_need_not_fit_the_defaults(small: Setting) -> None:
    """2,000 steps of warm-up do not go into 12, and fusion=gated, the default, has no proj_init."""
    rest = [line for line in small.with_() if not line.startswith("schedule.warmup_steps")]
    known = "sweep.search.enqueue=[{schedule.warmup_steps: 5, optim.eps: 1.0e-3}]"
    lines = ["fusion=concat,residual", "fusion.proj_init=random", "schedule.warmup_steps=range(2,8)",
             "sweep.name=w", "sweep.search.n_trials=1", known, "optim.eps=1e-4"]  # fmt: skip
    answer = cli([*rest, *lines], "-m")
    assert answer.code == 2 and "optim.eps is no dimension" in answer.err
    answer = cli([*rest, *lines[:-1], "optim.eps=interval(1e-4,1e-2)"], "-m")
    assert (answer.code, answer.err) == (0, "")
    (trial,) = trials_of(small.out / "w", "-residual")
    assert trial["params"] == {"schedule.warmup_steps": 5, "optim.eps": 1e-3} and trial["state"] == "COMPLETE"
    config = yaml.safe_load((small.out / "w" / trial["folder"] / "config.yaml").read_text())
    assert (config["fusion"]["proj_init"], config["schedule"]["warmup_steps"]) == ("random", 5)
    overrides = record_of(small.out / "w", trial)["overrides"]
    assert [line for line in overrides if line.startswith(("schedule", "sweep"))] == ["schedule.warmup_steps=5"]


def test_a_known_baseline_has_no_part_in_what_is_not_searched_any_more(small: Setting) -> None:
    lines = ["sweep=lr_ratio_search", "data=text", "model.target_params=null", "optim.mamba_lr_mult=2",
             "sweep.search.n_trials=1", "pruner=none", "trainer.eval_batch_size=8"]  # fmt: skip
    rest = [line for line in small.with_() if not line.startswith("optim.lr")]
    assert cli([*rest, *lines], "-m").code == 0
    (trial,) = trials_of(small.out / "lr_ratio_search")
    assert trial["params"] == {"optim.lr": 1e-3, "optim.rwkv_lr_mult": 1.0, "fusion.gate_init": 0.5}


def test_what_the_command_sets_beside_a_search_of_it_is_refused(small: Setting) -> None:
    lines = ["optim.eps=1e-8", "optim.eps=interval(1e-6,1e-3)", "sweep.search.n_trials=1"]
    answer = cli([*small.with_(), *lines], "-m")
    assert answer.code == 2 and "optim.eps is both set and searched; leave one out" in answer.err


def test_what_an_arm_sets_is_not_searched_for_it(small: Setting) -> None:
    arms = ['+sweep.arms.free=["fusion=gain"]', '+sweep.arms.held=["fusion=gain","optim.eps=1.0e-3"]']
    known = "sweep.search.enqueue=[{schedule.warmup_steps: 5, optim.eps: 1.0e-4}]"
    lines = [*arms, "optim.eps=interval(1e-4,1e-2)", "sweep.name=h", "sweep.search.n_trials=1"]
    rest = [line for line in small.with_() if not line.startswith("schedule.warmup_steps")]
    answer = cli([*rest, *lines, known, "schedule.warmup_steps=range(2,8)"], "-m")
    assert (answer.code, answer.err) == (0, "")
    (free,), (held,) = (trials_of(small.out / "h", f"-{arm}") for arm in ("free", "held"))
    assert free["params"] == {"schedule.warmup_steps": 5, "optim.eps": 1e-4}
    assert held["params"] == {"schedule.warmup_steps": 5}
    assert yaml.safe_load((small.out / "h" / held["folder"] / "config.yaml").read_text())["optim"]["eps"] == 1e-3
    assert yaml.safe_load((small.out / "h" / "best-held.yaml").read_text())["optim"]["eps"] == 1e-3
    answer = cli([*small.with_(), *lines, "sweep.name=i"], "-m")
    assert answer.code == 2 and "arm held sets all that is searched (optim.eps); leave one out" in answer.err


def test_two_objectives(small: Setting) -> None:
    objectives = ["sweep.search.metric=[best_val_loss,flops_per_token]", "sweep.search.direction=[minimize,minimize]"]
    line = "model.ffn_hidden=range(8,64,8)"
    command = small.with_(line, "sweep.name=m", "sweep.search.n_trials=4", "sampler=nsga2", *objectives)
    assert "add pruner=none" in cli(command, "-m").err
    answer = cli([*command, "pruner=none"], "-m")
    assert (answer.code, answer.err) == (0, "")
    found = strict_json((small.out / "m" / "search.json").read_text())
    values = {trial["number"]: trial["values"] for trial in found["trials"]}
    front = [n for n, v in values.items() if not any(w != v and all(a <= b for a, b in zip(w, v, strict=True))
                                                     for w in values.values())]  # fmt: skip
    assert found["best"] == front and all(len(v) == 2 for v in values.values())


def test_the_same_point_twice_is_one_run(small: Setting) -> None:
    """A space of two points and three trials: the third finds a record and takes its curve over."""
    answer = cli(
        small.with_("fusion=choice(gain,gated)", "sweep.name=p", "sweep.search.n_trials=3", "pruner=none"), "-m"
    )
    assert answer.code == 0
    trials = trials_of(small.out / "p")
    assert len(trials) == 3 and len(list((small.out / "p").glob("*/summary.json"))) == 2
    by_point: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        by_point.setdefault(trial["params"]["fusion"], []).append(trial)
    (one, other), _ = sorted(by_point.values(), key=len, reverse=True)
    assert (one["folder"], one["values"], one["intermediate"]) == (
        other["folder"],
        other["values"],
        other["intermediate"],
    )


@pytest.mark.slow  # test_study.py has many workers at once on one study
def test_two_searches_at_once_share_the_study(small: Setting) -> None:
    command = without_lr(small, *SEARCH, "pruner=none", "sweep.search.n_trials=8")
    processes = [start(command, "-m") for _ in range(2)]
    answers = [finish(process) for process in processes]
    assert [answer.code for answer in answers] == [0, 0]
    trials = trials_of(small.out / "s")
    assert [trial["number"] for trial in trials] == list(range(8)) and {t["state"] for t in trials} == {"COMPLETE"}
    assert len({trial["folder"] for trial in trials}) == 8 and len({trial["worker"] for trial in trials}) == 2


# ---- interrupted


def same_as(undisturbed: Search, root: Path) -> None:
    """The search in ``root`` has the trials and the results of the undisturbed one."""

    def told(trial: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in trial.items() if key not in ("seconds", "worker")}

    trials = trials_of(root)
    assert [told(trial) for trial in trials] == [told(trial) for trial in undisturbed.found["trials"]]
    for trial in trials:
        assert results(record_of(root, trial)) == results(record_of(undisturbed.root, trial))
        assert rows(root / trial["folder"]) == rows(undisturbed.root / trial["folder"])
    assert len(list(root.glob("*/summary.json"))) == len(trials)


def kill_and_resume(command: list[str], root: Path, times: int, seed: int) -> Answer:
    """Kill -9 at random moments, then let it finish."""
    moments = random.Random(seed)
    for _ in range(times):
        process = start(command, "-m")
        before = len(list(root.glob("*/metrics.jsonl")))
        begun: Callable[[], bool] = lambda before=before: len(list(root.glob("*/metrics.jsonl"))) > before  # noqa: E731
        deadline = time.monotonic() + 60
        while process.poll() is None and not begun() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    return finish(start(command, "-m"))


def test_a_stopped_and_then_killed_search_goes_on_as_if_nothing_had_happened(small: Setting, search: Search) -> None:
    command, root = without_lr(small, *SEARCH, *MEDIAN, f"sweep.search.n_trials={N}"), small.out / "s"
    process = start(command, "-m")
    wait_for(lambda: len(list(root.glob("*/summary.json"))) >= 2, process)
    process.send_signal(signal.SIGINT)
    answer = finish(process)
    assert answer.code == 130 and "trials are done; to go on: python -m hybrid.train" in answer.out
    begun = len(list(root.glob("*/metrics.jsonl")))
    process = start(command, "-m")
    wait_for(lambda: len(list(root.glob("*/metrics.jsonl"))) > begun, process)
    process.kill()
    process.wait()
    assert cli(command, "-m").code == 0
    same_as(search, root)


def test_an_interrupt_that_a_library_swallows_still_stops_the_search(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = worker.tell

    def careless(*arguments: Any) -> None:
        original(*arguments)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(worker, "tell", careless)
    answer = cli(without_lr(small, *SEARCH, "sweep.search.n_trials=3"), "-m")
    assert answer.code == 130 and "1 of 3 trials are done" in answer.out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_search_killed_ten_times_goes_on_as_if_nothing_had_happened(
    shared: tuple[str, ...], small: Setting, tmp_path: Path
) -> None:
    lines = (*SEARCH, *MEDIAN, "sweep.search.n_trials=30")
    whole = tmp_path / "whole"
    command = without_lr(Setting((*shared, f"out={whole}"), whole), *lines)
    answer = finish(start(command, "-m"))
    root = whole / "s"
    undisturbed = Search(root, command, answer, json.loads((root / "search.json").read_text()), {})
    assert kill_and_resume(without_lr(small, *lines), small.out / "s", times=10, seed=2).code == 0
    same_as(undisturbed, small.out / "s")


# ---- what is refused


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sweep.search.n_trials=0", LR], "sweep.search.n_trials must be at least 1, got 0"),
        (["sweep.search.n_trials=2"], "sweep.search.space is empty"),
        (["sweep.search.n_trials=2", LR, "seed_init=0,1"], "a search trains one seed a trial"),
        (["sweep.search.n_trials=2", LR, "sweep.seeds=[0,1]"], "a search trains one seed a trial"),
        (["sweep.search.n_trials=2", "optim.lr=interval(-1,1)"], "optim.lr must be above 0, got -1"),
        (["sweep.search.n_trials=2", "optim.lrr=interval(1,2)"], "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["sweep.search.n_trials=2", LR, "sampler=tpee"], "sampler=tpee: no such choice; did you mean tpe?"),
        (["sweep.search.n_trials=2", LR, "sweep.search.sampler._target_=optuna.samplers.TPE"], "no such sampler"),
        (["sweep.search.n_trials=2", LR, "sweep.search.metric=loss"], "no metric 'loss'"),
        (["sweep.search.n_trials=2", LR, "sweep.search.workers=0"], "sweep.search.workers must be at least 1"),
        (["sweep.search.n_trials=2", LR, "sweep.search.enqueue=[5]"], "sweep.search.enqueue must be a list"),
        (["sweep.search.n_trials=1", LR, "sweep.search.enqueue=[{optim.lr: 0.01},{optim.lr: 0.02}]"], "is below the 2"),
        (["sweep.search.n_trials=1", LR, "sweep.search.sampler.sed=1"], "unexpected keyword argument 'sed'"),
        (["sweep.search.n_trials=1", LR, "hydra/launcher=jobli"], "did you mean joblib? (there are joblib, ray"),
        (
            ["sweep.search.n_trials=1", LR, "hydra/launcher=joblib", "hydra.launcher.jobs=2"],
            "'hydra.launcher.jobs' (conf",
        ),
        (["sweep.search.n_trials=2", LR, "sweep.search.storage=x.db"], "is no database URL"),
    ],
)
def test_what_cannot_be_searched_is_one_line(small: Setting, lines: list[str], message: str) -> None:
    answer = cli(without_lr(small, *lines), "-m")
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
    assert not list(small.out.glob("*/*/summary.json"))


def test_a_search_needs_a_multirun(small: Setting) -> None:
    answer = cli(small.with_("sweep=lr_ratio_search", "data=text"))
    assert answer.code == 2 and "add -m" in answer.err


def test_a_damaged_journal_ends_the_search_in_a_line(small: Setting) -> None:
    (small.out / "s").mkdir(parents=True)
    (small.out / "s" / "study.journal").write_text("not\na\njournal\n")
    answer = cli(without_lr(small, *SEARCH, "sweep.search.n_trials=2"), "-m")
    assert answer.code == 2 and "study.journal is damaged" in answer.err and answer.err.count("\n") == 1


@pytest.mark.slow
def test_a_killed_process_of_a_search_is_replaced_at_once(small: Setting) -> None:
    """Two workers under joblib; the process of one is killed. Its successor goes on from the checkpoint."""
    own = [line for line in small.with_() if not re.match(r"trainer\.(max_steps|eval_every|checkpoint_every)", line)]
    own += ["trainer.max_steps=300", "trainer.eval_every=100", "trainer.checkpoint_every=20"]
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    lines = ["sweep.name=s", "optim.lr=interval(1e-4,1e-2)", "pruner=none", "sweep.search.n_trials=3", *joblib]
    process, root = start([line for line in [*own, *lines] if not line.startswith("optim.lr=0")], "-m"), small.out / "s"
    wait_for(lambda: any(last > 60 for last in metrics_steps(root).values()), process)
    victim = next(name for name, last in metrics_steps(root).items() if last > 60)
    pid = holder(process, victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    answer = finish(process)
    assert answer.code == 0 and "s: 3 complete of 3 trials" in answer.out
    assert "resumes after step" in (root / victim / "log.txt").read_text()
    assert len({trial["folder"] for trial in trials_of(root)}) == 3 == len(list(root.glob("*/summary.json")))
    assert not list((root / "workers").iterdir()) and not (root / "launcher").exists()
