"""Searches as ``hybrid.train`` leaves them: search.json and the run folders of the trials."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPACE = {
    "optim.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "fusion": {"type": "categorical", "choices": ["gated", "gain"]},
    "fusion.gate_init": {"type": "float", "low": 0.0, "high": 1.0, "when": {"fusion": "gated"}},
}


def trial(number: int, lr: float, value: float | list[float] | None, **changes: Any) -> dict[str, Any]:
    """One trial of search.json; complete if it has a value."""
    values = [value] if isinstance(value, float) else value
    return {
        "number": number,
        "state": "COMPLETE" if values else "FAIL",
        "params": {"optim.lr": lr, "fusion": "gain"},
        "values": values,
        "intermediate": {"50": 2.5, "100": 2.0},
        "reason": None,
        "folder": f"trial-{number:03d}-{number:08x}",
        "run_id": f"{number:064x}",
        "steps": 150,
        "max_steps": 150,
        "seconds": 90.0,
        "enqueued": False,
        "worker": "a",
    } | changes


def write_search(root: Path, trials: list[dict[str, Any]], name: str = "search.json", **changes: Any) -> Path:
    """Write the file of a search and return it."""
    content = {
        "schema": "groundthink.search/1",
        "sweep": "lr",
        "question": "Which rate?",
        "study_name": "lr",
        "arm": None,
        "sampler": "TPESampler",
        "pruner": "HyperbandPruner",
        "n_trials": len(trials),
        "metrics": ["best_val_loss"],
        "directions": ["minimize"],
        "space": SPACE,
        "trials": trials,
        "best": [],
        "importance": {"best_val_loss": {"optim.lr": 0.75, "fusion": 0.25}},
        "importance_method": "PED-ANOVA",
        "steps": {"run": 600, "without_pruning": 1000},
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content | changes), encoding="utf-8")
    return root / name


def write_trial_runs(make_run: Callable[..., Path], root: Path, trials: list[dict[str, Any]]) -> None:
    """The run folder of every trial; one that has not ended has no summary."""
    status = {"COMPLETE": "completed", "PRUNED": "stopped", "FAIL": "diverged"}
    for item in trials:
        ended = item["state"] in status
        edit = {"status": status.get(item["state"]), "trial": {"study": "lr", "number": item["number"]}}
        number = item["number"]
        name = f"trial-{number:03d}"
        make_run(root, name, 0, run_id=f"{number:08x}" * 2, finished=ended, edit=edit, final=1.0 + number)
