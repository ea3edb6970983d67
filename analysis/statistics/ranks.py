"""How firm a ranking is: over the seeds (bootstrap of blocks) and over training (Kendall's tau by step)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import betaincinv

from analysis.statistics.resampling import RESAMPLES, resample_counts

SETTLED = 0.9


@dataclass(frozen=True)
class Settling:
    """``taus``: per evaluated step, Kendall's tau-b between the ranking there and at the last step. ``settled`` is the
    first step from which tau stays at ``SETTLED`` or above; None where there are not two steps."""

    taus: pd.Series
    settled: float | None


def first_places(values: np.ndarray) -> np.ndarray | None:
    """How often each arm of ``values`` [arms, blocks] has the lowest mean when blocks are drawn with replacement.

    Blocks that lack an arm are left out; None where fewer than two are left. Ties share the place.
    """
    whole = values[:, np.isfinite(values).all(axis=0)]
    if whole.shape[1] < 2 or not len(whole):
        return None
    means = resample_counts(whole.shape[1]) @ whole.T / whole.shape[1]
    first = means <= means.min(axis=1, keepdims=True) + 1e-12
    return (first / first.sum(axis=1, keepdims=True)).sum(axis=0) / RESAMPLES


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two samples (ties count for neither side); NaN where one of them is constant."""
    first, second = np.triu_indices(len(a), 1)
    x, y = np.sign(a[first] - a[second]), np.sign(b[first] - b[second])
    scale = math.sqrt(float((x != 0).sum()) * float((y != 0).sum()))
    return float((x * y).sum()) / scale if scale else math.nan


def settling(curves: pd.DataFrame) -> Settling:
    """When the final ranking is settled; ``curves``: steps by arms, means over seeds. Steps that lack arms are out."""
    curves = curves.dropna().sort_index()
    if len(curves) < 2 or curves.shape[1] < 2:
        return Settling(pd.Series(dtype=float), None)
    final = curves.iloc[-1].to_numpy()
    taus = pd.Series([kendall_tau(row, final) for row in curves.to_numpy()], index=curves.index, name="tau")
    late = ~(taus >= SETTLED)
    after = taus.index[late][-1] if late.any() else None
    settled = taus.index[0] if after is None else next((s for s in taus.index if s > after), None)
    return Settling(taus, None if settled is None else float(settled))


def mean_curves(steps: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Validation loss, steps by arms, as ``settling`` takes it; a step counts for an arm if all its runs have it.
    Runs of which nothing was logged are left out.

    ``steps`` as of ``StepReader.read`` with ``val_loss``; its ``run`` is the index of ``runs``.
    """
    rows = steps.loc[(steps["kind"] == "eval") & steps["val_loss"].notna() & (steps["step"] > 0)]
    runs = runs.loc[runs.index.isin(rows["run"].unique())]
    wide = rows.pivot(index="step", columns="run", values="val_loss").reindex(columns=runs.index)
    values = wide.to_numpy()
    own = {arm: np.flatnonzero(runs["arm"] == arm) for arm in sorted(runs["arm"].unique())}
    return pd.DataFrame({arm: values[:, columns].mean(axis=1) for arm, columns in own.items()}, index=wide.index)


def share_interval(hits: float, of: float, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share; ``of`` may be an effective, fractional number of trials."""
    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, of - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, of - hits, 1 - tail)) if hits < of else 1.0
    return low, high
