"""The stopping rules on series of rows: each fires where it should, not just below, and not where training is well."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from hybrid.stopping.watcher import RULES, StoppingRules
from hybrid.training.watching import Action
from tests.hybrid.configs import config

STEPS = 1000
Row = dict[str, Any]
Events = list[tuple[str, int, str]]


def watcher(*overrides: str) -> StoppingRules:
    """Of a run of 1,000 steps with 100 of warm-up; ``overrides`` are of the section ``stopping``."""
    keys = [f"stopping.{line}" for line in ("grad_ratio.min_steps=1", *overrides)]
    return StoppingRules(config(f"trainer.max_steps={STEPS}", "schedule.warmup_steps=100", *keys))


def only(name: str, *overrides: str) -> StoppingRules:
    """The same with one rule; ``reductions`` needs the plateau."""
    others = {rule.name for rule in RULES} | {"reductions"}
    return watcher(*(f"{other}.enabled=false" for other in sorted(others - {name})), *overrides)


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


# ---- overfitting


def rising(val: float, train: float) -> list[Row]:
    """Best validation loss 2.0 at step 200, then ``val`` with a training loss that was 1.9 at the best."""
    return [
        evaluation(0, 4.5, None),
        evaluation(100, 3.0, 3.4),
        evaluation(200, 2.0, 1.9),
        evaluation(240, 2.05, 1.8),
        evaluation(280, val, train),
    ]


@pytest.mark.parametrize(
    "overrides, val, train, fires",
    [
        ((), 2.21, 1.7, True),
        ((), 2.2, 1.7, False),  # exactly 10%
        ((), 2.19, 1.7, False),
        ((), 2.21, 1.89, True),
        ((), 2.21, 1.9, False),  # the training loss has not fallen
        ((), 2.21, 2.3, False),  # both rise
        (("overfitting.rise=0.05",), 2.11, 1.7, True),
        (("overfitting.rise=0.05",), 2.09, 1.7, False),
        ((), math.nan, 1.7, False),
        ((), 2.21, math.nan, False),
    ],
)
def test_overfitting(overrides: tuple[str, ...], val: float, train: float, fires: bool) -> None:
    events, actions = feed(only("overfitting", *overrides), rising(val, train))
    assert events == [("overfitting", 280, "stop")] * fires
    assert [action.lr_factor for action in actions] == [None] * fires


def test_overfitting_says_its_numbers() -> None:
    _, (action,) = feed(only("overfitting"), rising(2.25, 1.7))
    assert action.reason == (
        "overfitting: validation loss 2.2500 is 12.5% above its best 2.0000 (step 200), limit 10.0%, "
        "while the training loss fell from 1.9000 to 1.7000"
    )


def test_overfitting_from_the_first_step_on() -> None:
    """The best validation loss was before training: the first training loss is what the later ones fell from."""
    rows = [evaluation(0, 3.0, None), evaluation(100, 3.5, 2.9), evaluation(200, 3.6, 2.9), evaluation(300, 3.7, 2.8)]
    assert feed(only("overfitting"), rows)[0] == [("overfitting", 300, "stop")]


# ---- plateau, convergence, reductions


def falls_until(last: int, level: float = 2.0) -> Callable[[int], float]:
    """Down to ``level`` at step ``last``, then flat."""
    return lambda step: level + 0.002 * max(0, last - step)


def test_plateau_protocol_by_default() -> None:
    """Flat from 300: reduced at 15% without improvement, tried for 15% more, then over 20% long and stopped."""
    events, (reduced, stopped) = feed(only("plateau"), evaluations(falls_until(300)))
    assert events == [("plateau", 460, "reduce_lr"), ("plateau", 620, "stop")]  # evaluations each 20 steps
    assert reduced.lr_factor == 0.6 and stopped.lr_factor is None
    assert reduced.reason == (
        "plateau: no validation loss more than 0.001 below 2.0000 (step 300) in 16.0% of the training"
    )
    assert stopped.reason == (
        "plateau: converged: no validation loss more than 0.001 below 2.0000 (step 300) in 32.0% of the training, "
        "limit 20.0%"
    )


@pytest.mark.parametrize("every", [10, 50])
def test_plateau_to_the_step(every: int) -> None:
    rows = evaluations(falls_until(300), every)
    assert feed(only("plateau"), rows)[0] == [("plateau", 450, "reduce_lr"), ("plateau", 600, "stop")]
    assert feed(only("plateau"), evaluations(falls_until(300), every, last=449))[0] == []
    assert feed(only("plateau"), evaluations(falls_until(300), every, last=599))[0] == [("plateau", 450, "reduce_lr")]


@pytest.mark.parametrize("gain, reduced", [(0.0011, False), (0.0009, True), (0.001, True)])
def test_what_counts_as_an_improvement(gain: float, reduced: bool) -> None:
    """One better evaluation at step 440, in the plateau from 300 on; level 2.0 - gain is held from there."""
    rows = evaluations(lambda step: falls_until(300)(step) - (gain if step >= 440 else 0), 20, last=460)
    assert bool(feed(only("plateau"), rows)[0]) == reduced
    slack = feed(only("plateau", "plateau.min_delta=0"), rows)[0]
    assert slack == []


def test_gains_below_min_delta_add_up() -> None:
    """0.0004 nats every 50 steps: no single step is an improvement, 150 steps are."""
    assert feed(only("plateau"), evaluations(lambda step: 3 - 0.0004 * step / 50, every=50))[0] == []
    slower = feed(only("plateau"), evaluations(lambda step: 3 - 0.0001 * step / 50, every=50))[0]
    assert slower[0] == ("plateau", 250, "reduce_lr")  # 100 steps of warm-up, 150 of plateau


def test_an_improvement_in_the_trial_begins_anew() -> None:
    """Flat from 300; reduced at 450; better at 500, flat again: reduced at 650, and stopped at 800."""
    events, _ = feed(
        only("plateau"), evaluations(lambda step: falls_until(300)(step) - (0.1 if step >= 500 else 0), every=10)
    )
    assert events == [("plateau", 450, "reduce_lr"), ("plateau", 650, "reduce_lr"), ("plateau", 800, "stop")]


def test_a_plateau_begins_after_the_warm_up_and_takes_two_evaluations() -> None:
    assert feed(only("plateau"), evaluations(lambda _: 2.0, every=10, last=249))[0] == []
    assert feed(only("plateau"), evaluations(lambda _: 2.0, every=10, last=250))[0] == [("plateau", 250, "reduce_lr")]
    sparse = feed(only("plateau"), evaluations(falls_until(300), every=300))[0]
    assert sparse == [("plateau", 900, "reduce_lr")]  # one evaluation without improvement, at 600, is none
    sparse = feed(only("plateau"), evaluations(falls_until(300), every=150))[0]
    assert sparse == [("plateau", 600, "reduce_lr"), ("plateau", 900, "stop")]  # nor is one of the lower rate, at 750


def test_reductions_and_stops_each_by_itself() -> None:
    rows = evaluations(falls_until(300), every=10)
    assert feed(only("plateau", "plateau.reduce=false"), rows)[0] == [("plateau", 500, "stop")]
    assert feed(only("plateau", "plateau.reduce=false", "plateau.stop=false"), rows)[0] == []
    reduced = feed(only("plateau", "plateau.stop=false"), rows)
    assert reduced[0] == [("plateau", step, "reduce_lr") for step in (450, 600, 750, 900)]
    early = only("plateau", "plateau.reduce_after=0.1", "plateau.lr_factor=0.5")
    events, actions = feed(early, rows)
    assert events == [("plateau", 400, "reduce_lr"), ("plateau", 500, "stop")] and actions[0].lr_factor == 0.5
    late = only("plateau", "plateau.stop_after=0.5")
    assert feed(late, rows)[0] == [
        *[("plateau", step, "reduce_lr") for step in (450, 600, 750)],
        ("plateau", 900, "stop"),  # the first end of a trial at which the plateau is half of the training long
    ]


def test_two_reductions_in_one_plateau() -> None:
    rules = only("plateau", "plateau.stop=false", "reductions.enabled=true")
    events, actions = feed(rules, evaluations(falls_until(300), every=10))
    assert events == [("plateau", 450, "reduce_lr"), ("plateau", 600, "reduce_lr"), ("reductions", 750, "stop")]
    assert actions[-1].reason == (
        "reductions: the last 2 reductions of the learning rate lowered the validation loss by 0.0000, 0.0000 to "
        "2.0000, each less than 0.01"
    )


@pytest.mark.parametrize(
    "first, second, stops",
    [(0.009, 0.009, True), (0.011, 0.009, False), (0.009, 0.011, False)],
)
def test_two_reductions_with_small_gains(first: float, second: float, stops: bool) -> None:
    """A small gain after each reduction ends its plateau; at the third plateau it shows that neither helped."""

    def curve(step: int) -> float:
        return falls_until(100)(step) - (first if step >= 260 else 0) - (second if step >= 420 else 0)

    rules = only("plateau", "reductions.enabled=true")
    rows = evaluations(curve, every=10)
    events, _ = feed(rules, rows)
    assert events[:2] == [("plateau", 250, "reduce_lr"), ("plateau", 410, "reduce_lr")]
    assert events[2] == (("reductions", 570, "stop") if stops else ("plateau", 570, "reduce_lr"))
    three = feed(only("plateau", "reductions.enabled=true", "reductions.limit=3"), rows)[0]
    assert three[2] == ("plateau", 570, "reduce_lr")
    strict = feed(only("plateau", "reductions.enabled=true", "reductions.min_gain=0.012"), rows)[0]
    assert strict[2] == ("reductions", 570, "stop")


# ---- oscillation


def zigzag(swing: float, period: int) -> Callable[[int], float]:
    """A triangle wave of ``swing`` from trough to crest about a falling line."""
    return lambda step: 3 - step / 2000 + swing * abs((step / period) % 1 - 0.5) * 2


@pytest.mark.parametrize("period", [40, 80, 160])
def test_oscillation(period: int) -> None:
    """Every period has a rise: two of them are in 20% of the training for all of these but the longest."""
    every = 20
    assert feed(only("oscillation"), evaluations(zigzag(0.4, period), every))[0] == []
    events, (action,) = feed(only("oscillation"), evaluations(zigzag(0.7, period), every))
    assert [(rule, what) for rule, _, what in events] == [("oscillation", "stop")]
    assert action.reason.startswith("oscillation: validation loss rose by 0.") and "limit 0.5" in action.reason


def test_oscillation_by_hand() -> None:
    """Rises of 0.51 that end at 40 and 80; one of 0.5 is none; what lies further apart than the window is none."""

    def fires(values: list[float], every: int, *overrides: str) -> Events:
        rows = [evaluation(i * every, value) for i, value in enumerate(values)]
        return feed(only("oscillation", *overrides), rows)[0]

    swings = [2.51, 2.0, 2.51, 2.0, 2.51]
    assert fires(swings, 20) == [("oscillation", 80, "stop")]
    assert fires([2.5, 2.0, 2.5, 2.0, 2.5], 20) == []
    assert fires(swings, 100) == [("oscillation", 400, "stop")]  # 200 steps apart: just within
    assert fires(swings, 101) == []
    assert fires(swings, 101, "oscillation.window=0.21") == [("oscillation", 404, "stop")]
    assert fires(swings, 20, "oscillation.rises=1") == [("oscillation", 40, "stop")]
    assert fires(swings, 20, "oscillation.rises=3") == []
    assert fires(swings, 20, "oscillation.swing=0.52") == []
    assert fires([2.0, 2.2, 2.1, 2.3, 2.2, 2.4, 2.3, 2.6], 20, "oscillation.rises=1") == [("oscillation", 140, "stop")]


def test_no_oscillation_without_a_way_back() -> None:
    rules = only("oscillation")
    assert feed(rules, evaluations(lambda step: 9 * math.exp(-step / 100)))[0] == []  # a steep fall
    assert feed(only("oscillation"), evaluations(lambda step: 2 + step / 100))[0] == []  # divergence
    spike = [evaluation(step, 5.0 if step == 300 else 2.0) for step in range(0, 700, 20)]
    assert feed(only("oscillation"), spike)[0] == []
    stairs = [evaluation(20 * i, value) for i, value in enumerate([2.0, 2.6, 2.3, 3.2, 2.8, 3.8])]
    assert feed(only("oscillation"), stairs)[0] == []  # rises only: no fall of more than 0.5 between


# ---- collapse

ALIVE = probe(0, rwkv=0.1, mamba=0.1)


@pytest.mark.parametrize(
    "series, at",
    [
        ([probe(0, rwkv=0.1), probe(10, rwkv=9e-7), probe(20, rwkv=9e-7)], 20),
        ([probe(0, rwkv=0.1), probe(10, rwkv=9e-7), probe(20, rwkv=1e-6), probe(30, rwkv=9e-7)], None),
        ([probe(0, rwkv=0.1), probe(10, rwkv=9e-7)], None),
        ([probe(0, rwkv=0.1, mamba=0.1), probe(10, rwkv=0.0, mamba=0.1), probe(20, rwkv=0.1, mamba=0.0)], None),
        ([probe(0, rwkv=0.0), probe(50, rwkv=0.0), probe(100, rwkv=0.0)], None),  # not alive yet, in the warm-up
        ([probe(0, rwkv=0.0), probe(100, rwkv=0.0), probe(110, rwkv=0.0), probe(120, rwkv=0.0)], 120),
        ([probe(0, rwkv=0.0), probe(50, rwkv=0.0), probe(60, rwkv=0.2), probe(200, rwkv=0.2)], None),
        ([probe(0, mamba_a=0.1, mamba_b=0.1), probe(10, mamba_a=0.1, mamba_b=0.0), probe(20, mamba_b=0.0)], 20),
        ([probe(0, rwkv=0.1), probe(10, rwkv=math.nan), probe(20, rwkv=math.nan)], None),
    ],
)
def test_collapse(series: list[Row], at: int | None) -> None:
    events, _ = feed(only("collapse"), series)
    assert events == ([] if at is None else [("collapse", at, "stop")])


@pytest.mark.parametrize("warmup, last", [(2, 100), (100, 100), (150, 150)])
def test_a_branch_that_wakes_up_has_the_warm_up_and_a_hundred_steps(warmup: int, last: int) -> None:
    """RWKV-6's output is exactly zero at first: with a warm-up of two steps it is still nearly that at step 6."""
    rules = lambda: StoppingRules(config(f"schedule.warmup_steps={warmup}"))  # noqa: E731
    asleep = [probe(step, rwkv=0.0) for step in range(0, last + 1, 2)]
    assert feed(rules(), [*asleep, probe(last + 2, rwkv=0.1)])[0] == []
    later = [probe(step, rwkv=0.0) for step in (last + 1, last + 2)]
    assert feed(rules(), [*asleep, *later])[0] == [("collapse", last + 2, "stop")]


