"""The view of all runs that go on: what it reads from their folders, and what it shows of them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sweeps import live
from sweeps.live import LiveView
from tests.runs import Setting


class Folder:
    """A run's folder, written as a run writes it."""

    def __init__(self, root: Path, name: str, seed: int = 0, max_steps: int = 100) -> None:
        self.path = root / f"{name}-0123abcd"
        self.config = f"trainer: {{max_steps: {max_steps}}}\nseed_init: {seed}\n"

    def begin(self) -> Folder:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "summary.json").unlink(missing_ok=True)
        partial = self.path / "config.partial"
        partial.write_text(self.config)
        os.replace(partial, self.path / "config.yaml")
        return self

    def append(self, text: str) -> None:
        with (self.path / "metrics.jsonl").open("a") as handle:
            handle.write(text)

    def row(self, step: int, seconds: float, **values: Any) -> None:
        kind = "eval" if "val_loss" in values else "train"
        self.append(json.dumps({"kind": kind, "step": step, "wall_seconds": seconds, **values}) + "\n")

    def train(self, step: int, seconds: float, loss: float = 2.0, speed: float = 1000.0) -> None:
        self.row(step, seconds, loss=loss, tokens_per_second=speed)

    def end(self, status: str = "completed", reason: str | None = None, best: float | None = 1.5) -> None:
        summary = {"status": status, "stop_reason": reason, "best_val_loss": best, "best_step": 90}
        (self.path / "summary.json").write_text(json.dumps(summary))


class Shown:
    """A view whose console is a string; ``refresh`` is called by hand."""

    def __init__(self, root: Path, total: int = 4, style: str = "plain", height: int = 20) -> None:
        self.out = io.StringIO()
        self.console = Console(file=self.out, width=110, height=height, highlight=False, force_terminal=style == "bar")
        self.view = LiveView(root, total, style, self.console)

    def lines(self) -> list[str]:
        """What it has printed since the last time."""
        self.view.refresh()
        text = self.out.getvalue()
        self.out.seek(0)
        self.out.truncate()
        return text.splitlines()

    def table(self) -> str:
        self.view.refresh()
        out = io.StringIO()
        Console(file=out, width=110, highlight=False).print(self.view.table())
        return out.getvalue()


def test_a_line_as_a_run_begins_evaluates_and_ends(tmp_path: Path) -> None:
    shown = Shown(tmp_path / "sweep")
    assert shown.lines() == []  # the folder is not there yet
    run = Folder(tmp_path / "sweep", "gated", seed=3).begin()
    assert shown.lines() == ["gated seed 3: begins"]
    run.row(0, 1.0, val_loss=4.0, train_loss=None)
    assert shown.lines() == ["gated seed 3: step   0/100  val 4.0000"]
    run.train(10, 11.0, speed=1234.5)
    assert shown.lines() == []  # steps alone print nothing
    run.train(20, 21.0)
    run.row(20, 21.0, val_loss=3.25, train_loss=3.5)
    # 20 steps in 20 seconds, 80 to go
    assert shown.lines() == ["gated seed 3: step  20/100  train 3.5000  val 3.2500  1,000 tok/s  1:20 left"]
    run.end()
    (line,) = shown.lines()
    assert line.startswith("gated seed 3: completed, best val 1.5000 at step 90 (1 of 4 ended")
    assert shown.lines() == []


def test_a_whole_run_between_two_looks_is_told_in_order(tmp_path: Path) -> None:
    shown = Shown(tmp_path)
    run = Folder(tmp_path, "gain").begin()
    run.row(0, 1.0, val_loss=4.0, train_loss=None)
    run.train(50, 2.0)
    run.row(50, 2.0, val_loss=None, train_loss=3.0)  # not a finite number
    run.end("diverged", "validation loss not finite at step 50", best=None)
    lines = [line.removeprefix("gain seed 0: ") for line in shown.lines()]
    assert lines[0] == "begins" and lines[1] == "step   0/100  val 4.0000"
    assert lines[2].startswith("step  50/100  train 3.0000  val   1,000 tok/s")
    assert lines[3].startswith("diverged: validation loss not finite at step 50 (1 of 4 ended")
    assert shown.view.counts() == {"done": 0, "failed": 1, "running": 0, "waiting": 3}


