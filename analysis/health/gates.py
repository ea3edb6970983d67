"""The validation gates and stopping rules of runs, from their summaries: what was found, and the worst verdicts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.records.json_files import number, whole
from analysis.records.runs import Run

VERDICTS = ("fail", "warn", "pass", "n/a")  # worst first
GATES = {
    "G0": "kernels",
    "G1": "forward",
    "G2": "initial entropy",
    "G3": "first steps",
    "G3.5": "state health",
    "G4": "balance",
}
# ``worst`` with its step: over the run; ``specified``: the verdict by the specification's reading, if there are two.
GATE_COLUMNS = ["arm", "seed_init", "seed_data", "gate", "verdict", "value", "reading", "worst", "worst_step"]
GATE_COLUMNS += ["specified", "folder"]
EVENT_COLUMNS = ["arm", "seed_init", "seed_data", "rule", "step", "action", "acted", "reason", "folder"]


@dataclass(frozen=True)
class Health:
    """What gates and stopping rules said of the runs of a report; rows in the order of the runs."""

    gates: pd.DataFrame  # GATE_COLUMNS
    events: pd.DataFrame  # EVENT_COLUMNS


def read_health(runs: Iterable[Run]) -> Health:
    """From the summaries only; what is no verdict or no event counts for none."""
    runs = list(runs)
    gates = [(run.arm, *run.seeds, *row, run.folder) for run in runs for row in _gates(run)]
    events = [(run.arm, *run.seeds, *row, run.folder) for run in runs for row in _events(run)]
    return Health(pd.DataFrame(gates, columns=GATE_COLUMNS), pd.DataFrame(events, columns=EVENT_COLUMNS))


def _gates(run: Run) -> Iterator[tuple[Any, ...]]:
    gates = run.summary.get("gates")
    for name, gate in gates.items() if isinstance(gates, dict) else ():
        if isinstance(gate, dict) and gate.get("verdict") in VERDICTS:
            worst = gate.get("worst") if gate.get("worst") in VERDICTS else gate["verdict"]
            reading = " ".join(str(gate.get("reading") or "").split())[:300]
            specified = gate.get("specified")
            specified = specified.get("verdict") if isinstance(specified, dict) else None
            specified = specified if specified in VERDICTS else None
            value, step = number(gate.get("value")), whole(gate.get("worst_step"))
            yield str(name), gate["verdict"], value, reading, worst, step, specified


def _events(run: Run) -> Iterator[tuple[Any, ...]]:
    stopping = run.summary.get("stopping")
    events = stopping.get("events") if isinstance(stopping, dict) else None
    for event in events if isinstance(events, list) else ():
        if isinstance(event, dict) and isinstance(event.get("rule"), str):
            reason = " ".join(str(event.get("reason") or "").split())[:300]
            action, acted = str(event.get("action")), event.get("acted") is True
            yield event["rule"], whole(event.get("step")), action, acted, reason


def stopped_by(run: Run) -> str | None:
    """The rule that stopped a run; None where none did."""
    return next((rule for rule, _, action, acted, _ in _events(run) if acted and action == "stop"), None)


def gate_names(gates: pd.DataFrame) -> list[str]:
    """The gates that there are, in the order of their numbers."""

    def key(name: str) -> tuple[bool, float, str]:
        found = re.fullmatch(r"G(\d+(?:\.\d+)?)", name)
        return found is None, float(found[1]) if found else 0.0, name

    return sorted(set(gates["gate"]), key=key)


def worst_rows(gates: pd.DataFrame, arms: list[str], least: str = "warn") -> list[dict[str, Any]]:
    """Of every arm and gate with a verdict of ``least`` or worse: the worst run's row, ``count`` runs with that
    verdict of ``runs`` that were judged.

    Among several runs with the worst verdict, the one whose value is farthest from the middle of the arm's values: an
    example, and the worst reading only where values go wrong in one direction and decide alone.
    """
    found = []
    order = {name: i for i, name in enumerate(gate_names(gates))}
    place = {arm: i for i, arm in enumerate(arms)}
    judged = gates[gates["verdict"] != "n/a"].assign(rank=lambda rows: rows["verdict"].map(VERDICTS.index))
    worst_of = judged.groupby(["arm", "gate"])["rank"].transform("min")
    for _, own in judged[worst_of <= VERDICTS.index(least)].groupby(["arm", "gate"], sort=False):
        worst = own[own["rank"] == own["rank"].min()]
        away = (worst["value"] - own["value"].median()).abs().fillna(-1.0)
        row = worst.drop(columns="rank").loc[away.idxmax()].to_dict()
        found.append(row | {"count": len(worst), "runs": len(own)})
    return sorted(found, key=lambda row: (place[row["arm"]], order[row["gate"]]))
