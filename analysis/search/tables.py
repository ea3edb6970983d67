"""The trials of a search as tables: all of them for a CSV file, the best in words."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from analysis.files import write_text
from analysis.search.trials import Search, Trial
from analysis.search.words import metric_words, param_words, value_words
from analysis.tables.table import DASH, Cell, Table, latex, markdown

TOP = 20


def trials_frame(search: Search) -> pd.DataFrame:
    """One row per trial, by number: state, place among the complete ones, metrics, parameters, cost, run folder."""
    place = {trial.number: i + 1 for i, trial in enumerate(search.ranked())}
    best = {trial.number for trial in search.best()}
    return pd.DataFrame(
        [
            {"trial": t.number, "state": t.state.lower(), "place": place.get(t.number), "best": t.number in best}
            | {"enqueued": t.enqueued}
            | {m: t.values[i] if t.values else math.nan for i, m in enumerate(search.metrics)}
            | {"last_intermediate": t.last}
            | {d.name: t.params.get(d.name) for d in search.space}
            | {"steps": t.steps, "seconds": t.seconds, "reason": t.reason, "folder": t.folder, "run_id": t.run_id}
            for t in search.trials
        ]
    ).astype({"place": "Int64", "steps": "Int64"} if search.trials else {})


def top_trials(search: Search, most: int = TOP) -> tuple[Table, list[Trial]]:
    """The best complete trials and those asked for by hand, best first; and the trials of the rows."""
    ranked = search.ranked()
    chosen = [trial for i, trial in enumerate(ranked) if i < most or trial.enqueued]
    best = {trial.number for trial in search.best()}
    header = ["Trial", *(metric_words(metric).capitalize() for metric in search.metrics)]
    header += [*(dimension.name for dimension in search.space), "Steps", "Minutes"]
    rows = []
    for trial in chosen:
        remarks = ["known"] if trial.enqueued else []
        remarks += ["Pareto" if len(search.metrics) > 1 else "best"] if trial.number in best else []
        name = f"{trial.number}" + (f" ({', '.join(remarks)})" if remarks else "")
        minutes = trial.seconds / 60
        rows.append(
            [
                Cell(name, trial.number),
                *(Cell(value_words(m, v), v) for m, v in zip(search.metrics, trial.values, strict=True)),
                *(_param(trial, dimension.name) for dimension in search.space),
                Cell(DASH if trial.steps is None else f"{trial.steps:,}", trial.steps),
                Cell(DASH if math.isnan(minutes) else f"{minutes:.1f}", None if math.isnan(minutes) else minutes),
            ]
        )
    return Table(header, rows), chosen


def _param(trial: Trial, name: str) -> Cell:
    value = trial.params.get(name)
    if value is None:
        return Cell(DASH)
    return Cell(param_words(value), value if isinstance(value, int | float) else str(value))


def write_search_tables(folder: Path, search: Search, suffix: str) -> list[Path]:
    """Write trials.csv (all) and top_trials as .csv, .md and .tex, ``suffix`` behind the stem."""
    folder.mkdir(parents=True, exist_ok=True)
    table, chosen = top_trials(search)
    frame = trials_frame(search)
    top = frame.set_index("trial").loc[[trial.number for trial in chosen]].reset_index() if chosen else frame.iloc[:0]
    contents = {
        f"trials{suffix}.csv": frame.to_csv(index=False),
        f"top_trials{suffix}.csv": top.to_csv(index=False),
        f"top_trials{suffix}.md": markdown(table),
        f"top_trials{suffix}.tex": latex(table),
    }
    return [write_text(folder / name, text) for name, text in contents.items()]
