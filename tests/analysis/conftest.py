"""Synthetic run folders, written as ``hybrid.train`` writes them, with numbers that a test can compute by hand."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

VERSIONS = {"python": "3.11.9", "torch": "2.13.0"}


def write_run(
    root: Path,
    variant: str,
    seed: int = 0,
    *,
    final: float = 1.5,
    best: float | None = None,
    steps: int = 150,
    eval_every: int = 50,
    log_every: int = 10,
    params: int = 3_500_000,
    run_id: str | None = None,
    curve: Callable[[int], float] | None = None,
    finished: bool = True,
    gate: float | None = None,
    config: str = "",
    edit: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write one run folder and return it.

    ``gate`` is logged for every block at each evaluation; ``config`` is added to config.yaml.
    ``changes`` and ``edit`` replace keys of summary.json; a key of a nested object is written ``data__sha256``, and a
    change to ``...`` removes the key. A run that is not ``finished`` has no summary.
    """
    run_id = run_id or hashlib.sha256(f"{root}{variant}{seed}".encode()).hexdigest()[:16]
    folder = root / f"{variant}-{run_id[:8]}"
    (folder / "checkpoints").mkdir(parents=True)
    best = final if best is None else best
    curve = curve or (lambda step: final + 3.0 * math.exp(-6.0 * step / steps) - 3.0 * math.exp(-6.0))

    (folder / "config.yaml").write_text(
        f"trainer:\n  max_steps: {steps}\nseed_init: {seed}\nseed_data: {seed}\n{config}", encoding="utf-8"
    )
    (folder / "log.txt").write_text("started\n", encoding="utf-8")
    rows = []
    for step in range(log_every, steps + 1, log_every):
        loss = curve(step)
        rows.append(
            {"kind": "train", "step": step, "tokens": step * 1024, "loss": loss, "lr": 3e-4, "lr_rwkv": 3e-4}
            | {"lr_mamba": 3e-4, "grad_norm": 0.8, "grad_norm_rwkv": 0.4, "grad_norm_mamba": 0.5}
            | {"grad_norm_fusion": 0.1, "grad_norm_other": 0.3, "grad_ratio": 0.8, "grad_ratio_total": 0.9}
            | {"tokens_per_second": 35000.0, "memory_bytes": 2**28, "wall_seconds": step * 0.2}
        )
        if step % eval_every == 0:
            rows.append(
                {
                    "kind": "eval",
                    "step": step,
                    "tokens": step * 1024,
                    "val_loss": loss,
                    "val_bits_per_byte": loss * 1.44,
                }
                | {"train_loss": loss - 0.05, "wall_seconds": step * 0.2}
                | ({"gate_mean": [gate] * 4} if gate is not None else {})
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    summary: dict[str, Any] = {
        "schema": "groundthink.run/1",
        "run_id": run_id,
        "status": "completed",
        "stop_reason": None,
        "variant": variant,
        "overrides": [f"fusion={variant}", f"seed_init={seed}"],
        "seed_init": seed,
        "seed_data": seed,
        "params": {"total": params, "embedding": 12_416, "rwkv": 900_000, "mamba": 1_200_000, "fusion": 2_056}
        | {"ffn": 1_380_000, "attention": 0, "norm": 5_528},
        "state_floats_per_layer": [36_864] * 4,
        "flops_per_token": 7.0e6,
        "steps": steps,
        "tokens": steps * 1024,
        "best_val_loss": best,
        "best_step": steps,
        "final_val_loss": final,
        "final_train_loss": final - 0.05,
        "val_bits_per_byte": final / math.log(2),
        "grad_ratio": 0.8,
        "gates": {},
        "tokens_per_second": 35_000.0,
        "peak_memory_bytes": 2**28,
        "wall_seconds": 30.0,
        "data": {"name": "shakespeare", "sha256": "d" * 64, "tokenizer": "char", "tokenizer_sha256": "e" * 64}
        | {"vocab_size": 97},
        "environment": {"versions": VERSIONS, "device": "cpu", "kernels": {"wkv6": "torch", "ssd": "torch"}}
        | {"git_commit": "c" * 40, "git_dirty": False, "code_version": "v" * 12},
    }
    if not finished:
        return folder
    for key, value in (changes | (edit or {})).items():
        *parents, last = key.split("__")
        place = summary
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def write_plan(root: Path, runs: Sequence[tuple[str, int]], baseline: str | None = None, name: str = "smoke") -> None:
    """Write the sweep.json of a sweep that meant to do ``runs``, pairs of a variant and a seed."""
    listed = [
        {"variant": variant, "seed_init": seed, "seed_data": seed, "run_id": f"{i:016x}"}
        | {"folder": f"{name}/{variant}-{i:08x}", "overrides": [f"fusion={variant}"]}
        for i, (variant, seed) in enumerate(runs)
    ]
    arms = list(dict.fromkeys(variant for variant, _ in runs))
    plan = {"schema": "groundthink.sweep/1", "name": name, "question": "Which fusion?", "baseline": baseline}
    plan |= {"arms": arms, "seeds": sorted({seed for _, seed in runs}), "runs": listed}
    root.mkdir(parents=True, exist_ok=True)
    (root / "sweep.json").write_text(json.dumps(plan), encoding="utf-8")


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., None]:
    return write_plan
