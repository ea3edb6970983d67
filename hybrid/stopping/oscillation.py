"""Oscillation: the validation loss swings up and down."""

from __future__ import annotations

from typing import Any

from hybrid.stopping.rule import Finding, Rule, finite


class Oscillation(Rule):
    """Stops where the validation loss rises by more than ``swing`` nats ``rises`` times within ``window``.

    A rise is measured from the lowest point since the last fall, and only a fall of more than ``swing`` from the
    highest point since lets another one begin. So swings smaller than ``swing`` from trough to crest never count, at
    any period; nor does a fall, however steep; nor, with two rises asked for, a single spike or a divergence.
    ``window`` is a share of the training. Training losses of single batches are not looked at: they scatter.
    """

    name = "oscillation"

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Finding | None:
        if row["kind"] != "eval" or not finite(row["val_loss"]):
            return None
        step, loss, swing = row["step"], row["val_loss"], self.cfg.swing
        if not memory:
            memory.update(rising=False, extreme=loss, rises=[])
        if memory["rising"]:
            if memory["extreme"] - loss > swing:
                memory.update(rising=False, extreme=loss)
            else:
                memory["extreme"] = max(memory["extreme"], loss)
            return None
        if loss - memory["extreme"] <= swing:
            memory["extreme"] = min(memory["extreme"], loss)
            return None
        window = self.steps(self.cfg.window)
        recent = [rise for rise in memory["rises"] if step - rise[0] <= window]
        recent.append([step, loss - memory["extreme"]])
        memory.update(rising=True, extreme=loss, rises=recent)
        if len(recent) < self.cfg.rises:
            return None
        sizes = ", ".join(f"{size:.3f} (step {at})" for at, size in recent)
        return self.stop(
            f"validation loss rose by {sizes} within {self.percent(window)} of the training, limit {swing:g}"
        )
