"""What a report says, before it takes a form: about arms, about searches, or both."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.comparison.compare import Comparison
from analysis.comparison.verdict import Verdict
from analysis.diagnosis.report import BranchReport
from analysis.figures.drawing import Drawn
from analysis.health.report import HealthReport
from analysis.records.configs import Flat, config_words, differing
from analysis.records.runs import Records, Run
from analysis.records.together import NOTE, some_together
from analysis.search.report import SearchReport, searches_headline
from analysis.tables.comparison import comparison_table, difference_table
from analysis.tables.files import finding_tables
from analysis.tables.table import DASH, Cell, Table

MOST_LEFT_OUT = 200
MOST_RUNS = 500  # rows of the table of runs
MOST_KEYS = 24  # columns of the table of configurations


@dataclass(frozen=True)
class Compared:
    """What a report says about arms, before it takes a form."""

    comparison: Comparison
    table: pd.DataFrame  # tables.comparison_frame
    verdict: Verdict
    configs: dict[str, Flat]
    figures: list[Drawn]
    health: HealthReport
    branches: BranchReport | None = None  # None where no run is diagnosed

    @cached_property
    def rows(self) -> Table:
        return comparison_table(self.table)

    @cached_property
    def together(self) -> str:
        """What the numbers of runs that trained together mean; empty where all trained alone."""
        return NOTE if some_together(self.comparison.runs) else ""

    @cached_property
    def differences(self) -> Table:
        return difference_table(self.comparison)

    @cached_property
    def found_tables(self) -> dict[str, Table]:
        return finding_tables(self.comparison)

    @property
    def all_figures(self) -> list[Drawn]:
        """Also those of the sections on branches and health."""
        return [*self.figures, *self.health.figures, *(self.branches.figures if self.branches else [])]

    def figure(self, name: str) -> Drawn:
        return next(drawn for drawn in self.figures if drawn.name == name)


@dataclass(frozen=True)
class Report:
    """What a report says: about arms, about searches, or both."""

    records: Records
    notes: list[str]
    compared: Compared | None = None  # None where there are only trials of searches
    searches: list[SearchReport] = field(default_factory=list)

    @property
    def title(self) -> str:
        names = [plan.name for plan in self.records.plans] or [report.search.folder for report in self.searches]
        names = list(dict.fromkeys(names))
        return ", ".join(names[:4]) if names else self.records.directory.resolve().name

    @property
    def question(self) -> str:
        questions = [plan.question for plan in self.records.plans] + [r.search.question for r in self.searches]
        return " ".join(dict.fromkeys(question for question in questions[:4] if question))

    @property
    def headline(self) -> str:
        return self.compared.verdict.headline if self.compared else searches_headline(self.searches)


def configuration_table(configs: dict[str, Flat], arms: list[str]) -> Table:
    """The keys that differ between arms, a row per arm; seeds, places and display options are no difference."""
    keys = differing(configs)[:MOST_KEYS]
    rows = [
        [Cell(arm, i), *(Cell(config_words(configs[arm].get(key)), _sort_key(configs[arm].get(key))) for key in keys)]
        for i, arm in enumerate(arm for arm in arms if arm in configs)
    ]
    return Table(["Arm", *keys], rows if keys else [])


def runs_table(runs: list[Run], metric: str) -> Table:
    """Every run that counts, the first ``MOST_RUNS`` of them."""
    rows = []
    for place, run in enumerate(runs[:MOST_RUNS]):
        summary = run.summary
        seconds = summary.get("wall_seconds")
        timed = isinstance(seconds, int | float)
        rows.append(
            [
                Cell(run.arm, place),
                *(Cell(str(seed), seed) for seed in run.seeds),
                Cell(f"{summary[metric]:.4f}", summary[metric]),
                Cell(str(summary["status"]), str(summary["status"])),
                Cell(f"{seconds / 60:.1f}" if timed else DASH, seconds if timed else None),
            ]
        )
    header = ["Arm", "Seed init", "Seed data", metric.replace("_", " ").capitalize(), "Status", "Minutes"]
    return Table(header, rows)


def _sort_key(value: Any) -> float | str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None if value is None else config_words(value)
