"""Synthetic diagnosis.json files, as ``hybrid.diagnose`` writes them, with numbers that a test can compute by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

CLASSES = ("letter", "capital", "digit", "space", "newline", "punctuation", "other")
# What switching a branch off everywhere costs, by intervention and branch; a layer alone costs a tenth of it.
COSTS = {
    "zero": {"rwkv": 0.12, "mamba": 0.40},
    "mean": {"rwkv": 0.10, "mamba": 0.30},
    "shuffle": {"rwkv": 0.20, "mamba": 0.60},
}


def diagnosis(
    run: Path,
    layers: int = 4,
    branches: tuple[str, ...] = ("rwkv", "mamba"),
    costs: dict[str, dict[str, float]] | None = None,
    shift: float = 0.0,
    control: float = 0.01,
    gates: bool = True,
    last_lag: int = 64,
    **changes: Any,
) -> dict[str, Any]:
    """The diagnosis of the run in folder ``run``; ``shift`` is added to every loss increase."""
    summary = json.loads((run / "summary.json").read_text())
    costs = costs or {name: {b: own.get(b, 0.2) for b in branches} for name, own in COSTS.items()}
    necessity = [
        {"layer": layer, "branch": branch, "intervention": name}
        | {"loss_increase": own[branch] / (1 if layer is None else 10) + shift, "standard_error": 0.005}
        | {"control": control / (1 if layer is None else 10), "control_standard_error": 0.001}
        for name, own in costs.items()
        for branch in branches
        for layer in (None, *range(layers))
    ]
    lags = [2**k for k in range(20) if 2**k <= last_lag]
    positions = [round(last_lag * i / 32) for i in range(32)]
    influence: dict[str, Any] = {"lags": lags, "full": [0.5 / lag for lag in lags]}
    influence |= {branch: [0.25 / lag ** (1 + i) for lag in lags] for i, branch in enumerate(branches)}
    found = {
        "schema": "groundthink.diagnosis/1",
        "run_id": summary["run_id"], "variant": summary["variant"],
        "seed_init": summary["seed_init"], "seed_data": summary["seed_data"],
        "checkpoint": "best", "step": summary["best_step"],
        "environment": {"code_version": "v" * 12, "device": "cpu", "versions": {"torch": "2.13.0"}},
        "dtype": "float32", "tokens": 16384, "loss": summary["best_val_loss"], "branches": list(branches),
        "necessity": necessity,
        "gates": {
            "start": [0.3] * layers,
            "layers": [
                {"layer": layer, "mean": 0.3 + 0.1 * layer + shift, "std": 0.1, "start": 0.3}
                | {"saturated_low": 0.02, "saturated_high": 0.2 if layer == layers - 1 else 0.0}
                | {"by_position": [0.3 + 0.1 * layer + 0.05 * math.exp(-p / 8) for p in positions]}
                | {"by_class": {name: 0.3 + 0.1 * layer + 0.02 * i for i, name in enumerate(CLASSES)}}
                for layer in range(layers)
            ],
            "positions": positions,
        } if gates else None,
        "memory": {
            "influence": influence,
            "half_lives": [
                {"layer": layer, "branch": branch, "head": head}
                | {"p10": 2.0**head, "p50": 2.0 ** (head + layer), "p90": None if head else 2.0 ** (head + layer + 2)}
                for layer in range(layers)
                for branch in branches
                for head in range(2)
            ],
            "loss_by_position": {"positions": positions, "loss": [2.0 + 1.5 * math.exp(-p / 10) for p in positions]},
        },
        "outputs": [
            {"layer": layer, "rms": {b: 0.5 + i for i, b in enumerate(branches)}}
            | {"rms_normed": dict.fromkeys(branches, 1.0), "share": {b: 0.3 + 0.4 * i for i, b in enumerate(branches)}}
            | {"cosine": 0.05 if len(branches) > 1 else None}
            for layer in range(layers)
        ],
        "updates": {"rwkv": 2e-3, "mamba": 1e-3, "fusion": 5e-3, "other": 1e-3},
        "wall_seconds": 60.0,
    }  # fmt: skip
    return found | changes


def write_diagnosis(run: Path, **keys: Any) -> Path:
    """Write ``diagnosis`` into the run folder ``run`` and return the file."""
    path = run / "diagnosis.json"
    path.write_text(json.dumps(diagnosis(run, **keys)), encoding="utf-8")
    return path