def test_collapse_says_where() -> None:
    rows = [probe(0, rwkv=0.1, mamba=0.1), *(probe(step, rwkv=0.1, mamba=step / 1e9) for step in (10, 20))]
    _, (action,) = feed(only("collapse"), rows)
    assert action.reason == (
        "collapse: the output of mamba of layer 2 is constant: variance 1e-08 (step 10), 2e-08 (step 20), limit 1e-06"
    )
    assert feed(only("collapse", "collapse.probes=3"), rows)[0] == []
    assert feed(only("collapse", "collapse.variance=1e-9"), rows)[0] == []


# ---- gradient ratio


@pytest.mark.parametrize(
    "ratio, at",
    [
        (lambda step: 10.1, 160),  # from 110 on, the first step after the warm-up, for 50 steps
        (lambda step: 0.099, 160),
        (lambda step: 10.0, None),
        (lambda step: 0.1, None),
        (lambda step: 50.0 if step < 300 else 1.0, 160),
        (lambda step: 50.0 if step <= 150 else 1.0, None),  # one row too short
        (lambda step: 1.0 if step % 50 == 0 else 50.0, None),  # never sustained
        (lambda step: 50.0 if step >= 500 else 1.0, 550),
        (lambda step: 0.01 if step % 20 else 50.0, 160),  # outside is outside
        (lambda step: 50.0 if step <= 100 else 1.0, None),  # the warm-up
        (lambda step: math.nan, None),
    ],
)
def test_gradient_ratio(ratio: Callable[[int], float], at: int | None) -> None:
    events, _ = feed(only("grad_ratio"), ratios(ratio))
    assert events == ([] if at is None else [("grad_ratio", at, "stop")])