def test_what_ended_before_or_belongs_to_others_is_not_shown(tmp_path: Path) -> None:
    Folder(tmp_path, "done").begin().end()
    elsewhere = Folder(tmp_path, "elsewhere").begin()
    (tmp_path / "launcher").mkdir()
    shown = Shown(tmp_path)
    elsewhere.row(0, 1.0, val_loss=4.0, train_loss=None)
    assert shown.lines() == [] and shown.view.counts()["waiting"] == 4


def test_a_resumed_run_shows_what_is_new(tmp_path: Path) -> None:
    run = Folder(tmp_path, "gain").begin()
    run.row(0, 1.0, val_loss=4.0, train_loss=None)
    run.train(50, 101.0)
    shown = Shown(tmp_path)
    run.begin()
    assert shown.lines() == ["gain seed 0: goes on after step 50"]
    run.train(60, 106.0)
    run.row(60, 106.0, val_loss=3.0, train_loss=3.1)
    # 10 steps in 5 seconds since it goes on, 40 to go; not the 2 seconds a step of before
    assert shown.lines() == ["gain seed 0: step  60/100  train 3.1000  val 3.0000  1,000 tok/s  0:20 left"]


def test_a_failed_run_that_is_tried_again_is_shown_again(tmp_path: Path) -> None:
    run = Folder(tmp_path, "gain").begin()
    run.end("failed", "no luck")
    shown = Shown(tmp_path)
    assert shown.lines() == []
    run.begin()
    assert shown.lines() == ["gain seed 0: begins"]
    run.end()
    assert shown.view.counts()["failed"] == 0 and "completed" in shown.lines()[0]


def test_a_torn_line_waits_for_its_rest(tmp_path: Path) -> None:
    shown = Shown(tmp_path)
    run = Folder(tmp_path, "gain").begin()
    run.append('{"kind": "eval", "step": 10, "wall_secon')
    assert shown.lines() == ["gain seed 0: begins"]
    run.append('ds": 3.0, "val_loss": 2.5, "train_loss": null}\n')
    assert shown.lines() == ["gain seed 0: step  10/100  val 2.5000"]


def test_a_rewritten_file_repeats_no_line(tmp_path: Path) -> None:
    """A run whose process died goes on from a checkpoint: its metrics are cut and replaced."""
    shown = Shown(tmp_path)
    run = Folder(tmp_path, "gain").begin()
    for step in (0, 20, 40):
        run.row(step, 1.0 + step, val_loss=4.0 - step / 100, train_loss=None)
    assert len(shown.lines()) == 4
    kept = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (run.path / "new").write_text("".join(kept))
    os.replace(run.path / "new", run.path / "metrics.jsonl")
    assert shown.lines() == []
    run.row(40, 50.0, val_loss=3.6, train_loss=None)  # the same evaluation again
    run.row(60, 70.0, val_loss=3.4, train_loss=None)
    assert [line[: len("gain seed 0: step  60")] for line in shown.lines()] == ["gain seed 0: step  60"]


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Folder(tmp_path, "gain", max_steps=100_000).begin()
    for step in range(0, 50_000, 10):
        run.train(step, float(step))
    shown = Shown(tmp_path)
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(live.json, "loads", lambda text: parsed.append(text) or loads(text))
    run.begin()
    assert shown.lines() == ["gain seed 0: goes on after step 49990"]
    size = (run.path / "metrics.jsonl").stat().st_size
    assert sum(map(len, parsed)) <= live.TAIL_BYTES < size / 4
    parsed.clear()
    run.train(50_000, 50_000.0)
    shown.lines()
    assert len([text for text in parsed if b"wall" in text]) == 1


