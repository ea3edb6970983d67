"""Rows of a run's log that tests of the stopping rules are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hybrid.stopping.watcher import StoppingRules
from hybrid.training.watching import Action
from tests.hybrid.configs import config

STEPS = 1000


Row = dict[str, Any]


Events = list[tuple[str, int, str]]


def watcher(*overrides: str) -> StoppingRules:
    """Of a run of 1,000 steps with 100 of warm-up; ``overrides`` are of the section ``stopping``."""
    keys = [f"stopping.{line}" for line in ("grad_ratio.min_steps=1", *overrides)]
    return StoppingRules(config(f"trainer.max_steps={STEPS}", "schedule.warmup_steps=100", *keys))


def evaluation(step: int, val: float, train: float | None = 1.0) -> Row:
    return {"kind": "eval", "step": step, "val_loss": val, "train_loss": train}


def evaluations(curve: Callable[[int], float], every: int = 20, last: int = STEPS) -> list[Row]:
    """Validation and training losses of one curve."""
    return [evaluation(step, curve(step), curve(step) if step else None) for step in range(0, last + 1, every)]


def ratios(ratio: Callable[[int], float], every: int = 10, first: int = 10) -> list[Row]:
    return [{"kind": "train", "step": step, "grad_ratio": ratio(step)} for step in range(first, STEPS + 1, every)]


def probe(step: int, **variances: float) -> Row:
    """Layer 0 is well, layer 1 has these."""
    well = {"rwkv": {"variance": 0.1, "rms": 0.3}, "mamba": {"variance": 0.1, "rms": 0.3}}
    branches = {name: {"variance": variance, "rms": 1.0} for name, variance in variances.items()}
    return {
        "kind": "probe",
        "step": step,
        "layers": [{"layer": 0, "branches": well}, {"layer": 1, "branches": branches}],
    }


def feed(rules: StoppingRules, rows: Iterable[Row]) -> tuple[Events, list[Action]]:
    """What the rows lead to: the events, and the actions that were asked for."""
    actions = [action for row in rows if (action := rules.see(row)) is not None]
    record = rules.summary()["stopping"]["events"]
    assert all(event["reason"] and "\n" not in event["reason"] for event in record)
    return [(event["rule"], event["step"], event["action"]) for event in record], actions


def rising(val: float, train: float) -> list[Row]:
    """Best validation loss 2.0 at step 200, then ``val`` with a training loss that was 1.9 at the best."""
    return [
        evaluation(0, 4.5, None),
        evaluation(100, 3.0, 3.4),
        evaluation(200, 2.0, 1.9),
        evaluation(240, 2.05, 1.8),
        evaluation(280, val, train),
    ]


def falls_until(last: int, level: float = 2.0) -> Callable[[int], float]:
    """Down to ``level`` at step ``last``, then flat."""
    return lambda step: level + 0.002 * max(0, last - step)
