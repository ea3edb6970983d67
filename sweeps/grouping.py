"""Which runs of a sweep train as one: those that differ by nothing but their seeds and learning rates.

Another draw of the initial values (``init.stream``) counts as another seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from hybrid.arguments import plain_key
from hybrid.config import identity
from hybrid.run import PlannedRun
from sweeps.expand import SEED_KEYS, hydra_value

# What may differ, by section of the configuration, besides the seeds.
APART = {"optim": ("lr", "rwkv_lr_mult", "mamba_lr_mult", "fusion_lr_mult"), "init": ("stream",)}


def group_alike(runs: Sequence[PlannedRun], todo: list[int]) -> list[list[int]]:
    """The numbers in ``todo`` in groups of at most ``trainer.seeds_together``, in the order of their first runs."""
    alike: dict[str, list[int]] = {}
    for i in todo:
        plain = identity(runs[i].cfg)
        for key in SEED_KEYS:
            plain.pop(key, None)
        for section, keys in APART.items():
            for key in keys:
                plain[section].pop(key, None)
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
            **{part: {key: getattr(getattr(run.cfg, part), key) for key in keys} for part, keys in APART.items()},
        }
        for run in members
    ]
    apart = {*SEED_KEYS}
    for section, keys in APART.items():
        for key in keys:
            if all(run[section][key] == own[0][section][key] for run in own):
                for run in own:
                    del run[section][key]
            else:
                apart.add(f"{section}.{key}")
    return [*(line for line in overrides if plain_key(line) not in apart), f"+sweep.together={hydra_value(own)}"]
