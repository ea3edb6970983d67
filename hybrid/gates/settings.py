"""What the ``gates`` section of a configuration may hold, and what of it belongs to a run's identity."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hybrid.config import ConfigError
from hybrid.schema import Band, GatesConfig

READINGS = {"G2": ("normalised", "specified"), "G3_5": ("calibrated", "specified")}


def check(gates: GatesConfig) -> None:
    """Raise ``ConfigError`` for what no gate could use."""
    for gate, value in dataclasses.asdict(gates.on_fail).items():
        one_of(f"gates.on_fail.{gate}", value, ("warn", "stop"))
    for gate, readings in READINGS.items():
        one_of(f"gates.{gate}.reading", getattr(gates, gate).reading, readings)
    for gate in dataclasses.fields(gates):
        section = getattr(gates, gate.name)
        for option in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            value = getattr(section, option.name)
            if isinstance(value, Band):
                check_band(f"gates.{gate.name}.{option.name}", value)
    for key, value, least in (
        ("G3.steps", gates.G3.steps, 1), ("G4.every", gates.G4.every, 1),
        ("G3_5.least_variance", gates.G3_5.least_variance, 0),
    ):  # fmt: skip
        if not math.isfinite(value) or value < least:
            raise ConfigError(f"gates.{key} must be at least {least}, got {value}")


def check_band(key: str, band: Band) -> None:
    for name in ("passes", "warns"):
        bounds = getattr(band, name)
        if len(bounds) != 2 or not all(map(math.isfinite, bounds)) or bounds[0] > bounds[1]:
            raise ConfigError(f"{key}.{name} must be two numbers [low, high], got {bounds}")
    if not (band.warns[0] <= band.passes[0] and band.passes[1] <= band.warns[1]):
        raise ConfigError(f"{key}: passes={band.passes} must lie inside warns={band.warns}")


def one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ConfigError(f"{key} must be {' or '.join(options)}, got '{value}'")


def identity(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of the section, as plain data, that can change a result: the gates that stop runs.

    A gate that only warns says something of a result and changes nothing of it. So a run with other thresholds for it
    is the same run, and its record keeps the verdicts that it was made with.
    """
    if not plain["enabled"]:
        return {}
    acting = {gate: action for gate, action in plain["on_fail"].items() if action != "warn"}
    return {gate: {"on_fail": action, **plain.get(gate, {})} for gate, action in acting.items()}
