"""Costs over seeds, held against hand-computed intervals; what is and is not called needed."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from analysis.diagnosis.necessity import Cost, Interval, compare_branches, costs, over_seeds
from analysis.diagnosis.records import COLUMNS, Diagnoses
from analysis.diagnosis.words import branch_name, interval_words, remarks, sentences


def diagnoses(increases, controls=None, arm="gated", error=0.01):
    """``increases``: by (branch, intervention), a number per seed, of all layers at once."""
    controls = controls or {}
    rows = [
        (arm, seed, seed, -1, *place, value, error, controls.get(place, [0.01] * len(values))[seed], error)
        for place, values in increases.items()
        for seed, value in enumerate(values)
    ]
    tables = {"necessity": pd.DataFrame(rows, columns=["arm", "seed_init", "seed_data", *COLUMNS["necessity"]])}
    branches = tuple(dict.fromkeys(branch for branch, _ in increases))
    seeds = range(max(map(len, increases.values())))
    about = [(arm, s, s, "best", 100, 16384.0, 1.5, branches, "float32", "v", "cpu", f"{arm}-{s}") for s in seeds]
    tables["about"] = pd.DataFrame(about, columns=["arm", "seed_init", "seed_data", *COLUMNS["about"]])
    return Diagnoses(tables)


def say(increases, controls=None):
    (sentence,) = sentences(diagnoses(increases, controls), ["gated"])
    return sentence.kind, sentence.text


def test_interval_over_seeds_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, t(2) at 97.5% = 4.302653, over the root of 3: 2.484138."""
    found = over_seeds(np.array([1.0, 2.0, 3.0, math.nan]), np.full(4, 100.0))
    assert (found.mean, found.seeds) == (2.0, 3) and found.half == pytest.approx(2.484138, abs=1e-6)
    assert not found.positive and not found.negative


def test_interval_of_one_seed_is_over_windows():
    found = over_seeds(np.array([math.nan, 0.5]), np.array([9.0, 0.1]))
    assert found == Interval(0.5, pytest.approx(0.196), 1) and found.positive


def test_no_number_gives_no_interval():
    found = over_seeds(np.array([math.nan]), np.array([0.1]))
    assert found.seeds == 0 and math.isnan(found.mean) and not found.positive and not found.negative


def test_excess_over_the_control_is_paired():
    """Increases 0.1, 0.2, 0.3 with controls 0.05, 0.15, 0.25: 0.05 in every seed, although the intervals overlap."""
    found = diagnoses({("rwkv", "zero"): [0.1, 0.2, 0.3]}, {("rwkv", "zero"): [0.05, 0.15, 0.25]})
    (cost,) = costs(found["necessity"]).values()
    assert cost.beyond.mean == pytest.approx(0.05) and cost.beyond.half == pytest.approx(0.0, abs=1e-12)
    assert cost.beyond.positive and not cost.increase.positive and not cost.shown


def test_one_seed_adds_the_errors_of_increase_and_control():
    found = diagnoses({("rwkv", "zero"): [0.1]}, error=0.03)
    (cost,) = costs(found["necessity"]).values()
    assert cost.beyond == Interval(pytest.approx(0.09), pytest.approx(1.96 * math.hypot(0.03, 0.03)), 1)


@pytest.mark.parametrize(
    ("increase", "beyond", "shown"),
    [(0.1, 0.1, True), (-0.1, 0.1, False), (0.1, -0.1, False), (0.01, 0.1, False), (0.1, 0.01, False)],
)
def test_shown_needs_both(increase, beyond, shown):
    assert Cost(Interval(increase, 0.02, 5), Interval(0, 0, 5), Interval(beyond, 0.02, 5)).shown is shown


