"""How far a token reaches: influence against lag, half-lives of the recurrences, loss by position in the context."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.diagnosis.panels import (
    arm_panels,
    bottom_axes,
    branch_look,
    layer_numbers,
    left_axes,
    name_branches,
    remark,
)
from analysis.diagnosis.records import FULL, Diagnoses
from analysis.figures.over_steps import MOST_BANDS, draw_band, draw_line
from analysis.figures.style import FAINT, PAPER, ArmStyle, label_ends

_SEVERAL = "bands: range of the seeds."
_MOST_DECADES = 8  # below the largest influence; what is smaller is rounding


def influence_curves(found: Diagnoses, arms: list[str], styles: dict[str, ArmStyle]) -> Figure | None:
    """A panel per arm, a line through all paths and one per branch, both axes logarithmic. None without data."""
    influence = found["influence"]
    influence = influence[(influence["nats"] > 0) & (influence["lag"] > 0)]
    shown = [arm for arm in arms if (influence["arm"] == arm).any()]
    if not shown:
        return None
    there = influence.loc[influence["arm"].isin(shown), "path"]
    branches = [branch for arm in shown for branch in found.branches(arm)]
    order = dict.fromkeys([FULL, *branches, *there])
    paths = [path for path in order if path in set(there)]
    figure, axes = arm_panels(shown, styles, 2.75, 2.3, 3, right=1.35)
    for ax, arm in zip(axes, shown, strict=True):
        for path in paths:
            own = influence[(influence["arm"] == arm) & (influence["path"] == path)]
            if own.empty:
                continue
            table = own.pivot_table(index="lag", columns=["seed_init", "seed_data"], values="nats")
            draw_band(ax, table, styles[arm])
            (line, marker, filled), colour = branch_look(path), styles[arm].colour
            look = {"ls": line, "marker": marker or "", "ms": 3.5, "lw": 2.2 if path == FULL else 1.4}
            ax.plot(table.index, table.mean(axis=1), color=colour, mfc=colour if filled else PAPER, **look)
    values = influence.loc[influence["arm"].isin(shown), "nats"]
    axes[0].set_xscale("log", base=2)
    axes[0].set_yscale("log")
    axes[0].set_ylim(max(0.6 * values.min(), values.max() / 10**_MOST_DECADES), 1.6 * values.max())
    for ax in axes:
        ax.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_locator(NullLocator())
    for ax in bottom_axes(axes):
        ax.set_xlabel("tokens later")
    for ax in left_axes(axes):
        ax.set_ylabel("influence, nats")
    name_branches(figure, paths)
    text = "Mean KL divergence between the predictions with and without a change of one token"
    remark(figure, f"{text}; {_SEVERAL}" if _several_seeds(influence) else f"{text}.")
    return figure


def half_lives(found: Diagnoses, arms: list[str], styles: dict[str, ArmStyle]) -> Figure | None:
    """A panel per arm: per layer and branch the range of the half-lives, in tokens. None without data.

    Thick: median over heads and seeds of a head's 10th to 90th percentile, with a marker at its 50th. Thin: from the
    lowest 10th to the highest 90th of all heads. Triangles: beyond the axis.
    """
    lives = found["half_lives"]
    lives = lives[(lives["p50"] > 0) & lives["arm"].isin(arms)]
    shown = [arm for arm in arms if (lives["arm"] == arm).any()]
    finite = lives[["p10", "p50", "p90"]].to_numpy(dtype=float)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    if not shown or not finite.size:
        return None
    top, bottom = 4.0 * finite.max(), finite.min() / 1.5
    layers = sorted(int(layer) for layer in lives["layer"].unique())
    there = set(lives["branch"])
    known = dict.fromkeys(branch for arm in shown for branch in found.branches(arm) if branch in there)
    figure, axes = arm_panels(shown, styles, max(2.75, 0.2 * len(layers) + 0.5), 2.3, 3, right=1.15)
    for ax, arm in zip(axes, shown, strict=True):
        own = lives[lives["arm"] == arm]
        branches = [branch for branch in found.branches(arm) if branch in set(own["branch"])]
        for (layer, branch), heads in own[own["branch"].isin(branches)].groupby(["layer", "branch"]):
            x = layers.index(int(layer)) + 0.34 * (branches.index(str(branch)) - (len(branches) - 1) / 2)
            middle = heads[["p10", "p50", "p90"]].median()
            colour = styles[arm].colour
            for low, high, width in ((heads["p10"].min(), heads["p90"].max(), 0.8), (*middle[["p10", "p90"]], 2.6)):
                ax.plot([x, x], [max(low, bottom), min(high, top)], color=colour, lw=width, solid_capstyle="butt")
            _, marker, filled = branch_look(str(branch))
            if middle["p50"] < top:
                face = colour if filled else PAPER
                ax.plot([x], [middle["p50"]], marker=marker, ms=5, color=colour, mfc=face, mew=1.3)
            if heads["p90"].max() > top:
                ax.plot([x], [top], marker="^", ms=4.5, color=colour, clip_on=False)
        every = -(-len(layers) // 12)
        ax.set_xticks(range(0, len(layers), every), layer_numbers(layers)[::every])
    axes[0].set_yscale("log")
    axes[0].set_ylim(bottom, top)
    for ax in axes:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.minorticks_off()
        ax.grid(axis="x", visible=False)
    for ax in bottom_axes(axes):
        ax.set_xlabel("layer")
    for ax in left_axes(axes):
        ax.set_ylabel("half-life, tokens")
    name_branches(figure, list(known), lines=False)
    words = "Thick: a head's 10th to 90th percentile, marker: 50th (medians over heads and seeds); thin: all heads."
    beyond = " Triangle: some heads forget nothing." if np.isinf(lives["p90"]).any() else ""
    remark(figure, words + beyond)
    return figure


def loss_by_position(found: Diagnoses, arms: list[str], styles: dict[str, ArmStyle]) -> Figure | None:
    """A line per arm: the loss of a token against how much context it has. None without data."""
    losses = found["position_loss"]
    losses = losses[losses["loss"].notna() & losses["position"].notna()]
    shown = [arm for arm in arms if (losses["arm"] == arm).any()]
    if not shown:
        return None
    figure = Figure(figsize=(8.6, max(3.8, 0.19 * len(shown) + 0.8)))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.76, top=0.92, bottom=0.13)
    ends = []
    for order, arm in enumerate(reversed(shown)):
        table = losses[losses["arm"] == arm].assign(context=lambda rows: rows["position"] + 1)
        table = table.pivot_table(index="context", columns=["seed_init", "seed_data"], values="loss")
        if len(shown) <= MOST_BANDS:
            draw_band(ax, table, styles[arm])
        mean = pd.Series(table.mean(axis=1))
        draw_line(ax, mean, styles[arm], 3 + 0.01 * order)
        if styles[arm].named:
            ends.append((float(mean.iloc[-1]), arm, styles[arm]))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()
    ax.margins(x=0.01)
    ax.set_title("Loss by position in the context")
    ax.set_xlabel("tokens of context (first position of a bin)")
    ax.set_ylabel("nats per token")
    label_ends(ax, ends)
    spread = f", {_SEVERAL}" if len(shown) <= MOST_BANDS and _several_seeds(losses) else "."
    figure.text(0.08, -0.005, f"Means over seeds{spread}", color=FAINT, fontsize=8.5, va="top")
    return figure


def _several_seeds(rows: pd.DataFrame) -> bool:
    return bool((rows.groupby("arm")[["seed_init", "seed_data"]].nunique().max(axis=1) > 1).any())
