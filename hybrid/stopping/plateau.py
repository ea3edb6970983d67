"""The plateau protocol: a lower learning rate first, and the end where that does not help."""

from __future__ import annotations

import itertools
from typing import Any

from hybrid.schema import Config
from hybrid.stopping.rule import Finding, Rule, finite

# One evaluation without improvement is no plateau, however far apart evaluations are.
LEAST_EVALUATIONS = 2


class Plateau(Rule):
    """Lowers the learning rate in a plateau, and stops where it lasts.

    A plateau is the time since the last improvement, as a share of the training; the warm-up does not count. An
    improvement is a validation loss more than ``min_delta`` below the level of the last one, so a slow fall counts
    as soon as it adds up to that. The protocol:

    - below ``reduce_after``: go on;
    - from ``reduce_after`` on: learning rate times ``lr_factor``, and the lower rate is tried for ``reduce_after``
      more. An improvement in that time ends the plateau;
    - where the trial ends without one and the plateau is at least ``stop_after`` long: converged, stop. (By default
      the reduction is at 15% and the stop at 30%: 15% would not be over 20%, and a stop at 20% would leave the lower
      rate no time.) If it is not that long yet, the learning rate is lowered again;
    - with ``reduce: false`` a plateau of ``stop_after`` stops at once, with ``stop: false`` none does.

    ``stopping.reductions`` ends the run in place of a further reduction, where the last ``limit`` have brought less
    than ``min_gain`` each: in one plateau, or in a series of plateaus with tiny gains between them.
    """

    name = "plateau"

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.reductions = cfg.stopping.reductions

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Finding | None:
        if row["kind"] != "eval" or not finite(row["val_loss"]):
            return None
        step, loss = row["step"], row["val_loss"]
        if not memory or loss < memory["level"] - self.cfg.min_delta:
            lowered = memory.get("lowered", [])  # the levels at which the learning rate was lowered
            memory.update(level=loss, improved=step, since=step, evaluations=0, lowered=lowered)
            return None
        memory["evaluations"] += 1
        if memory["evaluations"] < LEAST_EVALUATIONS:
            return None
        length = step - max(memory["improved"], self.warmup_steps)
        if not self.cfg.reduce:
            return self._converged(length, memory) if length >= self.steps(self.cfg.stop_after) else None
        if step - max(memory["since"], self.warmup_steps) < self.steps(self.cfg.reduce_after):
            return None
        tried = memory["since"] > memory["improved"]
        if tried and self.cfg.stop and length >= self.steps(self.cfg.stop_after):
            return self._converged(length, memory)
        if self.reductions.enabled and (gains := self._gains(memory)):
            return Finding(
                "reductions",
                f"the last {len(gains)} reductions of the learning rate lowered the validation loss by "
                f"{', '.join(f'{gain:.4f}' for gain in gains)} to {memory['level']:.4f}, "
                f"each less than {self.reductions.min_gain:g}",
            )
        memory["lowered"].append(memory["level"])
        memory.update(since=step, evaluations=0)
        return Finding(self.name, self._since(length, memory), self.cfg.lr_factor)

    def _since(self, length: int, memory: dict[str, Any]) -> str:
        return (
            f"no validation loss more than {self.cfg.min_delta:g} below {memory['level']:.4f} (step "
            f"{memory['improved']}) in {self.percent(length)} of the training"
        )

    def _converged(self, length: int, memory: dict[str, Any]) -> Finding | None:
        if not self.cfg.stop:
            return None
        return self.stop(f"converged: {self._since(length, memory)}, limit {self.cfg.stop_after:.1%}")

    def _gains(self, memory: dict[str, Any]) -> list[float]:
        """What the last ``limit`` reductions brought; empty where there were fewer or one brought enough."""
        levels = [*memory["lowered"], memory["level"]]
        gains = [before - after for before, after in itertools.pairwise(levels)][-self.reductions.limit :]
        few = len(gains) < self.reductions.limit
        return [] if few or max(gains) >= self.reductions.min_gain else gains
