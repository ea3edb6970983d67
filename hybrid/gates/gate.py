"""What all gates share: a reading with its verdict, and bands of values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hybrid.schema import Band, Config

NOT_APPLICABLE = "n/a"
ORDER = (NOT_APPLICABLE, "pass", "warn", "fail")  # from best to worst


@dataclass(frozen=True)
class Reading:
    """What a gate found: ``text`` is one line of words with numbers, ``more`` the gate's own facts for the record."""

    verdict: str
    text: str
    value: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


class Gate:
    """Base of all gates.

    ``begin`` and ``see`` depend on their arguments alone; ``memory`` (plain JSON values) is what the gate wants to
    remember from row to row. None means that there is nothing to say.
    """

    name: str  # as the record has it
    test: str  # what it looks at, for tables

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    @property
    def key(self) -> str:
        """The gate's name in ``gates.on_fail`` and the like: a dot would be a level of keys."""
        return self.name.replace(".", "_")

    def begin(self, environment: dict[str, Any]) -> Reading | None:
        return None

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Reading | None:
        return None

    def thresholds(self) -> str:
        """Pass / warn / fail in words, for tables."""
        raise NotImplementedError


def worst(verdicts: list[str]) -> str:
    return max(verdicts, key=ORDER.index, default=NOT_APPLICABLE)


def judge(value: float, band: Band, strict: bool = False) -> str:
    """``strict``: a value on a bound of ``passes`` warns, unless ``warns`` ends there as well."""
    (low, high), (lowest, highest) = band.passes, band.warns
    if low <= value <= high and not (strict and (value == low != lowest or value == high != highest)):
        return "pass"
    return "warn" if lowest <= value <= highest else "fail"


def is_number(value: Any) -> bool:
    """A record has null where a number was not finite."""
    return isinstance(value, int | float) and math.isfinite(value)


def in_words(band: Band, percent: bool = False) -> str:
    """``0.3-3 / 0.1-10 / else``."""

    def side(bounds: list[float]) -> str:
        return "-".join(f"{100 * bound:g}%" if percent else f"{bound:g}" for bound in bounds)

    return f"{side(band.passes)} / {side(band.warns)} / else"
