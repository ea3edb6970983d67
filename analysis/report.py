"""``python -m analysis.report DIR``: a folder of run records becomes tables, figures and one page that answers.

Only the standard library is imported at the top, so that help and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.arguments import Parser, end
from analysis.comparison.baseline import UnknownArm, choose_baseline
from analysis.records.runs import METRICS, LeftOut, Records, read_records

if TYPE_CHECKING:
    from analysis.page.content import Compared, Report
    from analysis.records.steps import StepReader

WATCH_SECONDS = 30.0


class ReportError(Exception):
    """No report can be made; the message is one line that says why."""

    def __init__(self, message: str, left_out: list[LeftOut] | None = None) -> None:
        super().__init__(message)
        self.left_out = left_out or []  # what was found and cannot be used


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report, all below ``folder`` (DIR/report), by name, and what it says."""

    folder: Path
    html: Path
    markdown: Path
    tables: dict[str, Path]
    figures: dict[str, Path]  # each as .png and .svg
    report: Report


def write_report(
    directory: Path,
    baseline: str | None = None,
    metric: str = "final_val_loss",
    reader: StepReader | None = None,
    refresh: float | None = None,
) -> ReportPaths:
    """Read all records below ``directory`` and write ``directory``/report.

    ``baseline`` is the arm to compare with; without it, the one that sweep.json names or else the one with the lowest
    mean of ``metric`` (best_val_loss or final_val_loss). Trials of searches are reported as such, never as arms.
    ``reader`` may remember what it read for an earlier report; with ``refresh`` the page loads itself again after that
    many seconds. Raises ReportError if there is nothing to report or ``baseline`` is not among the arms, OSError if
    the report cannot be written.
    """
    directory = Path(directory)
    if metric not in METRICS:
        raise ReportError(f"no metric {metric!r}; there are {' and '.join(METRICS)}")
    records = _usable_records(directory, metric)
    if baseline is not None and not records.runs:
        raise ReportError(f"no arm {baseline!r}: below {directory} are only trials of searches, which are no arms")

    folder = directory / "report"
    tables: dict[str, Path] = {}
    notes = list(records.notes)
    compared = _compare(records, folder, baseline, metric, reader, tables, notes) if records.runs else None

    from analysis.figures.drawing import drop_stale
    from analysis.files import write_text
    from analysis.page.content import Report
    from analysis.page.html import html_page
    from analysis.page.markdown import markdown_page
    from analysis.search.report import report_searches
    from analysis.tables.comparison import left_out_frame

    searches = report_searches(folder, records)
    for found in searches:
        tables |= found.tables
    if "left_out.csv" not in tables:
        text = left_out_frame(records.left_out).to_csv(index=False)
        tables["left_out.csv"] = write_text(folder / "tables" / "left_out.csv", text)
    drawn = [*(compared.all_figures if compared else []), *(figure for found in searches for figure in found.figures)]
    drop_stale(folder / "figures", drawn)
    figures = {path.name: path for figure in drawn for path in (figure.png, figure.svg)}
    report = Report(records, notes, compared, searches)
    html = write_text(folder / "report.html", html_page(report, folder, refresh))
    text = write_text(folder / "report.md", markdown_page(report))
    return ReportPaths(folder, html, text, tables, figures, report)


def _compare(
    records: Records,
    folder: Path,
    baseline: str | None,
    metric: str,
    reader: StepReader | None,
    tables: dict[str, Path],
    notes: list[str],
) -> Compared:
    """Compare the arms; adds the tables written to ``tables`` and what was unreadable to ``notes``."""
    try:
        chosen = choose_baseline(records, baseline, metric)
    except UnknownArm as error:
        raise ReportError(str(error)) from None

    from analysis.figures.curves import CurveReading
    from analysis.records.frames import best_first, runs_frame
    from analysis.records.steps import StepReader

    runs = runs_frame(records.runs)
    reading = CurveReading(runs, best_first(runs, metric), chosen.arm, records, reader or StepReader())

    # Imported and computed while the metrics are read, which takes as long.
    from analysis.comparison.compare import compare
    from analysis.comparison.verdict import verdict
    from analysis.diagnosis.report import report_branches
    from analysis.figures.drawing import write_figures
    from analysis.health.report import report_health
    from analysis.page.content import Compared
    from analysis.records.configs import arm_configs
    from analysis.tables.comparison import comparison_frame
    from analysis.tables.files import write_tables

    comparison = compare(records, runs, chosen, metric)
    frame = comparison_frame(comparison, records)
    configs = arm_configs(records, comparison.arms)
    curves = reading.result()
    for path, count in curves.unreadable.items():
        shown = path.relative_to(records.directory).as_posix()
        notes.append(f"{shown}/metrics.jsonl: {count} unreadable lines skipped")
    comparison.findings.add_settling(curves.steps.rows, comparison.runs)
    tables |= {path.name: path for path in write_tables(folder / "tables", frame, comparison, records)}
    figures = write_figures(folder / "figures", comparison, records, curves)
    health = report_health(folder, comparison, records)
    branches, skipped = report_branches(folder, comparison, records)
    notes += health.notes + skipped
    tables |= {path.name: path for path in (*health.files, *(branches.files if branches else []))}
    return Compared(comparison, frame, verdict(comparison), configs, figures, health, branches)


def _usable_records(directory: Path, metric: str) -> Records:
    if not directory.is_dir():
        reason = "is a file, not a folder" if directory.exists() else "does not exist"
        raise ReportError(f"{directory} {reason}; give a folder that holds run folders, e.g. outputs/smoke")
    records = read_records(directory, metric)
    if records.runs or records.searches:
        return records
    if records.trials:
        why = f" ({records.notes[0]})" if records.notes else ""
        count = len(records.trials)
        raise ReportError(f"below {directory} are {count} trials of a search, but no usable search.json{why}")
    if not any(item.path for item in records.left_out):
        raise ReportError(f"no run folders below {directory} (a run folder holds summary.json or metrics.jsonl)")
    count = len(records.left_out)
    raise ReportError(f"no usable run below {directory}: all {count} found were left out", records.left_out)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 with a report, 2 without one."""
    parser = Parser(
        prog="python -m analysis.report",
        description="Compare the arms of a sweep, or report a search: tables, figures and a page, in DIR/report.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a folder with run folders at any depth")
    parser.add_argument(
        "--baseline",
        metavar="ARM",
        help="the arm to compare with (default: the one sweep.json names, else the best mean)",
    )
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default=METRICS[0],
        help="the loss that the verdict is about (default: %(default)s)",
    )
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=_seconds,
        const=WATCH_SECONDS,
        help="report again whenever records change, looking every so many seconds (default: %(const)g), until every "
        "planned run has a record",
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.watch is not None:
            from analysis.watch import watch

            return watch(arguments.directory, arguments.baseline, arguments.metric, arguments.watch)
        paths = write_report(arguments.directory, arguments.baseline, arguments.metric)
    except ReportError as error:
        if error.left_out:
            from analysis.page.terminal import console, print_left_out

            print_left_out(console(), error.left_out)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written: {error}", file=sys.stderr)
        return 2

    from analysis.page.terminal import console, print_paths

    print_paths(console(), paths)
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 1 to 86400")
    return seconds


if __name__ == "__main__":
    end(main)
