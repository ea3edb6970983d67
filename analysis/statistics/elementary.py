"""The few formulas that every comparison rests on: mean and spread, paired and unpaired differences, t, Holm.

Only ``scipy.special`` is needed; ``scipy.stats`` gives the same numbers (tests compare the two) and takes longer to
import than everything here takes to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """Arm minus baseline over shared blocks. Without at least two pairs there is no interval and no p (all NaN).

    If every pair shows exactly the same difference there is no spread to measure it against: the interval has zero
    width and p is NaN.
    """

    n: int
    mean: float
    sd: float  # of the differences, n - 1 in the denominator
    low: float
    high: float
    p: float  # two-sided, paired t

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def mean_sd(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of the finite values; NaN where there are too few."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if values.size else math.nan
    return mean, float(values.std(ddof=1)) if values.size > 1 else math.nan


def t_interval(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's interval of the mean, ``mean +- t(n-1) * sd / sqrt(n)``; NaN for fewer than two finite values."""
    values = np.asarray(values, dtype=float)
    n = int(np.isfinite(values).sum())
    if n < 2:
        return math.nan, math.nan
    mean, sd = mean_sd(values)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)
    return mean - half, mean + half


def paired_difference(arm: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """The mean of ``arm - baseline`` over pairs, its 95% t interval and the p of the paired t test.

    The two sequences hold the same blocks in the same order. Raises ValueError if their lengths differ.
    """
    if len(arm) != len(baseline):
        raise ValueError(f"{len(arm)} values cannot be paired with {len(baseline)}")
    differences = np.asarray(arm, dtype=float) - np.asarray(baseline, dtype=float)
    mean, sd = mean_sd(differences)
    n = int(np.isfinite(differences).sum())
    low, high = t_interval(differences)
    return PairedDifference(n, mean, sd, low, high, _p_value(n, mean, sd))


def _p_value(n: int, mean: float, sd: float) -> float:
    # Equal differences leave rounding noise in the sd, about 1e-16 of a loss; a t from that would be meaningless.
    if n < 2 or not sd > 1e-12 * max(1.0, abs(mean)):
        return math.nan
    return float(2 * stdtr(n - 1, -abs(mean) / (sd / math.sqrt(n))))


def welch(arm: Sequence[float], other: Sequence[float]) -> PairedDifference:
    """The difference of two means without pairs (Welch 1947, Satterthwaite's degrees of freedom).

    ``n`` is the smaller sample, ``sd`` the standard error times the root of ``n``; all NaN where a sample has no
    two values or neither any spread.
    """
    first, second = (np.asarray(values, dtype=float) for values in (arm, other))
    n = min(len(first), len(second))
    mean = float(first.mean() - second.mean()) if n else math.nan
    if n < 2:
        return PairedDifference(n, mean, math.nan, math.nan, math.nan, math.nan)
    parts = [float(values.var(ddof=1)) / len(values) for values in (first, second)]
    error = math.sqrt(sum(parts))
    if not error > 1e-12 * max(1.0, abs(mean)):
        return PairedDifference(n, mean, error * math.sqrt(n), mean, mean, math.nan)
    df = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (first, second), strict=True))
    half = float(stdtrit(df, (1 + CONFIDENCE) / 2)) * error
    return PairedDifference(
        n, mean, error * math.sqrt(n), mean - half, mean + half, float(2 * stdtr(df, -abs(mean) / error))
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979): reject where the result is < alpha.

    NaN (a comparison without a test) stays NaN and does not count as a comparison.
    """
    return holm_adjust(np.asarray(p_values, dtype=float)).tolist()


def holm_adjust(p: np.ndarray) -> np.ndarray:
    """``holm`` along the last axis of ``p`` [..., comparisons]."""
    if not p.shape[-1]:
        return p.copy()
    order = np.argsort(p, axis=-1, kind="stable")  # NaN last
    ranked = np.take_along_axis(p, order, axis=-1)
    left = np.isfinite(p).sum(axis=-1, keepdims=True) - np.arange(p.shape[-1])
    stepped = np.maximum.accumulate(np.minimum(ranked * left, 1.0), axis=-1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.where(np.isnan(ranked), np.nan, stepped), axis=-1)
    return adjusted


def all_pairs_p(blocks: np.ndarray) -> np.ndarray:
    """Paired t p-values of every pair of arms of ``blocks`` [..., arms, blocks] (NaN where an arm lacks a block).

    Returns [..., arms, arms]: symmetric, NaN on the diagonal and where there is no test.
    """
    arms = blocks.shape[-2]
    p = np.full((*blocks.shape[:-1], arms), math.nan)
    for i in range(arms - 1):
        differences = blocks[..., i + 1 :, :] - blocks[..., i, None, :]
        n = np.isfinite(differences).sum(axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.nansum(differences, axis=-1) / n
            sd = np.sqrt(np.nansum((differences - mean[..., None]) ** 2, axis=-1) / (n - 1))
            values = 2 * stdtr(n - 1, -np.abs(mean) / (sd / np.sqrt(n)))
        testable = (n > 1) & (sd > 1e-12 * np.maximum(1.0, np.abs(mean)))
        p[..., i, i + 1 :] = p[..., i + 1 :, i] = np.where(testable, values, math.nan)
    return p
