"""What the section ``stopping`` of a configuration may say, and what of it can change a result. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hybrid.schema import Config, StoppingConfig

# key -> bounds, both excluded
RANGES = {
    "overfitting.rise": (0, math.inf),
    "plateau.reduce_after": (0, 1),
    "plateau.lr_factor": (0, 1),
    "plateau.stop_after": (0, 1),
    "reductions.min_gain": (0, math.inf),
    "oscillation.swing": (0, math.inf),
    "oscillation.window": (0, 1),
    "collapse.variance": (0, math.inf),
    "grad_ratio.low": (0, math.inf),
    "grad_ratio.high": (0, math.inf),
    "grad_ratio.share": (0, 1),
}
COUNTS = ("reductions.limit", "oscillation.rises", "collapse.probes", "grad_ratio.min_steps")


def problem_of(stopping: StoppingConfig) -> str | None:
    """What is wrong with the section, in one line that names the key; None where nothing is."""
    for key, (least, most) in RANGES.items():
        section, leaf = key.split(".")
        value = getattr(getattr(stopping, section), leaf)
        if not least < value < most:
            bounds = f"strictly between {least} and {most}" if most < math.inf else "a number above 0"
            return f"stopping.{key} must be {bounds}, got {value}"
    for key in COUNTS:
        section, leaf = key.split(".")
        value = getattr(getattr(stopping, section), leaf)
        if value < 1:
            return f"stopping.{key} must be at least 1, got {value}"
    if not 0 <= stopping.plateau.min_delta < math.inf:
        return f"stopping.plateau.min_delta must be at least 0, got {stopping.plateau.min_delta}"
    low, high = stopping.grad_ratio.low, stopping.grad_ratio.high
    if low >= high:
        return f"stopping.grad_ratio.low={low} must be below stopping.grad_ratio.high={high}"
    return None


def acts(cfg: Config) -> bool:
    """Whether stopping rules act on a run: as set, else in single runs, because a comparison needs equal tokens."""
    return cfg.sweep.name is None if cfg.stopping.act is None else cfg.stopping.act


def may_lower_lr(cfg: Config) -> bool:
    return acts(cfg) and cfg.stopping.plateau.enabled and cfg.stopping.plateau.reduce


def acting_rules(cfg: Config) -> dict[str, Any]:
    """The rules that can change a run, with their thresholds."""
    if not acts(cfg):
        return {}
    sections = dataclasses.asdict(cfg.stopping)
    sections.pop("act")
    plateau = sections["plateau"]
    if not may_lower_lr(cfg):
        sections.pop("reductions")
        del plateau["reduce_after"], plateau["lr_factor"]
    if not plateau["stop"]:
        del plateau["stop_after"]
    if not (plateau["stop"] or plateau["reduce"]):
        sections.pop("plateau")
    return {name: section for name, section in sections.items() if section.pop("enabled")}