def test_branches_are_compared_inside_each_seed():
    """Differences 0.3, 0.3, 0.3 although the costs themselves vary by 0.2; a seed that one branch lacks counts not."""
    found = diagnoses({("rwkv", "zero"): [0.1, 0.2, 0.3], ("mamba", "zero"): [0.4, 0.5, 0.6, 9.9]})
    more = compare_branches(found["necessity"], "gated", "mamba", "rwkv", "zero")
    assert more == Interval(pytest.approx(0.3), pytest.approx(0.0, abs=1e-12), 3) and more.positive
    assert compare_branches(found["necessity"], "gated", "rwkv", "mamba", "shuffle").seeds == 0


def test_both_needed_and_one_more():
    """t(2) = 4.302653. Mamba 0.40, 0.41, 0.42: sd 0.01, +- 0.0248. RWKV 0.11, 0.12, 0.13 the same; difference 0.29."""
    kind, text = say({("rwkv", "zero"): [0.11, 0.12, 0.13], ("mamba", "zero"): [0.40, 0.41, 0.42]})
    assert kind == "both"
    assert text.startswith("switching Mamba off everywhere costs 0.410 ± 0.025 nats (control 0.010 ± 0.000), ")
    assert "RWKV 0.120 ± 0.025 (control 0.010 ± 0.000) (3 seeds). " in text
    assert text.rstrip().endswith("Both are needed, Mamba more (by 0.290 ± 0.000).")


def test_both_needed_and_none_more():
    kind, text = say({("rwkv", "zero"): [0.40, 0.42, 0.41], ("mamba", "zero"): [0.41, 0.40, 0.42]})
    assert kind == "both" and "Both are needed; that one matters more than the other is not shown (" in text


def test_zero_inside_the_interval_is_not_shown():
    kind, text = say({("rwkv", "zero"): [-0.01, 0.05, 0.02], ("mamba", "zero"): [0.40, 0.41, 0.42]})
    assert kind == "one"
    assert "Mamba is needed; RWKV is not shown to matter (the interval includes zero)." in text
    assert "Both" not in text


def test_within_the_control_is_not_shown():
    kind, text = say(
        {("rwkv", "zero"): [0.11, 0.12, 0.13], ("mamba", "zero"): [0.40, 0.41, 0.42]},
        {("rwkv", "zero"): [0.10, 0.15, 0.12]},
    )
    assert kind == "one"
    assert "RWKV is not shown to matter (no more than as long a move in random directions)." in text


def test_neither():
    kind, text = say({("rwkv", "zero"): [-0.02, 0.05, 0.0], ("mamba", "zero"): [-0.40, -0.41, -0.42]})
    assert kind == "none" and "Neither is shown to matter: " in text
    assert "Mamba is not shown to matter (the loss falls without it)" in text and "−0.410 ± 0.025" in text


def test_one_seed_speaks_of_its_model_only():
    kind, text = say({("rwkv", "zero"): [0.12], ("mamba", "zero"): [0.41]})
    assert kind == "both" and "one seed: ± is over validation windows, and holds for that model" in text
    assert "0.410 ± 0.020" in text  # 1.96 x 0.01


def test_two_seeds_show_little():
    """t(1) at 97.5% = 12.71: 0.10 and 0.14 give 0.12 +- 0.254, although each is many errors of its windows above 0."""
    kind, text = say({("rwkv", "zero"): [0.10, 0.14], ("mamba", "zero"): [0.40, 0.40]})
    assert kind == "one" and "RWKV 0.120 ± 0.254" in text
    assert "RWKV matters in each of the 2 models, by their validation windows, but too unevenly to say so of" in text
    kind, text = say({("rwkv", "zero"): [0.10, 0.14], ("mamba", "zero"): [0.2, 0.4]})
    assert kind == "none" and text.rstrip().endswith(
        "None is shown to matter over seeds, though each does in every one of the 2 models, by their validation "
        "windows."
    )
    unclear = {("rwkv", "zero"): [-0.10, 0.14], ("mamba", "zero"): [0.2, 0.4]}
    assert "Neither is shown to matter over seeds: Mamba matters in each of the 2 models" in say(unclear)[1]


