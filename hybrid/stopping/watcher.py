"""The watcher that holds a run's rows against all stopping rules."""

from __future__ import annotations

from typing import Any

from hybrid.schema import Config
from hybrid.stopping.collapse import Collapse
from hybrid.stopping.gradient_ratio import GradientRatio
from hybrid.stopping.oscillation import Oscillation
from hybrid.stopping.overfitting import Overfitting
from hybrid.stopping.plateau import Plateau
from hybrid.stopping.rule import STOP, Finding, Rule
from hybrid.stopping.settings import acts
from hybrid.training.watching import Action, Watcher

RULES: tuple[type[Rule], ...] = (Overfitting, Plateau, Oscillation, Collapse, GradientRatio)


class StoppingRules(Watcher):
    """Evaluates the rules that are switched on, writes down what they find, and acts on it if it may.

    ``events`` lists what was found with its step; ``acted`` says whether the run was stopped, or its learning rate
    lowered, for it. Where the rules do not act, the run goes on, and so do they: later events are then what they say
    of the run as it is, not of one that had followed them. A rule that has asked for a stop is silent afterwards, and
    all are once one has acted.
    """

    name = "stopping"

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.rules = [rule(cfg) for rule in RULES if getattr(cfg.stopping, rule.name).enabled]
        self.needs_probe = any(rule.needs_probe for rule in self.rules)
        self.acts, self.max_steps = acts(cfg), cfg.trainer.max_steps
        self.state = {"memory": {rule.name: {} for rule in self.rules}, "done": [], "stopped": False, "events": []}
        self.fresh: list[str] = []

    def see(self, row: dict[str, Any]) -> Action | None:
        state, self.fresh = self.state, []
        if state["stopped"]:
            return None
        found: list[Finding] = []
        for rule in self.rules:
            finding = None if rule.name in state["done"] else rule.see(row, state["memory"][rule.name])
            if finding is not None:
                found.append(finding)
                if finding.action == STOP:
                    state["done"].append(rule.name)
        # There is nothing left to stop or to train more slowly at the last step; a stop goes before a reduction.
        may = found if self.acts and row["step"] < self.max_steps else []
        chosen = next((f for f in may if f.action == STOP), may[0] if may else None)
        for finding in found:
            acted = finding is chosen
            state["events"].append(
                {"rule": finding.rule, "step": row["step"], "action": finding.action, "reason": finding.reason,
                 "acted": acted}
            )  # fmt: skip
            if not acted:
                would = "stop" if finding.action == STOP else f"learning rate x{finding.lr_factor:g}"
                self.fresh.append(f"stopping rule at step {row['step']}, not acted upon ({would}): {said(finding)}")
        if chosen is None:
            return None
        state["stopped"] = chosen.action == STOP
        return Action(said(chosen), chosen.lr_factor)

    def summary(self) -> dict[str, Any]:
        return {"stopping": {"act": self.acts, "events": self.state["events"]}}

    def news(self) -> list[str]:
        return self.fresh


def said(finding: Finding) -> str:
    return f"{finding.rule}: {finding.reason}"
