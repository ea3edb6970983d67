"""A search through the command line: every trial once, and what it leaves, also when it is interrupted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeps import worker
from tests.runs import Answer, Setting, cli, finish, results, rows, snapshot, start, strict_json, wait_for
from tests.sweeps.searches import SEARCH, evaluations_of, record_of, trials_of, without_lr

pytestmark = pytest.mark.usefixtures("one_thread")


MEDIAN = ["pruner=median", "sweep.search.pruner.n_startup_trials=1", "sweep.search.pruner.n_warmup_steps=0"]


N = 5  # trials of the search that most tests look at


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
        losses = evaluations_of(search.root, trial)
        assert trial["intermediate"] == dict(zip(losses, itertools.accumulate(losses.values(), min), strict=True))
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
