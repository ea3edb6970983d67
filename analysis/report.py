"""``python -m analysis.report DIR``: a folder of run records becomes tables, figures and one page that answers.

Only the standard library is imported at the top, so that help and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.arms import UnknownArm, choose_baseline
from analysis.records import METRICS, LeftOut, Records, read_records

if TYPE_CHECKING:
    from analysis.page import Report


class ReportError(Exception):
    """No report can be made; the message is one line that says why."""

    def __init__(self, message: str, left_out: list[LeftOut] | None = None) -> None:
        super().__init__(message)
        self.left_out = left_out or []  # what was found and cannot be used


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report, all below ``folder`` (DIR/report), and what it says."""

    folder: Path
    html: Path
    markdown: Path
    tables: dict[str, Path]  # comparison.csv, comparison.md, differences.csv, left_out.csv, runs.csv
    figures: dict[str, Path]  # learning_curves and final_loss, each .png and .svg
    report: Report


def write_report(directory: Path, baseline: str | None = None, metric: str = "final_val_loss") -> ReportPaths:
    """Read all records below ``directory`` and write ``directory``/report.

    ``baseline`` is the arm to compare with; without it, the one that sweep.json names or else the one with the lowest
    mean of ``metric`` (best_val_loss or final_val_loss). Raises ReportError if no run is usable or ``baseline`` is
    not among the arms, OSError if the report cannot be written.
    """
    directory = Path(directory)
    if metric not in METRICS:
        raise ReportError(f"no metric {metric!r}; there are {' and '.join(METRICS)}")
    records = _usable_records(directory, metric)
    try:
        chosen = choose_baseline(records, baseline, metric)
    except UnknownArm as error:
        raise ReportError(str(error)) from None

    from analysis.compare import compare
    from analysis.figures import write_figures
    from analysis.frames import runs_frame
    from analysis.page import Report, html_page, markdown_page
    from analysis.tables import comparison_frame, write_tables, write_text
    from analysis.verdict import verdict

    comparison = compare(records, runs_frame(records.runs), chosen, metric)
    folder = directory / "report"
    frame = comparison_frame(comparison, records)
    tables = {path.name: path for path in write_tables(folder / "tables", frame, comparison, records)}
    figures, remarks = write_figures(folder / "figures", comparison, records)
    report = Report(records, comparison, frame, verdict(comparison), records.notes + remarks)
    html = write_text(folder / "report.html", html_page(report, figures))
    text = write_text(folder / "report.md", markdown_page(report))
    return ReportPaths(folder, html, text, tables, figures, report)


def _usable_records(directory: Path, metric: str) -> Records:
    if not directory.is_dir():
        reason = "is a file, not a folder" if directory.exists() else "does not exist"
        raise ReportError(f"{directory} {reason}; give a folder that holds run folders, e.g. outputs/smoke")
    records = read_records(directory, metric)
    if not records.runs and not any(item.path for item in records.left_out):
        raise ReportError(f"no run folders below {directory} (a run folder holds summary.json or metrics.jsonl)")
    if not records.runs:
        count = len(records.left_out)
        raise ReportError(f"no usable run below {directory}: all {count} found were left out", records.left_out)
    return records


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 with a report, 2 without one."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report",
        description="Compare the arms of a sweep: tables, figures and a page with a verdict, in DIR/report.",
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
    arguments = parser.parse_args(argv)
    try:
        paths = write_report(arguments.directory, arguments.baseline, arguments.metric)
    except ReportError as error:
        if error.left_out:
            from analysis.terminal import console, print_left_out

            print_left_out(console(), error.left_out)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written: {error}", file=sys.stderr)
        return 2

    from analysis.tables import comparison_table
    from analysis.terminal import console, print_report

    report = paths.report
    table = comparison_table(report.table)
    files = {
        "comparison table": paths.tables["comparison.csv"],
        "the same, Markdown": paths.tables["comparison.md"],
        "differences": paths.tables["differences.csv"],
        "runs": paths.tables["runs.csv"],
        "left out": paths.tables["left_out.csv"],
        "learning curves": paths.figures["learning_curves.png"],
        "final loss, differences": paths.figures["final_loss.png"],
        "report, Markdown": paths.markdown,
        "report, web page": paths.html,
    }
    print_report(console(), table, report.verdict, report.records.left_out, report.notes, files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
