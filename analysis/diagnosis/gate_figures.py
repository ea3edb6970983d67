"""What trained gates do: their drift from the start, and maps by layer and position or class of token."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis.diagnosis.panels import (
    MOST_LAYERS,
    arm_panels,
    bottom_axes,
    colour_scale,
    layer_numbers,
    left_axes,
    number_map,
    remark,
)
from analysis.diagnosis.records import Diagnoses
from analysis.figures.style import FAINT, PAPER, ArmStyle

_SATURATED = 0.01  # shares below this are not worth a word
_CLASSES = ("letter", "capital", "digit", "space", "newline", "punctuation", "other")
_LEAST_RANGE = 0.02  # of the scale of colours: gates closer together than this look the same


def gate_drift(found: Diagnoses, arms: list[str], styles: dict[str, ArmStyle]) -> Figure | None:
    """A panel per gated arm: from the measured start to the trained mean of every layer, and how the gates spread."""
    gates = found["gates"]
    gates = gates[gates["mean"].notna()]
    shown = [arm for arm in arms if (gates["arm"] == arm).any()]
    if not shown:
        return None
    columns = ["start", "mean", "std", "saturated_low", "saturated_high"]
    means = gates[gates["arm"].isin(shown)].groupby(["arm", "layer"])[columns].mean()
    layers = sorted({int(layer) for _, layer in means.index})
    figure, axes = arm_panels(shown, styles, max(2.75, 0.26 * len(layers) + 0.5), 2.3, 3)
    for ax, arm in zip(axes, shown, strict=True):
        colour = styles[arm].colour
        for layer, row in means.loc[arm].iterrows():
            x = layers.index(int(layer))  # type: ignore[call-overload]
            spread = [max(row["mean"] - row["std"], 0), min(row["mean"] + row["std"], 1)]
            ax.plot([x, x], spread, color=colour, lw=5, alpha=0.3, solid_capstyle="butt")
            ax.plot([x, x], [row["start"], row["mean"]], color=colour, lw=1.2)
            ax.plot([x], [row["start"]], marker="o", ms=5, mfc=PAPER, color=FAINT, mew=1.2)
            ax.plot([x], [row["mean"]], marker="o", ms=5, color=colour)
            for name, y, side in (("saturated_low", -0.03, "top"), ("saturated_high", 1.03, "bottom")):
                if row[name] >= _SATURATED:
                    ax.text(x, y, f"{row[name]:.0%}", ha="center", va=side, fontsize=7, color=FAINT)
        every = -(-len(layers) // 12)
        ax.set_xticks(range(0, len(layers), every), layer_numbers(layers)[::every])
        ax.grid(axis="x", visible=False)
    axes[0].set_ylim(-0.12, 1.12)  # room for the shares of saturated gates
    axes[0].set_yticks(np.linspace(0, 1, 6))
    axes[0].set_xlim(-0.6, len(layers) - 0.4)
    for ax in bottom_axes(axes):
        ax.set_xlabel("layer")
    for ax in left_axes(axes):
        ax.set_ylabel("gate (share of the first branch)")
    words = "Ring: measured start; point: trained mean; bar: one standard deviation over tokens; "
    remark(figure, words + "%: gates below 0.05 or above 0.95. Means over seeds.")
    return figure


def gate_positions(found: Diagnoses, arms: list[str], styles: dict[str, ArmStyle]) -> Figure | None:
    """A map per gated arm: mean gate of every layer along the context."""
    return _maps(found["gate_positions"], "position", arms, styles, numbers=False)


def gate_classes(found: Diagnoses, arms: list[str], styles: dict[str, ArmStyle]) -> Figure | None:
    """A map per gated arm: mean gate of every layer by the class of the token."""
    return _maps(found["gate_classes"], "token_class", arms, styles, numbers=True)


def _maps(
    gates: pd.DataFrame, column: str, arms: list[str], styles: dict[str, ArmStyle], numbers: bool
) -> Figure | None:
    gates = gates[gates["gate"].notna() & gates["arm"].isin(arms)]
    tables = {
        str(arm): own.pivot_table(index="layer", columns=column, values="gate").iloc[:MOST_LAYERS]
        for arm, own in gates.groupby("arm")
    }
    shown = [arm for arm in arms if arm in tables]
    if not shown:
        return None
    values = np.concatenate([tables[arm].to_numpy(dtype=float).ravel() for arm in shown])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    norm = Normalize(low, max(high, low + _LEAST_RANGE))
    heights = [max(0.25 * len(tables[arm]) + 0.3, 1.1) for arm in shown]
    width = 0.52 * len(_CLASSES) + 0.2 if numbers else 2.9
    figure, axes = arm_panels(shown, styles, width, heights, 3, share=False, right=1.0)
    for ax, arm in zip(axes, shown, strict=True):
        table = tables[arm]
        if numbers:
            known = [name for name in _CLASSES if name in table] + [n for n in table if n not in _CLASSES]
            table = table[known]
        words = np.vectorize(lambda value: f"{value:.2f}".lstrip("0"))(table.to_numpy()) if numbers else None
        number_map(ax, table.to_numpy(dtype=float), norm, words)
        places = np.arange(len(table.columns))
        if numbers:
            ax.set_xticks(places, [str(name) for name in table.columns], fontsize=8, rotation=35, ha="right")
        else:
            ticks = places[:: max(1, len(places) // 6)]
            ax.set_xticks(ticks, [f"{table.columns[i]:g}" for i in ticks], fontsize=8)
            ax.set_xlabel("position")
        ax.set_yticks(range(len(table)), layer_numbers([int(layer) for layer in table.index]), fontsize=8)
    for ax in left_axes(axes):
        ax.set_ylabel("layer")
    colour_scale(figure, norm, "mean gate")
    count = int(gates["layer"].nunique())
    cut = f" Of {count} layers, the first {MOST_LAYERS}." if count > MOST_LAYERS else ""
    remark(figure, "Share of the first branch, means over seeds; one scale of colours for all arms." + cut)
    return figure
