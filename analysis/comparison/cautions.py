"""What to know before believing a verdict."""

from __future__ import annotations

import pandas as pd

from analysis.comparison.compare import Comparison
from analysis.comparison.flags import TOGETHER, matches
from analysis.records.together import arms_by_size, differing_sizes
from analysis.words import METRIC_WORDS

OVERFITTED = 0.05  # final validation loss above the best by more than this share


def cautions(comparison: Comparison, told: list[str]) -> list[str]:
    """A sentence for each; ``told`` are the arms that the verdict calls better, worse or neither."""
    tested, found = tested_rows(comparison), to_come(comparison)
    unlike = [m.what for m in matches(comparison.runs, comparison.baseline.arm) if not m.same]
    differ = [what.lower() for what in unlike if what != TOGETHER]
    if differ:
        found.append(f"Not matched between the arms: {', '.join(differ)}.")
    found += unlike_speeds(comparison)
    pairs = tested.loc[tested["pairs"] > 1, "pairs"]
    if len(pairs) and pairs.min() == 2 and any(not _shown(comparison, arm, comparison.metric) for arm in told):
        found.append(
            "With 2 seeds a 95% interval reaches 12.7 standard errors to each side: only a difference far larger than "
            "the spread between seeds can be shown. Not shown does not mean equal."
        )
    found += _overfitted(comparison)
    other = next(metric for metric in METRIC_WORDS if metric != comparison.metric)
    changed: dict[str, list[str]] = {}
    for arm in told:
        shown = _shown(comparison, arm, other)
        if shown != _shown(comparison, arm, comparison.metric):
            changed.setdefault(("no difference shown", "worse", "better")[shown], []).append(arm)
    if changed:
        words = "; ".join(f"{what}: {names(arms)}" for what, arms in changed.items())
        found.append(f"By {METRIC_WORDS[other]} the verdict is another for some arms ({words}; see differences.csv).")
    return found


def _overfitted(comparison: Comparison) -> list[str]:
    """A final loss far above the best one says how fast an arm overfits, not how well it models the text."""
    if comparison.metric != "final_val_loss":
        return []
    losses = comparison.runs.groupby("arm")[["final_val_loss", "best_val_loss"]].mean()
    rise = (losses["final_val_loss"] / losses["best_val_loss"] - 1).reindex(comparison.arms).dropna()
    risen = rise[rise > OVERFITTED]
    if risen.empty:
        return []
    which = "every arm" if len(risen) == len(rise) > 1 else names(list(risen.index))
    shares = " to ".join(dict.fromkeys((f"{risen.min():.0%}", f"{risen.max():.0%}")))
    return [
        f"Overfitted: the final validation loss of {which} is {shares} above its best. It says how fast an arm "
        "overfits in so many steps; --metric best_val_loss compares the arms at their best."
    ]


def to_come(comparison: Comparison) -> list[str]:
    count = comparison.to_come
    if not count:
        return []
    return [f"Not the last word: {count} planned run{'s have' if count > 1 else ' has'} no result yet."]


def unlike_speeds(comparison: Comparison, arms: list[str] | None = None, what: str = "Speed and memory") -> list[str]:
    """A sentence on ``what`` of ``arms`` (all) where their runs trained in groups of different size, else none."""
    arms = comparison.arms if arms is None else arms
    runs = comparison.runs[comparison.runs["arm"].isin(arms)]
    if not differing_sizes(runs):
        return []
    sizes = "; ".join(f"{size} in {names(own)}" for size, own in arms_by_size(runs, arms).items())
    return [f"{what} are not comparable where the number of runs trained together differs: {sizes}."]


def tested_rows(comparison: Comparison) -> pd.DataFrame:
    return comparison.differences[comparison.differences["metric"] == comparison.metric]


def names(arms: list[str]) -> str:
    """``a, b and c``; a number where they are many."""
    if len(arms) > 6:
        return f"{len(arms)} arms"
    return arms[0] if len(arms) == 1 else f"{', '.join(arms[:-1])} and {arms[-1]}"


def _shown(comparison: Comparison, arm: str, metric: str) -> int:
    row = comparison.difference(arm, metric)
    return (1 if row["difference"] > 0 else -1) if row["shown"] else 0