def test_gradient_ratio_outside_for_a_short_while_only() -> None:
    """However short the run."""
    assert feed(only("grad_ratio", "grad_ratio.min_steps=250"), ratios(lambda _: 50.0))[0] == [
        ("grad_ratio", 360, "stop")
    ]
    assert feed(only("grad_ratio", "grad_ratio.share=0.3"), ratios(lambda _: 50.0))[0] == [("grad_ratio", 410, "stop")]
    assert config().stopping.grad_ratio.min_steps == 250


def test_gradient_ratio_takes_three_rows_and_a_model_with_both() -> None:
    assert feed(only("grad_ratio"), ratios(lambda _: 50.0, every=200, first=200))[0] == [("grad_ratio", 600, "stop")]
    assert feed(only("grad_ratio"), [{"kind": "train", "step": s, "loss": 1.0} for s in range(10, 900, 10)])[0] == []
    _, (action,) = feed(only("grad_ratio"), ratios(lambda step: 20 + step / 10))
    assert action.reason == (
        "grad_ratio: gradient ratio RWKV/Mamba 31 to 36 in all 6 logged steps from 110 on (5.0% of the training), "
        "limits 0.1 and 10"
    )


# ---- all rules together


def whole_run(curve: Callable[[int], float]) -> list[Row]:
    rows = [
        *evaluations(curve),
        *ratios(lambda _: 0.8),
        *(probe(step, rwkv=0.1, mamba=0.2) for step in range(0, 900, 100)),
    ]
    return sorted(rows, key=lambda row: row["step"])


