"""Reads the diagnosis.json of run folders into tidy tables. What cannot be used is named in one line and skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.records.json_files import load_object, number, whole
from analysis.records.runs import Run

SCHEMA = "groundthink.diagnosis/1"
FILE = "diagnosis.json"
ALL_LAYERS = -1  # in the column ``layer`` of ``necessity``: the branch is disturbed in all layers at once
FULL = "full"  # in the column ``path`` of ``influence``: through everything, not through one branch only

# The columns of every table behind arm, seed_init and seed_data. Layers, heads and positions count from 0.
COLUMNS = {
    # nats per token: what disturbing the branch adds to the loss, and what as long a move in random directions adds
    "necessity": ("layer", "branch", "intervention", "increase", "error", "control", "control_error"),
    "influence": ("path", "lag", "nats"),  # mean KL between predictions with and without a change ``lag`` tokens ago
    "half_lives": ("layer", "branch", "head", "p10", "p50", "p90"),  # tokens, infinite where nothing is forgotten
    "position_loss": ("position", "loss"),
    "gates": ("layer", "start", "mean", "std", "saturated_low", "saturated_high"),
    "gate_positions": ("layer", "position", "gate"),
    "gate_classes": ("layer", "token_class", "gate"),
    "outputs": ("layer", "branch", "rms", "rms_normed", "contribution", "cosine"),
    "updates": ("group", "ratio"),
    "about": ("checkpoint", "step", "tokens", "loss", "branches", "dtype", "code_version", "device", "folder"),
}


class _Unusable(Exception):
    """A part of a file is not what the schema says; the message names it."""


@dataclass(frozen=True)
class Diagnoses:
    """The diagnoses of a report's runs as one table per part (``COLUMNS``); what no run has is an empty table."""

    tables: dict[str, pd.DataFrame]

    def __getitem__(self, name: str) -> pd.DataFrame:
        return self.tables[name]

    @cached_property
    def arms(self) -> list[str]:
        """Arms with at least one diagnosed run."""
        return list(dict.fromkeys(self["about"]["arm"]))

    def branches(self, arm: str) -> list[str]:
        """The branches of an arm's models, in the order of the first of them."""
        listed = self["about"].loc[self["about"]["arm"] == arm, "branches"]
        return list(dict.fromkeys(branch for one in listed for branch in one))


def read_diagnoses(runs: list[Run]) -> tuple[Diagnoses | None, list[str]]:
    """The diagnoses of ``runs``, None where there is no usable one; and a line for every file that was skipped."""
    rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in COLUMNS}
    notes = []
    for run in runs:
        if not (run.path / FILE).exists():
            continue
        content = load_object(run.path / FILE)
        try:
            found = _parse(content, run)
        except _Unusable as error:
            notes.append(f"{run.folder}: {error}; the diagnosis is not used")
            continue
        for name, own in found.items():
            rows[name] += [(run.arm, *run.seeds, *row) for row in own]
    if not rows["about"]:
        return None, notes
    leading = ("arm", "seed_init", "seed_data")
    return Diagnoses({n: pd.DataFrame(own, columns=[*leading, *COLUMNS[n]]) for n, own in rows.items()}), notes


def _parse(content: dict[str, Any] | str, run: Run) -> dict[str, list[tuple[Any, ...]]]:
    if isinstance(content, str):
        raise _Unusable(content)
    if content.get("schema") != SCHEMA:
        raise _Unusable(f"{FILE} has the schema {str(content.get('schema'))[:60]!r} instead of {SCHEMA!r}")
    if str(content.get("run_id")) != run.run_id:
        raise _Unusable(f"{FILE} is of another run ({str(content.get('run_id'))[:16]!r})")
    branches = content.get("branches")
    if not isinstance(branches, list) or not branches or not all(isinstance(name, str) for name in branches):
        raise _Unusable(f"{FILE}: branches is no list of names")
    gates, memory = _part(content, "gates", dict), _part(content, "memory", dict)
    environment = _part(content, "environment", dict)
    about = (
        str(content.get("checkpoint")),
        whole(content.get("step")),
        number(content.get("tokens")),
        number(content.get("loss")),
        tuple(branches),
        str(content.get("dtype")),
        str(environment.get("code_version")),
        str(environment.get("device")),
        run.folder,
    )
    updates = _part(content, "updates", dict)
    return {
        "necessity": list(_necessity(_part(content, "necessity", list))),
        "influence": list(_influence(_part(memory, "influence", dict))),
        "half_lives": list(_half_lives(_part(memory, "half_lives", list))),
        "position_loss": list(_curve(_part(memory, "loss_by_position", dict), "positions", "loss")),
        "gates": list(_gates(gates)),
        "gate_positions": list(_gate_positions(gates)),
        "gate_classes": list(_gate_classes(gates)),
        "outputs": list(_outputs(_part(content, "outputs", list), branches)),
        "updates": [(str(group), number(ratio)) for group, ratio in updates.items()],
        "about": [about],
    }


