"""Stopped or killed at any moment, a run goes on to the same bits."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from hybrid.records import RunFolder
from hybrid.run import execute
from hybrid.training import checkpoint
from hybrid.training.loop import Stop, Trainer
from tests.hybrid.trainers import model_of
from tests.runs import Killed, Setting, results, rows, same_weights, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_leftover_signal_handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- stopping and resuming


def asked_at(step: int, number: int) -> Callable[[Trainer, int], tuple[Tensor, Tensor]]:
    """``Trainer._update`` during whose call for ``step`` the signal arrives."""
    original = Trainer._update

    def update(self: Trainer, current: int) -> tuple[Tensor, Tensor]:
        if current == step:
            os.kill(os.getpid(), number)
        return original(self, current)

    return update


@pytest.fixture(scope="module")
def reference(
    shared: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> tuple[RunFolder, dict[str, Any]]:
    """The small run with dropout, undisturbed."""
    out = tmp_path_factory.mktemp("reference")
    return Setting((*shared, f"out={out}"), out).run("model.dropout=0.1")


def assert_same_run(folder: RunFolder, summary: dict[str, Any], reference: tuple[RunFolder, dict[str, Any]]) -> None:
    assert results(summary) == results(reference[1])
    assert rows(folder) == rows(reference[0])
    for name in ("final", "best"):
        assert same_weights(weights(folder, name), weights(reference[0], name))
    assert {path.name for path in folder.checkpoints.iterdir()} >= {"best.safetensors", "final.safetensors"}
    assert not list(folder.checkpoints.glob("step-*"))


@pytest.mark.parametrize(
    ("step", "number"),
    [(1, signal.SIGINT), (3, signal.SIGINT), (5, signal.SIGTERM), (6, signal.SIGINT), (11, signal.SIGINT)],
)
def test_asked_to_stop_it_saves_and_goes_on_as_if_nothing_had_been(
    small: Setting,
    reference: tuple[RunFolder, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    number: signal.Signals,
) -> None:
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", asked_at(step, number))
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step}; the same command goes on from there"):
            small.run("model.dropout=0.1")
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers
    folder = small.plan("model.dropout=0.1").folder
    assert folder.summary() is None
    assert [path.name for path in folder.checkpoints.glob("step-*")] == [f"step-{step:08d}"]
    folder, summary = small.run("model.dropout=0.1")
    assert_same_run(folder, summary, reference)
    assert f"resumes after step {step}" in folder.log.read_text()


def test_a_second_ctrl_c_acts_at_once() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(stop.asked)
        os.kill(os.getpid(), signal.SIGTERM)  # not a second Ctrl-C
        reached.append(stop.asked)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it goes on")
    assert reached == [True, True]


def test_asked_during_the_last_step_it_finishes_and_then_stops(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_update", asked_at(12, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="this run is done"):
        small.run("model.dropout=0.1")
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("it trains again"))
    assert_same_run(*small.run("model.dropout=0.1"), reference)


def test_resuming_exactly_at_the_end(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the last step is there, the record is not."""
    original = checkpoint.save_weights

    def die(model: nn.Module, path: Path) -> None:
        if path.name == "final.safetensors":
            raise Killed
        original(model, path)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", asked_at(12, signal.SIGINT))
        patch.setattr(checkpoint, "save_weights", die)
        with pytest.raises(Killed):
            small.run("model.dropout=0.1")
    monkeypatch.setattr(Trainer, "_update", lambda *_: pytest.fail("there is nothing left to train"))
    folder, summary = small.run("model.dropout=0.1")
    assert_same_run(folder, summary, reference)


