"""Crossed factors: which there are, and what they do."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from statsmodels.stats.anova import anova_lm

from analysis.comparison.finding_words import factorial_words
from analysis.comparison.settings import arm_settings, factors, setting_words
from analysis.statistics.factorial import Factor, factorial

TWO = [Factor("norm", ("none", "rms")), Factor("fusion", ("gain", "gated", "concat"))]
CELLS = list(itertools.product(*(factor.levels for factor in TWO)))


def with_statsmodels(values, named, cells):
    rows = [(*cells[i], j, v) for (i, j), v in np.ndenumerate(values) if np.isfinite(v)]
    frame = pd.DataFrame(rows, columns=[*(f.name for f in named), "block", "y"])
    terms = " * ".join(f"C({f.name}, Sum)" for f in named)
    return anova_lm(smf.ols(f"y ~ C(block, Sum) + {terms}", frame).fit(), typ=3)


@pytest.mark.parametrize("missing", [[], [(0, 0)], [(1, 2), (5, 0), (4, 3)]])
def test_two_factors_against_statsmodels(missing):
    values = np.random.default_rng(1).normal(size=(6, 4)) + np.arange(4)
    values[3:] += 1.0
    for cell in missing:
        values[cell] = math.nan
    found, expected = factorial(values, TWO, CELLS), with_statsmodels(values, TWO, CELLS)
    terms = found.terms.set_index("term")
    names = {"norm": "C(norm, Sum)", "fusion": "C(fusion, Sum)", "norm x fusion": "C(norm, Sum):C(fusion, Sum)"}
    for ours, theirs in names.items():
        assert terms.loc[ours, "f"] == pytest.approx(expected.loc[theirs, "F"])
        assert terms.loc[ours, "p"] == pytest.approx(expected.loc[theirs, "PR(>F)"])
    assert terms["df_residual"].iloc[0] == expected.loc["Residual", "df"]


def test_three_factors_against_statsmodels():
    named = [*TWO, Factor("init", ("official", "fla"))]
    cells = list(itertools.product(*(factor.levels for factor in named)))
    values = np.random.default_rng(2).normal(size=(12, 3))
    found, expected = factorial(values, named, cells), with_statsmodels(values, named, cells)
    assert found.terms["term"].tolist()[3:] == ["norm x fusion", "norm x init", "fusion x init", "norm x fusion x init"]
    assert found.terms["f"].to_numpy() == pytest.approx(expected["F"].iloc[2:-1].to_numpy())


def test_effects_by_hand():
    # rms - none is 0.2, 0.4, 0.0 for the three fusions: 0.2 on average; a checkerboard of +-0.01 leaves a spread
    effect = np.array([0.0, 0.0, 0.0, 0.2, 0.4, 0.0])
    noise = 0.01 * np.array([[1, -1], [-1, 1], [1, -1], [-1, 1], [1, -1], [-1, 1]])
    found = factorial(1.5 + effect[:, None] + noise + np.array([0.0, 0.3]), TWO, CELLS)
    (norm,) = found.effects[found.effects["factor"] == "norm"].to_dict("records")
    assert norm["difference"] == pytest.approx(0.2)
    # 12 cells, 6 arm means and 1 more block: 5 df; each residual is 0.01, so s^2 = 12e-4 / 5; t(5) at 97.5% = 2.570582
    half = 2.570582 * math.sqrt(12e-4 / 5 * (1 / 6 + 1 / 6))
    assert (norm["half_width"], norm["high"]) == (pytest.approx(half), pytest.approx(0.2 + half))
    assert found.residual_sd == pytest.approx(math.sqrt(12e-4 / 5))
    cells = found.cells.set_index(["norm", "fusion"])
    assert cells.loc[("rms", "gated"), "mean"] == pytest.approx(1.5 + 0.4 + 0.15)
    assert cells.loc[("none", "gain"), "high"] - cells.loc[("none", "gain"), "mean"] == pytest.approx(
        2.570582 * math.sqrt(12e-4 / 5 / 2)
    )
    said = factorial_words(found)
    assert said[0].startswith(
        "norm=rms costs 0.2000 ± 0.0230 nats against norm=none, averaged over fusion (p < 0.001)."
    )
    assert said[2].startswith("norm x fusion interact (p < 0.001)")


def test_words_need_evidence():
    values = np.random.default_rng(3).normal(size=(6, 5))
    said = " ".join(factorial_words(factorial(values, TWO, CELLS)))
    assert (
        "no effect of norm shown" in said
        and "fusion has no effect shown" in said
        and "No interaction shown: norm x fusion" in said
    )


def test_too_little_to_analyse():
    assert factorial(np.random.default_rng(4).normal(size=(6, 1)), TWO, CELLS) is None  # one seed
    values = np.random.default_rng(5).normal(size=(6, 4))
    values[2] = math.nan  # a combination that never ran
    assert factorial(values, TWO, CELLS) is None


def test_crossed_keys_and_a_joint_rest():
    settings = {
        f"{fusion}{gate}-{norm}": {"fusion": fusion, "fusion.branch_norm": norm}
        | ({"fusion.gate_init": gate} if gate else {})
        for fusion, gate in (("gain", ""), ("gated", "0.5"), ("gated", "0.3"))
        for norm in ("none", "rms")
    }
    found = factors(settings)
    named, cells = found.factors, found.cells
    assert [(f.name, f.levels) for f in named] == [
        ("branch_norm", ("none", "rms")),
        ("fusion and gate_init", ("gain", "gated, gate_init=0.5", "gated, gate_init=0.3")),
    ]
    assert cells["gated0.3-rms"] == ("rms", "gated, gate_init=0.3")
    assert [f.levels[0] for f in found.from_baseline("gated0.3-rms").factors] == ["rms", "gated, gate_init=0.3"]
    del settings["gain-rms"]
    assert factors(settings) is None  # not complete any more
    assert factors({"a": {"fusion": "gain"}, "b": {"fusion": "gated"}}) is None  # one factor


def test_settings_come_from_the_overrides(tmp_path, make_run):
    from analysis.records.runs import read_records

    for arm, lines in {"a": ["fusion=gated", "fusion.gate_init=0.3"], "b": ["fusion=gain"]}.items():
        for seed in (0, 1):
            overrides = ["sweep=x", f"seed_init={seed}", "out=there", "model=tiny", *lines]
            make_run(tmp_path, arm, seed, overrides=overrides)
    assert arm_settings(read_records(tmp_path)) == {
        "a": {"fusion": "gated", "fusion.gate_init": "0.3"},
        "b": {"fusion": "gain"},
    }
    assert setting_words({"fusion.gate_init": "0.3", "fusion": "gated"}) == "gated, gate_init=0.3"
