"""All runs of a sweep that are going on, in one view. It reads what the runs write, so it fits every launcher."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hybrid.progress import duration

REFRESH_SECONDS = 0.5
TAIL_BYTES = 65_536  # of a metrics file that is seen for the first time
BAD = ("failed", "diverged")


@dataclass
class Watched:
    """What is known of one run's folder."""

    path: Path
    at_start: tuple[int, int] | None  # the configuration file before this call, None where there was none
    name: str = ""
    max_steps: int = 0
    running: bool = False
    status: str | None = None
    outcome: str = ""  # status, reason and best loss in words
    step: int = 0
    loss: float | None = None
    val_loss: float | None = None
    speed: float | None = None
    first: tuple[int, float] | None = None  # step and seconds when this call first saw it
    last: tuple[int, float] | None = None
    file: int = 0  # inode of the metrics file ...
    offset: int = 0  # ... and how far it has been read
    share_before: float = 0.0  # how much was done before this call
    told: int = -1  # the last evaluation that was shown
    evaluations: list[str] = field(default_factory=list)  # in words, not yet shown

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        return 1.0 if self.status else self.step / self.max_steps if self.max_steps else 0.0

    def left(self) -> float | None:
        """Seconds, from the run's own clock; None while nothing is known."""
        if self.first is None or self.last is None or self.last[0] <= self.first[0]:
            return None
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0]) * (self.max_steps - self.step)

    def read(self) -> None:
        """Take in what the run has written since the last time: a few lines at the end of ``metrics.jsonl``."""
        try:
            with (self.path / "metrics.jsonl").open("rb") as handle:
                facts = os.fstat(handle.fileno())
                fresh = facts.st_ino != self.file or facts.st_size < self.offset
                if fresh:  # new, or rewritten by a run that resumes
                    self.file, self.offset = facts.st_ino, max(0, facts.st_size - TAIL_BYTES)
                handle.seek(self.offset)
                data = handle.read()
        except OSError:
            return
        whole = data.rfind(b"\n") + 1
        self.offset += whole
        for line in data[:whole].splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._take(json.loads(line))

    def _take(self, row: dict[str, Any]) -> None:
        self.step = int(row["step"])
        self.first = self.first or (self.step, row["wall_seconds"])
        self.last = (self.step, row["wall_seconds"])
        if row["kind"] == "eval":
            self.val_loss = row["val_loss"]
            if self.step > self.told:
                self.evaluations.append(evaluation_line(self, row))
                self.told = self.step
        elif row["kind"] == "train":
            self.loss, self.speed = row["loss"], row["tokens_per_second"]

    def begin(self) -> None:
        """A run has begun, or goes on, in this folder."""
        self.running, self.name = True, self.path.name
        with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            cfg = yaml.safe_load((self.path / "config.yaml").read_text())
            self.max_steps = int(cfg["trainer"]["max_steps"])
            self.name = f"{self.path.name.rpartition('-')[0]} seed {cfg['seed_init']}"
        if self.at_start is not None:  # what it evaluated in an earlier call was shown then
            self.read()
            self.evaluations.clear()
            self.first, self.share_before = self.last, self.share

    def ended(self) -> bool:
        """Whether the run's record is there: it was removed as the run began."""
        try:
            summary = json.loads((self.path / "summary.json").read_text())
            self.status, reason, best = str(summary["status"]), summary["stop_reason"], summary["best_val_loss"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self.running = False
        self.outcome = self.status + (f": {reason}" if reason else "")
        if best is not None:
            self.outcome += f", best val {best:.4f} at step {summary.get('best_step')}"
        return True


class LiveView:
    """A context in which a thread shows the runs below ``root`` as they go: a table on a terminal, else lines.

    ``total`` is how many runs this call means to do. ``style`` is ``display.progress``: auto, bar, plain or off. Locks
    are left alone, since to try one is to hold it for an instant: a run has begun when its ``config.yaml`` is written
    anew, which is the first thing it does, and has ended when its record is there.
    """

    def __init__(self, root: Path, total: int, style: str, console: Console) -> None:
        self.root, self.total, self.console = root, total, console
        self.style = ("bar" if console.is_terminal else "plain") if style == "auto" else style
        self.started = time.monotonic()
        self.runs = {path.name: Watched(path, stamp(path / "config.yaml")) for path in self._folders()}
        self.over = threading.Event()
        self.live: Live | None = None
        self.thread: threading.Thread | None = None

    def __enter__(self) -> LiveView:
        if self.style == "bar":
            self.live = Live(self.table(), console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        if self.style != "off":
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.thread is not None:
            self.thread.join()
            self.refresh()
        if self.live is not None:
            self.live.stop()

    def _watch(self) -> None:
        while not self.over.wait(REFRESH_SECONDS):
            self.refresh()

    def _folders(self) -> list[Path]:
        try:
            with os.scandir(self.root) as entries:
                return sorted(Path(entry) for entry in entries if entry.is_dir())
        except OSError:  # not there yet
            return []

    def refresh(self) -> None:
        """Read what is new and show it."""
        for path in self._folders():
            run = self.runs.setdefault(path.name, Watched(path, None))
            now = None if run.running or run.status else stamp(path / "config.yaml")
            if now is not None and now != run.at_start:
                run.begin()
                self._tell(run, f"goes on after step {run.step}" if run.step else "begins")
            if not run.running:
                continue
            run.read()
            ended = run.ended()
            if ended:
                run.read()  # its last rows were written before its record
            for line in run.evaluations:
                self._tell(run, line)
            run.evaluations.clear()
            if ended:
                left = "" if (seconds := self.left()) is None else f", sweep {duration(seconds)} left"
                counts = self.counts()
                self._tell(run, f"{run.outcome} ({counts['done'] + counts['failed']} of {self.total} ended{left})")
        if self.live is not None:
            self.live.update(self.table(), refresh=True)

    def _tell(self, run: Watched, text: str) -> None:
        if self.style == "plain":
            self.console.print(f"{run.name}: {text}", soft_wrap=True, markup=False)

    def counts(self) -> dict[str, int]:
        """How many runs of this call are done, failed, running and waiting."""
        failed = sum(run.status in BAD for run in self.runs.values())
        done = sum(run.status is not None for run in self.runs.values()) - failed
        running = sum(run.running for run in self.runs.values())
        return {"done": done, "failed": failed, "running": running,
                "waiting": max(0, self.total - done - failed - running)}  # fmt: skip

    def left(self) -> float | None:
        """Seconds until the sweep is through, taking all runs as equally long; None before anything is done."""
        begun = [run for run in self.runs.values() if run.running or run.status]
        already = sum(run.share_before for run in begun)
        done = sum(run.share for run in begun) - already
        total = max(self.total, len(begun)) - already
        return (time.monotonic() - self.started) * (total - done) / done if done > 0 else None

    def table(self) -> Group:
        """The header and a row for every run that goes on, as many as the terminal has room for."""
        counts = self.counts()
        seconds = self.left()
        header = ", ".join(f"{number} {word}" for word, number in counts.items()) + f" of {self.total}"
        header += "" if seconds is None else f", {duration(seconds)} left"
        table = Table(box=None, expand=True, padding=(0, 1))
        for column in ("run", "step", "", "loss", "val loss", "tok/s", "left"):
            table.add_column(column, justify="left" if column in ("run", "") else "right", no_wrap=True)
        running = [run for run in self.runs.values() if run.running]
        room = max(1, self.console.height - 4)
        for run in running[:room]:
            left = run.left()
            bar = ProgressBar(total=max(1, run.max_steps), completed=run.step, width=20)
            cells = (f"{run.step}/{run.max_steps}", bar, number(run.loss, ".4f"), number(run.val_loss, ".4f"),
                     number(run.speed, ",.0f"), "" if left is None else duration(left))  # fmt: skip
            table.add_row(Text(run.name, overflow="ellipsis"), *cells)
        more = [Text(f"and {len(running) - room} more")] if len(running) > room else []
        return Group(Text(f"{self.root.name}: {header}"), table, *more)


def evaluation_line(run: Watched, row: dict[str, Any]) -> str:
    """One evaluation, as a run on its own prints it."""
    text = f"step {row['step']:>{len(str(run.max_steps))}}/{run.max_steps}  "
    text += "" if row.get("train_loss") is None else f"train {row['train_loss']:.4f}  "
    text += f"val {number(row['val_loss'], '.4f')}"
    left = run.left()
    if run.speed is not None:
        text += f"  {run.speed:,.0f} tok/s"
    return text if left is None else f"{text}  {duration(left)} left"


def number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced, by no clock but its own; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns
