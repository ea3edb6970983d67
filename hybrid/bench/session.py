"""What a benchmark command works with: its options, the device, the record, and how rows are measured."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from hybrid.bench import show
from hybrid.bench.document import Document
from hybrid.bench.task import Row, Runner, Task


@dataclass
class Session:
    options: Namespace
    device: Row  # the answer of a task of kind "device"
    document: Document
    runner: Runner
    console: Console
    data: list[str]  # overrides that choose the corpus
    label: Callable[[Row], str] | None = None  # of the figure's bars

    @property
    def cuda(self) -> bool:
        return bool(self.device["cuda"])

    def measure(self, task: Task) -> Row:
        """Measure, keep and announce a row."""
        return self.add(self.runner(task))

    def skip(self, group: str, name: str, reason: str) -> Row:
        return self.add({"group": group, "name": name, "status": "skipped", "reason": reason})

    def add(self, row: Row) -> Row:
        self.document.add(row)
        said = f"{show.timed(row)} {row.get('unit', '')}" if row["status"] == "ok" else row.get("reason")
        self.say(f"{row['group']}, {row['name']}: {row['status']} {said}")
        return row

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def parameters(self, overrides: list[str]) -> int:
        """Parameters of the model that these overrides make."""
        from hybrid.bench.configure import configuration
        from hybrid.run import check_data
        from hybrid.sizes import count_params

        cfg = configuration(overrides)
        check_data(cfg)
        return count_params(cfg)["total"]

    def table(self, title: str, columns: list[show.Column], rows: list[Row] | None = None) -> None:
        show.table(self.console, title, columns, self.document.rows if rows is None else rows)
