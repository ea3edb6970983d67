"""The report in a terminal: the table, the verdict, what was left out, and where the files are."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from analysis.records import LeftOut
from analysis.tables import Table
from analysis.verdict import Verdict

MOST_LINES = 20
_PLAIN_WIDTH = 200  # where the output goes to a file, nothing should be wrapped
_FIRST_TO_GO = ("Bits/byte", "Final Train Loss", "Steps", "RWKV/Mamba Ratio", "Memory", "Params")
_COLOURS = {"better": "green", "worse": "yellow", "none": "", "untested": "dim", "incomparable": "red"}


def console() -> Console:
    """Standard output; as wide as the terminal, or wide enough for the table if it is none."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def print_report(
    out: Console, table: Table, verdict: Verdict, left_out: list[LeftOut], notes: list[str], files: dict[str, Path]
) -> None:
    """Print everything; ``files`` are the paths to name at the end."""
    print_table(out, table)
    out.print(Text(verdict.headline, style="bold"), soft_wrap=not out.is_terminal)
    for sentence in verdict.sentences[:MOST_LINES]:
        line = Text("  ").append(sentence.arm, style=f"bold {_COLOURS[sentence.kind]}".strip())
        out.print(line.append(f": {sentence.text}"), soft_wrap=not out.is_terminal)
    _and_more(out, len(verdict.sentences), "arms in differences.csv")
    for remark in verdict.remarks:
        out.print(Text(f"  {remark}", style="dim"), soft_wrap=not out.is_terminal)
    print_left_out(out, left_out)
    for note in notes[:MOST_LINES]:
        out.print(Text(f"Note: {note}", style="yellow"), soft_wrap=True)
    out.print()
    width = max(map(len, files))
    for name, path in files.items():  # never wrapped: a path is there to be copied
        out.print(Text(f"{name:<{width}}  ", style="dim").append(str(path), style="none"), soft_wrap=True)


def print_table(out: Console, table: Table) -> None:
    """The comparison table; in a narrow terminal without the standard deviations, then without some columns."""
    header, rows = table.header, [[cell.text for cell in row] for row in table.rows[: 3 * MOST_LINES]]
    left_away = []
    if _width(header, rows) > out.width:
        header = [name.replace(" ", "\n") for name in header]
        rows = [[text.partition(" \N{PLUS-MINUS SIGN} ")[0] for text in row] for row in rows]
        for name in _FIRST_TO_GO:
            if _width(header, rows) > out.width:
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
        out.print(f"  and {len(table.rows) - len(rows)} more arms in comparison.csv")
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
    for item in left_out[:MOST_LINES]:
        out.print(Text("  ").append(item.folder).append(f": {item.reason}", style="yellow"), soft_wrap=True)
    _and_more(out, len(left_out), "in left_out.csv")


def _and_more(out: Console, count: int, where: str) -> None:
    if count > MOST_LINES:
        out.print(f"  and {count - MOST_LINES} more {where}")
