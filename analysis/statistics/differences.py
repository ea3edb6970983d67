"""From a table of losses, arms by seed blocks, to one row of statistics per arm against the baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics.elementary import PairedDifference, paired_difference, welch
from analysis.statistics.inference import ALPHA, Inference, check_level, infer
from analysis.statistics.power import seeds_needed, smallest_guarded, smallest_paired
from analysis.statistics.resampling import bca_interval, sign_flip

COLUMNS = (
    *("arm", "baseline", "metric", "comparable", "test", "pairs", "difference", "sd", "low", "high", "half_width", "p"),
    *("adjusted_difference", "simultaneous_low", "simultaneous_high", "p_block", "p_holm", "p_adjusted", "family"),
    *("shown", "better_in", "bca_low", "bca_high", "p_sign_flip", "p_sign_flip_smallest", "sign_flip_exact"),
    *("smallest_detectable", "seeds_needed"),
)
NO_TEST, PAIRED, UNPAIRED = "none", "paired", "unpaired"


@dataclass(frozen=True)
class Method:
    """How p were adjusted for one metric, for the words under the table."""

    name: str  # dunnett, tukey, holm (where the pooled residual is not trusted), none
    family: int = 0  # comparisons, the unpaired ones too
    df: int = 0  # of the pooled residual
    residual_sd: float = math.nan
    p_spread: float = math.nan  # test of the baseline's spread against the others'
    check_level: float = math.nan  # below which the residual is not pooled
    exact: bool = True  # False: too many pairs of an incomplete design, Bonferroni's bound instead of Tukey
    unpaired: int = 0


def difference_rows(
    table: pd.DataFrame, baseline: str, metric: str, *, every_pair: bool = False, blocked: frozenset[str] = frozenset()
) -> tuple[pd.DataFrame, Method]:
    """One row (``COLUMNS``) per row of ``table`` (NaN: no such run) other than ``baseline``, in its order.

    ``difference`` is the mean of arm minus baseline over shared blocks, [``low``, ``high``] its own 95% t interval and
    ``p`` its paired t test; ``p_adjusted`` is what ``shown`` goes by (see ``analysis.inference``). The simultaneous
    interval holds for all comparisons at once. Where an arm shares fewer than two blocks with the baseline and both
    have two runs, the row is Welch's ``unpaired`` comparison. ``smallest_detectable`` is the difference that as many
    seeds find with a chance of 80%, ``seeds_needed`` the seeds that find the observed one. ``blocked`` arms are not
    compared and count in no family. ``every_pair``: see ``infer``.
    """
    values = dict(zip(table.index, table.to_numpy(dtype=float), strict=True))
    base = values[baseline]
    others = [arm for arm in table.index if arm != baseline]
    shared = {arm: np.isfinite(values[arm]) & np.isfinite(base) & (arm not in blocked) for arm in others}
    paired = [arm for arm in others if shared[arm].sum() > 1]
    unpaired = [
        arm for arm in others if arm not in blocked and arm not in paired and min(_count(values[arm]), _count(base)) > 1
    ]
    tested = _infer(values, [baseline, *paired], every_pair) if paired else None
    arms_in_family = 1 + len(paired) + len(unpaired)
    family = math.comb(arms_in_family, 2) if every_pair else arms_in_family - 1
    method = _method(tested, family, len(unpaired), every_pair)
    # The 5% are shared out by the number of comparisons where some are paired and some are not.
    share = family / tested.family.size if tested and unpaired else 1.0

    critical = tested.family.critical(tested.fit.df) if tested else math.nan
    place = {arm: i for i, arm in enumerate(paired, start=1)}

    rows = []
    for arm in others:
        own, other = values[arm][shared[arm]], base[shared[arm]]
        if arm in unpaired:
            d = welch(values[arm][np.isfinite(values[arm])], base[np.isfinite(base)])
            row = _row(d, UNPAIRED) | {"pairs": int(shared[arm].sum()), "p_adjusted": min(1.0, d.p * family)}
        else:
            d = paired_difference(own, other)
            row = _row(d, PAIRED if arm in paired else NO_TEST)
        if arm in paired:
            row |= _beside(tested, place[arm], own - other, critical, share, every_pair)
        row |= {"arm": arm, "baseline": baseline, "metric": metric, "comparable": arm not in blocked}
        row |= {"family": family, "better_in": int((own < other).sum())}
        rows.append(row | {"shown": bool(row.get("p_adjusted", math.nan) < ALPHA)})
    return pd.DataFrame(rows, columns=list(COLUMNS)), method


def _count(values: np.ndarray) -> int:
    return int(np.isfinite(values).sum())


def _infer(values: dict[str, np.ndarray], arms: list[str], every_pair: bool) -> Inference:
    table = np.array([values[arm] for arm in arms])
    return infer(table[:, np.isfinite(table).sum(axis=0) > 1], 0, every_pair)


def _method(tested: Inference | None, family: int, unpaired: int, every_pair: bool) -> Method:
    if tested is None:
        return Method("none" if not unpaired else "bonferroni", family, unpaired=unpaired)
    name = "holm" if not tested.pooled else "tukey" if every_pair else "dunnett"
    sd = math.sqrt(tested.fit.variance) if tested.fit.df else math.nan
    level = check_level(int(tested.pairs[0]))
    return Method(name, family, tested.fit.df, sd, float(tested.p_spread), level, tested.family.exact, unpaired)


def _row(d: PairedDifference, test: str) -> dict[str, Any]:
    return {"test": test, "pairs": d.n, "difference": d.mean, "sd": d.sd, "low": d.low, "high": d.high} | {
        "half_width": d.half_width,
        "p": d.p,
    }


def _beside(
    tested: Inference, i: int, differences: np.ndarray, critical: float, share: float, every_pair: bool
) -> dict[str, Any]:
    """What stands beside a paired comparison: the model's numbers, resampling, power."""
    pooled, df, arms = bool(tested.pooled), tested.fit.df, len(tested.pairs)
    half = critical * tested.standard_error[i]
    adjusted = tested.adjusted_difference[i]
    bca, flip = bca_interval(differences), sign_flip(differences)
    n = int(tested.pairs[i])
    if pooled:
        unit = math.sqrt(2 * tested.fit.variance)
        smallest = smallest_guarded(n, critical, df)
    else:
        unit, smallest = float(tested.sd[i]), smallest_paired(n, tested.family.size)
    needed = None
    if unit > 0 and np.isfinite(tested.p_paired[i]):
        needed = seeds_needed(tested.difference[i] / unit, arms, every_pair=every_pair, pooled=pooled)
    return {
        "adjusted_difference": adjusted,
        "simultaneous_low": adjusted - half,
        "simultaneous_high": adjusted + half,
        "p_block": tested.p_block[i],
        "p_holm": tested.p_holm[i],
        "p_adjusted": min(1.0, tested.p_adjusted[i] * share)
        if tested.p_adjusted[i] == tested.p_adjusted[i]
        else math.nan,
        "bca_low": bca[0],
        "bca_high": bca[1],
        "p_sign_flip": flip.p,
        "p_sign_flip_smallest": flip.smallest,
        "sign_flip_exact": flip.exact,
        "smallest_detectable": smallest * unit if unit > 0 else math.nan,
        "seeds_needed": math.nan if needed is None else needed,
    }