def killed_at(small: Setting, step: int, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of the small run with dropout, dead during ``step``."""
    original = Trainer._update

    def update(self: Trainer, current: int) -> tuple[Tensor, Tensor]:
        if current == step:
            raise Killed
        return original(self, current)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        with pytest.raises(Killed):
            small.run("model.dropout=0.1")
    return small.plan("model.dropout=0.1").folder


@pytest.mark.parametrize("torn", ['{"kind": "tr', '{"kind": "eval", "step": 9, "val_loss": 3.', "\n\n", "\0" * 40])
def test_resuming_over_a_torn_line(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, torn: str
) -> None:
    folder = killed_at(small, 8, monkeypatch)
    with folder.metrics.open("a") as handle:
        handle.write(torn)
    assert_same_run(*small.run("model.dropout=0.1"), reference)


def test_a_full_disk_costs_nothing_but_time(small: Setting, reference: tuple[RunFolder, dict[str, Any]]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (500, 2_000, 60_000):  # too small for the log, for the metrics, for the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with contextlib.suppress(OSError):
                assert small.run("model.dropout=0.1")[1]["status"] == "failed"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not small.plan("model.dropout=0.1").ended
    assert_same_run(*small.run("model.dropout=0.1"), reference)


def test_resuming_after_death_within_torch_save(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def half(content: dict[str, Any], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"PK\x03\x04 half a file")
            raise Killed
        original(content, path)

    original = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            small.run("model.dropout=0.1")
    folder = small.plan("model.dropout=0.1").folder
    assert {path.name for path in folder.checkpoints.iterdir()} >= {"step-00000003", "partial-00000006"}
    assert_same_run(*small.run("model.dropout=0.1"), reference)
    assert not list(folder.checkpoints.glob("partial-*"))


class FileChanges:
    """Lists what changes a file below ``root``, and from change number ``last`` on lets nothing more happen.

    As after kill -9, whatever Python does on its way out reaches no file.
    """

    CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")

    def __init__(self) -> None:
        self.root: str | None = None
        sys.addaudithook(self._hook)  # for the life of the process; idle without a root

    @contextlib.contextmanager
    def watch(self, root: Path, last: int | None = None) -> Iterator[list[str]]:
        self.root, self.last = str(root), last
        self.seen: list[str] = []
        try:
            yield self.seen
        finally:
            self.root = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None or event not in self.CHANGES:
            return
        path = arguments[0]
        inside = isinstance(path, str | os.PathLike) and (str(path).startswith(self.root) or not os.path.isabs(path))
        if not inside or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.seen.append(f"{event} {Path(path).name}")
        if self.last is not None and len(self.seen) > self.last:
            raise Killed


class Deaths:
    """A short run, and what becomes of it after death before any of its changes to files."""

    def __init__(self, small: Setting, changes: FileChanges) -> None:
        short = ("trainer.max_steps=3", "trainer.eval_every=2", "trainer.checkpoint_every=1", "trainer.log_every=2")
        self.run, self.changes = small.plan("model.dropout=0.1", "display.progress=off", *short), changes
        self.run.folder.path.parent.mkdir(parents=True)  # not again with every death
        with changes.watch(self.run.folder.path) as self.list:
            summary = execute(self.run, [])
        self.expected = results(summary), rows(self.run.folder), weights(self.run.folder)

    def problem(self, last: int) -> str | None:
        """What is wrong with the run that died before change ``last`` and was started again; None if nothing is."""
        shutil.rmtree(self.run.folder.path)
        with contextlib.suppress(Killed), self.changes.watch(self.run.folder.path, last):
            execute(self.run, [])
            return f"{self.list[last]}: not reached"
        summary = execute(self.run, [])
        if summary["status"] != "completed":
            return f"{self.list[last]}: {summary['status']}, {summary['stop_reason']}"
        found = results(summary), rows(self.run.folder)
        if found != self.expected[:2] or not same_weights(weights(self.run.folder), self.expected[2]):
            return f"{self.list[last]}: other results"
        return None


@pytest.fixture(scope="module")
def file_changes() -> FileChanges:
    return FileChanges()


def test_killed_at_any_kind_of_change_to_a_file_it_resumes_to_the_same_bits(
    small: Setting, file_changes: FileChanges
) -> None:
    deaths = Deaths(small, file_changes)
    assert len(deaths.list) > 40
    last_of_kind = {re.sub(r"[\d]|\.[0-9a-f-]+\.partial", "", kind): i for i, kind in enumerate(deaths.list)}
    assert len(last_of_kind) > 15
    assert [found for i in sorted(last_of_kind.values()) if (found := deaths.problem(i))] == []


@pytest.mark.slow
def test_killed_at_every_change_to_a_file_it_resumes_to_the_same_bits(
    small: Setting, file_changes: FileChanges
) -> None:
    deaths = Deaths(small, file_changes)
    assert [found for i in range(len(deaths.list)) if (found := deaths.problem(i))] == []


def test_killed_while_it_tidies_up_it_is_tidied_up_later(small: Setting, file_changes: FileChanges) -> None:
    deaths = Deaths(small, file_changes)
    last = max(i for i, change in enumerate(deaths.list) if change.startswith("os.remove "))
    assert deaths.problem(last) is None
    names = {path.name for path in deaths.run.folder.checkpoints.iterdir()}
    assert names == {"best.safetensors", "final.safetensors"}


def test_a_run_that_had_no_time_for_a_checkpoint_starts_over(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed_at(small, 2, monkeypatch)
    assert not list(folder.checkpoints.glob("step-*"))
    assert_same_run(*small.run("model.dropout=0.1"), reference)
    assert "resumes" not in folder.log.read_text()


def test_the_newest_of_two_checkpoints_is_taken(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Death came after the new one had its name and before the old one was gone, or half of it."""
    folder = killed_at(small, 8, monkeypatch)
    (newest,) = folder.checkpoints.glob("step-*")
    old = folder.checkpoints / "step-00000003"
    old.mkdir()
    (old / "training.pt").write_bytes(b"half gone")
    assert newest.name == "step-00000006"
    assert_same_run(*small.run("model.dropout=0.1"), reference)
    log = folder.log.read_text()
    assert "resumes after step 6" in log and "cannot be read" not in log


def test_a_checkpoint_of_another_model_is_refused(small: Setting, tmp_path: Path) -> None:
    checkpoint.save_weights(model_of(small), tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.partial").exists()
    with pytest.raises(RuntimeError):
        checkpoint.load_weights(model_of(small, "fusion=gain"), tmp_path / "weights.safetensors")


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def scribble(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("file", ["training.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", [truncate, scribble, Path.unlink])
def test_a_damaged_checkpoint_is_put_aside(
    small: Setting,
    reference: tuple[RunFolder, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    damage: Callable[[Path], None],
) -> None:
    """As after a power cut. The run starts over, and gives what it would have given."""
    folder = killed_at(small, 8, monkeypatch)
    damage(folder.checkpoints / "step-00000006" / file)
    assert_same_run(*small.run("model.dropout=0.1"), reference)
    assert "step-00000006 cannot be read" in folder.log.read_text()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_a_checkpoint_that_cannot_be_read_just_now_is_kept(
    small: Setting, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = killed_at(small, 8, monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with contextlib.suppress(OSError):
            small.run("model.dropout=0.1")
    assert (folder.checkpoints / "step-00000006").exists()


def test_death_at_the_very_end_does_not_cost_the_whole_run(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_summary", die)
        with pytest.raises(Killed):
            small.run()
    steps = []
    original = Trainer._update
    monkeypatch.setattr(Trainer, "_update", lambda self, step: steps.append(step) or original(self, step))
    small.run()
    assert len(steps) <= 3  # checkpoint_every
