"""What a lower loss costs: loss against parameters, speed and recurrent state, with the Pareto front."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from analysis.figures.style import FAINT, ArmStyle, name_arms
from analysis.records.together import differing_sizes, size_words
from analysis.words import METRIC_WORDS

_LEAST_SPREAD = 0.01  # largest over smallest minus 1; below that the arms are matched, and there is no trade


@dataclass(frozen=True)
class Cost:
    """One thing that a loss is set against."""

    column: str
    label: str
    more_is_better: bool = False


SPEED = Cost("tokens_per_second", "training tokens per second", more_is_better=True)
COSTS = (
    Cost("params_total", "parameters"),
    SPEED,
    Cost("state_floats", "recurrent state, floats"),
)


def pareto_front(loss: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """True where no other point has at most this loss and at most this cost, one of them less. No NaN."""
    order = np.lexsort((loss, cost))
    front = np.zeros(len(loss), dtype=bool)
    lowest = np.inf
    for i in order:
        if loss[i] < lowest:
            front[i], lowest = True, loss[i]
    return front


def drawn_costs(runs: pd.DataFrame, arms: list[str]) -> list[Cost]:
    """The costs in which ``arms`` differ by more than 1%."""
    means = runs.groupby("arm")[[cost.column for cost in COSTS]].mean().reindex(arms)
    return [cost for cost in COSTS if _differs(means[cost.column])]


def tradeoffs(runs: pd.DataFrame, metric: str, arms: list[str], styles: dict[str, ArmStyle]) -> Figure | None:
    """A panel per cost of ``drawn_costs``; None if there is none or only one arm.

    Speeds of arms whose runs trained in groups of different size are drawn without a front and said to be no match.
    """
    means = runs.groupby("arm")[[metric, *(cost.column for cost in COSTS)]].mean().reindex(arms)
    spread = runs.groupby("arm")[metric].agg(["min", "max"]).reindex(arms)
    costs = drawn_costs(runs, arms)
    if not costs or len(arms) < 2:
        return None
    named = [arm for arm in arms if styles[arm].named]
    figure = Figure(figsize=(4.0 * len(costs) + 0.4, max(3.8, 0.19 * len(named) + 0.8)))
    axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.08, right=0.97, top=0.92, bottom=0.13, wspace=0.08)
    members = runs.loc[runs["arm"].isin(arms), ["members"]]
    unlike = SPEED in costs and differing_sizes(members)
    lines = 0
    for ax, cost in zip(axes, costs, strict=True):
        with_front = not (cost is SPEED and unlike)
        lines += _panel(ax, cost, means[cost.column], means[metric], spread, styles, with_front)
        ax.label_outer()
    axes[0].set_ylabel(f"{METRIC_WORDS[metric]}, nats per token", fontsize=9)
    name_arms(figure, named, styles)
    words = ["Means over seeds" + (", bars: range of the seeds" if runs["arm"].duplicated().any() else "")]
    if lines:
        words.append("line: Pareto front (no other arm is at least as good in both)")
    if unlike:
        size = size_words(members["members"].min(), members["members"].max())
        words.append(f"speeds are not comparable, hence no front (runs trained together: {size})")
    figure.text(0.08, -0.005, "; ".join(words) + ".", color=FAINT, fontsize=8.5, va="top")
    return figure


def _differs(values: pd.Series) -> bool:
    values = values[values > 0]
    return len(values) > 1 and values.max() / values.min() - 1 > _LEAST_SPREAD


def _panel(
    ax: Axes,
    cost: Cost,
    x: pd.Series,
    y: pd.Series,
    spread: pd.DataFrame,
    styles: dict[str, ArmStyle],
    with_front: bool,
) -> bool:
    """Draw a cost; whether the Pareto front is a line, not a single arm."""
    x = x[x.notna() & y.notna()]
    y = y[x.index]
    front = pareto_front(y.to_numpy(), x.to_numpy() * (-1 if cost.more_is_better else 1))
    line = sorted(zip(x[front], y[front], strict=True), reverse=cost.more_is_better)
    if with_front:
        ax.plot(*zip(*line, strict=True), color=FAINT, lw=1.2, drawstyle="steps-post", zorder=2)
    for arm in reversed(x.index):
        style = styles[arm]
        low, high = spread.loc[arm]
        ax.plot([x[arm]] * 2, [low, high], color=style.colour, lw=1.0, alpha=0.6, zorder=2.5)
        ax.plot([x[arm]], [y[arm]], color=style.colour, marker=style.marker, ms=7, ls="", zorder=3)
    if x.min() > 0 and x.max() / x.min() > 8:  # attention has no state, and 0 no place there
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(_short))
    ax.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    ax.margins(x=0.08)
    ax.set_title(f"Loss against {cost.label.partition(',')[0]}")
    ax.set_xlabel(cost.label + (" (more is better)" if cost.more_is_better else ""))
    return with_front and len(line) > 1


def _short(value: float, _: object = None) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:g}"
