"""What a design can show: the power of the verdict's rule, the smallest difference it finds, the seeds it needs.

Differences are in units of the standard deviation of a paired difference (arm minus baseline with the same seed).
The rule needs two things at once (see ``analysis.inference``): |t| above the family's critical value on the pooled
residual, and above Student's on the pair's own spread. With n seeds the pair's sum of squares u is a chi-square on
n - 1 degrees of freedom and the rest v of the pooled one is independent of it, so the power is an integral over u
and v of a normal probability.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.special import chdtri, ndtr, stdtrit

from analysis.statistics.families import Family, all_pairs, dunnett

POWER = 0.8
ALPHA = 0.05
MOST_SEEDS = 1000
# What is answered to the question how many seeds: every number up to 30, then steps of 5% and more.
_SEEDS = (*range(2, 31), *range(32, 61, 2), *range(65, 121, 5), *range(130, 251, 10), *range(300, MOST_SEEDS + 1, 50))
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def guarded_power(effect: float, seeds: int, critical: float, df: int) -> float:
    """Chance that a true ``effect`` is shown while the check of spreads holds.

    ``critical`` is the family's for the pooled residual on ``df`` degrees of freedom, of which ``seeds`` - 1 are the
    pair's own.
    """
    own = stdtrit(seeds - 1, 1 - ALPHA / 2)
    u = chdtri(seeds - 1, 1 - _NODES)[:, None]
    v = chdtri(df - seeds + 1, 1 - _NODES)[None, :] if df > seeds - 1 else np.zeros((1, 1))
    weights = _WEIGHTS[:, None] * (_WEIGHTS[None, :] if df > seeds - 1 else 1.0)
    threshold = np.maximum(critical * np.sqrt((u + v) / df), own * np.sqrt(u / (seeds - 1)))
    return _beyond(effect * math.sqrt(seeds), threshold, weights)


def paired_power(effect: float, seeds: int, comparisons: int) -> float:
    """Chance that a paired t test finds ``effect`` at 0.05 / ``comparisons``, the strictest step of Holm."""
    critical = stdtrit(seeds - 1, 1 - ALPHA / (2 * max(comparisons, 1)))
    u = chdtri(seeds - 1, 1 - _NODES)
    return _beyond(effect * math.sqrt(seeds), critical * np.sqrt(u / (seeds - 1)), _WEIGHTS)


def _beyond(shift: float, threshold: np.ndarray, weights: np.ndarray) -> float:
    return float(((ndtr(shift - threshold) + ndtr(-shift - threshold)) * weights).sum())


@functools.lru_cache(maxsize=512)
def smallest_guarded(seeds: int, critical: float, df: int) -> float:
    """The effect that ``guarded_power`` finds with a chance of 80%."""
    return _solve(lambda effect: guarded_power(effect, seeds, critical, df))


@functools.lru_cache(maxsize=512)
def smallest_paired(seeds: int, comparisons: int) -> float:
    """The effect that ``paired_power`` finds with a chance of 80%."""
    return _solve(lambda effect: paired_power(effect, seeds, comparisons))


def _solve(power: object) -> float:
    low, high = 0.0, 1.0
    while power(high) < POWER:  # type: ignore[operator]
        low, high = high, 2 * high
    for _ in range(18):  # to 1e-5 of the effect
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)  # type: ignore[operator]
    return high


def seeds_needed(effect: float, arms: int, *, every_pair: bool, pooled: bool) -> int | None:
    """Seeds per arm with which ``effect`` would be shown with a chance of 80%; None beyond 1,000 or without effect.

    For ``arms`` arms on the same seeds, compared with a baseline or, with ``every_pair``, all with all; ``pooled``
    says whether the pooled residual is used or, where spreads differ, paired t tests with Holm's correction.
    """
    low, high = -1, len(_SEEDS) - 1
    if not abs(effect) >= _smallest(_SEEDS[high], arms, every_pair, pooled):
        return None
    while high - low > 1:  # the smallest effect falls with the seeds
        middle = (low + high) // 2
        reached = _smallest(_SEEDS[middle], arms, every_pair, pooled) <= abs(effect)
        low, high = (low, middle) if reached else (middle, high)
    return _SEEDS[high]


@functools.lru_cache(maxsize=4096)
def _smallest(seeds: int, arms: int, every_pair: bool, pooled: bool) -> float:
    family = balanced_family(arms, every_pair)
    df = (arms - 1) * (seeds - 1)
    return smallest_guarded(seeds, family.critical(df), df) if pooled else smallest_paired(seeds, family.size)


def balanced_family(arms: int, every_pair: bool) -> Family:
    """The family of a design without missing cells."""
    covariance = np.eye(arms) - 1 / arms
    return all_pairs(covariance) if every_pair else dunnett(covariance, 0)