def test_a_model_needs_a_branch_only_beyond_the_error_of_its_windows():
    """Errors of 0.01, a control of 0.01: an increase of 0.0377 is just within 1.96 x root 2 x 0.01 of its control."""
    for least, needed in ((0.0377, False), (0.0378, True)):
        found = diagnoses({("rwkv", "zero"): [least, 0.4]})
        (cost,) = costs(found["necessity"]).values()
        assert cost.in_every_run is needed and not cost.shown


def test_a_single_branch_is_compared_with_nothing():
    kind, text = say({("mamba", "zero"): [2.0, 2.1, 2.2]})
    assert kind == "single" and text.endswith("It is the only branch.") and "needed" not in text


def test_other_interventions_that_disagree_are_told():
    increases = {("rwkv", "zero"): [0.11, 0.12, 0.13], ("mamba", "zero"): [0.40, 0.41, 0.42]}
    agreeing = increases | {("rwkv", "mean"): [0.11, 0.12, 0.13], ("mamba", "mean"): [0.40, 0.41, 0.42]}
    assert "But" not in say(agreeing)[1]
    constant = increases | {("rwkv", "mean"): [0.11, 0.12, 0.13], ("mamba", "mean"): [-0.01, 0.01, 0.0]}
    assert "But replaced by its mean, Mamba costs 0.000 ± 0.025: not shown to matter." in say(constant)[1]
    turned = increases | {("rwkv", "shuffle"): [0.81, 0.82, 0.83], ("mamba", "shuffle"): [0.40, 0.41, 0.42]}
    assert "But shuffled over the batch, RWKV costs more (by 0.410 ± 0.000)." in say(turned)[1]
    hidden = increases | {("rwkv", "zero"): [-0.01, 0.05, 0.02], ("rwkv", "shuffle"): [0.81, 0.82, 0.83]}
    assert "But shuffled over the batch, RWKV costs 0.820 ± 0.025, more than its control." in say(hidden)[1]


def test_without_a_control_nothing_is_shown():
    kind, text = say({("rwkv", "zero"): [0.1, 0.1, 0.11], ("mamba", "zero"): [0.4, 0.4, 0.41]},
                     {("rwkv", "zero"): [math.nan] * 3})  # fmt: skip
    assert kind == "one" and "RWKV 0.103 ± 0.014 (no control recorded)" in text
    assert "RWKV is not shown to matter (there is no control to hold it against)" in text


def test_names_and_numbers():
    assert [branch_name(name) for name in ("rwkv", "mamba", "rwkv_b", "conv", "rwkv_long")] == [
        "RWKV", "Mamba", "RWKV b", "conv", "rwkv_long"
    ]  # fmt: skip
    assert interval_words(Interval(-0.00001, 0.00002, 3)) == "−0.00001 ± 0.00002"
    assert interval_words(Interval(0.1234, math.nan, 1)) == "0.123"
    assert interval_words(Interval(1e-8, 1e-9, 2)) == "0.000 ± 0.000"


def test_remarks_name_what_was_not_made_alike():
    found = diagnoses({("rwkv", "zero"): [0.1, 0.2, 0.3]})
    found["about"]["step"] = [60, 2000, 50]
    assert remarks(found, {"gated": 3}, ["gated"]) == ["Measured on the best weights, of steps 50 to 2,000."]
    found["about"]["step"] = 60
    assert remarks(found, {"gated": 3}, ["gated"]) == ["Measured on the best weights, of step 60."]
    found["about"].loc[0, ["checkpoint", "tokens"]] = ["final", 1000.0]
    said = remarks(found, {"gated": 5, "gain": 5}, ["gated", "gain"])
    assert said == [
        "gated: 3 of 5 runs diagnosed.",
        "Not diagnosed: gain.",
        "Diagnosed with different checkpoints, so compare with care: best (2 runs), final (1 runs).",
        "Diagnosed with different numbers of validation tokens, so compare with care: 16,384 (2 runs), 1,000 (1 runs).",
    ]
