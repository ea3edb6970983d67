"""Final loss: a dot per seed, mean and interval per arm, with the paired differences beside them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.comparison.compare import Comparison, block_table
from analysis.figures.style import FAINT, GRID, INK, PAPER, ArmStyle, shorten
from analysis.records.runs import LeftOut
from analysis.statistics.elementary import t_interval
from analysis.words import METRIC_WORDS, p_number, signed

MOST_ROWS = 40


def final_loss(comparison: Comparison, left_out: list[LeftOut], styles: dict[str, ArmStyle]) -> Figure:
    """Draw the figure: one row per arm, best mean on top; at most ``MOST_ROWS`` of them, and the baseline."""
    baseline = comparison.baseline.arm
    shown = [arm for i, arm in enumerate(comparison.arms) if i < MOST_ROWS or arm == baseline]
    lost = {arm: Counter() for arm in shown}
    for item in left_out:
        if item.arm and item.kind in ("diverged", "failed") and (item.arm in lost or item.arm not in comparison.arms):
            lost.setdefault(item.arm, Counter())[item.kind] += 1
    rows = [*shown, *(arm for arm in lost if arm not in shown)][: MOST_ROWS + 5]
    place = {arm: len(rows) - 1 - i for i, arm in enumerate(rows)}

    paired = len(shown) > 1 and (comparison.differences["pairs"] > 0).any()
    height = 0.33 * len(rows) + 1.0  # inches, like the margins below
    figure = Figure(figsize=(12.2 if paired else 7.5, height))
    axes = figure.subplots(1, 2 if paired else 1, sharey=True, squeeze=False, gridspec_kw={"wspace": 0.06})[0]
    figure.subplots_adjust(left=0.16, right=0.74 if paired else 0.97, bottom=0.6 / height, top=1 - 0.4 / height)

    _draw_losses(axes[0], comparison, shown, place, styles)
    if paired:
        _draw_differences(axes[1], comparison, shown, place, styles)
    for ax in axes:
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0, pad=9)
        ax.spines["left"].set_visible(False)
        for y in range(0, len(rows), 2):
            ax.axhspan(y - 0.5, y + 0.5, color=GRID, alpha=0.45, lw=0, zorder=0)
    labels = [_row_label(arm, arm == baseline and len(shown) > 1, lost[arm]) for arm in rows]
    axes[0].set_yticks([place[arm] for arm in rows], labels)
    for label, arm in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_color(INK if arm in shown else FAINT)
        label.set_fontweight("bold" if arm == baseline else "normal")
    for arm in rows[len(shown) :]:
        across = axes[0].get_yaxis_transform()
        axes[0].text(
            0.5, place[arm], "no usable run", transform=across, color=FAINT, ha="center", va="center", size=8.5
        )
    _footnote(figure, comparison, shown, paired)
    return figure


def _footnote(figure: Figure, comparison: Comparison, shown: list[str], paired: bool) -> None:
    remarks = []
    if comparison.runs["arm"].duplicated().any():
        remarks.append("dots: seeds; lines: 95% t intervals of the mean, with an arrow where one leaves the panel")
    if paired:
        remarks.append("filled marker and bold: difference shown (adjusted p < 0.05)")
    hidden = len(comparison.arms) - len(shown)
    if hidden:
        remarks.append(f"{hidden} arms with a higher mean are not shown")
    if remarks:
        text = "; ".join(remarks)
        figure.text(
            0.16, 0.08 / figure.get_figheight(), f"{text[0].upper()}{text[1:]}.", color=FAINT, fontsize=8.5, va="top"
        )


def _row_label(arm: str, is_baseline: bool, lost: Counter) -> str:
    words = [f"{count} {kind}" for kind, count in lost.items()]
    if is_baseline:
        words.insert(0, "baseline")
    return shorten(arm) + (f" ({', '.join(words)})" if words else "")


def _draw_losses(
    ax: Axes, comparison: Comparison, shown: list[str], place: dict[str, int], styles: dict[str, ArmStyle]
) -> None:
    values = {arm: group[comparison.metric].to_numpy() for arm, group in comparison.runs.groupby("arm")}
    everything = np.concatenate([values[arm] for arm in shown])
    intervals = {arm: t_interval(values[arm]) for arm in shown}
    _set_limits(ax, everything, intervals.values())
    for arm in shown:
        _row(ax, place[arm], values[arm], intervals[arm], styles[arm], filled=True)
    ax.set_title(f"{METRIC_WORDS[comparison.metric].capitalize()}")
    ax.set_xlabel("nats per token")


def _draw_differences(
    ax: Axes, comparison: Comparison, shown: list[str], place: dict[str, int], styles: dict[str, ArmStyle]
) -> None:
    baseline = comparison.baseline.arm
    blocks = block_table(comparison.runs, comparison.metric)
    others = [arm for arm in shown if arm != baseline]
    frame = comparison.differences[comparison.differences["metric"] == comparison.metric].set_index("arm")
    pairs = {
        arm: (blocks.loc[arm] - blocks.loc[baseline]).dropna().to_numpy() if frame.loc[arm, "pairs"] else np.array([])
        for arm in others
    }
    intervals = {arm: (frame.loc[arm, "low"], frame.loc[arm, "high"]) for arm in others}
    _set_limits(ax, np.concatenate([*pairs.values(), [0.0]]), intervals.values())
    ax.axvline(0.0, color=INK, lw=1.1, zorder=1.5)
    for arm in others:
        if len(pairs[arm]):
            _row(ax, place[arm], pairs[arm], intervals[arm], styles[arm], filled=bool(frame.loc[arm, "shown"]))
    ax.plot([0.0], [place[baseline]], color=INK, marker=styles[baseline].marker, ms=6, zorder=4)

    ax.set_title(f"Difference from {baseline if len(baseline) <= 14 else 'the baseline'}")
    ax.set_xlabel("nats per token (below 0 is better)")
    _write_columns(ax, frame, others, place)


def _row(ax: Axes, y: int, values: np.ndarray, interval: tuple[float, float], style: ArmStyle, filled: bool) -> None:
    """Seeds as faint dots, the mean as the arm's marker, the interval as a line, with an arrow where it is cut."""
    if len(values) > 1:
        offsets = (np.arange(len(values)) - (len(values) - 1) / 2) * min(0.1, 0.4 / len(values))
        ax.scatter(values, y + offsets, s=13, color=style.colour, alpha=0.5, lw=0, zorder=2)
    low, high = ax.get_xlim()
    if not math.isnan(interval[0]):
        ends = max(interval[0], low), min(interval[1], high)
        ax.plot(ends, [y, y], color=style.colour, lw=1.6, zorder=3, solid_capstyle="butt")
        for end, limit, arrow in ((interval[0], low, "<"), (interval[1], high, ">")):
            if (end < limit) if arrow == "<" else (end > limit):
                ax.plot([limit], [y], color=style.colour, marker=arrow, ms=5, clip_on=False, zorder=3)
    face = style.colour if filled else PAPER
    ax.plot([values.mean()], [y], marker=style.marker, ms=7, mfc=face, mec=style.colour, mew=1.5, zorder=4)


