"""Overfitting: the validation loss rises while the training loss falls."""

from __future__ import annotations

from typing import Any

from hybrid.stopping.rule import Finding, Rule, finite


class Overfitting(Rule):
    """Stops where the validation loss is more than ``rise`` (a share) above its best and the training loss has fallen.

    The training loss of an evaluation is the mean since the evaluation before. It has fallen where it is below what
    it was at the best validation loss; a run in which both rise diverges, which is another matter.
    """

    name = "overfitting"

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Finding | None:
        if row["kind"] != "eval" or not finite(row["val_loss"]):
            return None
        val, train = row["val_loss"], row["train_loss"]
        if "best" not in memory or val < memory["best"]:
            memory.update(best=val, step=row["step"], train=train)
            return None
        if not finite(memory["train"]):  # the best was before the first step
            memory["train"] = train
            return None
        best = memory["best"]
        if val > best * (1 + self.cfg.rise) and finite(train) and train < memory["train"]:
            return self.stop(
                f"validation loss {val:.4f} is {val / best - 1:.1%} above its best {best:.4f} (step {memory['step']}), "
                f"limit {self.cfg.rise:.1%}, while the training loss fell from {memory['train']:.4f} to {train:.4f}"
            )
        return None
