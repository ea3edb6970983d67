"""Arm + block least squares, families of comparisons and the verdict's rule, against worked numbers and libraries."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.formula.api as smf

from analysis.statistics.blocks import fit_blocks, spread_test
from analysis.statistics.families import all_pairs, dunnett
from analysis.statistics.inference import check_level, infer

NAN = math.nan


def by_statsmodels(values):
    """Ordinary least squares with dummies; the parameters of arms are differences from arm 0."""
    rows = [(i, j, v) for (i, j), v in np.ndenumerate(values) if np.isfinite(v)]
    frame = pd.DataFrame(rows, columns=["arm", "block", "y"])
    return smf.ols("y ~ C(arm) + C(block)", frame).fit()


def test_fit_by_hand():
    # arm means 1.5 and 3.5; d = -1, -3: the residuals are +-0.5 in every cell, so the sum of squares is 1 on 1 df
    fit = fit_blocks(np.array([[1.0, 2.0], [2.0, 5.0]]))
    difference, error = fit.against(1)
    assert difference == pytest.approx([-2.0, 0.0]) and fit.df == 1
    assert fit.variance == pytest.approx(1.0) and error[0] == pytest.approx(1.0)  # sqrt(2 * 1 / 2)


@pytest.mark.parametrize("missing", [[], [(0, 0)], [(1, 2), (3, 0)], [(0, 0), (1, 1), (2, 2), (3, 3)]])
def test_fit_against_statsmodels(missing):
    values = np.random.default_rng(1).normal(size=(4, 5)) + np.arange(5)
    for cell in missing:
        values[cell] = NAN
    fit, expected = fit_blocks(values), by_statsmodels(values)
    difference, error = fit.against(0)
    names = [f"C(arm)[T.{i}]" for i in (1, 2, 3)]
    assert difference[1:] == pytest.approx(expected.params[names].to_numpy())
    assert error[1:] == pytest.approx(expected.bse[names].to_numpy())
    assert (fit.df, fit.residual_ss) == (expected.df_resid, pytest.approx(expected.ssr))


def test_a_block_of_one_arm_says_nothing():
    values = np.random.default_rng(2).normal(size=(3, 4))
    wider = np.hstack([values, [[99.0], [NAN], [NAN]], np.full((3, 1), NAN)])
    one, two = fit_blocks(values), fit_blocks(wider)
    assert two.against(0)[0] == pytest.approx(one.against(0)[0]) and two.df == one.df
    assert two.residual_ss == pytest.approx(one.residual_ss)


def test_leading_dimensions_are_experiments():
    values = np.random.default_rng(3).normal(size=(7, 3, 4))
    values[:, 1, 0] = NAN
    fits = fit_blocks(values)
    assert fits.residual_ss.shape == (7,)
    assert fits.effects[5] == pytest.approx(fit_blocks(values[5]).effects)
    values[3, 2, 2] = NAN
    with pytest.raises(ValueError, match="differ in their missing cells"):
        fit_blocks(values)


def test_unconnected_arms_are_refused():
    with pytest.raises(ValueError, match="share no block"):
        fit_blocks(np.array([[1.0, NAN], [2.0, NAN], [NAN, 3.0], [NAN, 4.0]]))


@pytest.mark.parametrize(("arms", "blocks"), [(3, 3), (4, 5), (8, 3), (16, 5), (7, 2)])
def test_tukey_is_the_studentised_range(arms, blocks):
    fit = fit_blocks(np.random.default_rng(4).normal(size=(arms, blocks)))
    for q in (2.5, 3.5, 4.5, 6.0):
        expected = scipy.stats.studentized_range.sf(q, arms, fit.df)
        assert all_pairs(fit.covariance).p(q / math.sqrt(2), fit.df) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("missing", [[], [(0, 0)], [(1, 1), (2, 0)]])
def test_dunnett_is_the_multivariate_t(missing):
    values = np.random.default_rng(5).normal(size=(5, 4))
    for cell in missing:
        values[cell] = NAN
    fit = fit_blocks(values)
    contrasts = np.eye(5)[1:] - np.eye(5)[0]
    covariance = contrasts @ fit.covariance @ contrasts.T
    scale = np.sqrt(np.diag(covariance))
    joint = scipy.stats.multivariate_t(shape=covariance / np.outer(scale, scale), df=fit.df, seed=1)
    family = dunnett(fit.covariance, 0)
    for t in (1.8, 2.5, 3.5):
        expected = 1 - joint.cdf([t] * 4, lower_limit=[-t] * 4, maxpts=400_000)
        assert family.p(t, fit.df) == pytest.approx(expected, abs=1e-3)
    assert family.p(family.critical(fit.df), fit.df) == pytest.approx(0.05, abs=1e-6)


def test_dunnett_against_scipys_one_way_test():
    """Samples without blocks have the same joint t on their own degrees of freedom."""
    random = np.random.default_rng(11)
    control, *others = random.normal(size=(6, 7)) + np.arange(6)[:, None] * 0.5
    expected = scipy.stats.dunnett(*others, control=control, rng=np.random.default_rng(0))
    found = dunnett(np.eye(6) - 1 / 6, 0).p(expected.statistic, 6 * 6)
    assert found == pytest.approx(expected.pvalue, abs=1e-3) and 0.01 < np.median(found) < 0.5


def test_small_p_stay_between_one_comparison_and_bonferroni():
    family = dunnett(np.eye(16) - 1 / 16, 3)
    t = np.array([0.0, 3.0, 6.0, 12.0, 30.0])
    single = 2 * scipy.stats.t.sf(t, 40)
    assert ((family.p(t, 40) >= single) & (family.p(t, 40) <= np.minimum(1, 15 * single))).all()
    assert (np.diff(family.p(t, 40)) < 0).all()


def test_many_arms_with_missing_cells_get_a_bound():
    values = np.random.default_rng(6).normal(size=(70, 3))
    values[0, 0] = NAN
    fit = fit_blocks(values)
    family = all_pairs(fit.covariance)
    assert not family.exact and family.size == 70 * 69 / 2
    assert family.p(4.0, fit.df) == pytest.approx(min(1, 2415 * 2 * scipy.stats.t.sf(4.0, fit.df)))


def test_spread_test_is_exact_and_sees_a_noisy_arm():
    random = np.random.default_rng(7)
    for missing in (False, True):
        values = random.normal(size=(4000, 4, 5)) + random.normal(size=(4000, 1, 5))
        if missing:
            values[:, 0, 1] = values[:, 2, 3] = NAN
        p = spread_test(values, 0)
        assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    values[:, 0] *= 6
    assert (spread_test(values, 0) < 0.25).mean() > 0.9
    assert np.isnan(spread_test(np.zeros((2, 5)), 0))  # two arms: nothing to compare the spread with


def test_two_arms_are_a_paired_t_test():
    a, b = np.random.default_rng(8).normal(size=(2, 6))
    found = infer(np.array([a, b]), 1)
    expected = scipy.stats.ttest_rel(a, b)
    assert found.p_block[0] == found.p_holm[0] == pytest.approx(expected.pvalue)
    assert found.p_adjusted[0] == pytest.approx(expected.pvalue) and math.isnan(found.p_adjusted[1])


def test_the_rule_is_the_larger_of_two_p_or_holm():
    values = np.random.default_rng(9).normal(size=(50, 5, 4))
    values[:, 3] += 2.0
    for every_pair in (False, True):
        found = infer(values, 2, every_pair)
        others = [0, 1, 3, 4]
        assert 0 < found.pooled.sum() < 50
        larger = np.maximum(found.p_block, found.p_paired)
        expected = np.where(found.pooled[:, None], larger, found.p_holm)[:, others]
        assert found.p_adjusted[:, others] == pytest.approx(expected)
        assert (found.pooled == (found.p_spread >= 0.4)).all()  # 4 seeds
        for i in (0, 17):
            alone = infer(values[i], 2, every_pair)
            assert alone.p_adjusted == pytest.approx(found.p_adjusted[i], nan_ok=True)


def test_two_seeds_are_never_pooled():
    random = np.random.default_rng(10)
    found = infer(random.normal(size=(20, 4, 2)), 0)
    assert not found.pooled.any() and found.p_adjusted[:, 1:] == pytest.approx(found.p_holm[:, 1:])
    assert infer(random.normal(size=(20, 2, 2)), 0).pooled.all()  # two arms: the residual is the pair's own
    assert (check_level(2), check_level(3), check_level(5)) == (1.0, 0.4, 0.25)


def test_missing_cells_move_the_adjusted_difference():
    # y = arm + block exactly: the adjusted difference finds arm 1 - arm 0 = 1 although blocks are far apart
    blocks = np.array([0.0, 10.0, 30.0])
    values = np.array([0.0, 1.0, 5.0])[:, None] + blocks
    values[0, 2] = NAN
    found = infer(values, 0)
    assert found.adjusted_difference == pytest.approx([0.0, 1.0, 5.0])
    assert found.pairs.tolist() == [2, 2, 2] and np.isnan(found.p_adjusted).all()  # no spread at all


def test_differences_without_spread_have_no_p():
    values = np.array([[1.0, 2.0, 3.0], [1.5, 2.5, 3.5], [1.2, 2.1, 3.4]])
    found = infer(values, 0)
    assert math.isnan(found.p_adjusted[1]) and not found.shown[1] and found.p_adjusted[2] > 0
