"""What arms were configured with: the keys of config.yaml that differ between them, and the factors they cross."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from analysis.records.runs import Records

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
    return [key for key in keys if len({config_words(config.get(key)) for config in configs.values()}) > 1]


def config_words(value: Any) -> str:
    """A value of a configuration as a person writes it; an em dash for a key that is not there."""
    if value is None:
        return "\N{EM DASH}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(config_words, value))}]"
    return str(value)
