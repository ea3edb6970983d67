"""Runs as a tidy data frame: a row per run that counts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from analysis.records.json_files import number, whole
from analysis.records.runs import Run

PARTS = ("total", "embedding", "rwkv", "mamba", "fusion", "ffn", "attention", "norm")
NUMBERS = (
    "steps",
    "tokens",
    "best_val_loss",
    "best_step",
    "final_val_loss",
    "final_train_loss",
    "val_bits_per_byte",
    "grad_ratio",
    "tokens_per_second",
    "peak_memory_bytes",
    "wall_seconds",
    "flops_per_token",
)


def runs_frame(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per run, numbers as float (NaN where the record has none), the index counting from 0."""
    return pd.DataFrame([_run_row(run) for run in runs])


def best_first(runs: pd.DataFrame, metric: str) -> list[str]:
    """The arms of ``runs`` by the mean of ``metric``, lowest first, then by name."""
    return runs.groupby("arm")[metric].mean().sort_values(kind="stable").index.tolist()


def _run_row(run: Run) -> dict[str, Any]:
    summary = run.summary
    data, environment = _dict(summary, "data"), _dict(summary, "environment")
    params, kernels = _dict(summary, "params"), _dict(environment, "kernels")
    overrides, state = summary.get("overrides"), summary.get("state_floats_per_layer")
    return (
        {
            "arm": run.arm,
            "variant": summary["variant"],
            "seed_init": run.seeds[0],
            "seed_data": run.seeds[1],
            "status": summary["status"],
            "stop_reason": _text(summary.get("stop_reason")),
        }
        | {f"params_{part}": number(params.get(part)) for part in PARTS}
        | {"state_floats": sum(number(floats) for floats in state) if isinstance(state, list) else np.nan}
        | {key: number(summary.get(key)) for key in NUMBERS}
        | {
            "data": _text(data.get("name")),
            "data_sha256": _text(data.get("sha256")),
            "tokenizer": _text(data.get("tokenizer")),
            "tokenizer_sha256": _text(data.get("tokenizer_sha256")),
            "vocab_size": number(data.get("vocab_size")),
            "device": _text(environment.get("device")),
            "members": max(whole(environment.get("members")) or 1, 1),  # not recorded: trained alone
            "kernel_wkv6": _text(kernels.get("wkv6")),
            "kernel_ssd": _text(kernels.get("ssd")),
            "git_commit": _text(environment.get("git_commit")),
            "git_dirty": _text(environment.get("git_dirty")),
            "code_version": _text(environment.get("code_version")),
            "versions": _text(_dict(environment, "versions") or None),
            "overrides": " ".join(map(str, overrides)) if isinstance(overrides, list) else None,
            "run_id": run.run_id,
            "folder": run.folder,
        }
    )


def _dict(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True)
