"""What the gates of gated fusions do over training: the mean gate of every layer, from its measured start."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.over_steps import MOST_BANDS, draw_band, draw_line, step_axis, step_range, thin_out
from analysis.figures.style import FAINT, ArmStyle, name_arms

MOST_LAYERS = 16  # panels; of more layers, evenly spaced ones are shown
_COLUMNS = 4


def gate_values(
    logged: pd.DataFrame, runs: pd.DataFrame, arms: list[str], styles: dict[str, ArmStyle]
) -> Figure | None:
    """A panel per layer, a line per arm that has gates; None where no arm has.

    ``logged`` is steps.Logged's list ``gate_mean`` (the share of the first branch, per block with a gate), its
    ``run`` the index of ``runs``.
    """
    gates = _over_seeds(logged, runs, arms)
    if gates.empty:
        return None
    layers = sorted(gates["place"].unique())
    shown = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, min(MOST_LAYERS, len(layers))).astype(int))]
    with_gates = set(gates["arm"])
    gated = [arm for arm in arms if arm in with_gates]
    tables = {layer: _tables(gates[gates["place"] == layer], gated) for layer in shown}
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    height = max(2.1 * rows + 0.7, 0.19 * len(gated) + 0.8)
    figure = Figure(figsize=(2.9 * columns + 0.6, height))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    figure.subplots_adjust(left=0.06, right=0.97, bottom=0.55 / height, wspace=0.12, hspace=0.28)

    first, last = step_range(tables.values())
    for ax, layer in zip(axes, shown, strict=False):
        for order, (arm, table) in enumerate(reversed(tables[layer].items())):
            thinned = thin_out(table, log=False)
            if len(gated) <= MOST_BANDS:
                draw_band(ax, thinned[["min", "max"]], styles[arm])
            draw_line(ax, thinned["mean"], styles[arm], 3 + 0.01 * order)
        ax.set_title(f"Layer {layer + 1} of {layers[-1] + 1}", fontsize=9.5)
        step_axis(ax, first, last, log=False)
        ax.label_outer()
    low, high = gates["min"].min(), gates["max"].max()
    room = max(0.06 * (high - low), 0.01)
    axes[0].set_ylim(max(low - room, -0.02), min(high + room, 1.02))
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    for above in axes[max(0, len(shown) - columns) : columns * (rows - 1)]:  # nothing stands below these
        above.tick_params(labelbottom=True)
        above.set_xlabel("step")
    for ax in axes[::columns]:
        ax.set_ylabel("mean gate")
    name_arms(figure, _by_last_value(gates, gated), styles)
    words = "Share of the first branch (RWKV-6 in a parallel block), mean over the validation split, from step 0 on; "
    spread = "bands: range of the seeds." if len(gated) <= MOST_BANDS else "means over seeds."
    figure.text(0.06, -0.005, words + spread, color=FAINT, fontsize=8.5, va="top")
    return figure


def _over_seeds(logged: pd.DataFrame, runs: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    """Mean, smallest and largest gate of each arm, layer and step, as far as all of the arm's runs go."""
    arm_of = runs["arm"].map({arm: i for i, arm in enumerate(arms)}).fillna(-1).to_numpy(dtype=int)
    codes = arm_of[runs.index.get_indexer(logged["run"])]
    kept = ((logged["kind"] == "eval") & logged["value"].notna()).to_numpy() & (codes >= 0)
    rows = logged.loc[kept, ["place", "step", "value"]].assign(arm=codes[kept])
    found = rows.groupby(["arm", "place", "step"])["value"].agg(["mean", "min", "max", "count"]).reset_index()
    found = found[found["count"] == found.groupby(["arm", "place"])["count"].transform("max")]
    found["arm"] = pd.Categorical.from_codes(found["arm"], arms)  # much faster to group by than texts
    return found


def _tables(gates: pd.DataFrame, arms: list[str]) -> dict[str, pd.DataFrame]:
    """Per arm: mean, min and max by step, of one layer."""
    groups = {
        arm: group.set_index("step")[["mean", "min", "max"]] for arm, group in gates.groupby("arm", observed=True)
    }
    return {arm: groups[arm] for arm in arms if arm in groups}


def _by_last_value(gates: pd.DataFrame, arms: list[str]) -> list[str]:
    """The arms in the order that their curves end in, highest first."""
    ends = gates[gates["step"] == gates.groupby("arm", observed=True)["step"].transform("max")]
    last = ends.groupby("arm", observed=True)["mean"].mean()
    return sorted(arms, key=lambda arm: -last[arm])
