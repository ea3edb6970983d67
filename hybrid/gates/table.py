"""The specification's table of gates, filled in."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybrid.gates.trial import Trial

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def show(console: Console, trial: Trial, title: str) -> None:
    table = Table(title=title, show_lines=True)
    for name, options in (
        ("gate", {"no_wrap": True}), ("test", {}), ("reading", {"ratio": 3}), ("verdict", {"no_wrap": True}),
        ("pass / warn / fail", {"ratio": 2}), ("remarks", {"ratio": 2}),
    ):  # fmt: skip
        table.add_column(name, **options)
    for gate in trial.watcher.gates:
        record = trial.records[gate.name]
        verdict = Text(record["verdict"], style=COLOURS.get(record["verdict"], "dim"))
        cells = (gate.name, gate.test, record["reading"], verdict, gate.thresholds(), remark(gate.name, record))
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
    console.print(table)
    for line in trial.remarks:
        console.print(line, soft_wrap=True, markup=False)


def remark(name: str, record: dict[str, Any]) -> str:
    said = []
    if record["worst_step"] is not None and record["worst"] != record["verdict"]:
        said.append(f"at worst {record['worst']}, at step {record['worst_step']}")
    if name == "G2" and "specified" in record:
        value = record["specified"]["value"]
        said.append(f"as specified: {record['specified']['verdict']}" + (f" ({value:.2f} nats)" if value else ""))
    if name == "G4" and "specified" in record and record["specified"]["worst"] != record["worst"]:
        specified = record["specified"]
        said.append(f"as specified at worst {specified['worst']}, at step {specified['worst_step']}")
    if name == "G3.5" and record.get("cosine") is not None:
        said.append(f"as specified: {record['specified']['verdict']} (cosine {record['cosine']:.4f})")
        said.append(f"novelty {record['novelty']:.2f}, effective rank {record['effective_rank']:.1f} at worst")
    return "; ".join(said)
