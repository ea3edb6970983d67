"""The report in a terminal: the table, the verdict, what was left out, and where the files are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from analysis.comparison.verdict import Verdict
from analysis.records.runs import LeftOut
from analysis.tables.table import Table

if TYPE_CHECKING:
    from analysis.report import ReportPaths
    from analysis.search.report import SearchReport

MOST_ROWS = 40
MOST_SENTENCES, MOST_LEFT_OUT, MOST_NOTES = 8, 8, 5  # lines; the files have them all
_PLAIN_WIDTH = 200  # where the output goes to a file, nothing should be wrapped
_FIRST_TO_GO = ("Bits/byte", "Final Train Loss", "Steps", "RWKV/Mamba Ratio", "Memory", "Together", "Params")
_COLOURS = {"better": "green", "worse": "yellow", "none": "", "untested": "dim", "incomparable": "red"}


def console() -> Console:
    """Standard output; as wide as the terminal, or wide enough for the table if it is none."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def print_paths(out: Console, paths: ReportPaths) -> None:
    """The whole report: table, verdict, searches, what was left out, files."""
    report, tables, figures = paths.report, paths.tables, paths.figures
    files: dict[str, Path] = {}
    if report.compared:
        print_table(out, report.compared.rows)
        if report.compared.together:
            out.print(Text(f"  {report.compared.together}", style="dim"), soft_wrap=not out.is_terminal)
        _print_verdict(out, report.compared.verdict)
        files |= {
            "comparison table": tables["comparison.csv"],
            "final loss, differences": figures["final_loss.png"],
            "learning curves": figures["learning_curves.png"],
        }
    for found in report.searches:
        _print_search(out, found)
        files |= {name: path for name, path in found.tables.items() if name.startswith("trials")}
    print_left_out(out, report.records.left_out)
    for note in report.notes[:MOST_NOTES]:
        out.print(Text(f"Note: {note}", style="yellow"), soft_wrap=True)
    _and_more(out, len(report.notes), MOST_NOTES, "notes in report.md")
    files |= {"all tables": tables["left_out.csv"].parent, "all figures": paths.folder / "figures"}
    print_files(out, files | {"report, Markdown": paths.markdown, "report, web page": paths.html})


def print_watched(out: Console, paths: ReportPaths, every: float) -> None:
    """One line per refresh: when, how many runs, the headline, the page on the first."""
    records = paths.report.records
    open_runs = sum(item.kind in ("missing", "unfinished") for item in records.left_out)
    left = sum(max(s.n_trials - len(s.of_state("COMPLETE", "PRUNED", "FAIL")), 0) for s in records.searches)
    done = len(records.runs) + sum(len(search.trials) for search in records.searches) - left
    clock = time.strftime("%H:%M:%S")
    out.print(Text(f"{clock}  {done} done, {open_runs + left} to come: {paths.report.headline}"), soft_wrap=True)
    out.print(Text(f"          {paths.html} (looks again every {every:g} s; Ctrl-C ends)", style="dim"), soft_wrap=True)


def print_files(out: Console, files: dict[str, Path]) -> None:
    out.print()
    width = max(map(len, files))
    for name, path in files.items():  # never wrapped: a path is there to be copied
        out.print(Text(f"{name:<{width}}  ", style="dim").append(str(path), style="none"), soft_wrap=True)


def _print_verdict(out: Console, verdict: Verdict) -> None:
    out.print(Text(verdict.headline, style="bold"), soft_wrap=not out.is_terminal)
    for sentence in verdict.told[:MOST_SENTENCES]:
        line = Text("  ").append(sentence.arm, style=f"bold {_COLOURS[sentence.kind]}".strip())
        out.print(line.append(f": {sentence.text}"), soft_wrap=not out.is_terminal)
    _and_more(out, len(verdict.sentences), min(len(verdict.told), MOST_SENTENCES), "arms in report.html")
    for caution in verdict.cautions:
        out.print(Text(f"  {caution}", style="yellow"), soft_wrap=not out.is_terminal)


def _print_search(out: Console, found: SearchReport) -> None:
    if found.table.rows:
        print_table(out, found.table, most=10)
    out.print(Text(found.answer.headline, style="bold"), soft_wrap=not out.is_terminal)
    for kind, text in found.answer.points:
        style = "yellow" if kind in ("edge", "evidence") else ""
        out.print(Text(f"  {text}", style=style), soft_wrap=not out.is_terminal)


def print_table(out: Console, table: Table, most: int = MOST_ROWS) -> None:
    """A table of the report; in a narrow terminal without the standard deviations, then without some columns."""
    header, rows = table.header, [[cell.text for cell in row] for row in table.rows[:most]]
    left_away = []
    if _width(header, rows) > out.width:
        header = [name.replace(" ", "\n") for name in header]
        rows = [[text.partition(" \N{PLUS-MINUS SIGN} ")[0] for text in row] for row in rows]
        for name in _FIRST_TO_GO:
            if _width(header, rows) > out.width and name.replace(" ", "\n") in header:
                at = header.index(name.replace(" ", "\n"))
                header = header[:at] + header[at + 1 :]
                rows = [row[:at] + row[at + 1 :] for row in rows]
                left_away.append(name)
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        shown.add_column(Text(name), justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for row in rows:
        shown.add_row(*map(Text, row))
    out.print(shown)
    if len(table.rows) > len(rows):
        out.print(f"  and {len(table.rows) - len(rows)} more rows in the CSV file")
    if left_away:
        out.print(Text(f"  not shown for want of room: {', '.join(left_away)} (see comparison.md)", style="dim"))


def _width(header: list[str], rows: list[list[str]]) -> int:
    lines = [[max(name.split("\n"), key=len) for name in header], *rows]
    return sum(max(len(line[i]) for line in lines) + 3 for i in range(len(header)))


def print_left_out(out: Console, left_out: list[LeftOut]) -> None:
    if not left_out:
        return
    out.print()
    out.print(Text(f"Left out: {len(left_out)} run{'s' if len(left_out) > 1 else ''}", style="bold"))
    for item in left_out[:MOST_LEFT_OUT]:
        out.print(Text("  ").append(item.folder).append(f": {item.reason}", style="yellow"), soft_wrap=True)
    _and_more(out, len(left_out), MOST_LEFT_OUT, "in left_out.csv")


def _and_more(out: Console, count: int, shown: int, where: str) -> None:
    if count > shown:
        out.print(f"  and {count - shown} more {where}")
