"""What a person sees of a run while it trains: a live bar on a terminal, plain lines elsewhere. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from hybrid.schema import DisplayConfig


def duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``3675`` as ``1:01:15``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunProgress:
    """Progress of one run: which of how many, step, loss, tokens/s, time left (of the run and of the sweep).

    ``style`` is bar, plain, off, or auto: a bar on a terminal, else a line per evaluation. Lines also go to ``note``,
    which keeps them in the run's log.
    """

    def __init__(self, name: str, max_steps: int, display: DisplayConfig, note: Callable[[str], None]) -> None:
        self.name, self.max_steps, self.display, self.note = name, max_steps, display, note
        self.console = Console(stderr=False, highlight=False)
        style = display.progress
        self.style = ("bar" if self.console.is_terminal else "plain") if style == "auto" else style
        self.prefix = f"run {display.run_index}/{display.run_total} " if display.run_total > 1 else ""
        self.bar: Progress | None = None
        self.first_step: int | None = None  # where the clock of this process began
        self.started = time.monotonic()

    def __enter__(self) -> RunProgress:
        if self.style == "bar":
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
                refresh_per_second=4,
                expand=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(f"{self.prefix}{self.name}", total=self.max_steps, facts="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def message(self, text: str, alarm: bool = False) -> None:
        """A line for the log, and for the person unless progress is off; an ``alarm`` is red on a terminal."""
        self.note(text)
        if self.style != "off":
            style = "bold red" if alarm else None
            self.console.print(f"{self.prefix}{self.name}: {text}", soft_wrap=True, markup=False, style=style)

    def begin(self, step: int) -> None:
        """Start the clock; ``step`` steps are done already."""
        self.first_step, self.started = step, time.monotonic()

    def step(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        """Move the bar to ``step``; loss in nats per token."""
        if self.first_step is None:
            self.begin(step)
        if self.bar is not None:
            facts = (f"loss {loss:.3f}  " if loss is not None else "") + f"{tokens_per_second:,.0f} tok/s  "
            self.bar.update(self.task, completed=step, facts=facts + self.left(step))

    def evaluated(self, step: int, row: dict[str, float | None], ratio: float | None, tokens_per_second: float) -> None:
        """The line of the specification: train loss, validation loss, RWKV/Mamba gradient ratio."""
        train = "" if row.get("train_loss") is None else f"train {row['train_loss']:.4f}  "
        text = f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}  {train}val {row['val_loss']:.4f}"
        if ratio is not None:
            text += f"  RWKV/Mamba {ratio:.2f}"
        if tokens_per_second:
            text += f"  {tokens_per_second:,.0f} tok/s  {self.left(step)}"
        self.note(text)
        if self.style == "plain":
            print(f"{self.prefix}{self.name}: {text}", flush=True, file=sys.stdout)

    def left(self, step: int) -> str:
        """Time left of this run, and of the sweep if it has other runs (taken as equally long)."""
        if self.first_step is None or step <= self.first_step:
            return ""
        per_step = (time.monotonic() - self.started) / (step - self.first_step)
        run_left = per_step * (self.max_steps - step)
        text = f"{duration(run_left)} left"
        display = self.display
        if display.run_total > 1 and display.sweep_started is not None:
            done = display.run_index - 1 + step / self.max_steps
            elapsed = time.time() - display.sweep_started
            text += f", sweep {duration(elapsed / done * (display.run_total - done))}"
        return text
