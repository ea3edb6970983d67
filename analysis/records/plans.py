"""What a sweep meant to run, from its ``sweep.json``; and how a JSON file is read that somebody else wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.records.json_files import load_object

SWEEP_SCHEMA = "groundthink.sweep/1"


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep meant to run."""

    path: Path  # the folder of the sweep
    folder: str  # the same, relative to the directory of the report
    name: str
    question: str | None
    baseline: str | None
    arms: list[str]
    runs: list[dict[str, Any]]


def read_plan(path: Path, directory: Path) -> SweepPlan | str:
    """The plan in a sweep's folder, or a sentence that says why it cannot be used."""
    content = load_object(path / "sweep.json")
    folder = name_of(path, directory)
    if isinstance(content, str):
        return f"{folder}: {content}; the sweep's plan is not used"
    if content.get("schema") != SWEEP_SCHEMA:
        return f"{folder}: sweep.json has the schema {str(content.get('schema'))[:60]!r}; the plan is not used"

    def listed(key: str, kind: type) -> list[Any]:
        value = content.get(key)
        return [item for item in value if isinstance(item, kind)] if isinstance(value, list) else []

    def text(key: str) -> str | None:
        return content[key] if isinstance(content.get(key), str) and content[key] else None

    name = text("name") or path.name
    return SweepPlan(path, folder, name, text("question"), text("baseline"), listed("arms", str), listed("runs", dict))


def name_of(path: Path, directory: Path) -> str:
    """A folder relative to the directory of the report; that directory itself by its name."""
    return directory.resolve().name if path == directory else path.relative_to(directory).as_posix()
