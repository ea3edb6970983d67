"""Imbalance: one of the branches gets nearly all of the gradient, for a long time."""

from __future__ import annotations

from typing import Any

from hybrid.stopping.rule import Finding, Rule, finite

# However far apart the logged steps are, so many have to agree.
LEAST_ROWS = 3


class GradientRatio(Rule):
    """Stops where ``grad_ratio`` (RWKV over Mamba) is outside [``low``, ``high``] in every logged row over ``share``.

    ``share`` is one of the training, and at least ``min_steps``; the warm-up does not count. With the official
    initialisation RWKV-6's output starts at zero and its gradient takes some hundred steps to grow: gated runs that
    are well have a ratio of 0.05 to 0.1 in the first 200 of them.
    """

    name = "grad_ratio"

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Finding | None:
        if row["kind"] != "train" or row["step"] <= self.warmup_steps or not finite(row.get("grad_ratio")):
            return None
        step, ratio = row["step"], row["grad_ratio"]
        if self.cfg.low <= ratio <= self.cfg.high:
            memory.clear()
            return None
        if not memory:
            memory.update(since=step, rows=0, least=ratio, most=ratio)
        memory.update(rows=memory["rows"] + 1, least=min(memory["least"], ratio), most=max(memory["most"], ratio))
        length = step - memory["since"]
        if memory["rows"] < LEAST_ROWS or length < max(self.steps(self.cfg.share), self.cfg.min_steps):
            return None
        return self.stop(
            f"gradient ratio RWKV/Mamba {memory['least']:.3g} to {memory['most']:.3g} in all {memory['rows']} logged "
            f"steps from {memory['since']} on ({self.percent(length)} of the training), "
            f"limits {self.cfg.low:g} and {self.cfg.high:g}"
        )
