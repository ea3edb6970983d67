"""The formulas against hand-computed examples, scipy, statsmodels and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from analysis.statistics.elementary import all_pairs_p, holm, mean_sd, paired_difference, t_interval


def test_mean_sd():
    assert mean_sd([1.0, 2.0, 3.0, math.nan]) == (2.0, 1.0)
    mean, sd = mean_sd([5.0])
    assert mean == 5.0 and math.isnan(sd)
    assert all(math.isnan(value) for value in mean_sd([]))


def test_t_interval_by_hand():
    # mean 2, sd 1, n 3: t(2) at 97.5% is 4.302653, so the half width is 4.302653 / sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    # n 2: t(1) at 97.5% is tan(0.475 pi)
    half = math.tan(0.475 * math.pi) * 0.5
    assert t_interval([0.0, 1.0]) == pytest.approx((0.5 - half, 0.5 + half))
    assert all(math.isnan(end) for end in t_interval([1.0]))


def test_paired_difference_by_hand():
    # differences -0.10, -0.06, -0.12: mean -0.28/3, sd sqrt(0.0028/3), t = -sqrt(28), for 2 df p = 1 - t/sqrt(t^2 + 2)
    d = paired_difference([1.50, 1.52, 1.48], [1.60, 1.58, 1.60])
    assert (d.n, d.mean, d.sd) == (3, pytest.approx(-0.28 / 3), pytest.approx(math.sqrt(0.0028 / 3)))
    assert d.p == pytest.approx(1 - math.sqrt(28 / 30))
    assert d.half_width == pytest.approx(4.302653 * d.sd / math.sqrt(3), rel=1e-6)
    assert (d.low + d.high) / 2 == pytest.approx(d.mean)


def test_paired_difference_with_few_or_equal_pairs():
    one = paired_difference([1.0], [1.5])
    assert (one.n, one.mean) == (1, -0.5)
    assert all(math.isnan(value) for value in (one.low, one.high, one.p, one.sd))
    none = paired_difference([], [])
    assert none.n == 0 and math.isnan(none.mean)
    same = paired_difference([1.0, 2.0, 3.0], [0.9, 1.9, 2.9])  # 0.1 each, with rounding noise
    assert math.isnan(same.p) and same.half_width == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0, 2.0])


def test_against_scipy():
    random = np.random.default_rng(0)
    for n in (2, 3, 5, 20):
        a, b = random.normal(size=(2, n))
        expected = scipy.stats.ttest_rel(a, b)
        d = paired_difference(a, b)
        assert d.p == pytest.approx(expected.pvalue)
        assert (d.low, d.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_holm_by_hand():
    # sorted: 0.005*4, 0.01*3, 0.03*2, 0.04*1, then made monotone
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    adjusted = holm([math.nan, 0.02, 0.03])  # NaN is no comparison
    assert math.isnan(adjusted[0]) and adjusted[1:] == pytest.approx([0.04, 0.04])


def test_holm_against_statsmodels():
    random = np.random.default_rng(1)
    for n in (1, 2, 7, 30):
        p = random.random(n) ** 3
        assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


def test_all_pairs_agree_with_one_pair():
    random = np.random.default_rng(2)
    blocks = random.normal(size=(5, 4))
    blocks[1, 2] = blocks[3, 0] = blocks[4, 1:] = math.nan
    p = all_pairs_p(blocks)
    for i in range(5):
        for j in range(5):
            shared = np.isfinite(blocks[i]) & np.isfinite(blocks[j])
            expected = paired_difference(blocks[i][shared], blocks[j][shared]).p if i != j else math.nan
            assert p[i, j] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("seeds", [2, 5])
def test_family_wise_error_on_equal_arms(seeds):
    """6 equal arms and a baseline: some difference is 'shown' in at most 5% of sweeps."""
    random = np.random.default_rng(3)
    sweeps, wrong = 2000, 0
    for _ in range(sweeps):
        losses = random.normal(size=(7, seeds)) + random.normal(size=seeds)  # seeds shift all arms together
        wrong += min(holm([paired_difference(arm, losses[0]).p for arm in losses[1:]])) < 0.05
    assert wrong / sweeps < 0.05 + 3 * math.sqrt(0.05 * 0.95 / sweeps)


def test_a_true_difference_is_found():
    """Power of the paired t test at an effect of 2 sd of the differences, 5 pairs: 0.91 by the noncentral t."""
    random = np.random.default_rng(4)
    found = np.mean([paired_difference(random.normal(2.0, 1.0, 5), np.zeros(5)).p < 0.05 for _ in range(2000)])
    critical, shift = scipy.stats.t.ppf(0.975, 4), 2.0 * math.sqrt(5)
    power = scipy.stats.nct.sf(critical, 4, shift) + scipy.stats.nct.cdf(-critical, 4, shift)
    assert found == pytest.approx(power, abs=0.03)
