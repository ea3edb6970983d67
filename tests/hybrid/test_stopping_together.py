"""All stopping rules together: what they leave alone, which goes first, what they remember."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable

import pytest

from hybrid.stopping.watcher import RULES, StoppingRules
from tests.hybrid.configs import config
from tests.hybrid.stopping_rows import Row, evaluation, evaluations, falls_until, feed, probe, ratios, rising, watcher


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
