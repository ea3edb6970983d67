"""How the runs went, reported: tables of gates and rules, figures of the states' health and of the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from analysis.comparison.compare import Comparison
from analysis.figures.drawing import Drawn, draw
from analysis.figures.style import arm_styles, look
from analysis.health.gpu import gpu_use, read_gpu
from analysis.health.probes import read_probes
from analysis.health.state_figure import state_health
from analysis.health.tables import event_table, gate_table, worst_table
from analysis.records.runs import Records
from analysis.tables.files import write_named
from analysis.tables.table import Table

FIGURES = ("state_health", "gpu")
TABLES = ("gates", "gate_readings", "stopping")


@dataclass(frozen=True)
class HealthReport:
    """The section "Gates and stopping": tables by name and figures, those that there are."""

    tables: dict[str, Table]
    figures: list[Drawn]
    files: list[Path]
    notes: list[str]  # files that could not be read as a whole

    @property
    def empty(self) -> bool:
        return not self.tables and not self.figures


def report_health(folder: Path, comparison: Comparison, records: Records) -> HealthReport:
    """Write the tables and figures below ``folder``."""
    health, arms = comparison.health, comparison.arms
    tables = {
        "gates": gate_table(health.gates, arms),
        "gate_readings": worst_table(health.gates, arms),
        "stopping": event_table(health.events, arms),
    }
    tables = {name: table for name, table in tables.items() if table.rows}
    raw = {"gates": health.gates, "stopping": health.events}
    raw = {name: frame for name, frame in raw.items() if len(frame)}
    files = write_named(folder / "tables", raw, tables, TABLES)

    styles = arm_styles(records.arms, comparison.baseline.arm, arms)
    named = [arm for arm in arms if styles[arm].named]
    others = f" Of {len(arms)} arms, the best {len(named)}." if len(named) < len(arms) else ""
    probes, notes = read_probes(records.runs, named)
    figures = []
    with look():
        figure = state_health(probes, named, styles)
        if figure:
            caption = (
                "How much the recurrent states change from token to token. A state that decays slowly is close to the "
                "one before even when healthy, so the cosine as specified (gate G3.5) is shown beside the reading that "
                "is calibrated by the head's own decay."
            )
            figures.append(draw(folder / "figures", "state_health", "State health", caption + others, figure))
        figure = gpu_use(read_gpu(records.runs, named), styles)
        if figure:
            caption = "What the GPU did while the first run of every arm trained."
            figures.append(draw(folder / "figures", "gpu", "GPU", caption + others, figure))
    return HealthReport(tables, figures, files, notes)
