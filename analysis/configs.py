"""What arms were configured with: the keys of config.yaml that differ between them, and the factors they cross."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from analysis.records import Records

MOST_ARMS = 200  # configurations that are read; parsing YAML is slow
_NOT_SHOWN = ("seed_init", "seed_data", "out", "sweep", "variant", "display", "hydra", "data.cache_dir", "data.path")

Flat = dict[str, Any]


def read_config(path: Path) -> Flat | None:
    """A run's config.yaml with dotted keys, without seeds, paths and display options; None if it cannot be read."""
    try:
        with open(path / "config.yaml", encoding="utf-8") as file:
            content = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return dict(_flatten(content, "")) if isinstance(content, dict) else None


def _flatten(value: Any, key: str) -> Iterable[tuple[str, Any]]:
    if key in _NOT_SHOWN:
        return
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def arm_configs(records: Records, arms: Iterable[str]) -> dict[str, Flat]:
    """The configuration of each arm's first run; at most ``MOST_ARMS`` of them, without those that are unreadable."""
    first = {run.arm: run for run in reversed(records.runs)}
    found = {arm: read_config(first[arm].path) for arm in list(arms)[:MOST_ARMS] if arm in first}
    return {arm: config for arm, config in found.items() if config}


def differing(configs: Mapping[str, Flat]) -> list[str]:
    """The keys whose values are not the same in all configurations (or not there in some), in their order."""
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    return [key for key in keys if len({words(config.get(key)) for config in configs.values()}) > 1]


def words(value: Any) -> str:
    """A value of a configuration as a person writes it; an em dash for a key that is not there."""
    if value is None:
        return "\N{EM DASH}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(words, value))}]"
    return str(value)


@dataclass(frozen=True)
class Crossing:
    """A factor that was varied inside groups of arms that are otherwise the same."""

    key: str
    levels: list[Any]  # values of ``key``, numbers in order
    lines: dict[str, dict[Any, str]]  # what the arms of a group share, in words -> level -> arm


def crossings(configs: Mapping[str, Flat]) -> list[Crossing]:
    """Every key of which at least one group of arms, alike in all else, has two levels or more.

    Keys that change together (a preset and what it sets) count as part of the key that comes first; their names do
    not appear in the words.
    """
    keys = _independent(configs)
    found = []
    for key in keys:
        groups: dict[tuple[str, ...], dict[Any, str]] = defaultdict(dict)
        others = [other for other in keys if other != key]
        for arm, config in configs.items():
            groups[tuple(words(config.get(other)) for other in others)][_level(config.get(key))] = arm
        lines = {shared: arms for shared, arms in groups.items() if len(arms) > 1}
        if not lines:
            continue
        telling = [i for i in range(len(others)) if len({shared[i] for shared in lines}) > 1]
        named = {
            _shared_name(key, arms) or ", ".join(shared[i] for i in telling) or "all arms": arms
            for shared, arms in lines.items()
        }
        levels = {level for arms in lines.values() for level in arms}
        if len(named) == len(lines):
            found.append(Crossing(key, sorted(levels, key=lambda v: (isinstance(v, str), v)), named))
    return found


def _shared_name(key: str, arms: Mapping[Any, str]) -> str | None:
    """``gain`` for gain-branch_norm=none and gain-branch_norm=rms; None if the names do not part like this."""
    prefixes = ("", *(f"{name}=" for name in (key, *key.split("."))))

    def rest(level: Any, arm: str) -> str:
        own = {f"{prefix}{words(level)}" for prefix in prefixes}
        return "-".join(part for part in re.split(r"-(?!\d)", arm) if part not in own)

    names = {rest(level, arm) for level, arm in arms.items()}
    return names.pop() or None if len(names) == 1 else None


def _independent(configs: Mapping[str, Flat]) -> list[str]:
    """The differing keys without those that only repeat how an earlier one sorts the arms."""
    found: dict[tuple[int, ...], str] = {}
    for key in differing(configs):
        values = [words(config.get(key)) for config in configs.values()]
        first = {value: i for i, value in reversed(list(enumerate(values)))}
        found.setdefault(tuple(first[value] for value in values), key)
    return list(found.values())


def _level(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else words(value)


def full(crossing: Crossing) -> bool:
    """Whether every line has every level, and there are two lines: two factors, completely crossed."""
    return len(crossing.lines) > 1 and all(len(arms) == len(crossing.levels) for arms in crossing.lines.values())
