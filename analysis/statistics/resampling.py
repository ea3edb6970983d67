"""What the seeds themselves say, without a normal distribution: bootstrap intervals and sign flips."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

RESAMPLES = 4999
RANDOM_FLIPS = 20_000
EXACT_UP_TO = 12  # pairs; 2^12 sign patterns
TRUSTED_FROM = 10  # pairs: below this a bootstrap interval of a mean is known to be too short
_SEED = 20240301


@dataclass(frozen=True)
class SignFlip:
    """``p`` two-sided; ``smallest`` is the least p that so many pairs can give; ``flips`` sign patterns were used."""

    p: float
    smallest: float
    flips: int
    exact: bool


def sign_flip(differences: np.ndarray) -> SignFlip:
    """Permutation test of paired differences: under no difference each could as well have the other sign.

    All 2^n patterns up to 12 pairs, else 20,000 random ones with a fixed seed (the observed one counted in). For
    n = 5 the smallest possible p is 2 / 32 = 0.0625: five pairs cannot reach 0.05. NaN without differences.
    """
    differences = np.asarray(differences, dtype=float)
    differences = differences[np.isfinite(differences)]
    n = len(differences)
    if n == 0:
        return SignFlip(math.nan, math.nan, 0, True)
    signs = _signs(n)
    sums = np.abs(signs @ differences)
    observed = abs(differences.sum())
    hits = int((sums >= observed * (1 - 1e-12) - 1e-15).sum())
    if n <= EXACT_UP_TO:
        return SignFlip(hits / len(signs), 2 / len(signs), len(signs), True)
    return SignFlip((hits + 1) / (len(signs) + 1), 1 / (len(signs) + 1), len(signs), False)


@functools.lru_cache(maxsize=2)  # 20,000 patterns of 100 pairs are 16 MB
def _signs(n: int) -> np.ndarray:
    if n <= EXACT_UP_TO:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    return np.random.default_rng(_SEED).choice((1.0, -1.0), size=(RANDOM_FLIPS, n))


def bca_interval(differences: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987), 4,999 resamples, fixed seed.

    NaN for fewer than three values or where all are equal. Below 10 values it is too short: at n = 5 a nominal 95%
    covers about 85% of normal samples, at n = 10 about 89%.
    """
    values = np.asarray(differences, dtype=float)
    values = values[np.isfinite(values)]
    n = len(values)
    if n < 3 or np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return math.nan, math.nan
    mean = values.mean()
    means = np.sort(resample_counts(n) @ values / n)
    share = (means < mean).mean() + (means == mean).mean() / 2
    bias = float(ndtri(np.clip(share, 1 / RESAMPLES, 1 - 1 / RESAMPLES)))
    jackknife = mean - (values.sum() - values) / (n - 1)  # mean of the leave-one-out means, minus each
    acceleration = float((jackknife**3).sum() / (6 * (jackknife**2).sum() ** 1.5))
    ends = []
    for z in (ndtri((1 - confidence) / 2), ndtri((1 + confidence) / 2)):
        level = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
        below, part = divmod(float(level) * (RESAMPLES - 1), 1)  # np.quantile, without its overhead
        ends.append(float(means[int(below)] * (1 - part) + means[min(int(below) + 1, RESAMPLES - 1)] * part))
    return ends[0], ends[1]


@functools.lru_cache(maxsize=8)
def resample_counts(n: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each of ``n`` items is drawn in each of ``resamples`` draws of n with replacement [resamples, n]."""
    return np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
