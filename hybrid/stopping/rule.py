"""What all stopping rules have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hybrid.schema import Config
from hybrid.training.watching import settled_after

STOP, REDUCE_LR = "stop", "reduce_lr"


@dataclass(frozen=True)
class Finding:
    """What a rule asks for: the end of the run, or with ``lr_factor`` so many times the present learning rate."""

    rule: str
    reason: str  # one line, with the numbers
    lr_factor: float | None = None

    @property
    def action(self) -> str:
        return STOP if self.lr_factor is None else REDUCE_LR


class Rule:
    """Base of all rules. ``name`` is also the rule's section of ``stopping`` in the configuration.

    What a rule remembers is in the ``memory`` that it is called with: plain JSON values, empty before the first row.
    Its answers depend on the configuration and the rows so far alone.
    """

    name: str
    needs_probe = False  # whether it reads rows of kind probe

    def __init__(self, cfg: Config) -> None:
        self.cfg = getattr(cfg.stopping, self.name)
        self.warmup_steps, self.settled_after = cfg.schedule.warmup_steps, settled_after(cfg)
        self.max_steps = cfg.trainer.max_steps

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Finding | None:
        """A row of the run's record (``kind``: train, eval or probe), in order."""
        raise NotImplementedError

    def stop(self, reason: str) -> Finding:
        return Finding(self.name, reason)

    def steps(self, share: float) -> int:
        """``share`` of the training in whole steps, at least one."""
        return max(1, math.ceil(share * self.max_steps - 1e-9))

    def percent(self, steps: int) -> str:
        """A number of steps as a share of the training."""
        return f"{steps / self.max_steps:.1%}"


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
