"""Learning rate over training, as a share of the peak."""

from __future__ import annotations

import math

from hybrid.schema import Config


def lr_factor(step: int, cfg: Config) -> float:
    """The share of the peak learning rate for the update number ``step``, counted from 0.

    Rises linearly over ``schedule.warmup_steps`` updates, then falls as the schedule's name says to
    ``min_lr / lr`` (or ``min_lr_ratio``), which the last update of ``trainer.max_steps`` reaches.
    """
    schedule = cfg.schedule
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_ratio if schedule.min_lr is None else schedule.min_lr / cfg.optim.lr
    if schedule.name == "constant":
        return 1.0
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, cfg.trainer.max_steps - 1 - schedule.warmup_steps))
    fall = 1 - progress if schedule.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * fall
