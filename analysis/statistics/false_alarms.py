"""How often the statistics cry wolf: one arm under two names, compared on many choices of k of its seeds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from analysis.statistics.inference import ALPHA, infer
from analysis.statistics.ranks import share_interval

MOST_SUBSETS = 2000
_SEED = 20240315


@dataclass(frozen=True)
class FalseAlarms:
    """``rate``: share of ``comparisons`` in which a difference was shown, with a 95% interval.

    ``effective`` is the number of independent comparisons that the interval is worth: subsets of the same seeds
    overlap, and 10 seeds hold two disjoint halves only.
    """

    seeds: int
    of: int
    comparisons: int
    rate: float
    low: float
    high: float
    effective: float


def false_alarms(first: np.ndarray, second: np.ndarray, seeds: int, exchange: bool = True) -> FalseAlarms | None:
    """Estimate how often a comparison of ``seeds`` seeds of the same arm, run as ``first`` and ``second``, is shown.

    All subsets of the common blocks, or 2,000 random ones. With ``exchange`` also with the two names swapped on every
    possible selection of those seeds (at most 64 patterns a subset): under no difference they are interchangeable, and
    each swap is one more false comparison. None where there are too few seeds.
    """
    shared = np.isfinite(first) & np.isfinite(second)
    first, second = first[shared], second[shared]
    n = len(first)
    if seeds < 2 or n < seeds:
        return None
    random = np.random.default_rng(_SEED)
    if math.comb(n, seeds) <= MOST_SUBSETS:
        subsets = np.array(list(itertools.combinations(range(n), seeds)))
    else:
        subsets = np.array([random.choice(n, seeds, replace=False) for _ in range(MOST_SUBSETS)])
    swaps = np.zeros((1, seeds), dtype=bool)
    if exchange:  # swapping all seeds is the same comparison: the first one stays
        swaps = np.array(list(itertools.product((False, True), repeat=min(seeds - 1, 6))))
        swaps = np.hstack([np.zeros((len(swaps), seeds - swaps.shape[1]), dtype=bool), swaps])
    a = np.where(swaps, second[subsets][:, None], first[subsets][:, None])
    b = np.where(swaps, first[subsets][:, None], second[subsets][:, None])
    shown = infer(np.stack([a, b], axis=-2), 0).p_adjusted[..., 1] < ALPHA
    by_subset = shown.mean(axis=1)
    rate = float(by_subset.mean())
    effective = _effective(by_subset, subsets, n, seeds, rate)
    low, high = share_interval(rate * effective, effective)
    return FalseAlarms(seeds, n, shown.size, rate, low, high, effective)


def _effective(by_subset: np.ndarray, subsets: np.ndarray, n: int, seeds: int, rate: float) -> float:
    """Independent comparisons of the same variance, by the delete-one jackknife over seeds; at least n / seeds."""
    least = n / seeds
    if n <= seeds or not 0 < rate < 1:
        return least
    kept = [by_subset[(subsets != i).all(axis=1)] for i in range(n)]
    if any(len(one) == 0 for one in kept):
        return least
    means = np.array([one.mean() for one in kept])
    variance = (n - 1) / n * float(((means - means.mean()) ** 2).sum())
    most = float(len(by_subset))
    return most if variance <= 0 else min(max(least, rate * (1 - rate) / variance), most)
