"""What an arm is called, which of several records of the same arm and seeds counts, and which arm is the baseline.

An arm is called by its variant as long as that is unambiguous. Where a variant occurs twice with the same seeds, the
folder of the sweep is put in front (two sweeps), then the overrides that differ behind (two configurations). What is
still double then, e.g. the same configuration under an older code version, is left out except for the newest.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.records.runs import Run

# Overrides that do not make another arm: they choose the seed, the place or the display.
_NOT_AN_ARM = {"seed_init", "seed_data", "out", "sweep", "variant", "display", "hydra"}

Duplicates = list[tuple["Run", str]]  # a run to leave out, and why


def drop_copies(runs: Iterable[Run]) -> tuple[list[Run], Duplicates]:
    """Of two folders with the same run_id (a copied record), keep the first."""
    kept: dict[str, Run] = {}
    copies = []
    for run in runs:
        first = kept.setdefault(run.run_id, run)
        if first is not run:
            copies.append((run, f"the same run as {first.folder} (run_id {run.run_id[:8]})"))
    return list(kept.values()), copies


def label_arms(runs: list[Run], sweep_of: Callable[[Path], str]) -> list[Run]:
    """Runs that share a variant and seeds, but not a configuration, get labels of their own.

    ``sweep_of`` names the folder of the sweep that a run folder belongs to.
    """

    def with_sweep(group: list[Run]) -> dict[str, str]:
        sweeps = {run.folder: sweep_of(run.path) for run in group}
        return {folder: f"{sweep}/{group[0].arm}" for folder, sweep in sweeps.items() if len(set(sweeps.values())) > 1}

    for name in (with_sweep, _with_overrides):
        groups = defaultdict(list)
        for run in runs:
            groups[run.arm].append(run)
        labels: dict[str, str] = {}
        for group in groups.values():
            if len({run.seeds for run in group}) < len(group):
                labels |= name(group)
        runs = [replace(run, arm=labels.get(run.folder, run.arm)) for run in runs]
    return runs


def _with_overrides(group: list[Run]) -> dict[str, str]:
    chosen = {run.folder: arm_overrides(run.summary.get("overrides")) for run in group}
    count = Counter(override for overrides in chosen.values() for override in overrides)
    own = {folder: [o for o in overrides if count[o] < len(group)] for folder, overrides in chosen.items()}
    return {folder: f"{group[0].arm} ({', '.join(differing)})" for folder, differing in own.items() if differing}


def arm_overrides(overrides: Any) -> list[str]:
    if not isinstance(overrides, list):
        return []
    keys = {str(o): str(o).lstrip("+~").split("=")[0].split(".")[0] for o in overrides}
    return sorted(override for override, key in keys.items() if key not in _NOT_AN_ARM)


def keep_newest(runs: Iterable[Run], planned: set[str]) -> tuple[list[Run], Duplicates]:
    """One run per arm and seeds: one that a sweep's plan lists, else the newest.

    ``planned`` holds the first 8 characters of the run_ids that the plans list.
    """
    kept: dict[tuple[str, int, int], Run] = {}
    older = []
    for run in sorted(runs, key=lambda run: (run.run_id[:8] in planned, _finished_at(run), run.folder)):
        key = (run.arm, *run.seeds)
        if key in kept:
            older.append((kept[key], f"superseded by {run.folder}, the same arm and seeds"))
        kept[key] = run
    return sorted(kept.values(), key=lambda run: (run.arm, run.seeds)), older


def _finished_at(run: Run) -> float:
    try:
        return (run.path / "summary.json").stat().st_mtime
    except OSError:
        return 0.0
