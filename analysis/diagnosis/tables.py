"""Tables of what the branches do: in words for the page, raw numbers (a row per run and more) for CSV files."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from analysis.diagnosis.necessity import INTERVENTIONS, Cost, costs
from analysis.diagnosis.records import ALL_LAYERS, FULL, Diagnoses
from analysis.diagnosis.words import branch_name, interval_words, path_name
from analysis.statistics.elementary import mean_sd
from analysis.tables.table import DASH, Cell, Table, number_cell
from analysis.words import PM, signed

TITLES = {
    "branches": "Loss increase without a branch, in all layers at once",
    "reach": "How far a token reaches",
    "branch_gates": "Gates by layer",
    "branch_outputs": "Outputs of the branches by layer",
    "updates": "Size of an update relative to the weights",
}
WORDS = {
    "branches": (
        f"Nats per token, mean over seeds {PM} half of its 95% t interval (one seed: over validation windows). "
        "A branch is all that it does, short convolution and token shift as well as recurrence. "
        "Control: the outputs moved as far in random directions. In parentheses: not shown to matter, because the "
        "interval includes zero or the increase is not shown to exceed its control. Intervals are not corrected for "
        "the number of arms."
    ),
    "reach": (
        "Influence: mean KL divergence, in nats, between the predictions with and without a change of one token, so "
        "many tokens later; through one branch, only that one may carry the change forward. Median over seeds, their "
        "range in parentheses."
    ),
    "branch_gates": (
        "Gate: share of the first branch. Start: measured on the freshly initialised model. Spread: standard deviation "
        "over tokens. Saturated: share of gates below 0.05 and above 0.95. Means over seeds."
    ),
    "branch_outputs": (
        "RMS of what a branch puts out, before and after its norm, and of what enters the sum (gate or gain applied); "
        "cosine: mean over positions between the two outputs. Means over seeds."
    ),
    "updates": f"Norm of one AdamW step over the norm of the weights: mean over seeds {PM} standard deviation.",
}
# The tables of ``Diagnoses`` that are written as they are, by the name of their file.
RAW = {
    "branches": "necessity",
    "reach": "influence",
    "branch_gates": "gates",
    "branch_outputs": "outputs",
    "updates": "updates",
    "half_lives": "half_lives",
    "loss_by_position": "position_loss",
    "gate_positions": "gate_positions",
    "gate_classes": "gate_classes",
}


def branch_tables(found: Diagnoses, arms: list[str]) -> dict[str, Table]:
    """The tables by name, those that there is data for, rows in the order of ``arms``."""
    arms = [arm for arm in arms if arm in found.arms]
    tables = {
        "branches": _necessity_table(found, arms),
        "reach": _reach_table(found, arms),
        "branch_gates": _gate_table(found["gates"], arms),
        "branch_outputs": _output_table(found, arms),
        "updates": _update_table(found["updates"], arms),
    }
    return {name: table for name, table in tables.items() if table.rows}


def _necessity_table(found: Diagnoses, arms: list[str]) -> Table:
    necessity = found["necessity"]
    everywhere = costs(necessity[necessity["layer"] == ALL_LAYERS])
    header = ["Model", "Branch", "Seeds"]
    for name in INTERVENTIONS.values():
        header += [name, "Control"]
    rows = []
    for arm in arms:
        for branch in found.branches(arm):
            own = [everywhere.get((arm, ALL_LAYERS, branch, intervention)) for intervention in INTERVENTIONS]
            if not any(own):
                continue
            seeds = max(cost.increase.seeds for cost in own if cost)
            cells = [cell for cost in own for cell in _cost_cells(cost)]
            rows.append([Cell(arm, len(rows)), Cell(branch_name(branch), branch), Cell(str(seeds), seeds), *cells])
    return Table(header, rows)


def _cost_cells(cost: Cost | None) -> list[Cell]:
    if cost is None or cost.increase.mean != cost.increase.mean:
        return [Cell(DASH), Cell(DASH)]
    words = interval_words(cost.increase)
    control = cost.control.mean
    control_cell = Cell(interval_words(cost.control), control) if control == control else Cell(DASH)
    return [Cell(words if cost.shown else f"({words})", cost.increase.mean), control_cell]


def _reach_table(found: Diagnoses, arms: list[str]) -> Table:
    influence = found["influence"]
    header = ["Model", "Through", "Influence at lag 1", "At the longest lag", "Down to a tenth at", "To a hundredth at"]
    rows = []
    for arm in arms:
        own = influence[influence["arm"] == arm]
        for path in _paths(own, found.branches(arm)):
            curves = [
                curve.sort_values("lag")[["lag", "nats"]].to_numpy(dtype=float)
                for _, curve in own[own["path"] == path].groupby(["seed_init", "seed_data"])
            ]
            first, last = ([curve[i, 1] for curve in curves] for i in (0, -1))
            falls = [[fall(*curve.T, share) for curve in curves] for share in (0.1, 0.01)]
            longest = max(curve[-1, 0] for curve in curves)
            cells = [_small(first), _small(last), *(_lags(values, longest) for values in falls)]
            rows.append([Cell(arm, len(rows)), Cell(path_name(path), path), *cells])
    return Table(header, rows)


def _paths(own: pd.DataFrame, branches: list[str]) -> list[str]:
    there = list(dict.fromkeys(own["path"]))
    leading = [path for path in (FULL, *branches) if path in there]
    return leading + [path for path in there if path not in leading]


def fall(lags: np.ndarray, nats: np.ndarray, share: float) -> float:
    """The lag at which ``nats`` first is down to ``share`` of its first value, between lags on straight lines of the
    log-log plot; infinite where that is beyond the last lag, NaN without a positive first value."""
    if not len(nats) or not nats[0] > 0:
        return math.nan
    goal = share * nats[0]
    below = np.flatnonzero(nats <= goal)
    if not len(below):
        return math.inf
    i = int(below[0])
    if not nats[i] > 0 or not lags[i - 1] > 0:
        return float(lags[i])
    part = math.log(nats[i - 1] / goal) / math.log(nats[i - 1] / nats[i])
    return float(lags[i - 1] * (lags[i] / lags[i - 1]) ** part)


def _small(values: list[float]) -> Cell:
    middle = float(np.median(values))
    if middle != middle:
        return Cell(DASH)
    spread = f" ({min(values):.2g}\N{EN DASH}{max(values):.2g})" if len(values) > 1 else ""
    return Cell(f"{middle:.2g}{spread}", middle)


def _lags(values: list[float], longest: float) -> Cell:
    values = sorted(value for value in values if value == value)
    if not values:
        return Cell(DASH)

    def word(value: float) -> str:
        return f"> {longest:.0f}" if math.isinf(value) else f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"

    middle = values[len(values) // 2]  # of an even number the later one: no mean with what is beyond the last lag
    low, high = word(values[0]), word(values[-1])
    spread = f" ({low}\N{EN DASH}{high})" if low != high else ""
    return Cell(word(middle) + spread, middle if math.isfinite(middle) else 2 * longest)


def _gate_table(gates: pd.DataFrame, arms: list[str]) -> Table:
    header = ["Model", "Layer", "Start", "Trained", "Change", "Spread", "Saturated low", "Saturated high"]
    rows = []
    means = gates.groupby(["arm", "layer"])[["start", "mean", "std", "saturated_low", "saturated_high"]]
    drift = (gates["mean"] - gates["start"]).groupby([gates["arm"], gates["layer"]]).agg(["mean", "std"])
    for (arm, layer), row in _in_order(means.mean(), arms):
        change, sd = drift.loc[(arm, layer)]
        shares = [_percent(row["saturated_low"]), _percent(row["saturated_high"])]
        values = [number_cell(row[name], 3) for name in ("start", "mean")]
        changed = (
            Cell(signed(change, 3) + (f" {PM} {sd:.3f}" if sd == sd else ""), change) if change == change else None
        )
        rows.append(
            [Cell(arm, len(rows)), _layer(layer), *values, changed or Cell(DASH), number_cell(row["std"], 3), *shares]
        )
    return Table(header, rows)


def _output_table(found: Diagnoses, arms: list[str]) -> Table:
    outputs = found["outputs"]
    means = outputs.groupby(["arm", "layer", "branch"])[["rms", "rms_normed", "contribution", "cosine"]].mean()
    branches = list(dict.fromkeys(branch for arm in arms for branch in found.branches(arm)))
    branches = [branch for branch in branches if branch in set(outputs["branch"])]
    named = ("rms", "RMS"), ("rms_normed", "after norm"), ("contribution", "in the sum")
    header = ["Model", "Layer", *(f"{branch_name(b)} {words}" for _, words in named for b in branches), "Cosine"]
    by_place = {(arm, layer): rows.droplevel(["arm", "layer"]) for (arm, layer), rows in means.groupby(level=[0, 1])}
    rows = []
    for arm in arms:
        for layer in sorted(place[1] for place in by_place if place[0] == arm):
            own = by_place[arm, layer]
            values = [own[name].get(branch, math.nan) for name, _ in named for branch in branches]
            cells = [number_cell(value, 3) for value in (*values, own["cosine"].mean())]
            rows.append([Cell(arm, len(rows)), _layer(layer), *cells])
    return Table(header, rows)


def _update_table(updates: pd.DataFrame, arms: list[str]) -> Table:
    groups = list(dict.fromkeys(updates["group"]))
    rows = []
    for arm in arms:
        own = updates[updates["arm"] == arm]
        cells = [_scientific(*mean_sd(own.loc[own["group"] == group, "ratio"].to_numpy())) for group in groups]
        if len(own):
            rows.append([Cell(arm, len(rows)), *cells])
    return Table(["Model", *map(branch_name, groups)], rows)


def _in_order(means: pd.DataFrame, arms: list[str]) -> list[tuple[tuple[str, int], pd.Series]]:
    place = {arm: i for i, arm in enumerate(arms)}
    return sorted(means.iterrows(), key=lambda item: (place[item[0][0]], item[0][1]))  # type: ignore[index,return-value]


def _layer(layer: int) -> Cell:
    return Cell(str(int(layer) + 1), int(layer))


def _percent(share: float) -> Cell:
    return Cell(f"{share:.1%}", float(share)) if share == share else Cell(DASH)


def _scientific(mean: float, sd: float) -> Cell:
    if mean != mean:
        return Cell(DASH)
    return Cell(f"{mean:.2e}" + (f" {PM} {sd:.1e}" if sd == sd else ""), mean)
