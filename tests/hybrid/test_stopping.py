"""Each stopping rule on series of rows: it fires where it should, and not just below."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from hybrid.stopping.watcher import RULES, StoppingRules
from tests.hybrid.configs import config
from tests.hybrid.stopping_rows import (
    Events,
    Row,
    evaluation,
    evaluations,
    falls_until,
    feed,
    probe,
    ratios,
    rising,
    watcher,
)


def only(name: str, *overrides: str) -> StoppingRules:
    """The same with one rule; ``reductions`` needs the plateau."""
    others = {rule.name for rule in RULES} | {"reductions"}
    return watcher(*(f"{other}.enabled=false" for other in sorted(others - {name})), *overrides)


# ---- overfitting


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
