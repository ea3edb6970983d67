"""Tables for papers: LaTeX with the rules of the package booktabs."""

from __future__ import annotations

from analysis.tables import Table

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
