"""What disturbing one branch of one layer costs: a map of layers by branch and intervention, per arm."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure

from analysis.diagnosis.necessity import INTERVENTIONS, Cost, costs
from analysis.diagnosis.panels import MOST_LAYERS, arm_panels, colour_scale, left_axes, number_map, remark
from analysis.diagnosis.records import ALL_LAYERS, Diagnoses
from analysis.diagnosis.words import branch_name
from analysis.figures.style import FAINT, ArmStyle
from analysis.words import signed

_LINEAR = 1e-3  # nats: the scale of colours is linear up to here, logarithmic beyond
_SHORT = {"zero": "zero", "mean": "mean", "shuffle": "shuffle"}


def necessity_map(found: Diagnoses, arms: list[str], styles: dict[str, ArmStyle]) -> Figure | None:
    """A panel per arm: a row per layer and one for all layers, a column per branch and intervention.

    Numbers are means over seeds, in parentheses where the branch is not shown to matter. None without any layer.
    """
    necessity = found["necessity"]
    known = costs(necessity[necessity["arm"].isin(arms) & necessity["increase"].notna()])
    shown = [arm for arm in arms if any(key[0] == arm for key in known)]
    if not shown:
        return None
    every = sorted({key[1] for key in known if key[1] != ALL_LAYERS})
    layers = every[:MOST_LAYERS]
    everywhere = any(key[1] == ALL_LAYERS for key in known)
    rows = [*([ALL_LAYERS] if everywhere else []), *layers]
    columns = {arm: [(b, i) for b in found.branches(arm) for i in INTERVENTIONS] for arm in shown}
    own_rows = {}
    for arm in shown:
        own_rows[arm] = [row for row in rows if any((arm, row, *column) in known for column in columns[arm])]
    tables = {
        arm: np.array([[_mean(known.get((arm, row, *column))) for column in columns[arm]] for row in own_rows[arm]])
        for arm in shown
    }
    norm = _norm(np.concatenate([table.ravel() for table in tables.values()]))
    most = max(map(len, columns.values()))
    heights = [max(0.27 * len(own_rows[arm]) + 0.25, 1.3) for arm in shown]
    figure, axes = arm_panels(shown, styles, 0.58 * most + 0.2, heights, 3, share=False, right=1.0)
    for ax, arm in zip(axes, shown, strict=True):
        table, listed = tables[arm], own_rows[arm]
        words = np.array(
            [[_words(known.get((arm, row, *column))) for column in columns[arm]] for row in listed], dtype=object
        )
        number_map(ax, table, norm, words)
        names = [_SHORT[intervention] for _, intervention in columns[arm]]
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set_yticks(range(len(listed)), ["all" if row == ALL_LAYERS else str(row + 1) for row in listed], fontsize=8)
        count = len(INTERVENTIONS)
        for i, branch in enumerate(found.branches(arm)):
            centre = count * i + (count - 1) / 2
            ax.annotate(branch_name(branch), (centre, 0), (0, -15), xycoords=ax.get_xaxis_transform(),
                        textcoords="offset points", ha="center", va="top", fontsize=8.5)  # fmt: skip
            if i:
                ax.axvline(count * i - 0.5, color=FAINT, lw=1.5)
        if listed[0] == ALL_LAYERS:
            ax.axhline(0.5, color=FAINT, lw=1.5)
        ax.set_xlim(-0.5, len(names) - 0.5)
    for ax in left_axes(axes):
        ax.set_ylabel("layer")
    colour_scale(figure, norm, "loss increase, nats per token", _ticks(norm))
    lines = "Means over seeds; in parentheses: not shown to matter (interval includes zero, or within the control)."
    remark(figure, lines + (f" Of {len(every)} layers, the first {MOST_LAYERS}." if len(every) > MOST_LAYERS else ""))
    return figure


def _mean(cost: Cost | None) -> float:
    return cost.increase.mean if cost else np.nan


def _words(cost: Cost | None) -> str:
    if cost is None:
        return ""
    value = cost.increase.mean
    text = signed(value, 2 if abs(value) >= 0.995 else 3).removeprefix("+")
    text = text.replace("0.", ".", 1) if abs(value) < 0.995 else text  # three digits have to fit into a cell
    return text if cost.shown else f"({text})"


def _norm(values: np.ndarray) -> Normalize:
    values = values[np.isfinite(values)]
    high = max(float(values.max()), 2 * _LINEAR)
    return SymLogNorm(_LINEAR, linscale=0.5, vmin=min(float(values.min()), 0.0), vmax=high, base=10)


def _ticks(norm: Normalize) -> list[float]:
    low, high = float(norm.vmin), float(norm.vmax)  # type: ignore[arg-type]
    powers = [10.0**k for k in range(-3, 4)]
    return [value for value in (*(-power for power in powers[::-1]), 0.0, *powers) if low <= value <= high]
