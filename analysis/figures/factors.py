"""Figures of sweeps with structure: how one factor acts at each level of the others, and loss against learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.comparison.learning_rates import LearningRates
from analysis.comparison.settings import Crossing
from analysis.figures.style import FAINT, ArmStyle, label_ends
from analysis.statistics.elementary import t_interval
from analysis.words import METRIC_WORDS

MOST_PANELS = 3
_MOST_LEVELS = 12

Lines = dict[str, dict[str | float, str]]  # the name of a line -> level -> arm


def interaction(
    runs: pd.DataFrame, metric: str, crossing: Crossing | None, styles: Mapping[str, ArmStyle]
) -> Figure | None:
    """A panel per factor: the loss at each of its levels, a line per combination of the other factors.

    Parallel lines: the factors act independently. None where no factors are crossed. Of two factors the one with
    fewer levels is on the x axis: the same arms seen from the other side would say nothing new.
    """
    if crossing is None:
        return None
    factors = crossing.factors
    chosen = [i for i in range(len(factors)) if len(factors[i].levels) <= _MOST_LEVELS]
    chosen.sort(key=lambda i: (len(factors[i].levels), -i))
    chosen = chosen[: 1 if len(factors) == 2 else MOST_PANELS]
    if not chosen:
        return None
    figure, axes = _figure(
        runs, metric, len(chosen), max(len(crossing.cells) // len(factors[i].levels) for i in chosen)
    )
    for ax, i in zip(axes, chosen, strict=True):
        lines: Lines = {}
        for arm, cell in crossing.cells.items():
            others = [f.label(level) for j, (f, level) in enumerate(zip(factors, cell, strict=True)) if j != i]
            lines.setdefault(", ".join(others), {})[cell[i]] = arm
        levels = sorted(factors[i].levels, key=_in_order)
        _panel(ax, lines, levels, {level: place for place, level in enumerate(levels)}, runs, metric, styles)
        ax.set_xlim(-0.3, len(levels) - 0.7)
        ax.set_title(f"Loss by {factors[i].name}")
        ax.set_xlabel(factors[i].name)
    return figure


def learning_rates(
    runs: pd.DataFrame, metric: str, rates: LearningRates | None, styles: Mapping[str, ArmStyle]
) -> Figure | None:
    """Loss against the learning rate, a line per arms that differ in nothing else; None without such a sweep."""
    if rates is None:
        return None
    lines: Lines = {
        str(name): dict(zip(own["lr"], own["arm"], strict=True)) for name, own in rates.table.groupby("group")
    }
    levels = sorted({rate for line in lines.values() for rate in line})
    figure, (ax,) = _figure(runs, metric, 1, len(lines))
    ax.set_xscale("log")
    _panel(ax, lines, levels, {level: level for level in levels}, runs, metric, styles)
    ax.set_title("Loss against learning rate")
    ax.set_xlabel("learning rate")
    return figure


def _figure(runs: pd.DataFrame, metric: str, panels: int, lines: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(6.2 * panels, max(4.0, 0.19 * lines + 0.8)))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    left = 0.09 / panels + 0.02
    figure.subplots_adjust(left=left, right=0.8, top=0.92, bottom=0.13, wspace=0.75)
    axes[0].set_ylabel(f"{METRIC_WORDS[metric]}, nats per token", fontsize=9)
    spread = "bars: 95% t intervals of the mean; " if (runs["arm"].value_counts() > 2).any() else ""
    words = f"Means over seeds, {spread}a point has the look of its arm, a line that of its last."
    figure.text(left, -0.005, words, color=FAINT, fontsize=8.5, va="top")
    return figure, axes


def _panel(
    ax: Axes,
    lines: Lines,
    levels: Sequence[str | float],
    place: Mapping[str | float, float],
    runs: pd.DataFrame,
    metric: str,
    styles: Mapping[str, ArmStyle],
) -> None:
    values: dict[str, np.ndarray] = {arm: group.to_numpy() for arm, group in runs.groupby("arm")[metric]}
    log, ends = ax.get_xscale() == "log", []
    for k, (name, arms) in enumerate(lines.items()):
        points = [(level, arms[level]) for level in levels if level in arms]
        means = [float(values[arm].mean()) for _, arm in points]
        shift = (k - (len(lines) - 1) / 2) * 0.015  # so that intervals do not hide each other
        xs = [place[level] * (1 + shift) if log else place[level] + shift for level, _ in points]
        style = styles[points[-1][1]]
        ax.plot(xs, means, color=style.colour, lw=1.4, ls=style.line, zorder=2)
        for x, mean, (_, arm) in zip(xs, means, points, strict=True):
            look, (low, high) = styles[arm], t_interval(values[arm])
            if not math.isnan(low) and len(values[arm]) > 2:
                ax.plot([x, x], [low, high], color=look.colour, lw=1.0, alpha=0.55, zorder=2.5)
            ax.plot([x], [mean], color=look.colour, marker=look.marker, ms=6, ls="", zorder=3)
        if points[-1][0] == levels[-1]:
            ends.append((means[-1], name, style))
    names = {place[level]: f"{level:g}" if isinstance(level, float) else level for level in levels}
    ax.xaxis.set_major_locator(FixedLocator(list(names)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: names.get(x, "")))
    crowded = len(levels) > 5 or max(map(len, names.values())) > 14
    ax.tick_params(axis="x", labelrotation=30 if crowded and not log else 0)
    label_ends(ax, ends)


def _in_order(level: str) -> tuple[bool, float]:
    """Numbers by size; other levels keep their order, behind them."""
    try:
        return False, float(level)
    except ValueError:
        return True, 0.0
