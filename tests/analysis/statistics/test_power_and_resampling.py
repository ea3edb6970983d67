"""Power, smallest differences, seeds needed, bootstrap and sign flips, by hand, by scipy and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from analysis.statistics.elementary import welch
from analysis.statistics.inference import infer
from analysis.statistics.power import (
    balanced_family,
    guarded_power,
    paired_power,
    seeds_needed,
    smallest_guarded,
    smallest_paired,
)
from analysis.statistics.ranks import share_interval
from analysis.statistics.resampling import bca_interval, sign_flip


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 1), (5, 1), (5, 7), (20, 3)])
def test_paired_power_is_the_noncentral_t(seeds, comparisons):
    critical = scipy.stats.t.ppf(1 - 0.025 / comparisons, seeds - 1)
    for effect in (0.3, 0.8, 1.5):
        shift = effect * math.sqrt(seeds)
        expected = scipy.stats.nct.sf(critical, seeds - 1, shift) + scipy.stats.nct.cdf(-critical, seeds - 1, shift)
        assert paired_power(effect, seeds, comparisons) == pytest.approx(expected, abs=2e-3)


def test_of_two_arms_the_guard_changes_nothing():
    critical = balanced_family(2, False).critical(4)
    assert critical == pytest.approx(scipy.stats.t.ppf(0.975, 4), abs=1e-6)
    assert guarded_power(1.5, 5, critical, 4) == pytest.approx(paired_power(1.5, 5, 1), abs=1e-4)


def test_without_the_guard_power_is_that_of_the_pooled_t():
    """With many seeds a pair's own threshold is the lower one: what is left is a noncentral t on the pooled df."""
    family, seeds = balanced_family(8, False), 60
    df = 7 * (seeds - 1)
    critical, shift = family.critical(df), 0.4 * math.sqrt(seeds)
    expected = scipy.stats.nct.sf(critical, df, shift) + scipy.stats.nct.cdf(-critical, df, shift)
    assert guarded_power(0.4, seeds, critical, df) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(("arms", "seeds", "every_pair"), [(4, 5, False), (8, 3, False), (4, 10, True)])
def test_power_by_simulation(arms, seeds, every_pair):
    """Of sweeps with the smallest detectable difference 80% show it, where the baseline's spread is not doubted."""
    random = np.random.default_rng(1)
    df = (arms - 1) * (seeds - 1)
    effect = smallest_guarded(seeds, balanced_family(arms, every_pair).critical(df), df)
    sweeps = 4000
    values = random.normal(size=(sweeps, arms, seeds)) + random.normal(size=(sweeps, 1, seeds))
    values[:, 1] += effect * math.sqrt(2)  # the sd of a difference of two is sqrt(2)
    found = infer(values, 0, every_pair)
    pooled = (np.maximum(found.p_block, found.p_paired)[:, 1] < 0.05).mean()
    assert pooled == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / sweeps))
    holm = smallest_paired(seeds, found.family.size)
    assert holm > effect  # what pooling is for
    whole = found.shown[:, 1].mean()
    fallen_back = (~found.pooled).mean()
    assert pooled - fallen_back <= whole <= pooled


def test_seeds_needed():
    family = balanced_family(5, False)
    for seeds in (3, 6, 12):
        df = 4 * (seeds - 1)
        smallest = smallest_guarded(seeds, family.critical(df), df)
        assert seeds_needed(smallest * 1.001, 5, every_pair=False, pooled=True) == seeds
        assert seeds_needed(-smallest * 0.98, 5, every_pair=False, pooled=True) == seeds + 1
    assert seeds_needed(0.0, 5, every_pair=False, pooled=True) is None
    assert seeds_needed(1e-6, 5, every_pair=False, pooled=True) is None
    assert seeds_needed(1.0, 8, every_pair=True, pooled=True) > seeds_needed(1.0, 8, every_pair=False, pooled=True)
    assert seeds_needed(1.0, 8, every_pair=False, pooled=False) > seeds_needed(1.0, 8, every_pair=False, pooled=True)


def test_sign_flips_by_hand():
    # |sum| = 6 for 1, 2, 3: only the two patterns of one sign reach it, 2 of 8
    flip = sign_flip(np.array([1.0, 2.0, 3.0]))
    assert (flip.p, flip.smallest, flip.flips, flip.exact) == (0.25, 0.25, 8, True)
    # 1 + 2 - 3 = 0: every pattern reaches it
    assert sign_flip(np.array([1.0, 2.0, -3.0])).p == 1.0
    # 1 + 2 + 3 - 1 = 5: all plus (7), the observed one and that with the other 1 turned; and their mirrors: 6 of 16
    assert sign_flip(np.array([1.0, 2.0, 3.0, -1.0])).p == 6 / 16
    assert sign_flip(np.full(5, -0.1)).smallest == 0.0625


def test_sign_flips_against_scipy():
    differences = np.random.default_rng(2).normal(0.4, 1, 9)
    expected = scipy.stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(differences).p == pytest.approx(expected.pvalue)
    many = np.random.default_rng(3).normal(0.3, 1, 30)
    flip = sign_flip(many)
    assert not flip.exact and flip.flips == 20_000 and flip == sign_flip(many)
    assert flip.p == pytest.approx(scipy.stats.ttest_1samp(many, 0).pvalue, abs=0.01)


def test_bca_against_scipy():
    random = np.random.default_rng(4)
    for sample in (random.normal(size=12), random.exponential(size=25)):
        low, high = bca_interval(sample)
        expected = scipy.stats.bootstrap((sample,), np.mean, n_resamples=9999, rng=np.random.default_rng(0))
        width = expected.confidence_interval.high - expected.confidence_interval.low
        assert low == pytest.approx(expected.confidence_interval.low, abs=0.04 * width)
        assert high == pytest.approx(expected.confidence_interval.high, abs=0.04 * width)
    assert all(math.isnan(end) for end in (*bca_interval(np.ones(5)), *bca_interval(np.array([1.0, 2.0]))))


def test_welch_against_scipy():
    random = np.random.default_rng(5)
    a, b = random.normal(size=4), random.normal(1, 3, size=7)
    expected = scipy.stats.ttest_ind(a, b, equal_var=False)
    found = welch(a, b)
    assert (found.p, found.n) == (pytest.approx(expected.pvalue), 4)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert math.isnan(welch(a, b[:1]).p) and math.isnan(welch([1.0, 1.0], [2.0, 2.0]).p)


def test_share_interval_against_scipy():
    for hits, of in ((0, 10), (3, 10), (10, 10)):
        expected = scipy.stats.binomtest(hits, of).proportion_ci(0.95)
        assert share_interval(hits, of) == pytest.approx((expected.low, expected.high))
    assert share_interval(0, 2)[1] == pytest.approx(1 - math.sqrt(0.025))
