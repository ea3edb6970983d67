"""Shared by the figures that have the optimiser step on the x axis: tables, lines, bands over seeds, axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from analysis.figures.style import ArmStyle

MOST_BANDS = 7  # of more arms than this, the bands would hide each other
MOST_POINTS = 400  # of one curve; a figure shows no more
_LOG_FROM = 10  # last step over first step from which the steps are on a log axis
_LOG_LEFT = 100  # the left end of a log axis is at least the last step over this


def by_step(
    steps: pd.DataFrame, runs: pd.DataFrame, arms: Sequence[str], kind: str, column: str
) -> dict[str, pd.DataFrame]:
    """Per arm: steps by runs. ``steps["run"]`` is the index of ``runs``; an arm with nothing logged gets no rows."""
    rows = steps.loc[(steps["kind"] == kind) & steps[column].notna(), ["run", "step", column]]
    places, index = pd.factorize(rows["step"], sort=True)
    numbers = runs.index.get_indexer(rows["run"])
    values = np.full((len(index), len(runs)), np.nan)  # much less memory than a pivot
    values[places, numbers] = rows[column]
    tables = {}
    for arm in arms:
        own = np.flatnonzero(runs["arm"] == arm)
        logged = np.isfinite(values[:, own]).any(axis=1)
        tables[arm] = pd.DataFrame(values[np.ix_(logged, own)], index=index[logged], columns=runs.index[own])
    return tables


def seed_mean(table: pd.DataFrame) -> pd.Series:
    """Mean over the seeds, as far as all of an arm's runs go."""
    return table.mean(axis=1, skipna=False).dropna()


def draw_line(ax: Axes, mean: pd.Series, style: ArmStyle, zorder: float, mark_end: bool = False) -> None:
    points = {"marker": style.marker, "ms": 4} if 0 < len(mean) <= 12 and style.named else {}
    ax.plot(mean.index, mean, color=style.colour, lw=style.width, ls=style.line, zorder=zorder, **points)
    if len(mean) and mark_end and style.named:
        ax.plot(mean.index[-1:], mean.iloc[-1:], color=style.colour, marker=style.marker, ms=4.5, zorder=zorder)


def draw_band(ax: Axes, table: pd.DataFrame, style: ArmStyle) -> None:
    """The range of the seeds."""
    if table.shape[1] > 1:
        ax.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=style.colour, alpha=0.14, lw=0)


def thin_out(table: pd.DataFrame, log: bool) -> pd.DataFrame:
    """At most ``MOST_POINTS`` rows, evenly spaced on the axis that they are drawn on; a log axis has no step 0."""
    if log:
        table = table[table.index > 0]
    if len(table) <= MOST_POINTS:
        return table
    spaced = np.geomspace(1, len(table), MOST_POINTS) if log else np.linspace(1, len(table), MOST_POINTS)
    return table.iloc[np.unique(spaced.astype(int)) - 1]


def step_range(tables: Iterable[Mapping[str, pd.DataFrame]]) -> tuple[float, float]:
    """The first step above 0 and the last step of several ``by_step``; (1, 1) if there is none."""
    indices = [table.index for group in tables for table in group.values() if len(table)]
    first = [index[index > 0].min() for index in indices if (index > 0).any()]
    return min(first, default=1), max((index.max() for index in indices), default=1)


def is_log(first: float, last: float) -> bool:
    return last / first >= _LOG_FROM


def step_axis(ax: Axes, first: float, last: float, log: bool) -> None:
    """Label and limit the x axis; on a log axis step 0 is not shown."""
    ax.set_xlabel("step")
    if log:
        ax.set_xscale("log")
        ax.set_xlim(left=max(first, last / _LOG_LEFT), right=last * 1.06)
        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
        ax.minorticks_off()
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        ax.set_xlim(left=0, right=last * 1.015)
    ax.xaxis.set_major_formatter(FuncFormatter(_step_words))


def _step_words(step: float, _: object = None) -> str:
    return f"{step / 1000:g}K" if step >= 1000 else f"{step:g}"
