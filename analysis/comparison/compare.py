"""Arms against a baseline: paired differences over shared seeds, and what was and was not matched.

The design is a randomised block design: every arm runs on the same (seed_init, seed_data) pairs, so that an arm is
compared with the baseline inside each pair and what a seed does to all arms cancels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.comparison.baseline import Baseline
from analysis.comparison.findings import Findings, find
from analysis.comparison.flags import Flag, find_flags, rate_flags
from analysis.comparison.health_flags import health_flags
from analysis.comparison.settings import arm_settings
from analysis.health.gates import Health, read_health
from analysis.records.frames import best_first
from analysis.records.runs import METRICS, Records
from analysis.statistics.differences import Method, difference_rows


@dataclass
class Comparison:
    """Everything that the words, tables and figures of a report are made from."""

    metric: str
    baseline: Baseline
    arms: list[str]  # with a usable run; by the mean of ``metric``, lowest (best) first
    runs: pd.DataFrame  # frames.runs_frame
    differences: pd.DataFrame  # difference_frame of every metric
    methods: dict[str, Method]  # by metric: how p were adjusted
    flags: list[Flag]
    health: Health  # what gates and stopping rules said
    without_runs: list[str] = field(default_factory=list)  # arms that were tried or planned and have no usable run
    to_come: int = 0  # runs that are planned or under way and have no result yet
    findings: Findings = field(default_factory=Findings)  # factors, learning rates, ranks: what there is

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
    arms = best_first(runs, metric)
    flags = find_flags(records, runs, arms, baseline.arm)
    blocked = {flag.arm for flag in flags if flag.blocking}
    if baseline.arm in blocked:
        blocked = set(arms)
    found = {name: difference_frame(runs, arms, baseline, name, blocked) for name in METRICS}
    differences = pd.concat([frame for frame, _ in found.values()], ignore_index=True)
    methods = {name: method for name, (_, method) in found.items()}
    tried = [item.arm for item in records.left_out if item.arm and item.kind not in ("duplicate", "foreign")]
    without_runs = [arm for arm in dict.fromkeys(tried) if arm not in set(arms)]
    usable = block_table(runs, metric).reindex([arm for arm in arms if arm not in blocked])
    findings = find(usable, arm_settings(records), baseline, metric, [plan.name for plan in records.plans])
    health = read_health(records.runs)
    flags += rate_flags(findings.learning_rates, arms)
    flags += health_flags(health, runs["arm"].value_counts().to_dict(), arms)
    to_come = sum(item.kind in ("unfinished", "missing") for item in records.left_out)
    return Comparison(
        metric, baseline, arms, runs, differences, methods, flags, health, without_runs, to_come, findings
    )


def block_table(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Arms by (seed_init, seed_data) blocks; NaN where an arm has no such run."""
    return runs.pivot(index="arm", columns=["seed_init", "seed_data"], values=metric)


def difference_frame(
    runs: pd.DataFrame, arms: list[str], baseline: Baseline, metric: str, blocked: set[str]
) -> tuple[pd.DataFrame, Method]:
    """One row per arm other than the baseline, and how p were adjusted: see ``differences.difference_rows``.

    The family are the comparisons with the baseline or, if that was chosen after looking at the results, all pairs of
    arms. ``blocked`` arms cannot be compared (they were trained on other data).
    """
    table = block_table(runs, metric).reindex(arms)
    every_pair = baseline.source == "best_mean"
    return difference_rows(table, baseline.arm, metric, every_pair=every_pair, blocked=frozenset(blocked))
