"""Sweeps over the learning rate: every group of arms at its own best rate, and all of them at a shared one."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import pandas as pd

from analysis.comparison.baseline import Baseline
from analysis.comparison.settings import LEARNING_RATE, Settings, setting_words
from analysis.statistics.differences import Method, difference_rows

OPTIMISTIC = (
    "The best learning rate is chosen on the same seeds that it is judged by, which flatters every arm and those with "
    "more rates tried the most; run the chosen rates on new seeds before believing a small difference."
)


@dataclass(frozen=True)
class LearningRates:
    """``table``: a row per group and rate (group, lr, arm, runs, mean, sd, best, edge). ``differences`` as of
    ``difference_rows`` with a column ``at``: ``own best`` or a shared rate; p are adjusted within each ``at``."""

    metric: str
    table: pd.DataFrame
    differences: pd.DataFrame
    methods: dict[str, Method] = field(default_factory=dict)

    @property
    def edges(self) -> list[str]:
        """Groups whose best rate is the lowest or highest tried: the true best may lie beyond."""
        return self.table.loc[self.table["best"] & self.table["edge"], "group"].tolist()


def learning_rates(
    table: pd.DataFrame, settings: dict[str, Settings], baseline: Baseline, metric: str
) -> LearningRates | None:
    """Compare groups of arms that differ in more than the rate; None where no group has two rates.

    ``table``: arms by blocks, as of ``compare.block_table``. The baseline's group is the one compared with; p are
    adjusted for all pairs of groups where the baseline was chosen after looking.
    """
    groups: dict[str, dict[float, str]] = defaultdict(dict)
    for arm, own in settings.items():
        try:
            rate = float(own[LEARNING_RATE])
        except (KeyError, ValueError):
            continue
        if arm in table.index:
            groups[setting_words({k: v for k, v in own.items() if k != LEARNING_RATE}) or "all arms"].setdefault(
                rate, arm
            )
    if not any(len(rates) > 1 for rates in groups.values()):
        return None
    rows = []
    best: dict[str, str] = {}
    for group, rates in groups.items():
        means = {rate: table.loc[arm].mean() for rate, arm in rates.items()}
        chosen = min(means, key=lambda rate: means[rate])
        best[group] = rates[chosen]
        for rate in sorted(rates):
            losses = table.loc[rates[rate]].dropna()
            edge = len(rates) > 1 and rate in (min(rates), max(rates))
            rows.append((group, rate, rates[rate], len(losses), losses.mean(), losses.std(), rate == chosen, edge))
    frame = pd.DataFrame(rows, columns=["group", "lr", "arm", "runs", "mean", "sd", "best", "edge"])

    home = next((group for group, rates in groups.items() if baseline.arm in rates.values()), None)
    places = {"own best": best}
    for rate in sorted({rate for rates in groups.values() for rate in rates}):
        places[f"{rate:g}"] = {group: rates[rate] for group, rates in groups.items() if rate in rates}
    found, methods = [], {}
    for at, arms in places.items():
        if home in arms and len(arms) > 1:
            losses = table.loc[list(arms.values())].set_axis(list(arms), axis=0)
            every_pair = baseline.source == "best_mean"
            rows_at, methods[at] = difference_rows(losses, home, metric, every_pair=every_pair)
            found.append(rows_at.assign(at=at))
    differences = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    return LearningRates(metric, frame, differences, methods)
