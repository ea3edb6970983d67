"""Sweeps that cross two or three factors: main effects and interactions, with seeds as blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import fdtrc, stdtrit


@dataclass(frozen=True)
class Factor:
    """A way in which arms differ, e.g. ``branch_norm`` with the levels ``none`` and ``rms``."""

    name: str
    levels: tuple[str, ...]

    @property
    def joint(self) -> bool:
        """Whether several keys make up this factor; its levels then name them."""
        return " and " in self.name

    def label(self, level: str) -> str:
        return level if self.joint else f"{self.name}={level}"


@dataclass(frozen=True)
class Factorial:
    """``terms``: an F test per main effect and interaction; ``effects``: each level against its factor's first,
    averaged over the other factors, with a 95% t interval; ``cells``: a mean per combination, adjusted for blocks."""

    factors: list[Factor]
    terms: pd.DataFrame  # term, df, df_residual, f, p, partial_eta2
    effects: pd.DataFrame  # factor, level, against, difference, low, high, half_width, p
    cells: pd.DataFrame  # a column per factor, then mean, low, high, runs
    residual_sd: float


def factorial(values: np.ndarray, factors: Sequence[Factor], cells: Sequence[tuple[str, ...]]) -> Factorial | None:
    """Analyse ``values`` [arms, blocks] (NaN: missing), the arm of row i being the combination ``cells[i]``.

    Additive blocks, all interactions of the factors, sum-to-zero contrasts: every term is tested against the model
    without it (type III), so that missing cells do not mix effects. One residual for all arms. None where an arm has
    no run, a block stands alone or no degrees of freedom are left.
    """
    there = np.isfinite(values)
    used = there.sum(axis=0) > 0
    values, there = values[:, used], there[:, used]
    arm, block = np.nonzero(there)
    y = values[there]
    if not there.any(axis=1).all():
        return None
    blocks = np.eye(values.shape[1])[block]
    coded = _coded(factors, cells)
    columns = {term: matrix[arm] for term, matrix in coded.items()}
    full = np.hstack([blocks, *columns.values()])
    df = len(y) - full.shape[1]
    if df < 1 or np.linalg.matrix_rank(full) < full.shape[1]:
        return None
    inverse = np.linalg.inv(full.T @ full)
    beta = inverse @ (full.T @ y)
    residual = float(((y - full @ beta) ** 2).sum())
    variance = residual / df

    rows = []
    for term, matrix in columns.items():
        reduced = np.hstack([blocks, *(m for name, m in columns.items() if name != term)])
        left = y - reduced @ np.linalg.lstsq(reduced, y, rcond=None)[0]
        gained = max(float((left**2).sum()) - residual, 0.0)
        f = gained / matrix.shape[1] / variance if variance > 0 else math.nan
        p = float(fdtrc(matrix.shape[1], df, f)) if f == f else math.nan
        eta = gained / (gained + residual) if gained + residual > 0 else math.nan
        rows.append((term, matrix.shape[1], df, f, p, eta))
    terms = pd.DataFrame(rows, columns=["term", "df", "df_residual", "f", "p", "partial_eta2"])

    t = float(stdtrit(df, 0.975))
    arms_design = np.hstack([np.full((len(values), blocks.shape[1]), 1 / blocks.shape[1]), *coded.values()])
    return Factorial(
        list(factors),
        terms,
        _effects(factors, cells, arms_design, beta, inverse * variance, df),
        _cells(factors, cells, arms_design, beta, inverse * variance, t, there.sum(axis=1)),
        math.sqrt(variance),
    )


def _coded(factors: Sequence[Factor], cells: Sequence[tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Sum-to-zero columns [arms, df] of every main effect and interaction, main effects first."""
    single = []
    for i, factor in enumerate(factors):
        last = len(factor.levels) - 1
        codes = np.vstack([np.eye(last), -np.ones(last)])
        single.append(codes[[factor.levels.index(cell[i]) for cell in cells]])
    coded = {}
    for size in range(1, len(factors) + 1):
        for chosen in itertools.combinations(range(len(factors)), size):
            matrix = np.ones((len(cells), 1))
            for i in chosen:
                matrix = (matrix[:, :, None] * single[i][:, None, :]).reshape(len(cells), -1)
            coded[" x ".join(factors[i].name for i in chosen)] = matrix
    return coded


def _effects(
    factors: Sequence[Factor],
    cells: Sequence[tuple[str, ...]],
    design: np.ndarray,
    beta: np.ndarray,
    covariance: np.ndarray,
    df: int,
) -> pd.DataFrame:
    rows = []
    t = float(stdtrit(df, 0.975))
    for i, factor in enumerate(factors):
        mean_of = {level: design[[cell[i] == level for cell in cells]].mean(axis=0) for level in factor.levels}
        for level in factor.levels[1:]:
            contrast = mean_of[level] - mean_of[factor.levels[0]]
            difference, error = float(contrast @ beta), math.sqrt(float(contrast @ covariance @ contrast))
            f = (difference / error) ** 2 if error > 0 else math.nan
            p = float(fdtrc(1, df, f)) if f == f else math.nan
            ends = difference - t * error, difference + t * error
            rows.append((factor.name, level, factor.levels[0], difference, *ends, t * error, p))
    return pd.DataFrame(rows, columns=["factor", "level", "against", "difference", "low", "high", "half_width", "p"])


def _cells(
    factors: Sequence[Factor],
    cells: Sequence[tuple[str, ...]],
    design: np.ndarray,
    beta: np.ndarray,
    covariance: np.ndarray,
    t: float,
    runs: np.ndarray,
) -> pd.DataFrame:
    means = design @ beta
    half = t * np.sqrt(np.einsum("ij,jk,ik->i", design, covariance, design))  # for these seeds, not for any
    frame = pd.DataFrame(list(cells), columns=[factor.name for factor in factors])
    return frame.assign(mean=means, low=means - half, high=means + half, runs=runs)