def test_the_table_shows_what_goes_on(tmp_path: Path) -> None:
    shown = Shown(tmp_path, total=14, style="bar")
    runs = [Folder(tmp_path, name, seed=1).begin() for name in ("gain", "gated", "residual", "concat")]
    shown.view.refresh()
    runs[0].end()
    runs[1].end("failed", "no luck")
    runs[2].row(0, 1.0, val_loss=4.0, train_loss=None)
    runs[2].train(25, 26.0, loss=2.71828, speed=2345.6)
    header, columns, *rows = shown.table().splitlines()
    assert header.startswith(f"{tmp_path.name}: 1 done, 1 failed, 2 running, 10 waiting of 14, ")
    assert header.endswith(" left")
    assert columns.split() == ["run", "step", "loss", "val", "loss", "tok/s", "left"]
    assert len(rows) == 2 and {row.split()[0] for row in rows} == {"residual", "concat"}
    row = next(row for row in rows if "residual" in row)
    assert row.split()[:4] == ["residual", "seed", "1", "25/100"]
    assert row.split()[-4:] == ["2.7183", "4.0000", "2,346", "1:15"]  # a second a step, 75 to go


def test_the_table_fits_the_terminal(tmp_path: Path) -> None:
    shown = Shown(tmp_path, total=50, style="bar", height=10)
    for i in range(30):
        Folder(tmp_path, f"arm{i:02d}").begin()
    text = shown.table()
    assert len(text.splitlines()) <= 10 and text.rstrip().endswith("and 24 more")


def test_time_left_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four runs, one has ended and one is half done after 90 s: 60 s a run, 2.5 runs to go, as many at once."""
    now = 1000.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    shown = Shown(tmp_path)
    assert shown.view.left() is None
    one, two = Folder(tmp_path, "one").begin(), Folder(tmp_path, "two").begin()
    one.end()
    two.train(50, 80.0)
    shown.lines()
    now += 90
    assert shown.view.left() == pytest.approx(150)


def test_what_was_done_before_does_not_count_as_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run, at 80 of 100 steps when it goes on, at 90 a hundred seconds later: a hundred more to go."""
    now = 1000.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    run = Folder(tmp_path, "one").begin()
    run.train(80, 800.0)
    shown = Shown(tmp_path, total=1)
    run.begin()
    shown.lines()
    run.train(90, 900.0)
    now += 100
    shown.lines()
    assert shown.view.left() == pytest.approx(100)


@pytest.mark.parametrize("style", ["off", "plain", "bar", "auto"])
def test_styles(tmp_path: Path, style: str) -> None:
    out = io.StringIO()
    with LiveView(tmp_path, 1, style, Console(file=out, width=100)) as view:
        Folder(tmp_path, "gain").begin().end()
    assert view.style == {"auto": "plain"}.get(style, style)
    assert ("gain seed 0: completed" in out.getvalue()) == (style in ("plain", "auto"))
    assert view.thread is None or not view.thread.is_alive()


def test_auto_is_a_table_on_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with LiveView(tmp_path, 1, "auto", console) as view:
        Folder(tmp_path, "gain").begin()
    assert view.style == "bar" and "1 running" in out.getvalue()


def test_it_reads_what_a_run_writes_and_holds_no_lock(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    run = small.plan("sweep.name=two", "variant=gain")
    shown = Shown(run.folder.path.parent, total=1)
    small.run("sweep.name=two", "variant=gain")
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("took a lock"))
    lines = shown.lines()
    assert len(lines) == 5 and lines[0] == "gain seed 0: begins"
    summary = run.folder.summary()
    assert f"val {summary['final_val_loss']:.4f}" in lines[3] and "step 12/12" in lines[3]
    assert f"completed, best val {summary['best_val_loss']:.4f} at step {summary['best_step']}" in lines[4]
