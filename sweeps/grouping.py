"""Which runs of a sweep train as one: those that differ by nothing but their seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hybrid.config import identity
from hybrid.run import PlannedRun
from sweeps.expand import SEED_KEYS, plain_key


def group_by_seeds(runs: Sequence[PlannedRun], todo: list[int]) -> list[list[int]]:
    """The numbers in ``todo`` in groups of at most ``trainer.seeds_together``, in the order of their first runs."""
    alike: dict[tuple[str, str], list[int]] = {}
    for i in todo:
        plain = identity(runs[i].cfg)
        for key in SEED_KEYS:
            plain.pop(key, None)
        alike.setdefault((runs[i].variant, json.dumps(plain, sort_keys=True)), []).append(i)
    groups = []
    for members in alike.values():
        size = runs[members[0]].cfg.trainer.seeds_together or 1
        groups += [members[first : first + size] for first in range(0, len(members), size)]
    return groups


def group_overrides(overrides: Sequence[str], members: Sequence[PlannedRun]) -> list[str]:
    """The overrides of a job that trains ``members``; ``overrides`` are those of the first."""
    if len(members) == 1:
        return list(overrides)
    seeds = ",".join(f"[{run.cfg.seed_init},{run.cfg.seed_data}]" for run in members)
    return [*(line for line in overrides if plain_key(line) not in SEED_KEYS), f"+sweep.together=[{seeds}]"]
