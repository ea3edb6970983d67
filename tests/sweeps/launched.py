"""What tests of the launchers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.runs import (
    strict_json,
)  # fmt: skip

TWO = ["fusion=gain,gated", "seed_init=0,1", "sweep.name=two"]


JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


def records(root: Path) -> dict[str, dict[str, Any]]:
    """The summaries of a sweep by folder name."""
    return {path.parent.name: strict_json(path.read_text()) for path in sorted(root.glob("*/summary.json"))}
