"""Rows of a run's log that tests of the gates are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from hybrid.gates.watching import GateWatcher
from tests.hybrid.configs import config

ENVIRONMENT = {"device": "cpu", "kernels": {"wkv6": "torch", "ssd": "torch", "conv": "torch"}}


GOOD = {"cosine": 0.9, "novelty": 2.0, "top5_share": 0.8, "effective_rank": 6.0, "saturated": 0.0}


def branch(variance: float = 1.0, **worst: float) -> dict[str, Any]:
    return {"rms": 1.0, "variance": variance} | {
        name: {"median": value, "worst": worst.get(name, value)} for name, value in GOOD.items()
    }


def probe_row(
    step: int = 0,
    rwkv: dict[str, Any] | None = None,
    mamba: dict[str, Any] | None = None,
    closed: float = 0.0,
    **more: Any,
) -> dict[str, Any]:
    """A healthy model's row, layer 0 with both branches, but for what is given."""
    layer = {
        "layer": 0, "cosine": 0.1, "gate": {"mean": 0.5, "closed": closed},
        "branches": {"rwkv": rwkv or branch(), "mamba": mamba or branch()},
    }  # fmt: skip
    return {"kind": "probe", "step": step, "entropy": 4.5, "entropy_normalised": 0.99, "finite": True, "shape_ok": True,
            "layers": [layer]} | more  # fmt: skip


def told(rows: list[dict[str, Any]], *overrides: str, environment: dict[str, Any] = ENVIRONMENT) -> GateWatcher:
    watcher = GateWatcher(config("schedule.warmup_steps=0", *overrides))
    watcher.begin(environment)
    for row in rows:
        watcher.see(row)
    return watcher


def verdict(gate: str, rows: list[dict[str, Any]], *overrides: str, **more: Any) -> str:
    return told(rows, *overrides, **more).summary()["gates"][gate]["verdict"]


@torch.no_grad()
def fill(parameter: nn.Parameter, value: float) -> None:
    parameter.fill_(value)
