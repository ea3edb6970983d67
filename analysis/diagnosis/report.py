"""The section "What the branches do" of a report: sentences, tables and figures from the diagnoses of its runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from analysis.comparison.compare import Comparison
from analysis.diagnosis.gate_figures import gate_classes, gate_drift, gate_positions
from analysis.diagnosis.memory_figures import half_lives, influence_curves, loss_by_position
from analysis.diagnosis.necessity_map import necessity_map
from analysis.diagnosis.panels import drawn_arms
from analysis.diagnosis.records import read_diagnoses
from analysis.diagnosis.tables import RAW, branch_tables
from analysis.diagnosis.words import BranchSentence, remarks, sentences
from analysis.figures.drawing import Drawn, draw
from analysis.figures.style import arm_styles, look
from analysis.records.runs import Records
from analysis.tables.files import write_named
from analysis.tables.table import Table

_FIGURES = (
    ("branch_layers", necessity_map, "Loss increase by layer",
     "What it costs to disturb a branch in one layer or in all: zeroed, replaced by its mean, or shuffled over the "
     "batch."),
    ("influence", influence_curves, "Influence of a token",
     "How much the change of one token still changes the prediction so many tokens later: through everything, and "
     "through one branch while the others are held at what they were."),
    ("half_lives", half_lives, "Half-lives of the recurrences",
     "How many tokens it takes a recurrence to forget half, from its measured decays."),
    ("loss_by_position", loss_by_position, "Loss by position", "What more context is worth."),
    ("gate_drift", gate_drift, "Gates after training", "Where every layer's gate went from its measured start."),
    ("gate_positions", gate_positions, "Gates along the context", "Mean gate of every layer at each position."),
    ("gate_classes", gate_classes, "Gates by class of token", "Mean gate of every layer by the token it is at."),
)  # fmt: skip
FIGURES = tuple(name for name, *_ in _FIGURES)
# What belongs together on the page: a heading, its tables, its figures.
_TOPICS = (
    ("Necessity", ("branches",), ("branch_layers",)),
    ("Memory", ("reach",), ("influence", "half_lives", "loss_by_position")),
    ("Gates", ("branch_gates",), ("gate_drift", "gate_positions", "gate_classes")),
    ("Outputs and updates", ("branch_outputs", "updates"), ()),
)
_ONE_PANEL = ("loss_by_position",)


@dataclass(frozen=True)
class BranchReport:
    """What the section says."""

    sentences: list[BranchSentence]
    remarks: list[str]
    tables: dict[str, Table]
    figures: list[Drawn]
    files: list[Path]

    @property
    def topics(self) -> list[tuple[str, dict[str, Table], list[Drawn]]]:
        """Heading, tables by name and figures of each topic that there is something of."""
        found = [
            (
                heading,
                {name: self.tables[name] for name in tables if name in self.tables},
                [drawn for drawn in self.figures if drawn.name in figures],
            )
            for heading, tables, figures in _TOPICS
        ]
        return [topic for topic in found if topic[1] or topic[2]]


def report_branches(folder: Path, comparison: Comparison, records: Records) -> tuple[BranchReport | None, list[str]]:
    """Write tables and figures below ``folder``; None where no run has a usable diagnosis. The second: what was
    skipped, a line each."""
    found, notes = read_diagnoses(records.runs)
    if found is None:
        write_named(folder / "tables", {}, {}, RAW)
        return None, notes
    arms = [arm for arm in comparison.arms if arm in found.arms]
    tables = branch_tables(found, arms)
    raw = {name: found[part] for name, part in RAW.items() if len(found[part])}
    files = write_named(folder / "tables", raw, tables, RAW)
    styles = arm_styles(records.arms, comparison.baseline.arm, comparison.arms)
    drawn = drawn_arms(arms, comparison.baseline.arm)
    others = f" Of {len(arms)} diagnosed arms, the best {len(drawn)}." if len(drawn) < len(arms) else ""
    figures = []
    with look():
        for name, function, title, caption in _FIGURES:
            figure = function(found, drawn, styles)
            if figure:
                narrow = name in _ONE_PANEL or len(drawn) == 1
                figures.append(draw(folder / "figures", name, title, caption + others, figure, narrow))
    runs_per_arm = comparison.runs["arm"].value_counts().to_dict()
    said = remarks(found, runs_per_arm, comparison.arms)
    return BranchReport(sentences(found, arms), said, tables, figures, files), notes
