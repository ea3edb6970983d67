"""One search, reported: its answer, its tables and its figures. Trials are no arms: each is one seed of one guess."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from analysis.figures.drawing import Drawn, draw
from analysis.figures.style import look
from analysis.records.runs import Records
from analysis.search.figures import history, importance, pareto, slices
from analysis.search.tables import top_trials, write_search_tables
from analysis.search.trials import Search, Trial
from analysis.search.words import Answer, answer, metric_words, value_words
from analysis.tables.table import Table

_FIGURES = (
    ("history", history, "Course of the search", "The value of every trial and the best so far.", True),
    ("pareto", pareto, "Pareto front", "Every complete trial by its first two metrics.", True),
    ("slices", slices, "Slices", "The first metric against every dimension of the space.", False),
    (
        "importance",
        importance,
        "Importance",
        "How much each dimension decides whether a trial is good, inside the ranges searched.",
        True,
    ),
)


@dataclass(frozen=True)
class SearchReport:
    search: Search
    anchor: str  # of its section
    answer: Answer
    table: Table  # of the best trials
    trials: list[Trial]  # of its rows
    figures: list[Drawn]
    tables: dict[str, Path]

    @property
    def name(self) -> str:
        return self.search.arm or self.search.study


def report_searches(folder: Path, records: Records) -> list[SearchReport]:
    """Write the tables and figures of every search below ``folder``, and say what was found."""
    return [
        _report(folder, search, records, "" if len(records.searches) == 1 else f"-{_safe(search, i)}")
        for i, search in enumerate(records.searches)
    ]


def _safe(search: Search, place: int) -> str:
    name = re.sub(r"[^A-Za-z0-9_.]+", "_", search.arm or search.study)[:40]
    return f"{place + 1}-{name}"


def _report(folder: Path, search: Search, records: Records, suffix: str) -> SearchReport:
    tables = {path.name: path for path in write_search_tables(folder / "tables", search, suffix)}
    figures = []
    with look():
        for kind, function, title, caption, narrow in _FIGURES:
            figure = function(search)
            if figure:
                figures.append(draw(folder / "figures", f"search_{kind}{suffix}", title, caption, figure, narrow))
    shown_as = records.directory if search.path == records.directory else search.path
    table, trials = top_trials(search)
    words = answer(search, str(shown_as))
    return SearchReport(search, f"search{suffix}", words, table, trials, figures, tables)


def searches_headline(reports: list[SearchReport]) -> str:
    """The answer of one search, or the best of each of several."""
    if len(reports) == 1:
        return reports[0].answer.headline
    found = []
    for report in reports:
        best = report.search.best()
        if best:
            metric = report.search.metrics[0]
            found.append(f"{report.name} {value_words(metric, best[0].values[0])} (trial {best[0].number})")
    if not found:
        return f"{len(reports)} searches, no trial of which is complete yet."
    metric = metric_words(reports[0].search.metrics[0])
    return f"Best {metric.removeprefix('best ')} of each of {len(reports)} searches: {', '.join(found)}."
