"""The health of the recurrent states over training, from the probe.jsonl of runs, read for a few runs only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.records.json_files import number, whole
from analysis.records.metrics_files import complete_lines
from analysis.records.runs import Run

FILE = "probe.jsonl"
MOST_RUNS = 60  # files that are read, the arms' first seeds before their second
MOST_ROWS = 80  # of one file; a curve shows no more
# What is drawn of each branch: how its layers are joined, and which reading of a layer. The worst of a cosine is the
# highest, of a novelty and of a rank the lowest.
READINGS = {"cosine": ("max", "worst"), "novelty": ("min", "worst"), "effective_rank": ("median", "median")}
COLUMNS = ["arm", "run", "step", "branch", *READINGS]


def read_probes(runs: Sequence[Run], arms: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """A row (``COLUMNS``) per run, probed step and branch of ``arms``; and a line for each file with unreadable rows.

    ``run`` is the place in ``runs``. Readings are joined over layers as ``READINGS`` says, NaN where there is none.
    """
    rows, notes = [], []
    for place in _first_seeds(runs, arms):
        run = runs[place]
        content = complete_lines(run.path / FILE)
        lines = content.splitlines()
        kept = np.unique(np.linspace(0, len(lines) - 1, min(MOST_ROWS, len(lines))).astype(int))
        bad = 0
        for i in kept:
            found = _parse(lines[i])
            bad += found is None
            rows += [(run.arm, place, *row) for row in found or []]
        if bad:
            notes.append(f"{run.folder}/{FILE}: {bad} unreadable lines skipped")
    frame = pd.DataFrame(rows, columns=COLUMNS).dropna(subset=list(READINGS), how="all")  # attention has no state
    return frame.drop_duplicates(["run", "step", "branch"], keep="last"), notes


def _first_seeds(runs: Sequence[Run], arms: Sequence[str]) -> list[int]:
    """Places of the runs that have a file, at most ``MOST_RUNS``: every arm's first, then every arm's second."""
    wanted, turn = set(arms), dict.fromkeys(arms, 0)
    listed = []
    for place, run in enumerate(runs):
        if run.arm in wanted and (run.path / FILE).exists():
            listed.append((turn[run.arm], place))
            turn[run.arm] += 1
    return sorted(place for _, place in sorted(listed)[:MOST_RUNS])


def _parse(line: bytes) -> list[tuple[Any, ...]] | None:
    """Step, branch and readings, a row per branch; None for a line that is no probe."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = whole(row.get("step")) if isinstance(row, dict) else None
    layers = row.get("layers") if isinstance(row, dict) else None
    if step is None or not isinstance(layers, list):
        return None
    by_branch: dict[str, list[list[float]]] = {}
    for layer in layers:
        branches = layer.get("branches") if isinstance(layer, dict) else None
        for branch, readings in branches.items() if isinstance(branches, dict) else ():
            if isinstance(readings, dict):
                values = [_reading(readings.get(name), part) for name, (_, part) in READINGS.items()]
                by_branch.setdefault(str(branch), []).append(values)
    return [(step, branch, *_joined(values)) for branch, values in by_branch.items()]


def _reading(value: Any, part: str) -> float:
    return number(value.get(part)) if isinstance(value, dict) else number(value)


def _joined(layers: list[list[float]]) -> list[float]:
    join = {"max": max, "min": min, "median": np.median}
    found = []
    for values, (how, _) in zip(zip(*layers, strict=True), READINGS.values(), strict=True):
        known = [value for value in values if value == value]
        found.append(float(join[how](known)) if known else float("nan"))
    return found
