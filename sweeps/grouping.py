"""Which runs of a sweep train as one: those that differ by nothing but their seeds and learning rates."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hybrid.config import identity
from hybrid.run import PlannedRun
from sweeps.expand import SEED_KEYS, hydra_value, plain_key

RATES = ("lr", "rwkv_lr_mult", "mamba_lr_mult", "fusion_lr_mult")  # of optim


def group_alike(runs: Sequence[PlannedRun], todo: list[int]) -> list[list[int]]:
    """The numbers in ``todo`` in groups of at most ``trainer.seeds_together``, in the order of their first runs."""
    alike: dict[str, list[int]] = {}
    for i in todo:
        plain = identity(runs[i].cfg)
        for key in SEED_KEYS:
            plain.pop(key, None)
        for key in RATES:
            plain["optim"].pop(key, None)
        alike.setdefault(json.dumps(plain, sort_keys=True), []).append(i)
    groups = []
    for members in alike.values():
        size = runs[members[0]].cfg.trainer.seeds_together or 1
        groups += [members[first : first + size] for first in range(0, len(members), size)]
    return groups


def group_overrides(overrides: Sequence[str], members: Sequence[PlannedRun]) -> list[str]:
    """The overrides of a job that trains ``members``; ``overrides`` are those of the first."""
    if len(members) == 1:
        return list(overrides)
    own = [
        {
            "variant": run.variant,
            "seed_init": run.cfg.seed_init,
            "seed_data": run.cfg.seed_data,
            "optim": {key: getattr(run.cfg.optim, key) for key in RATES},
        }
        for run in members
    ]
    for key in RATES:
        if len({run["optim"][key] for run in own}) == 1:
            for run in own:
                del run["optim"][key]
    apart = {*SEED_KEYS, *(f"optim.{key}" for key in own[0]["optim"])}
    return [*(line for line in overrides if plain_key(line) not in apart), f"+sweep.together={hydra_value(own)}"]
