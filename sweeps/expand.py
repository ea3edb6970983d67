"""From a sweep's description and the command line to the list of its jobs. Pure functions, no Hydra run-time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from hybrid.config import ConfigError, SweepConfig
from hybrid.records import safe_name

SEED_KEYS = ("seed_init", "seed_data")


@dataclass(frozen=True)
class Job:
    """One run to be: the arm it belongs to (None: named by its configuration) and its Hydra overrides."""

    variant: str | None
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """One value of an axis: what it adds to the arm's name and to the overrides."""

    name: str
    overrides: tuple[str, ...]


def expand(sweep: SweepConfig, arguments: list[str]) -> list[Job]:
    """All combinations of the sweep's arms, its grid, the axes on the command line, and the seeds.

    An axis given on the command line replaces the grid's axis of the same key; ``seed_init`` or ``seed_data`` there
    replaces the sweep's seeds. Every arm gets the same seeds. Raises ``ConfigError`` where the command line would
    overwrite what makes the arms differ.
    """
    fixed: list[str] = []
    given: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(overrides=arguments):
        if override.is_sweep_override():
            given[override.get_key_element()] = [f"{override.get_key_element()}={v}" for v in sweep_values(override)]
        else:
            fixed.append(override.input_line)
    fixed_keys = {line.lstrip("+~").split("=")[0] for line in fixed}

    axes: list[list[Choice]] = []
    if sweep.arms:
        for arm, overrides in sweep.arms.items():
            clash = {line.lstrip("+~").split("=")[0] for line in overrides} & (fixed_keys | given.keys())
            if clash:
                raise ConfigError(f"{sorted(clash)[0]} is what arm '{arm}' of sweep {sweep.name} sets; leave it out")
        axes.append([Choice(arm, tuple(overrides)) for arm, overrides in sweep.arms.items()])
    for key, values in sweep.grid.items():
        if key in fixed_keys:
            continue  # the command line pins this axis
        lines = given.pop(key, None) or [f"{key}={hydra_value(value)}" for value in values]
        axes.append([Choice(label(line), (line,)) for line in lines])
    seeds_given = [key for key in SEED_KEYS if key in given or key in fixed_keys]
    for key, lines in given.items():
        if key not in SEED_KEYS:
            axes.append([Choice(label(line), (line,)) for line in lines])
    for key in SEED_KEYS:
        if key in given:
            axes.append([Choice("", (line,)) for line in given[key]])
    if sweep.seeds and not seeds_given:
        axes.append([Choice("", tuple(f"{key}={seed}" for key in SEED_KEYS)) for seed in sweep.seeds])

    jobs = []
    for combination in itertools.product(*axes):
        name = safe_name("-".join(choice.name for choice in combination if choice.name))
        varied = tuple(line for choice in combination for line in choice.overrides)
        jobs.append(Job(name or None, (*fixed, *varied)))
    return jobs


def sweep_values(override: Override) -> list[str]:
    return list(override.sweep_string_iterator())


def label(line: str) -> str:
    """What an override adds to an arm's name: ``fusion=gated`` gives gated, ``optim.lr=0.001`` gives lr=0.001."""
    key, _, value = line.lstrip("+~").partition("=")
    return f"{key.rsplit('.', 1)[-1]}={value}" if "." in key else value


def hydra_value(value: Any) -> str:
    """A YAML value as it would be written on Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(hydra_value(item) for item in value) + "]"
    if isinstance(value, str) and not value.replace("_", "").replace(".", "").isalnum():
        return "'" + value.replace("'", "\\'") + "'"
    return str(value)
