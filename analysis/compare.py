"""Arms against a baseline: paired differences over shared seeds, and what was and was not matched.

The design is a block design: every arm runs on the same (seed_init, seed_data) pairs, so that an arm is compared with
the baseline inside each pair and the spread between seeds cancels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.arms import Baseline
from analysis.flags import Flag, find_flags
from analysis.records import METRICS, Records
from analysis.stats import all_pairs_p, holm, paired_difference

ALPHA = 0.05


@dataclass
class Comparison:
    """Everything that the words, tables and figures of a report are made from."""

    metric: str
    baseline: Baseline
    arms: list[str]  # with a usable run; by the mean of ``metric``, lowest (best) first
    runs: pd.DataFrame  # frames.runs_frame
    differences: pd.DataFrame  # difference_frame of every metric
    flags: list[Flag] = field(default_factory=list)
    without_runs: list[str] = field(default_factory=list)  # arms that were tried or planned and have no usable run

    @cached_property
    def _rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        return {(row["arm"], row["metric"]): row for row in self.differences.to_dict("records")}

    def difference(self, arm: str, metric: str | None = None) -> dict[str, Any]:
        """The row of ``differences`` for an arm other than the baseline."""
        return self._rows[arm, metric or self.metric]

    @cached_property
    def _flags(self) -> dict[str, list[Flag]]:
        by_arm: dict[str, list[Flag]] = {arm: [] for arm in self.arms}
        for flag in self.flags:
            by_arm[flag.arm].append(flag)
        return by_arm

    def flags_of(self, arm: str) -> list[Flag]:
        return self._flags[arm]


def compare(records: Records, runs: pd.DataFrame, baseline: Baseline, metric: str) -> Comparison:
    """Compare every arm with ``baseline``, for ``metric`` (which orders the arms) and for the other metrics too."""
    means = runs.groupby("arm")[metric].mean()
    arms = sorted(records.arms, key=lambda arm: (means[arm], arm))
    flags = find_flags(records, runs, arms, baseline.arm)
    blocked = {flag.arm for flag in flags if flag.blocking}
    if baseline.arm in blocked:
        blocked = set(arms)
    frames = [difference_frame(runs, arms, baseline, name, blocked) for name in METRICS]
    differences = pd.concat(frames, ignore_index=True)
    tried = [item.arm for item in records.left_out if item.arm and item.kind not in ("duplicate", "foreign")]
    without_runs = [arm for arm in dict.fromkeys(tried) if arm not in set(arms)]
    return Comparison(metric, baseline, arms, runs, differences, flags, without_runs)


def block_table(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Arms by (seed_init, seed_data) blocks; NaN where an arm has no such run."""
    return runs.pivot(index="arm", columns=["seed_init", "seed_data"], values=metric)


def difference_frame(
    runs: pd.DataFrame, arms: list[str], baseline: Baseline, metric: str, blocked: set[str]
) -> pd.DataFrame:
    """One row per arm other than the baseline: paired difference of ``metric`` (arm minus baseline, nats per token).

    ``p`` is from the paired t test, ``p_holm`` is adjusted for the whole family: the comparisons with the baseline
    or, if the baseline was chosen after looking at the results, all pairs of arms. ``blocked`` arms cannot be compared
    (they were trained on other data) and count in no family.
    """
    blocks = block_table(runs, metric)
    values = dict(zip(blocks.index, blocks.to_numpy(dtype=float), strict=True))
    rows = []
    for arm in arms:
        if arm == baseline.arm:
            continue
        shared = np.isfinite(values[arm]) & np.isfinite(values[baseline.arm]) & (arm not in blocked)
        own, base = values[arm][shared], values[baseline.arm][shared]
        d = paired_difference(own, base)
        rows.append(
            {"arm": arm, "baseline": baseline.arm, "metric": metric, "comparable": arm not in blocked, "pairs": d.n}
            | {"difference": d.mean, "sd": d.sd, "low": d.low, "high": d.high, "half_width": d.half_width, "p": d.p}
            | {"better_in": int((own < base).sum())}
        )
    columns = ["arm", "baseline", "metric", "comparable", "pairs", "difference", "sd", "low", "high", "half_width", "p"]
    frame = pd.DataFrame(rows, columns=[*columns, "better_in"])

    if baseline.source == "best_mean" and len(frame):
        adjusted, frame["family"] = _holm_all_pairs(blocks.drop(index=list(blocked & set(blocks.index))), baseline.arm)
        frame["p_holm"] = frame["arm"].map(adjusted).astype(float)
    else:
        frame["p_holm"] = holm(frame["p"].tolist())
        frame["family"] = int(frame["p"].notna().sum())
    frame["shown"] = frame["p_holm"] < ALPHA
    return frame


def _holm_all_pairs(blocks: pd.DataFrame, baseline: str) -> tuple[dict[str, float], int]:
    """Adjusted p of each arm against the baseline among all pairs of arms, and how many pairs have a test."""
    if baseline not in blocks.index:
        return {}, 0
    p = all_pairs_p(blocks.to_numpy())
    upper = np.triu_indices(len(p), 1)
    adjusted = np.full_like(p, np.nan)
    adjusted[upper] = holm(p[upper].tolist())
    adjusted = np.where(np.isnan(adjusted), adjusted.T, adjusted)
    return dict(zip(blocks.index, adjusted[blocks.index.get_loc(baseline)], strict=True)), int(
        np.isfinite(p[upper]).sum()
    )