@pytest.mark.parametrize(
    "curve",
    [
        lambda step: 1.5 + 3 * math.exp(-step / 400) + 0.05 * math.sin(step / 15),  # small periodic dips
        lambda step: 1.5 + 3 * math.exp(-step / 400) + (0.15 if step % 100 == 0 else 0.0),  # one evaluation in five
        lambda step: 3 - 0.01 * math.log(step + 1),  # a slight slope on a log scale
        lambda step: 1.2 + 8 * math.exp(-step / 30) - 0.0001 * step,  # a steep fall, then a slow one
    ],
    ids=["dips", "jitter", "slope", "steep"],
)  # fmt: skip
def test_they_leave_a_run_alone_that_is_well(curve: Callable[[int], float]) -> None:
    assert feed(watcher(), whole_run(curve)) == ([], [])


CASES: dict[str, list[Row]] = {
    "overfitting": rising(2.5, 1.0),
    "plateau": evaluations(falls_until(300)),
    "oscillation": [evaluation(20 * i, value) for i, value in enumerate([2.6, 2.0, 2.6, 2.0, 2.6])],
    "collapse": [probe(0, rwkv=0.1), probe(10, rwkv=0.0), probe(20, rwkv=0.0)],
    "grad_ratio": ratios(lambda _: 100.0),
}


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_can_be_switched_off_alone(name: str) -> None:
    assert {rule for rule, _, _ in feed(watcher(), CASES[name])[0]} == {name} and watcher().needs_probe
    off = watcher(f"{name}.enabled=false")
    assert feed(off, CASES[name]) == ([], []) and len(off.rules) == len(RULES) - 1
    assert off.needs_probe == (name != "collapse")


