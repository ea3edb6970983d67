"""What the runs of a report ran on, and where that was not the same for all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.records.together import some_together

_COLUMNS = {
    "device": "Device",
    "kernel_wkv6": "wkv6 kernel",
    "kernel_ssd": "ssd kernel",
    "code_version": "Code version of hybrid/",
    "git_commit": "Git commit",
    "git_dirty": "Uncommitted changes",
    "data_sha256": "Data sha256",
    "tokenizer_sha256": "Tokenizer sha256",
}
_WORDS = {"true": "yes", "false": "no"}


@dataclass(frozen=True)
class Fact:
    """One line of the environment; ``mixed`` where runs differ in it."""

    name: str
    text: str
    mixed: bool = False


def environment(runs: pd.DataFrame) -> list[Fact]:
    """One line for each thing recorded; several values with the number of runs of each."""
    facts = []
    for column, name in _COLUMNS.items():
        counts = runs[column].fillna("not recorded").value_counts()
        values = [str(_WORDS.get(value, value)) for value in counts.index]
        listed = [f"{value} ({count} runs)" for value, count in zip(values[:6], counts, strict=False)]
        text = values[0] if len(values) == 1 else ", ".join(listed)
        facts.append(Fact(name, text, len(values) > 1))
    versions: dict[str, set[str]] = {}
    for text in runs["versions"].dropna().unique():
        recorded: Any = json.loads(text) if text.startswith("{") else {}
        for package, version in recorded.items():
            versions.setdefault(package, set()).add(str(version))
    words = [f"{package} {' or '.join(sorted(found))}" for package, found in sorted(versions.items())]
    mixed = any(len(found) > 1 for found in versions.values())
    facts.append(Fact("Versions", ", ".join(words) or "not recorded", mixed))
    shared = "; runs trained together share their time" if some_together(runs) else ""
    return [*facts, Fact("Time of all runs", _duration((runs["wall_seconds"] / runs["members"]).sum()) + shared)]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"
