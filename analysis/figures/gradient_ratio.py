"""The gradient ratio RWKV over Mamba over training, against the bands of gate G4."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from analysis.figures.over_steps import (
    MOST_BANDS,
    by_step,
    draw_band,
    draw_line,
    is_log,
    step_axis,
    step_range,
    thin_out,
)
from analysis.figures.style import FAINT, INK, ArmStyle, label_ends

PASS, WARN = (0.3, 3.0), (0.1, 10.0)  # G4: inside PASS passes, inside WARN warns, outside fails
_COLOURS = {"pass": "#009e73", "warn": "#e69f00", "fail": "#d55e00"}


def gradient_ratio(
    steps: pd.DataFrame, runs: pd.DataFrame, arms: list[str], styles: dict[str, ArmStyle]
) -> Figure | None:
    """A line per arm (geometric mean over seeds, running median over steps); None where nothing was logged."""
    positive = steps["grad_ratio"].where(steps["grad_ratio"] > 0)
    tables = by_step(steps.assign(log_ratio=np.log10(positive)), runs, arms, "train", "log_ratio")
    tables = {arm: table for arm, table in tables.items() if len(table)}
    if not tables:
        return None
    window = max(1, max(map(len, tables.values())) // 50)
    first, last = step_range([tables])
    log = is_log(first, last)
    labels = sum(styles[arm].named for arm in tables)
    figure = Figure(figsize=(8.6, max(4.2, 0.19 * labels + 0.8)))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.76, top=0.92, bottom=0.12)
    ends, extremes = [], [*PASS]
    for order, (arm, table) in enumerate(reversed(tables.items())):
        smooth = thin_out(table.rolling(window, min_periods=1, center=True).median(), log)
        if smooth.empty:
            continue
        mean = 10 ** smooth.mean(axis=1)
        if len(tables) <= MOST_BANDS:
            draw_band(ax, 10**smooth, styles[arm])
        draw_line(ax, mean, styles[arm], 3 + 0.01 * order)
        extremes += [mean.min(), mean.max()]
        if styles[arm].named:
            ends.append((float(np.log10(mean.iloc[-1])), arm, styles[arm]))
    ax.set_yscale("log")
    ax.set_ylim(0.7 * min(extremes), 1.4 * max(extremes))
    step_axis(ax, first, last, log)
    _bands(ax)
    ax.set_title("Gradient ratio RWKV / Mamba, with the bands of gate G4")
    ax.set_ylabel("mean gradient norm of a tensor, RWKV / Mamba", fontsize=8.5)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 3), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()
    low, high = np.log10(ax.get_ylim())
    label_ends(ax, [((y - low) / (high - low), arm, style) for y, arm, style in ends], limits=(0.0, 1.0))
    words = "Means over seeds" + (f" of a running median of {window} logged steps" if window > 1 else "")
    spread = ", bands: range of the seeds" if len(tables) <= MOST_BANDS and runs["arm"].duplicated().any() else ""
    figure.text(0.08, -0.005, f"{words}{spread}.", color=FAINT, fontsize=8.5, va="top")
    return figure


def _bands(ax: Axes) -> None:
    """Tinted zones with their verdict at the left edge, as far as they are in view."""
    low, high = ax.get_ylim()
    zones = [("fail", 0, WARN[0]), ("warn", WARN[0], PASS[0]), ("pass", *PASS), ("warn", PASS[1], WARN[1])]
    for name, bottom, top in [*zones, ("fail", WARN[1], np.inf)]:
        bottom, top = max(bottom, low), min(top, high)
        if bottom >= top:
            continue
        ax.axhspan(bottom, top, color=_COLOURS[name], alpha=0.10, lw=0, zorder=0)
        if np.log10(top / bottom) > 0.07 * np.log10(high / low):
            side, y = ("bottom", bottom * 1.03) if bottom >= PASS[1] else ("top", top * 0.97)
            place = {"transform": ax.get_yaxis_transform(), "ha": "left", "va": side, "fontsize": 8.5}
            ax.text(0.012, y, name, color=INK, zorder=6, **place)
    for edge in (*PASS, *WARN):
        if low < edge < high:
            ax.axhline(edge, color=FAINT, lw=0.7, zorder=1)