def test_all_can_be_switched_off() -> None:
    off = StoppingRules(config("stopping=off"))
    assert off.rules == [] and feed(off, CASES["overfitting"]) == ([], [])
    assert off.summary() == {"stopping": {"act": True, "events": []}}


@pytest.mark.parametrize("name", CASES)
def test_rules_that_do_not_act_only_write_down(name: str) -> None:
    acting, watching = watcher(), watcher("act=false")
    events, actions = feed(acting, CASES[name])
    assert feed(watching, CASES[name]) == (events, []) and len(actions) == len(events) > 0
    record = watching.summary()["stopping"]
    assert record["act"] is False and not any(event["acted"] for event in record["events"])
    acted = acting.summary()["stopping"]
    assert acted["act"] is True and all(event["acted"] for event in acted["events"])
    assert [e["reason"] for e in acted["events"]] == [e["reason"] for e in record["events"]]


def test_in_the_runs_of_a_sweep_they_act_only_if_told_to() -> None:
    def acts(*overrides: str) -> bool:
        return StoppingRules(config(*overrides)).acts

    assert acts() and acts("stopping.act=true") and not acts("stopping.act=false")
    assert not acts("sweep.name=s") and acts("sweep.name=s", "stopping.act=true")


def test_after_a_stop_that_acted_nothing_more_is_said() -> None:
    rules = watcher()
    feed(rules, [*CASES["overfitting"], evaluation(300, 2.0, 1.0), *CASES["oscillation"], *CASES["plateau"]])
    assert [event["rule"] for event in rules.summary()["stopping"]["events"]] == ["overfitting"]


