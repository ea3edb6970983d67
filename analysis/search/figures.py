"""Figures of a search: its course, what mattered, the slices through its space, the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.figures.style import FAINT, INK, PALE, PALETTE
from analysis.search.trials import COMPLETE, FAIL, PRUNED, Dimension, Search, Trial
from analysis.search.words import metric_words, value_words
from analysis.words import METRIC_WORDS

_BLUE, _RED, _GREEN, _GREY = PALETTE[0], PALETTE[1], PALETTE[2], PALE
_COLUMNS = 3


def history(search: Search) -> Figure | None:
    """The value of every trial by number, with the best so far. A panel per metric."""
    if not search.of_state(COMPLETE):
        return None
    count = len(search.metrics)
    figure = Figure(figsize=(8.6 if count == 1 else 12.5, 4.2))
    axes = figure.subplots(1, count, squeeze=False)[0]
    figure.subplots_adjust(left=0.08, right=0.98, top=0.92, bottom=0.12, wspace=0.2)
    for i, ax in enumerate(axes):
        _history(ax, search, i)
    return figure


def _history(ax: Axes, search: Search, i: int) -> None:
    complete, metric = search.of_state(COMPLETE), search.metrics[i]
    values = np.array([trial.values[i] for trial in complete])
    numbers = [trial.number for trial in complete]
    so_far = np.minimum.accumulate if search.directions[i] == "minimize" else np.maximum.accumulate
    reached = [*so_far(values), so_far(values)[-1]]
    line = {"color": INK, "lw": 1.6, "drawstyle": "steps-post", "zorder": 2, "label": "best so far"}
    ax.plot([*numbers, search.trials[-1].number], reached, **line)
    own = [trial for trial in complete if not trial.enqueued]
    low, high = _limits(values, [trial.values[i] for trial in complete if trial.enqueued])
    heights = np.clip([trial.values[i] for trial in own], low, high)
    ax.scatter([t.number for t in own], heights, s=26, color=_BLUE, lw=0, label="complete", zorder=3)
    known = [trial for trial in complete if trial.enqueued]
    if known:
        points = [t.number for t in known], [t.values[i] for t in known]
        ax.scatter(*points, s=52, color=_GREEN, marker="D", lw=0, label="known, put in by hand", zorder=4)
    pruned = [t for t in search.of_state(PRUNED) if i == 0 and not math.isnan(t.last)]
    if pruned:  # their last intermediate value, held inside the panel
        heights = np.clip([t.last for t in pruned], low, high)
        beyond = any(not low <= t.last <= high for t in pruned)
        label = "pruned (last value before" + (", at the edge: beyond it)" if beyond else ")")
        ax.scatter([t.number for t in pruned], heights, s=26, color=_GREY, marker="v", lw=0, label=label, zorder=2.5)
    failed = search.of_state(FAIL)
    if failed:
        top = {"s": 34, "color": _RED, "marker": "x", "lw": 1.6, "label": "failed", "zorder": 3, "clip_on": False}
        ax.scatter([t.number for t in failed], [high] * len(failed), **top)
    room = 0.04 * (high - low)
    ax.set_ylim(low - room, high + room)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("trial")
    ax.set_title(f"{metric_words(metric).capitalize()} by trial")
    _plain_numbers(ax, metric)
    if i == 0:
        where = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
        ax.legend(ncols=5, frameon=False, fontsize=8.5, handletextpad=0.3, columnspacing=1.2, **where)


def _limits(values: np.ndarray, always: Sequence[float] = ()) -> tuple[float, float]:
    """The range of most values and of those to be seen always: one bad trial must not press the others into a line."""
    low, high = float(values.min()), float(values.max())
    middle = np.quantile(values, [0.25, 0.75])
    reach = 4 * max(middle[1] - middle[0], 1e-6 * max(abs(high), 1.0))
    low, high = min(max(low, middle[0] - reach), *always, high), max(min(high, middle[1] + reach), *always, low)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _plain_numbers(ax: Axes, metric: str) -> None:
    if metric in METRIC_WORDS:
        ax.ticklabel_format(axis="y", useOffset=False)
    else:
        ax.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
        )


def importance(search: Search) -> Figure | None:
    """A bar per dimension and metric; None where the search has not worked them out."""
    metrics = [metric for metric in search.metrics if search.importance.get(metric)]
    if not metrics:
        return None
    names = sorted({name for m in metrics for name in search.importance[m]}, key=lambda n: _share(search, metrics, n))
    height = 0.36 * len(names) + 0.95
    figure = Figure(figsize=(4.6 * len(metrics) + 1.8, height))
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.28, right=0.96, top=1 - 0.35 / height, bottom=0.5 / height, wspace=0.12)
    for ax, metric in zip(axes, metrics, strict=True):
        shares = [search.importance[metric].get(name, 0.0) for name in names]
        ax.barh(range(len(names)), shares, height=0.62, color=_BLUE)
        for y, share in enumerate(shares):
            ax.text(share + 0.012, y, f"{share:.2f}", va="center", fontsize=8.5)
        ax.set_xlim(0, max(1.0, *shares) * 1.08)
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"share of the importance ({search.importance_method})")
        ax.set_title(metric_words(metric).capitalize())
    return figure


def _share(search: Search, metrics: list[str], name: str) -> float:
    return sum(search.importance[metric].get(name, 0.0) for metric in metrics)


def slices(search: Search) -> Figure | None:
    """The first metric against every dimension; dimensions with a condition hold only the trials that have them."""
    complete = search.of_state(COMPLETE)
    shown = [d for d in search.space if any(d.name in trial.params for trial in complete)]
    if not shown:
        return None
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    height = 2.7 * rows + 0.4
    figure = Figure(figsize=(4.1 * columns + 0.3, height))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.55 / height, hspace=0.34, wspace=0.08)
    best = {trial.number for trial in search.best()}
    limits = _limits(np.array([t.values[0] for t in complete]), [t.values[0] for t in complete if t.enqueued])
    for ax, dimension in zip(axes, shown, strict=False):
        _slice(ax, dimension, [t for t in complete if dimension.name in t.params], best, limits)
        room = 0.06 * (limits[1] - limits[0])
        ax.set_ylim(limits[0] - room, limits[1] + room)
        ax.set_xlabel(dimension.name)
        _plain_numbers(ax, search.metrics[0])
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel(metric_words(search.metrics[0]))
    words = (
        "Complete trials, later ones darker; diamonds: the best; dashed: ends of the range; far-off values at the edge."
    )
    figure.text(0.08, -0.01, words, color=FAINT, fontsize=8.5, va="top")
    return figure


def _slice(ax: Axes, dimension: Dimension, trials: list[Trial], best: set[int], limits: tuple[float, float]) -> None:
    if dimension.choices or dimension.kind == "categorical":
        levels = [*map(str, dimension.choices)]
        levels += sorted({str(t.params[dimension.name]) for t in trials} - set(levels))
        wobble = np.random.default_rng(0).uniform(-0.15, 0.15, len(trials))  # only to tell the dots apart
        xs = [levels.index(str(t.params[dimension.name])) + w for t, w in zip(trials, wobble, strict=True)]
        ax.set_xlim(-0.5, len(levels) - 0.5)
        ax.xaxis.set_major_locator(FixedLocator(range(len(levels))))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: levels[round(x)] if 0 <= x < len(levels) else ""))
        ax.tick_params(axis="x", labelrotation=25 if len(levels) > 4 else 0)
    else:
        xs = [float(t.params[dimension.name]) for t in trials]
        if dimension.log:
            ax.set_xscale("log")
            if dimension.high / dimension.low < 50:
                ticks = [dimension.low * (dimension.high / dimension.low) ** (i / 4) for i in range(5)]
                ax.xaxis.set_major_locator(FixedLocator(ticks))
                ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        else:
            ax.xaxis.set_major_locator(MaxNLocator(5))
        low, high = dimension.low, dimension.high
        if high > low:
            room = (high / low) ** 0.04 if dimension.log else 0.04 * (high - low)
            ax.set_xlim(*((low / room, high * room) if dimension.log else (low - room, high + room)))
            for end in (low, high):
                ax.axvline(end, color=FAINT, lw=0.8, ls=(0, (4, 3)), zorder=1)
    order = np.linspace(0.5, 1.0, max(len(trials), 2))[: len(trials)]
    ys = np.clip([trial.values[0] for trial in trials], *limits)
    ax.scatter(xs, ys, s=24, color=_BLUE, alpha=order, lw=0, zorder=2)
    marked = [i for i, trial in enumerate(trials) if trial.number in best]
    ax.scatter([xs[i] for i in marked], [ys[i] for i in marked], s=62, color=_RED, marker="D", lw=0, zorder=3)


def pareto(search: Search) -> Figure | None:
    """The first two metrics of every complete trial, with the trials that none beats joined; None for one metric."""
    complete = search.of_state(COMPLETE)
    if len(search.metrics) < 2 or not complete:
        return None
    figure = Figure(figsize=(7.6, 4.6))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.12, right=0.97, top=0.92, bottom=0.12)
    front = sorted(search.best(), key=lambda trial: trial.values[0])
    ax.scatter(*zip(*(t.values[:2] for t in complete), strict=True), s=26, color=_GREY, lw=0, label="complete")
    step = "steps-post" if search.directions[0] == "minimize" else "steps-pre"
    points = list(zip(*(t.values[:2] for t in front), strict=True))
    ax.plot(*points, color=_RED, lw=1.2, marker="D", ms=6, drawstyle=step, label="Pareto front", zorder=3)
    known = [t for t in complete if t.enqueued]
    if known:
        places = zip(*(t.values[:2] for t in known), strict=True)
        ax.scatter(*places, s=52, color=_GREEN, marker="D", lw=0, label="known, put in by hand", zorder=4)
    for trial in front if len(front) <= 15 else ():
        place = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8.5}
        ax.annotate(str(trial.number), trial.values[:2], **place)
    for axis, metric, direction in zip((ax.xaxis, ax.yaxis), search.metrics, search.directions, strict=False):
        better = "lower" if direction == "minimize" else "higher"
        axis.set_label_text(f"{metric_words(metric)} ({better} is better)")
        axis.set_major_formatter(FuncFormatter(lambda value, _, m=metric: value_words(m, value).rstrip("0").rstrip(".")
                                               if abs(value) < 10 else f"{value:,.0f}"))  # fmt: skip
    ax.set_title("What no other trial beats in both")
    ax.legend(frameon=False, fontsize=8.5)
    return figure
