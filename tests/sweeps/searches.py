"""What tests of searches share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.runs import Setting, rows, strict_json

LR = "optim.lr=tag(log,interval(1e-5,1e-1))"
EVALUATED = ["trainer.eval_every=3"]
SEARCH = ["sweep.name=s", LR, "fusion=choice(gain,gated)", "sampler=random", *EVALUATED]


def without_lr(small: Setting, *more: str) -> list[str]:
    """The small run's overrides with the learning rate left to the search."""
    return [line for line in small.with_(*more) if not line.startswith("optim.lr=0")]


def trials_of(root: Path, arm: str = "") -> list[dict[str, Any]]:
    return strict_json((root / f"search{arm}.json").read_text())["trials"]


def evaluations_of(root: Path, trial: dict[str, Any]) -> dict[str, float]:
    """By step, as ``intermediate`` has it, the validation loss of a trial's run."""
    found = rows(root / trial["folder"])
    return {str(row["step"]): row["val_loss"] for row in found if row["kind"] == "eval" and row["step"] > 0}


def record_of(root: Path, trial: dict[str, Any]) -> dict[str, Any]:
    return strict_json((root / trial["folder"] / "summary.json").read_text())