def test_where_they_do_not_act_every_stop_is_said_once() -> None:
    rules = watcher("act=false")
    rows = rising(2.5, 1.0) + [evaluation(step, 2.5, 1.0) for step in range(300, 1000, 50)]
    rows += [evaluation(step, 2.5 if step % 40 else 3.2, 1.0) for step in range(1000, 1200, 20)]
    news = []
    for row in rows:
        assert rules.see(row) is None
        news += rules.news()
    assert [event["rule"] for event in rules.summary()["stopping"]["events"]] == [
        "overfitting", "plateau", "plateau", "oscillation",
    ]  # fmt: skip
    assert len(news) == 4 and news[0].startswith("stopping rule at step 280, not acted upon (stop): overfitting: ")
    assert news[1].startswith("stopping rule at step 350, not acted upon (learning rate x0.6): plateau: ")


def test_a_stop_goes_before_a_reduction() -> None:
    """Step 400 is the end of a plateau of 15% and 10% above the best."""
    rules = watcher()
    rows = [evaluation(0, 4.0, None), evaluation(200, 2.0, 1.9), evaluation(300, 2.05, 1.8), evaluation(400, 2.3, 1.7)]
    _, (action,) = feed(rules, rows)
    assert action.reason.startswith("overfitting: ") and action.lr_factor is None
    events = rules.summary()["stopping"]["events"]
    assert [(e["rule"], e["acted"]) for e in events] == [("overfitting", True), ("plateau", False)]


def test_a_stop_goes_before_a_reduction_that_was_found_first() -> None:
    """Step 350 is the end of a plateau of 15% and the second rise of more than 0.5."""
    rows = [evaluation(step, val) for step, val in ((0, 4.0), (200, 2.0), (240, 2.6), (280, 2.05), (350, 2.6))]
    events, (action,) = feed(watcher(), rows)
    assert events == [("plateau", 350, "reduce_lr"), ("oscillation", 350, "stop")]
    assert action.reason.startswith("oscillation: ")


def test_at_the_last_step_there_is_nothing_left_to_act_on() -> None:
    rules = watcher()
    rows = [evaluation(700, 2.0, 1.9), evaluation(900, 2.1, 1.8), evaluation(1000, 2.3, 1.7)]
    assert feed(rules, rows)[1] == []
    assert [e["acted"] for e in rules.summary()["stopping"]["events"]] == [False, False]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("act", ["true", "false"])
def test_what_is_remembered_is_plain_data_and_all_there_is(name: str, act: str) -> None:
    """Cut after any row, another watcher with that state goes on the same."""
    whole = watcher(f"act={act}")
    expected = feed(whole, CASES[name])
    for cut in range(len(CASES[name])):
        first, second = watcher(f"act={act}"), watcher(f"act={act}")
        _, before = feed(first, CASES[name][:cut])
        second.state = json.loads(json.dumps(first.state))
        events, after = feed(second, CASES[name][cut:])
        assert (events, before + after) == expected and second.state == whole.state


def test_rows_are_left_as_they_are() -> None:
    rows = [row for case in CASES.values() for row in case]
    before = copy.deepcopy(rows)
    feed(watcher("act=false"), rows)
    assert rows == before
