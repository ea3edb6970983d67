"""Tables of gates and stopping rules: counts over seeds, readings of the worst verdicts, what the rules found."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from analysis.health.gates import GATES, VERDICTS, gate_names, worst_rows
from analysis.tables.table import DASH, Cell, Table

TITLES = {
    "gates": "Runs that pass, warn and fail",
    "gate_readings": "Gates that do not pass everywhere",
    "stopping": "Stopping rules",
}
_TONE = {"fail": 2.0, "warn": 1.0, "pass": 0.0}
_ACTIONS = {"stop": "stop", "reduce_lr": "reduce the learning rate"}


def gate_table(gates: pd.DataFrame, arms: list[str]) -> Table:
    """A row per arm, a column per gate: how many runs pass, warn and fail."""
    names = gate_names(gates)
    counts: dict[tuple[str, str], Counter[str]] = {}
    earlier: Counter[tuple[str, str]] = Counter()
    specified: dict[tuple[str, str], Counter[str]] = {}
    for row in gates.itertuples():
        counts.setdefault((row.arm, row.gate), Counter())[row.verdict] += 1
        earlier[row.arm, row.gate] += VERDICTS.index(row.worst) < VERDICTS.index(row.verdict)
        if isinstance(row.specified, str) and row.specified != row.verdict:
            specified.setdefault((row.arm, row.gate), Counter())[row.specified] += 1
    rows = []
    for arm in arms:
        keys = [(arm, name) for name in names]
        if any(key in counts for key in keys):
            cells = (_count_cell(counts.get(key), earlier[key], specified.get(key)) for key in keys)
            rows.append([Cell(arm, len(rows)), *cells])
    return Table(["Model", *(f"{name} {GATES.get(name, '')}".strip() for name in names)], rows)


def _count_cell(count: Counter[str] | None, earlier: int, specified: Counter[str] | None) -> Cell:
    if not count:
        return Cell(DASH)
    remarks = [f"{earlier} worse earlier"] if earlier else []
    remarks += [f"as specified: {_counted(specified)}"] if specified else []
    judged = sum(_TONE.get(verdict, 0.0) * count[verdict] for verdict in VERDICTS)
    return Cell(_counted(count) + (f" ({'; '.join(remarks)})" if remarks else ""), judged)


def _counted(count: Counter[str]) -> str:
    return ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])


def worst_table(gates: pd.DataFrame, arms: list[str]) -> Table:
    """A row per arm and gate that does not pass in every run: the worst verdict, in how many runs, a reading of it."""
    rows = []
    for row in worst_rows(gates, arms):
        where = f"seed {row['seed_init']}" if row["seed_init"] == row["seed_data"] else row["folder"]
        rows.append(
            [
                Cell(row["arm"], len(rows)),
                Cell(row["gate"], row["gate"]),
                Cell(row["verdict"], _TONE[row["verdict"]]),
                Cell(f"{row['count']} of {row['runs']}", row["count"]),
                Cell(row["reading"] or DASH, row["reading"] or None),
                Cell(where, row["seed_init"]),
            ]
        )
    return Table(["Model", "Gate", "Verdict", "Runs", "Reading of one", "In"], rows)


def event_table(events: pd.DataFrame, arms: list[str]) -> Table:
    """A row per arm, rule and action: in how many runs it fired, when first, and whether it acted."""
    rows = []
    place = {arm: i for i, arm in enumerate(arms)}
    groups = events.groupby(["arm", "rule", "action", "acted"], sort=False)
    for (arm, rule, action, acted), own in sorted(groups, key=lambda item: place[str(item[0][0])]):
        first = own.loc[own["step"].astype(float).idxmin()] if own["step"].notna().any() else own.iloc[0]
        step = f"{first['step']:,.0f}" if first["step"] == first["step"] and first["step"] is not None else DASH
        runs = len(own[["seed_init", "seed_data"]].drop_duplicates())
        rows.append(
            [
                Cell(str(arm), len(rows)),
                Cell(str(rule), str(rule)),
                Cell(_ACTIONS.get(str(action), str(action)), str(action)),
                Cell("yes" if acted else "no, noted only", float(acted)),
                Cell(str(runs), runs),
                Cell(step, None if step == DASH else float(first["step"])),
                Cell(first["reason"] or DASH, first["reason"] or None),
            ]
        )
    return Table(["Model", "Rule", "Asks to", "Acted", "Runs", "First at step", "Reason of the first"], rows)
