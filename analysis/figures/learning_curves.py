"""Learning curves: training and validation loss against step, and the difference from the baseline."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.comparison.compare import Comparison
from analysis.figures.curves import LostRun, drawn_arms
from analysis.figures.over_steps import (
    MOST_BANDS,
    by_step,
    draw_band,
    draw_line,
    is_log,
    seed_mean,
    step_axis,
    step_range,
    thin_out,
)
from analysis.figures.style import FAINT, INK, ArmStyle, label_ends, shorten

MOST_THIN_LINES = 100  # more single runs than this are not drawn one by one
_SETTLED = 0.1  # the panels of losses leave out what is higher than all is after this share of the steps
_SETTLED_LOG = 0.03  # the same where the steps are on a log axis


def learning_curves(
    comparison: Comparison, steps: pd.DataFrame, lost: list[LostRun], styles: dict[str, ArmStyle]
) -> Figure:
    """Draw the figure. ``steps`` is StepReader.read's rows with ``run`` being the index of ``comparison.runs``."""
    arms = drawn_arms(comparison)
    train = by_step(steps, comparison.runs, arms, "train", "loss")
    val = by_step(steps, comparison.runs, arms, "eval", "val_loss")
    differences = _differences(comparison, val)
    panels = 3 if differences else 2
    labels = sum(styles[arm].named for arm in arms)
    figure = Figure(figsize=(4.3 * panels, max(4.2, 0.19 * labels + 0.8)))
    axes = figure.subplots(1, panels, gridspec_kw={"wspace": 0.22})
    figure.subplots_adjust(left=0.05, right=0.86, top=0.92, bottom=0.12)

    window = max(1, max((len(table) for table in train.values()), default=0) // 50)
    first, last = step_range([train, val])
    log = is_log(first, last)
    smoothed = {arm: table.rolling(window, min_periods=1, center=True).mean() for arm, table in train.items()}

    _draw(axes[0], comparison, smoothed, styles, log)
    _draw(axes[1], comparison, val, styles, log, seeds=True)
    average = f", mean of {window} logged steps" if window > 1 else ""
    axes[0].set_title(f"Training loss{average}")
    axes[1].set_title("Validation loss")
    axes[0].set_ylabel("nats per token")
    _limit_losses(axes[0], smoothed, last, log)
    _limit_losses(axes[1], val, last, log)
    for run in lost:
        _draw_lost(axes[0], run, styles, "train", "loss", window)
        _draw_lost(axes[1], run, styles, "eval", "val_loss", 1)
    if differences:
        _draw_differences(axes[2], comparison, differences, styles)
    for ax, tables in zip(axes, (train, val, differences), strict=False):
        step_axis(ax, step_range([tables])[0], last, log and tables is not differences)

    drawn, shown = (
        (axes[2], differences) if differences else (axes[1], val if any(map(len, val.values())) else smoothed)
    )
    ends = [(_last(shown[arm]), arm, styles[arm]) for arm in arms if styles[arm].named and arm in shown]
    if len(ends) > 1:
        label_ends(drawn, [end for end in ends if end[0] == end[0]])
    _remark(figure, comparison, lost, styles, set(differences), sum(table.shape[1] for table in val.values()))
    return figure


def _differences(comparison: Comparison, val: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Per arm: validation loss minus that of the baseline in the same block, steps by shared blocks."""
    blocks = comparison.runs[["seed_init", "seed_data"]].apply(tuple, axis=1)
    tables = {arm: table.rename(columns=blocks) for arm, table in val.items()}
    base, found = tables[comparison.baseline.arm], {}
    for arm, table in tables.items():
        if arm == comparison.baseline.arm or not comparison.difference(arm)["comparable"]:
            continue
        shared = [block for block in table.columns if block in set(base.columns)]
        difference = (table[shared] - base[shared]).dropna()
        if shared and len(difference) > 1:
            found[arm] = difference
    if found:
        found[comparison.baseline.arm] = pd.DataFrame({"baseline": 0.0}, index=base.dropna(how="all").index)
    return found


def _draw(
    ax: Axes,
    comparison: Comparison,
    tables: dict[str, pd.DataFrame],
    styles: dict[str, ArmStyle],
    log: bool,
    seeds: bool = False,
) -> None:
    """Means over seeds, as far as all of an arm's runs go, over bands; thin single runs where bands would be a blur."""
    bands, single = _spread(len(tables), sum(table.shape[1] for table in tables.values()))
    for order, arm in enumerate(reversed(tables)):
        table, style = thin_out(tables[arm], log), styles[arm]
        if bands:
            draw_band(ax, table, style)
        elif seeds and single and table.shape[1] > 1 and style.named:
            ax.plot(table.index, table, color=style.colour, lw=0.6, alpha=0.35, zorder=2)
        draw_line(ax, seed_mean(table), style, 3 + 0.01 * order)


def _spread(arms: int, runs: int) -> tuple[bool, bool]:
    """Whether so many curves leave room for bands, and if not, for thin lines of single runs."""
    return arms <= MOST_BANDS, arms > MOST_BANDS and runs <= MOST_THIN_LINES


def _limit_losses(ax: Axes, tables: dict[str, pd.DataFrame], last: float, log: bool = False) -> None:
    """Leave the first steep fall out of the panel: it would press everything else into a line.

    Where too few points are left to make a curve, the whole one is shown.
    """
    means = [table.mean(axis=1) for table in tables.values() if len(table)]
    if not means:
        ax.text(0.5, 0.5, "nothing logged", transform=ax.transAxes, ha="center", color=FAINT)
        return
    low = min(mean.min() for mean in means)
    settled = [mean[mean.index >= (_SETTLED_LOG if log else _SETTLED) * last] for mean in means]
    if max(len(mean) for mean in settled) < 2:
        settled = means
    high = max(mean.max() if len(mean) else low for mean in settled)
    room = max(high - low, 1e-3)
    ax.set_ylim(low - 0.05 * room, high + 0.08 * room)


def _draw_lost(ax: Axes, run: LostRun, styles: dict[str, ArmStyle], kind: str, column: str, window: int) -> None:
    """A dotted line as far as the run came, a cross at its end if it broke down."""
    rows = run.steps[(run.steps["kind"] == kind) & run.steps[column].notna()]
    if rows.empty:
        return
    losses = rows.set_index("step")[column].sort_index().rolling(window, min_periods=1).mean()
    colour = styles[run.arm].colour if run.arm in styles else FAINT
    ax.plot(losses.index, losses, color=colour, lw=1.0, ls=(0, (1, 1.5)), zorder=2.5)
    if run.kind in ("diverged", "failed"):
        low, high = ax.get_ylim()
        y = min(max(losses.iloc[-1], low), high)
        ax.plot(losses.index[-1:], [y], color=colour, marker="x", ms=7, mew=1.8, zorder=4, clip_on=False)


def _draw_differences(
    ax: Axes, comparison: Comparison, differences: dict[str, pd.DataFrame], styles: dict[str, ArmStyle]
) -> None:
    """On a linear axis: here the end matters, not the first fall."""
    baseline = comparison.baseline.arm
    bands = len(differences) <= MOST_BANDS
    means = []
    for order, arm in enumerate(reversed([arm for arm in drawn_arms(comparison) if arm in differences])):
        table = thin_out(differences[arm], log=False)
        mean, style = table.mean(axis=1), styles[arm]
        means.append(mean)
        if bands:
            draw_band(ax, table, style)
        draw_line(ax, mean, style, 3 + 0.01 * order, mark_end=True)
    late = [mean[mean.index >= 0.25 * mean.index.max()] for mean in means]
    low, high = min(mean.min() for mean in late), max(mean.max() for mean in late)
    room = max(high - low, 1e-4)
    ax.set_ylim(low - 0.12 * room, high + 0.12 * room)
    ax.set_title(f"Validation loss minus that of {shorten(baseline, 24)}")
    ax.axhline(0.0, color=INK, lw=0.8, zorder=1)


def _last(table: pd.DataFrame) -> float:
    mean = seed_mean(table)
    return float(mean.iloc[-1]) if len(mean) else float("nan")


def _remark(
    figure: Figure,
    comparison: Comparison,
    lost: list[LostRun],
    styles: dict[str, ArmStyle],
    compared: set[str],
    runs_drawn: int,
) -> None:
    remarks = []
    if comparison.runs["arm"].duplicated().any():
        bands, single = _spread(len(drawn_arms(comparison)), runs_drawn)
        spread = ", bands the range of the seeds" if bands else ", thin lines single runs" if single else ""
        remarks.append(f"lines are means over seeds{spread}")
    if compared:
        remarks.append("differences are paired by seed")
    arms = drawn_arms(comparison)
    grey = sum(not styles[arm].named for arm in arms)
    if grey:
        remarks.append(f"grey: {grey} other arms")
    if len(arms) < len(comparison.arms):
        remarks.append(f"{len(comparison.arms) - len(arms)} arms with higher means are not drawn")
    unpaired = [arm for arm in arms if arm not in compared]
    if compared and unpaired:
        remarks.append(f"not in the right panel: {', '.join(unpaired[:4])}{' and others' if len(unpaired) > 4 else ''}")
    if lost:
        remarks.append("dotted: runs that do not count (a cross where one diverged or failed)")
    if remarks:
        figure.text(0.05, -0.005, "; ".join(remarks).capitalize() + ".", color=FAINT, fontsize=8.5, va="top")
