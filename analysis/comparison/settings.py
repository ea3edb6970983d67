"""What makes arms differ: the overrides they do not share, and the factors that these cross."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from analysis.records.arms import arm_overrides
from analysis.records.runs import Records
from analysis.statistics.factorial import Factor

LEARNING_RATE = "optim.lr"

Settings = dict[str, str]  # key -> value, as written on the command line


def arm_settings(records: Records) -> dict[str, Settings]:
    """Per arm the overrides that are not the same for all arms, from the record of its first run.

    A learning rate that only some arms override is read from the others' config.yaml. Arms whose record holds no list
    of overrides are not there.
    """
    first = {run.arm: run for run in reversed(records.runs)}
    chosen = {}
    for arm in records.arms:
        if isinstance(first[arm].summary.get("overrides"), list):
            pairs = (line.lstrip("+").partition("=") for line in arm_overrides(first[arm].summary["overrides"]))
            chosen[arm] = {key: value.strip("'\"") for key, _, value in pairs}
    if any(LEARNING_RATE in settings for settings in chosen.values()):
        for arm, settings in chosen.items():
            rate = settings.get(LEARNING_RATE) or configured(first[arm].path, "optim", "lr")
            if rate is not None:
                settings[LEARNING_RATE] = f"{float(rate):g}" if _is_number(rate) else rate
    varied = {
        key
        for key in {key for settings in chosen.values() for key in settings}
        if len({settings.get(key) for settings in chosen.values()}) > 1
    }
    return {arm: {k: v for k, v in settings.items() if k in varied} for arm, settings in chosen.items()}


def configured(path: Path, section: str, key: str) -> str | None:
    """``section.key`` of a run's config.yaml; a YAML parser would take 50 times as long for the one line."""
    try:
        text = (path / "config.yaml").read_text("utf-8", "replace")
    except OSError:
        return None
    found = re.search(rf"^{section}:\n(?:[ ]+.*\n)*?[ ]+{key}:[ ]*(\S+)[ ]*$", text, re.M)
    return found[1] if found else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def setting_words(settings: Mapping[str, str]) -> str:
    """``gated, gate_init=0.3``: choices of a group by their value, other keys by their last part."""
    named = sorted(settings.items(), key=lambda item: ("." in item[0], item[0]))
    return ", ".join(f"{key.rpartition('.')[2]}={value}" if "." in key else value for key, value in named)


@dataclass(frozen=True)
class Crossing:
    """Factors of which every combination of levels is an arm."""

    factors: list[Factor]
    cells: dict[str, tuple[str, ...]]  # by arm: a level of each factor

    def from_baseline(self, baseline: str) -> Crossing:
        """The same with the baseline's levels first: effects are measured from them."""
        own = self.cells[baseline]
        ordered = [
            Factor(factor.name, (own[i], *(level for level in factor.levels if level != own[i])))
            for i, factor in enumerate(self.factors)
        ]
        return Crossing(ordered, self.cells)


def factors(settings: Mapping[str, Settings]) -> Crossing | None:
    """Two or three factors that ``settings`` cross completely; None where there are none.

    A key is a factor of its own if every combination of the others occurs with every value of it. The keys that are
    not (fusion and gate_init, where only some fusions have a gate) make up one factor together.
    """
    keys = sorted({key for own in settings.values() for key in own})
    crossed = [key for key in keys if _crosses(key, keys, settings)]
    rest = [key for key in keys if key not in crossed]
    groups = [[key] for key in crossed] + ([rest] if rest else [])
    if not 2 <= len(groups) <= 3:
        return None
    cells = {arm: tuple(_level(own, group) for group in groups) for arm, own in settings.items()}
    levels = [tuple(dict.fromkeys(cell[i] for cell in cells.values())) for i in range(len(groups))]
    expected = 1
    for own in levels:
        expected *= len(own)
    if len(set(cells.values())) != expected or len(cells) != expected or min(map(len, levels)) < 2:
        return None
    names = [" and ".join(key.rpartition(".")[2] for key in group) for group in groups]
    return Crossing([Factor(name, own) for name, own in zip(names, levels, strict=True)], cells)


def _crosses(key: str, keys: Iterable[str], settings: Mapping[str, Settings]) -> bool:
    by_rest = defaultdict(set)
    for own in settings.values():
        by_rest[tuple(own.get(other) for other in keys if other != key)].add(own.get(key))
    levels = set().union(*by_rest.values())
    return len(levels) > 1 and len(by_rest) > 1 and all(found == levels for found in by_rest.values())


def _level(own: Settings, group: list[str]) -> str:
    if len(group) == 1:
        return own.get(group[0], "default")
    return setting_words({key: own[key] for key in group if key in own}) or "default"