def _part(parent: dict[str, Any], key: str, kind: type[dict] | type[list]) -> Any:
    """An object or a list of objects in ``parent``, empty where it is null or not there."""
    value = parent.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise _Unusable(f"{FILE}: {key} is a {type(value).__name__}, not {'an object' if kind is dict else 'a list'}")
    if kind is list and not all(isinstance(item, dict) for item in value):
        raise _Unusable(f"{FILE}: {key} holds something that is no object")
    return value


def _layer(row: dict[str, Any], where: str) -> int:
    layer = whole(row.get("layer"))
    if layer is None or layer < 0:
        raise _Unusable(f"{FILE}: {where} has the layer {str(row.get('layer'))[:30]!r}")
    return layer


def _numbers(value: Any, where: str) -> list[float]:
    if not isinstance(value, list):
        raise _Unusable(f"{FILE}: {where} is no list")
    return [number(item) for item in value]


def _necessity(listed: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    names = ("loss_increase", "standard_error", "control", "control_standard_error")
    for row in listed:
        layer = ALL_LAYERS if row.get("layer", 0) is None else _layer(row, "necessity")
        yield layer, str(row.get("branch")), str(row.get("intervention")), *(number(row.get(name)) for name in names)


def _influence(influence: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for path in influence:
        if path != "lags" and influence[path] is not None:
            yield from ((path, lag, nats) for lag, nats in _curve(influence, "lags", path))


def _curve(parent: dict[str, Any], x: str, y: str) -> Iterator[tuple[float, float]]:
    if not parent:
        return
    xs, ys = (_numbers(parent.get(key), key) for key in (x, y))
    if len(xs) != len(ys):
        raise _Unusable(f"{FILE}: {x} and {y} differ in length ({len(xs)} and {len(ys)})")
    yield from zip(xs, ys, strict=True)


def _half_lives(listed: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for row in listed:
        given = (row.get(name, math.nan) for name in ("p10", "p50", "p90"))
        lives = (math.inf if value in (None, math.inf) else number(value) for value in given)
        yield _layer(row, "half_lives"), str(row.get("branch")), whole(row.get("head")), *lives


def _gates(gates: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for row in _part(gates, "layers", list):
        yield _layer(row, "gates"), *(number(row.get(name)) for name in COLUMNS["gates"][1:])


def _gate_positions(gates: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for row in _part(gates, "layers", list):
        if row.get("by_position") is not None:
            places = {"positions": gates.get("positions"), "by_position": row["by_position"]}
            yield from ((_layer(row, "gates"), *point) for point in _curve(places, "positions", "by_position"))


def _gate_classes(gates: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for row in _part(gates, "layers", list):
        by_class = _part(row, "by_class", dict)
        yield from ((_layer(row, "gates"), str(name), number(gate)) for name, gate in by_class.items())


def _outputs(listed: list[dict[str, Any]], branches: list[str]) -> Iterator[tuple[Any, ...]]:
    for row in listed:
        parts = [_part(row, name, dict) for name in ("rms", "rms_normed", "share")]
        for branch in branches:
            if any(branch in part for part in parts):
                values = (number(part.get(branch)) for part in parts)
                yield _layer(row, "outputs"), branch, *values, number(row.get("cosine"))
