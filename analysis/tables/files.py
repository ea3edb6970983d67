"""Every table of a report as files: raw numbers as CSV, the words as Markdown and as LaTeX (booktabs)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from analysis.comparison.compare import Comparison
from analysis.comparison.findings import Findings
from analysis.files import write_text
from analysis.records.runs import Records
from analysis.tables.comparison import comparison_table, difference_table, left_out_frame, sizes_table
from analysis.tables.findings import factorial_tables, learning_rate_tables, phase_tables, rank_table
from analysis.tables.table import Table, latex, markdown


def finding_tables(comparison: Comparison) -> dict[str, Table]:
    """The tables of the findings by name, those that there are."""
    findings = comparison.findings
    tables = phase_tables(comparison, findings) | factorial_tables(findings) | learning_rate_tables(findings)
    return tables | rank_table(findings, comparison.arms)


def write_tables(folder: Path, frame: pd.DataFrame, comparison: Comparison, records: Records) -> list[Path]:
    """Write all tables below ``folder`` and return their paths.

    Always: comparison, sizes and differences as .csv, .md and .tex, left_out.csv and runs.csv; with what was found
    also ratio, fusion, factorial_terms, _effects and _cells, learning_rates, learning_rate_differences, ranks (.md and
    .tex; raw numbers in CSV) and settling.csv. ``frame`` is ``tables.comparison_frame``. Tables of an earlier report
    that this one has not are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = {"comparison": comparison_table(frame), "sizes": sizes_table(frame)}
    words["differences"] = difference_table(comparison)
    words |= finding_tables(comparison)
    raw = {"comparison": frame, "differences": comparison.differences, "runs": comparison.runs}
    raw["left_out"] = left_out_frame(records.left_out)
    raw |= _raw(comparison.findings)
    return write_named(folder, raw, words, _OPTIONAL)


def write_named(
    folder: Path, raw: dict[str, pd.DataFrame], words: dict[str, Table], optional: Iterable[str]
) -> list[Path]:
    """Write ``raw`` as .csv and ``words`` as .md and .tex; files of an earlier report named in ``optional`` that this
    one has no table for are removed."""
    contents = {f"{name}.csv": table.to_csv(index=False) for name, table in raw.items()}
    for name, table in words.items():
        contents |= {f"{name}.md": markdown(table), f"{name}.tex": latex(table)}
    for name in optional:
        for kind in ("csv", "md", "tex"):
            if f"{name}.{kind}" not in contents:
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return [write_text(folder / name, text) for name, text in contents.items()]


_OPTIONAL = (
    *("ratio", "fusion", "factorial_terms", "factorial_effects", "factorial_cells"),
    *("learning_rates", "learning_rate_differences", "ranks", "settling", "false_alarms"),
)


def _raw(findings: Findings) -> dict[str, pd.DataFrame]:
    raw = {}
    if findings.factorial:
        found = findings.factorial
        raw |= {"factorial_terms": found.terms, "factorial_effects": found.effects, "factorial_cells": found.cells}
    if findings.learning_rates:
        raw["learning_rates"] = findings.learning_rates.table
        raw["learning_rate_differences"] = findings.learning_rates.differences
    if findings.first_places is not None:
        raw["ranks"] = findings.first_places.rename_axis("arm").reset_index()
    if findings.settling is not None:
        raw["settling"] = findings.settling.taus.rename_axis("step").reset_index()
    if findings.false_alarms:
        raw["false_alarms"] = pd.DataFrame([vars(one) for one in findings.false_alarms])
    return raw
