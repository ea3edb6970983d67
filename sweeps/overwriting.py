"""Whether the command line overwrites what a sweep's arms are there for.

An arm may choose ``model=rwkv6`` or ``blocks=p4``, and so a pattern of blocks that it does not name. On the command
line ``model.pattern=P`` would then make the same model of every arm, under their old names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from omegaconf import OmegaConf

from hybrid.arguments import plain_key
from hybrid.config import CONF_DIR, ConfigError, default_options

NATURE = ("model.pattern", "model.branches", "fusion.name", "init.name")  # what a choice of a group is made for


def check_nature(sweep: str | None, arms: list[list[str]], command_line: list[str]) -> None:
    """Raises ``ConfigError`` where overrides on the command line make equal what those of the arms part."""
    for line in command_line:
        others = [other for other in command_line if other != line and plain_key(other) in default_options()]
        own = [nature([*others, *(own for own in lines if own not in command_line)]) for lines in arms]
        for key, (place, _) in nature([line], defaults=False).items():
            overwritten = {found[key][1] for found in own if key in found and found[key][0] < place}
            if len(overwritten) > 1:
                what = plain_key(line) if plain_key(line) == key else f"{plain_key(line)} sets {key}, which"
                raise ConfigError(f"{what} is what arms of sweep {sweep} differ in; leave it out")


def nature(overrides: Iterable[str], defaults: bool = True) -> dict[str, tuple[int, str]]:
    """What these overrides make of the keys in ``NATURE``, each value with its place in the order of being applied."""
    options = dict(default_options()) if defaults else {}
    found: dict[str, tuple[int, str]] = {}
    for line in overrides:
        if plain_key(line) in default_options():
            options[plain_key(line)] = line.partition("=")[2]
        elif plain_key(line) in NATURE:
            found[plain_key(line)] = (len(default_options()), line.partition("=")[2])
    for place, group in enumerate(default_options()):
        for key, value in set_by(group, options.get(group)).items():
            found[key] = max(found.get(key, (place, value)), (place, value), key=lambda pair: pair[0])
    return found


@functools.cache
def set_by(group: str, option: str | None) -> dict[str, str]:
    """What a choice of a group sets of ``NATURE``."""
    path = CONF_DIR / group / f"{option}.yaml"
    if not path.is_file():
        return {}
    package = re.match(r"# @package (\w+)", path.read_text())
    content = OmegaConf.load(path)
    keys = [key.partition(".") for key in NATURE if key.startswith(f"{package[1] if package else group}.")]
    return {f"{of}.{key}": str(content[key]) for of, _, key in keys if content.get(key) is not None}
