"""Least squares for arms by seed blocks: loss = arm + block + noise, also where cells of the design are missing.

Every function takes values [..., arms, blocks] with NaN for a missing cell; leading dimensions are independent
experiments with the same cells (tests simulate thousands at once). The formulas are those of the intra-block analysis
of an incomplete block design (e.g. John and Williams, Cyclic and Computer Generated Designs, 1995, chapter 1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc


@dataclass(frozen=True)
class BlockFit:
    """``effects`` [..., arms] are the arms' means adjusted for blocks, around 0; only their contrasts mean something.

    A contrast c has the variance ``c' covariance c * variance``; ``variance`` [...] is the residual one, on ``df``
    degrees of freedom (NaN for df = 0).
    """

    effects: np.ndarray
    covariance: np.ndarray
    residual_ss: np.ndarray
    df: int

    @property
    def variance(self) -> np.ndarray:
        return self.residual_ss / self.df if self.df else np.full_like(self.residual_ss, np.nan)

    def against(self, baseline: int) -> tuple[np.ndarray, np.ndarray]:
        """Every arm's effect minus that of ``baseline`` and the standard error of that, both [..., arms]."""
        diagonal, own = np.diag(self.covariance), self.covariance[baseline]
        unit = np.maximum(diagonal + diagonal[baseline] - 2 * own, 0.0)
        return self.effects - self.effects[..., baseline, None], np.sqrt(unit * self.variance[..., None])


def fit_blocks(values: np.ndarray) -> BlockFit:
    """Fit arm + block by least squares. All arms have to be connected through shared blocks.

    Raises ValueError if they are not, or if the experiments of the leading dimensions miss different cells.
    """
    present = np.isfinite(values)
    there = present.reshape(-1, *present.shape[-2:])[0]
    if not (present == there).all():
        raise ValueError("the experiments differ in their missing cells")
    covariance, connected = _adjusted(there.tobytes(), there.shape)
    if not connected:
        raise ValueError("some arms share no block with the others, not even through third arms")
    filled = np.where(there, values, 0.0)
    size = np.maximum(there.sum(axis=0), 1)
    centred = (filled - filled.sum(axis=-2, keepdims=True) / size[None, :]) * there
    effects = centred.sum(axis=-1) @ covariance
    left = (filled - effects[..., None]) * there
    left = (left - left.sum(axis=-2, keepdims=True) / size[None, :]) * there
    used_blocks = int((there.sum(axis=0) > 0).sum())
    df = int(there.sum()) - (len(there) - 1) - used_blocks
    return BlockFit(effects, covariance, (left**2).sum(axis=(-2, -1)), max(df, 0))


@functools.lru_cache(maxsize=256)
def _adjusted(cells: bytes, shape: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """The pseudo-inverse of the arms' normal equations after the blocks are eliminated, and whether all connect."""
    there = np.frombuffer(cells, dtype=bool).reshape(shape).astype(float)
    size = np.maximum(there.sum(axis=0), 1)
    information = np.diag(there.sum(axis=1)) - (there / size) @ there.T
    values, vectors = np.linalg.eigh(information)
    kept = values > 1e-9 * max(values.max(initial=0.0), 1.0)
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    return inverse, bool(kept.sum() == shape[0] - 1)


def spread_test(values: np.ndarray, arm: int) -> np.ndarray:
    """p [...] of the hypothesis that ``arm`` varies no more between blocks than the other arms do.

    F test, one-sided: what the residual sum of squares gains when ``arm`` joins the fit of the others, against the
    residual of the others. For equal variances and normal noise it is exact, also with missing cells; with three
    seeds it sees only large ratios (an arm with 3 times the standard deviation in about half of the sweeps), and like
    every test of variances it takes heavy tails for unequal variances. NaN where there is too little to test.
    """
    others = np.delete(values, arm, axis=-2)
    everything = fit_blocks(values)
    try:
        rest = fit_blocks(others)
    except ValueError:  # the arm is what connects the others
        return np.full(values.shape[:-2], np.nan)
    df = everything.df - rest.df
    if rest.df < 1 or df < 1:
        return np.full(values.shape[:-2], np.nan)
    gained = np.maximum(everything.residual_ss - rest.residual_ss, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (gained / df) / (rest.residual_ss / rest.df)
    return fdtrc(df, rest.df, ratio)
