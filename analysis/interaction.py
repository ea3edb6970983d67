"""Figures of sweeps with structure: how one factor acts at each level of the others, and loss against learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.configs import Crossing, full
from analysis.stats import t_interval
from analysis.style import FAINT, ArmStyle, label_ends
from analysis.verdict import METRIC_WORDS

LEARNING_RATE = "optim.lr"
MOST_PANELS = 3
_MOST_LEVELS = 12


def interaction(
    runs: pd.DataFrame, metric: str, crossed: Sequence[Crossing], styles: dict[str, ArmStyle]
) -> Figure | None:
    """A panel per crossed factor: the loss at each of its levels, a line per combination of the others.

    Parallel lines: the factors act independently. None where no two factors are completely crossed. Of two factors
    that cross each other, the one with fewer levels is on the x axis.
    """
    usable = [c for c in crossed if full(c) and c.key != LEARNING_RATE and len(c.levels) <= _MOST_LEVELS]
    chosen = sorted(usable, key=lambda c: len(c.levels))
    if len(crossed) == 2:  # the same arms seen from both sides; beside learning rates, that is another figure
        chosen = chosen[: len(usable) - 1]
    return _figure(runs, metric, chosen[:MOST_PANELS], styles) if chosen else None


def learning_rates(
    runs: pd.DataFrame, metric: str, crossed: Sequence[Crossing], styles: dict[str, ArmStyle]
) -> Figure | None:
    """Loss against the learning rate, a line per arms that differ in nothing else; None where there are none."""
    chosen = [c for c in crossed if c.key == LEARNING_RATE and all(isinstance(v, float) and v > 0 for v in c.levels)]
    return _figure(runs, metric, chosen, styles) if chosen else None


def _figure(runs: pd.DataFrame, metric: str, chosen: Sequence[Crossing], styles: dict[str, ArmStyle]) -> Figure:
    lines = max(len(crossing.lines) for crossing in chosen)
    figure = Figure(figsize=(6.2 * len(chosen), max(4.0, 0.19 * lines + 0.8)))
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    figure.subplots_adjust(left=0.09 / len(chosen) + 0.02, right=0.8, top=0.92, bottom=0.13, wspace=0.75)
    values = {arm: group.to_numpy() for arm, group in runs.groupby("arm")[metric]}
    for ax, crossing in zip(axes, chosen, strict=True):
        _panel(ax, crossing, values, styles)
    axes[0].set_ylabel(f"{METRIC_WORDS[metric]}, nats per token", fontsize=9)
    spread = "bars: 95% t intervals of the mean; " if runs["arm"].duplicated().any() else ""
    words = f"Means over seeds, {spread}a point has the look of its arm, a line that of its last."
    if any(full(crossing) for crossing in chosen):
        words += " Parallel lines: no interaction."
    figure.text(0.09 / len(chosen) + 0.02, -0.005, words, color=FAINT, fontsize=8.5, va="top")
    return figure


def _panel(ax: Axes, crossing: Crossing, values: dict, styles: dict[str, ArmStyle]) -> None:
    numeric = all(isinstance(level, float) and level > 0 for level in crossing.levels)
    log = numeric and (crossing.key == LEARNING_RATE or max(crossing.levels) / min(crossing.levels) > 8)
    place = {level: level if log else i for i, level in enumerate(crossing.levels)}
    ends = []
    for k, (name, arms) in enumerate(crossing.lines.items()):
        points = [(level, arm) for level, arm in sorted(arms.items(), key=lambda item: place[item[0]])]
        means = [values[arm].mean() for _, arm in points]
        shift = (k - (len(crossing.lines) - 1) / 2) * 0.015  # so that intervals do not hide each other
        xs = [place[level] * (1 + shift) if log else place[level] + shift for level, _ in points]
        style = styles[points[-1][1]]
        ax.plot(xs, means, color=style.colour, lw=1.4, ls=style.line, zorder=2)
        for x, mean, (_, arm) in zip(xs, means, points, strict=True):
            look, (low, high) = styles[arm], t_interval(values[arm])
            if not math.isnan(low) and len(values[arm]) > 2:
                ax.plot([x, x], [low, high], color=look.colour, lw=1.0, alpha=0.55, zorder=2.5)
            ax.plot([x], [mean], color=look.colour, marker=look.marker, ms=6, ls="", zorder=3)
        if points[-1][0] == crossing.levels[-1]:
            ends.append((float(means[-1]), name, style))
    if log:
        ax.set_xscale("log")
    else:
        ax.set_xlim(-0.3, len(crossing.levels) - 0.7)
    ax.xaxis.set_major_locator(FixedLocator([place[level] for level in crossing.levels]))
    ax.xaxis.set_minor_locator(NullLocator())
    names = {place[level]: f"{level:g}" if isinstance(level, float) else str(level) for level in crossing.levels}
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: names.get(x, "")))
    several = len(crossing.levels) > 5 or max(map(len, names.values())) > 14
    ax.tick_params(axis="x", labelrotation=30 if several and not log else 0)
    ax.set_xlabel(crossing.key)
    learning = crossing.key == LEARNING_RATE
    ax.set_title("Loss against learning rate" if learning else f"Loss by {_leaf(crossing.key)}")
    label_ends(ax, ends)


def _leaf(key: str) -> str:
    """``init`` for init.name, ``branch_norm`` for fusion.branch_norm."""
    return key.removesuffix(".name").rpartition(".")[2]
