"""From a sweep's description and the command line to the list of its jobs. Pure functions, no Hydra run-time."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString

from hybrid.arguments import plain_key
from hybrid.config import ConfigError, group_options
from hybrid.records import safe_name, short_hash
from hybrid.schema import SweepConfig
from sweeps.overwriting import check_nature

SEED_KEYS = ("seed_init", "seed_data")
NO_WORDS = ("null", "true", "false", "inf", "nan")  # to Hydra, unless quoted


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


class Groups:
    """What Hydra's parser asks of a configuration loader, for ``init=glob(*)``."""

    def get_group_options(self, group_name: str, results_filter: ObjectType | None = None) -> list[str]:
        return group_options(group_name)


def expand(sweep: SweepConfig, arguments: list[str]) -> list[Job]:
    """All combinations of the sweep's arms, its grid, the axes on the command line, and the seeds.

    An axis given on the command line replaces the grid's axis of the same key, also with a single value;
    ``seed_init`` or ``seed_data`` there replaces the sweep's seeds. Every arm gets the same seeds. Raises
    ``ConfigError`` where the command line would overwrite what makes the arms differ.
    """
    if sweep.only == [] or sweep.seeds == []:
        raise ConfigError(f"sweep.{'only' if sweep.only == [] else 'seeds'}=[] leaves nothing to run; leave it out")
    fixed: dict[str, str] = {}  # key -> the line as given
    given: dict[str, list[str]] = {}
    for override in OverridesParser.create(config_loader=Groups()).parse_overrides(overrides=arguments):
        if override.is_sweep_override():
            lines = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            given[override.key_or_group] = lines
        else:
            fixed[override.key_or_group] = override.input_line

    axes: list[list[Choice]] = []
    if sweep.arms:
        for arm, overrides in sweep.arms.items():
            clash = {plain_key(line) for line in overrides} & (fixed.keys() | given.keys())
            if clash:
                raise ConfigError(f"{sorted(clash)[0]} is what arm '{arm}' of sweep {sweep.name} sets; leave it out")
        axes.append([Choice(arm, tuple(overrides)) for arm, overrides in sweep.arms.items()])
    for key, values in sweep.grid.items():
        lines = given.pop(key, None) or [f"{key}={hydra_value(value)}" for value in values]
        if key in fixed:
            lines = [fixed.pop(key)]
        axes.append([Choice(label(line), (line,)) for line in lines])
    seeds_given = [key for key in SEED_KEYS if key in given or key in fixed]
    for key, lines in given.items():
        if key not in SEED_KEYS:
            axes.append([Choice(label(line), (line,)) for line in lines])
    for key in SEED_KEYS:
        if key in given:
            axes.append([Choice("", (line,)) for line in given[key]])
    if sweep.seeds and not seeds_given:
        axes.append([Choice("", tuple(f"{key}={seed}" for key in SEED_KEYS)) for seed in sweep.seeds])

    combinations = list(itertools.product(*axes))
    if any(choice.name for axis in axes for choice in axis) and ("variant" in fixed or "variant" in given):
        raise ConfigError("variant names a single arm; these are named by their axes: leave it out")
    names = arm_names(["-".join(choice.name for choice in combination if choice.name) for combination in combinations])
    only = chosen(sweep, combinations, names)
    arms = [
        (name, tuple(line for choice in combination for line in choice.overrides))
        for name, combination in zip(names, combinations, strict=True)
        if name in only
    ]
    check_nature(sweep.name, [lines for _, lines in arms], [*fixed.values(), *itertools.chain(*given.values())])
    return [Job(name, (*fixed.values(), *lines)) for name, lines in arms]


def chosen(sweep: SweepConfig, combinations: list[tuple[Choice, ...]], names: list[str | None]) -> set[str | None]:
    """The names that ``sweep.only`` leaves: it has arms as the sweep calls them, or with their place in the grid."""
    if not sweep.only:
        return set(names)
    of_arm: dict[str, set[str | None]] = {}
    for name, combination in zip(names, combinations, strict=True):
        for called in {name, combination[0].name if sweep.arms else name}:
            of_arm.setdefault(called or "", set()).add(name)
    unknown = [arm for arm in sweep.only if arm not in of_arm]
    if unknown:
        there = ", ".join(called for called in of_arm if called) or "none"
        raise ConfigError(f"sweep.only: {unknown[0]} is no arm of {sweep.name} (there are {there})")
    return set().union(*(of_arm[arm] for arm in sweep.only))


def name_of_axes(arguments: list[str]) -> str:
    """The folder of a sweep without a name: ``fusion=a,b optim.lr=1,2 seed_init=0,1`` goes to multirun-fusion-lr."""
    overrides = OverridesParser.create(config_loader=Groups()).parse_overrides(overrides=arguments)
    keys = [override.key_or_group for override in overrides if override.is_sweep_override()]
    return safe_name("-".join(["multirun", *(key.rsplit(".", 1)[-1] for key in keys if key not in SEED_KEYS)]))


def arm_names(wanted: list[str]) -> list[str | None]:
    """Folder names, different wherever the wanted names are; None for an empty one."""
    meant: dict[str, set[str]] = {}
    for name in wanted:
        meant.setdefault(safe_name(name), set()).add(name)
    names: list[str | None] = []
    for name in wanted:
        alone = len(meant[safe_name(name)]) == 1
        names.append((safe_name(name) if alone else f"{safe_name(name)}-{short_hash(name)}") if name else None)
    return names


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
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        word = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) and value.lower() not in NO_WORDS
        return value if word else QuotedString(text=value, quote=Quote.single).with_quotes()
    return str(value)