def _set_limits(ax: Axes, dots: np.ndarray, intervals: object) -> None:
    """Room for all dots, and for intervals up to 1.5 times their spread to each side; longer ones get an arrow."""
    low, high = float(dots.min()), float(dots.max())
    spread = max(high - low, 5e-3 * abs(high), 1e-6)
    ends = [end for interval in intervals for end in interval if not math.isnan(end)]
    left = max(min([low, *ends]), low - 1.5 * spread)
    right = min(max([high, *ends]), high + 1.5 * spread)
    ax.set_xlim(left - 0.06 * spread, right + 0.06 * spread)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.ticklabel_format(axis="x", useOffset=False)


def _write_columns(ax: Axes, frame: pd.DataFrame, others: list[str], place: dict[str, int]) -> None:
    """Difference, interval, p and number of pairs as text, right of the panel."""
    columns = ((1.025, "left", "difference  [95% interval]"), (1.80, "right", "adjusted p"), (1.93, "right", "pairs"))
    across = ax.get_yaxis_transform()
    for x, side, header in columns:
        ax.text(
            x, max(place.values()) + 0.60, header, transform=across, ha=side, va="bottom", fontsize=8.5, color=FAINT
        )
    for arm in others:
        row = frame.loc[arm]
        n, difference, p = int(row["pairs"]), row["difference"], row["p_adjusted"]
        text = "not comparable" if not row["comparable"] else "no shared seed" if n == 0 else signed(difference)
        if not math.isnan(row["low"]):
            text += f"  [{signed(row['low'])}, {signed(row['high'])}]"
        words = (text, "" if math.isnan(p) else p_number(p), str(n) if n else "")
        for (x, side, _), word in zip(columns, words, strict=True):
            weight = "bold" if row["shown"] else "normal"
            ax.text(x, place[arm], word, transform=across, ha=side, va="center", fontsize=8.5, fontweight=weight)
