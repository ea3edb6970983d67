"""The search space: what its description means, what it refuses, and what a trial draws from it."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hybrid.config import ConfigError
from sweeps.search import read_dimensions, without
from sweeps.space import Space, from_command_line

LR = {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}
FUSION = {"type": "categorical", "choices": ["gated", "gain", "concat"]}
GATE = {"type": "float", "low": 0.1, "high": 0.9, "when": {"fusion": "gated"}}
CONDITIONAL = {"fusion": FUSION, "fusion.gate_init": GATE, "optim.lr": LR}


def draw(space: Space, **params: Any) -> dict[str, Any]:
    return space.suggest(optuna.trial.FixedTrial(params))


def test_a_description_becomes_optunas_distributions() -> None:
    space = Space(
        {
            "optim.lr": LR,
            "optim.weight_decay": {"type": "float", "low": 0, "high": 0.3, "step": 0.1},
            "schedule.warmup_steps": {"type": "int", "low": 50, "high": 500, "step": 50},
            "model.rwkv.shift_low_rank": {"type": "int", "low": 4, "high": 64, "log": True},
            "fusion": FUSION,
        }
    )
    assert [(d.key, d.distribution) for d in space.dimensions] == [
        ("optim.lr", FloatDistribution(1e-4, 1e-2, log=True)),
        ("optim.weight_decay", FloatDistribution(0, 0.3, step=0.1)),
        ("schedule.warmup_steps", IntDistribution(50, 500, step=50)),
        ("model.rwkv.shift_low_rank", IntDistribution(4, 64, log=True)),
        ("fusion", CategoricalDistribution(["gated", "gain", "concat"])),
    ]
    assert Space(space.describe()).describe() == space.describe()


def test_a_dimension_with_a_condition_is_drawn_only_where_it_holds() -> None:
    space = Space(CONDITIONAL)
    params = {"fusion": "gated", "fusion.gate_init": 0.3, "optim.lr": 1e-3}
    assert draw(space, **params) == params
    assert draw(space, **{**params, "fusion": "gain"}) == {"fusion": "gain", "optim.lr": 1e-3}
    several = Space(CONDITIONAL | {"fusion.gate_init": GATE | {"when": {"fusion": ["gated", "gain"]}}})
    assert "fusion.gate_init" in draw(several, **{**params, "fusion": "gain"})
    assert Space(space.describe()).describe() == space.describe()


def test_a_condition_on_a_dimension_that_was_not_drawn_does_not_hold() -> None:
    space = Space(
        {
            "fusion": FUSION,
            "fusion.proj_init": {
                "type": "categorical", "choices": ["identity", "random"], "when": {"fusion": "concat"},
            },
            "fusion.branch_norm": {
                "type": "categorical", "choices": ["none", "rms"], "when": {"fusion.proj_init": "random"},
            },
        }
    )  # fmt: skip
    values = {"fusion.proj_init": "random", "fusion.branch_norm": "rms"}
    assert draw(space, fusion="concat", **values).keys() == {"fusion", *values}
    assert draw(space, fusion="gain", **values).keys() == {"fusion"}


def test_parameters_as_overrides() -> None:
    space = Space({"fusion.gain_init": {"type": "categorical", "choices": [[0.7, 0.3], [0.5, 0.5]]}, "optim.lr": LR})
    params = draw(space, **{"fusion.gain_init": "[0.7,0.3]", "optim.lr": 1 / 3000})
    lines = space.overrides(params)
    assert lines == ["fusion.gain_init=[0.7,0.3]", "optim.lr=0.0003333333333333333"]
    read = OverridesParser.create().parse_overrides(lines)
    assert [override.value() for override in read] == [[0.7, 0.3], 1 / 3000]


def test_corners_reach_both_ends_and_every_choice() -> None:
    corners = list(Space(CONDITIONAL).corners())
    assert {corner["fusion"] for corner in corners} == {"gated", "gain", "concat"}
    assert {corner["optim.lr"] for corner in corners} == {1e-4, 1e-2}
    assert all(("fusion.gate_init" in corner) == (corner["fusion"] == "gated") for corner in corners)


@pytest.mark.parametrize(
    ("key", "described", "message"),
    [
        ("optim.lrr", LR, "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("seed_init", {"type": "int", "low": 0, "high": 3}, "seed_init is not for a search"),
        ("data.seq_len", {"type": "int", "low": 8, "high": 9}, "data.seq_len is not for a search"),
        ("optim.lr", 3, "must be a dimension"),
        ("optim.lr", {"low": 1, "high": 2}, "optim.lr.type must be one of float, int, categorical"),
        ("optim.lr", {"type": "float", "low": 1}, "optim.lr.high is not set"),
        ("optim.lr", {"type": "float", "low": 2, "high": 1}, "low=2 is above high=1"),
        ("optim.lr", {"type": "float", "low": "a", "high": 1}, "optim.lr.low must be a number, got a"),
        ("optim.lr", LR | {"low": 0}, "optim.lr: "),  # no logarithm of 0
        ("optim.lr", LR | {"step": 0.1}, "optim.lr: "),  # no steps on a logarithmic scale
        ("optim.lr", LR | {"hihg": 1}, "no argument 'hihg' of float"),
        ("optim.lr", LR | {"log": "yes"}, "optim.lr.log must be true or false"),
        ("schedule.warmup_steps", {"type": "int", "low": 1.5, "high": 9}, "low must be a whole number, got 1.5"),
        ("fusion", {"type": "categorical", "choices": []}, "fusion.choices must be a list"),
        ("fusion", {"type": "categorical", "choices": ["gain", "gain"]}, "names a value twice"),
        ("fusion.gate_init", GATE, "fusion is no dimension above this one"),
    ],
)
def test_a_bad_dimension_is_named(key: str, described: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Space({key: described})
    assert message in str(caught.value) and key in str(caught.value) and "\n" not in str(caught.value)


def test_a_condition_that_can_never_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="fusion is never gate"):
        Space(CONDITIONAL | {"fusion.gate_init": GATE | {"when": {"fusion": "gate"}}})
    with pytest.raises(ConfigError, match=r"optim\.lr is not categorical"):
        Space({"optim.lr": LR, "optim.eps": LR | {"when": {"optim.lr": 1e-3}}})


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="space is empty"):
        Space({})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"optim.lr": 1.0}, "optim.lr=1.0 is outside its dimension"),
        ({"optim.lr": True}, "optim.lr=True is outside"),
        ({"optim.lr": "much"}, "optim.lr=much is outside"),
        ({"fusion": "gate"}, "fusion=gate is outside"),
        ({"optim.eps": 1e-8}, "optim.eps is no dimension of the space"),
    ],
)
def test_parameters_named_by_a_person_are_checked(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Space(CONDITIONAL).check_params(params, "sweep.search.enqueue")
    assert message in str(caught.value)
    good = {"fusion": "concat", "optim.lr": 1e-2}
    assert Space(CONDITIONAL).check_params(good, "here") == good


@pytest.mark.parametrize(
    ("line", "described"),
    [
        ("a=interval(1e-4,1e-2)", {"type": "float", "low": 1e-4, "high": 1e-2}),
        ("a=tag(log,interval(1e-4,1e-2))", LR),
        ("a=int(interval(1,9))", {"type": "int", "low": 1, "high": 9}),
        ("a=range(1,9)", {"type": "int", "low": 1, "high": 8}),
        ("a=range(0,10,3)", {"type": "int", "low": 0, "high": 9, "step": 3}),
        ("a=range(0,9,3)", {"type": "int", "low": 0, "high": 6, "step": 3}),  # the end is not part of a range
        ("a=choice(x,'y z',3)", {"type": "categorical", "choices": ["x", "y z", 3]}),
        ("a=1", None),
    ],
)
def test_a_dimension_on_the_command_line(line: str, described: dict[str, Any] | None) -> None:
    (override,) = OverridesParser.create().parse_overrides([line])
    assert from_command_line(override) == described


def test_the_command_line_changes_the_space() -> None:
    space = {"optim.lr": LR, "fusion": FUSION}
    lines = ["optim.lr=interval(1e-3,1e-2)", "schedule.warmup_steps=range(1,5)", "model=tiny", "init=official,fla"]
    new, fixed, rest = read_dimensions(space, lines)
    assert new == {
        "optim.lr": {"type": "float", "low": 1e-3, "high": 1e-2},
        "fusion": FUSION,
        "schedule.warmup_steps": {"type": "int", "low": 1, "high": 4},
    }
    assert (fixed, rest) == ({}, ["model=tiny", "init=official,fla"])  # a plain list of another key makes arms
    new, fixed, rest = read_dimensions(space, ["fusion=gain,gated", "optim.lr=1e-3"])
    assert new["fusion"] == {"type": "categorical", "choices": ["gain", "gated"]}
    assert (fixed, rest) == ({"optim.lr": "1e-3"}, ["optim.lr=1e-3"])
    _, _, rest = read_dimensions(space, ["seed_init=range(0,3)"])
    assert rest == ["seed_init=range(0,3)"]  # seeds are no dimension


def test_a_fixed_dimension_settles_the_conditions_on_it() -> None:
    assert without(CONDITIONAL, {"fusion": "gain"}) == {"optim.lr": LR}
    left = without(CONDITIONAL, {"fusion": "gated"})
    assert left.keys() == {"fusion.gate_init", "optim.lr"} and not left["fusion.gate_init"]["when"]
    assert "fusion.gate_init" in draw(Space(left), **{"fusion.gate_init": 0.5, "optim.lr": 1e-3})
    assert without(CONDITIONAL, {}) == CONDITIONAL
