"""A table in words, and the two forms it is written in: Markdown, and LaTeX with the rules of the package booktabs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.words import PM, p_number, signed

DASH = "\N{EM DASH}"


@dataclass(frozen=True)
class Cell:
    """A table cell in words, and the number that it is sorted by."""

    text: str
    sort: float | str | None = None


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Cell]]


def number_cell(value: float, digits: int) -> Cell:
    """A number with thousands separators; a dash where there is none (NaN, infinite)."""
    return Cell(f"{value:,.{digits}f}", float(value)) if math.isfinite(value) else Cell(DASH)


def signed_cell(value: float) -> Cell:
    """``+0.0123``, a dash for NaN."""
    return Cell(DASH) if value != value else Cell(signed(value), float(value))


def interval_cell(low: float, high: float) -> Cell:
    """``-0.0010 to +0.0030``, sorted by its width; a dash for NaN."""
    return Cell(DASH) if low != low else Cell(f"{signed(low)} to {signed(high)}", float(high - low))


def p_cell(p: float) -> Cell:
    """``0.012`` or ``< 0.001``; a dash where there is no test."""
    return Cell(DASH) if p != p else Cell(p_number(p), float(p))


def spread_cell(mean: float, sd: float, digits: int, mark: str = "") -> Cell:
    """``1.4800 +- 0.0120`` over seeds, sorted by the mean; the mean alone for one seed, a dash without one."""
    if mean != mean:
        return Cell(DASH)
    return Cell(f"{mean:.{digits}f}" + (f" {PM} {sd:.{digits}f}" if sd == sd else "") + mark, float(mean))


def markdown(table: Table) -> str:
    """A GitHub-flavoured Markdown table; the first column is text, the others are numbers."""
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)]]
    lines += [[escape_markdown(cell.text) for cell in row] for row in table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape_markdown(text: str) -> str:
    """Text that a Markdown table cell shows as it is."""
    for character in "\\`*_<>[]|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


_ESCAPED = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "\N{HORIZONTAL ELLIPSIS}": r"\dots{}",
}


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_ESCAPED.get(character, character) for character in text)


def latex(table: Table) -> str:
    """A tabular environment: the first column left-aligned, the others right."""
    lines = [table.header, *([cell.text for cell in row] for row in table.rows)]
    first, *rest = (f"{' & '.join(map(escape_latex, line))} \\\\" for line in lines)
    body = [rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"\toprule", first, r"\midrule", *rest]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}", ""])
