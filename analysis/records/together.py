"""Runs that trained together share one process: its time, its memory and its device.

Their losses are those of runs alone. Their speed and memory say something only beside those of as many runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

NOTE = "Together: runs that trained in one process. Memory is of the whole process, Tok/s of one run beside the others."


def some_together(runs: pd.DataFrame) -> bool:
    return bool((runs["members"] > 1).any())


def differing_sizes(runs: pd.DataFrame) -> bool:
    """Whether these runs trained in groups of different size."""
    return runs["members"].nunique() > 1


def size_words(low: float, high: float) -> str:
    """``5``, or ``1 to 5`` where they differ."""
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def arms_by_size(runs: pd.DataFrame, arms: Sequence[str]) -> dict[str, list[str]]:
    """The arms by the number of runs that trained together in words, the smallest first."""
    sizes = runs.groupby("arm")["members"].agg(["min", "max"]).reindex(arms)
    found: dict[str, list[str]] = {}
    for arm, size in sizes.sort_values(["min", "max"], kind="stable").iterrows():
        found.setdefault(size_words(size["min"], size["max"]), []).append(str(arm))
    return found
