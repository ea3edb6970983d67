"""Benchmarks for people: tables on the terminal and a figure. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid.bench.task import Row

Column = tuple[str, Callable[[Row], str]]
INK, FAINT, BAR, BAD = "#1b1f24", "#6a737d", "#0072b2", "#d55e00"


def number(value: float | None, form: str = ",.2f", unit: str = "") -> str:
    """A number of a row that may not be there."""
    return "" if value is None else f"{value:{form}}{unit}"


def figures(value: float) -> str:
    """Three figures without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 6)}f}"


def timed(row: Row) -> str:
    """Median and quartiles."""
    if row.get("median") is None:
        return ""
    return f"{figures(row['median'])} ({figures(row['q1'])} to {figures(row['q3'])})"


def table(console: Console, title: str, columns: list[Column], rows: list[Row]) -> None:
    """A line a row; one that was not measured says why."""
    shown = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    for i, (head, _) in enumerate(columns):
        shown.add_column(head, justify="left" if i < 2 else "right", overflow="fold")
    last_group = None
    for row in rows:
        if last_group not in (None, row["group"]):
            shown.add_section()
        last_group = row["group"]
        if row["status"] == "ok":
            shown.add_row(*(text(row) for _, text in columns))
        else:
            shown.add_row(row["group"], row["name"], row["status"], *[""] * (len(columns) - 3), style="dim")
    console.print(shown)
    for row in rows:
        if row["status"] != "ok":
            words = f"{row['group']}, {row['name']}: {row['status']}: {row.get('reason')}"
            console.print(words, markup=False, highlight=False, soft_wrap=True)


def targets(console: Console, found: list[dict[str, Any]]) -> None:
    for target in found:
        reached = "not measured" if target["reached"] is None else figures(target["reached"])
        verdict = {True: "met", False: "missed", None: "open"}[target["met"]]
        bound = "at most" if target["at_most"] else "at least"
        words = f"target {target['name']}: {bound} {figures(target['wanted'])}, reached {reached}: {verdict}"
        console.print(words, markup=False, highlight=False, soft_wrap=True)


def comparison(console: Console, found: list[dict[str, Any]]) -> None:
    shown = Table(title="against the earlier record", title_justify="left", header_style="bold", pad_edge=False)
    for head in ("group", "row", "before", "now", "change", "noise", "verdict"):
        shown.add_column(head, overflow="fold")
    for entry in found:
        change = entry["now"] / entry["before"] - 1 if entry["now"] and entry["before"] else None
        style = {"slower": "bold red", "gone": "bold red", "faster": "green"}.get(entry["verdict"])
        shown.add_row(
            entry["group"], entry["name"], number(entry["before"], ",.4g"), number(entry["now"], ",.4g"),
            number(change, "+.1%"), number(entry.get("noise"), ",.2g"), entry["verdict"], style=style,
        )  # fmt: skip
    console.print(shown)


def figure(content: dict[str, Any], path: Path, label: Callable[[Row], str] | None = None) -> None:
    """Every row's median with its quartiles, a panel a group: bars, or points where the axis is logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[Row]] = {}
    for row in content["rows"]:
        if row["status"] != "skipped":
            groups.setdefault(row["group"], []).append(row)
    heights = [len(rows) for rows in groups.values()] or [1]
    page = Figure(figsize=(9, 1.1 + 0.34 * sum(heights) + 0.75 * len(heights)), layout="constrained")
    FigureCanvasAgg(page)
    axes = page.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (group, rows) in zip(axes, groups.items(), strict=False):
        good = [row for row in rows if row["status"] == "ok" and row.get("median")]
        widest = max((row["q3"] for row in good), default=1.0)
        least = min((row["median"] for row in good), default=1.0)
        wide = widest > 20 * least
        for y, row in enumerate(rows):
            if row in good:
                if wide:  # a bar's length says nothing on a logarithmic axis
                    ax.plot(row["median"], y, "o", color=BAR, markersize=6)
                else:
                    ax.barh(y, row["median"], color=BAR, height=0.62)
                errors = [[row["median"] - row["q1"]], [row["q3"] - row["median"]]]
                ax.errorbar(row["median"], y, xerr=errors, color=INK, capsize=2, linewidth=1)
                words = label(row) if label else figures(row["median"])
                ax.annotate(
                    words, (row["q3"], y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK
                )
            else:
                ax.annotate(
                    row["status"], (0, y), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                    va="center", fontsize=8, color=BAD,
                )  # fmt: skip
        if wide:
            ax.set_xscale("log")
            ax.set_xlim(least / 2, widest * 8)
            ax.set_ylim(-0.6, len(rows) - 0.4)
        else:
            ax.set_xlim(0, widest * 1.45)
        ax.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        ax.invert_yaxis()
        ax.set_title(group, loc="left", fontsize=9, fontweight="bold", color=INK)
        ax.set_xlabel((good[0].get("unit", "") if good else "") + (" (log scale)" if wide else ""), fontsize=8)
        ax.tick_params(labelsize=8, colors=FAINT)
        ax.spines[["top", "right"]].set_visible(False)
    page.suptitle(
        f"hybrid.bench {content['command']} on {content['device'].get('device')}",
        fontsize=10,
        color=INK,
        x=0.01,
        ha="left",
    )
    page.savefig(path, dpi=130)
