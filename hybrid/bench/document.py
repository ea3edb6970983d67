"""The record of a benchmark: JSON with the schema ``groundthink.bench/1``, and comparing two of them.

``rows`` hold, besides their ``group`` and ``name``: ``status`` (ok, failed, skipped) with a ``reason``; ``unit``,
``median``, ``q1``, ``q3`` and all ``times`` of what was measured (smaller is better); and what the command adds.
Imports no torch.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from hybrid.bench.task import Row
from hybrid.files import write_text_atomically
from hybrid.records import environment, finite

SCHEMA = "groundthink.bench/1"
LEAST = 0.01  # share by which a row must be slower to count, whatever its spread: clocks differ from start to start
STATUS = ("ok", "failed", "skipped")


class BadDocument(ValueError):
    """A file that is no benchmark record, or none that compares with another; the message is one line."""


class Document:
    """A record that is written anew after every row, so that one that is cut short keeps what it has."""

    def __init__(self, command: str, arguments: dict[str, Any], device: Row, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
        number = 1
        while (folder / f"{stem}.json").exists():  # never over another record
            number += 1
            stem = f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{number}"
        self.path, self.figure = folder / f"{stem}.json", folder / f"{stem}.png"
        self.begun = time.time()
        about = environment(device.get("device", "cpu"), {})
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "command": command,
            "arguments": arguments,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": {k: v for k, v in device.items() if k not in ("group", "name", "status")},
            "cpu": {"name": cpu_name(), "cores": os.cpu_count(), "load_before": os.getloadavg()},
            "versions": about["versions"],
            "code": {key: about[key] for key in ("code_version", "git_commit", "git_dirty")},
            "rows": [],
            "targets": [],
            "notes": ["--quick: too few repetitions to judge targets"] if arguments.get("quick") else [],
        }
        self.write()

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        self.write()
        return row

    def note(self, text: str) -> None:
        self.content["notes"].append(text)

    def target(self, name: str, reached: float | None, wanted: float, at_most: bool = False) -> None:
        """A figure that was to be reached; None where it could not be measured. Few repetitions judge nothing."""
        if self.content["arguments"].get("quick"):
            return
        met = None if reached is None else (reached <= wanted if at_most else reached >= wanted)
        self.content["targets"].append(
            {"name": name, "reached": reached, "wanted": wanted, "at_most": at_most, "met": met}
        )

    def write(self) -> None:
        self.content["seconds"] = time.time() - self.begun
        self.content["cpu"]["load_after"] = os.getloadavg()
        write_text_atomically(self.path, json.dumps(finite(self.content), indent=1, default=str) + "\n")


def find(rows: list[Row], group: str, name: str) -> Row | None:
    """The row of that group and name, if it was measured."""
    return next((r for r in rows if (r["group"], r["name"], r["status"]) == (group, name, "ok")), None)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def read(path: Path, command: str | None = None) -> dict[str, Any]:
    """An earlier record, of that command. Raises ``BadDocument``."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadDocument(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not (isinstance(rows, list) and all(map(is_row, rows)) and is_head(content)):
        raise BadDocument(f"{path} is no benchmark record ({SCHEMA})")
    if command is not None and content.get("command") != command:
        raise BadDocument(f"{path} is of the command {content.get('command')}, not {command}")
    return content


def is_head(content: dict[str, Any]) -> bool:
    device, command = content.get("device"), content.get("command")
    return content.get("schema") == SCHEMA and isinstance(device, dict) and isinstance(command, str)


def is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not {"group", "name", "status"} <= row.keys() or row["status"] not in STATUS:
        return False
    measured = [row.get(key) for key in ("median", "q1", "q3")]
    unmeasured = row["status"] != "ok" or measured[0] is None
    return unmeasured or all(type(number) in (int, float) for number in measured)


def check_comparable(old: dict[str, Any], device: str) -> None:
    """Raise ``BadDocument`` where the devices differ: times of two machines say nothing about the code."""
    before = old["device"].get("device")
    if before != device:
        raise BadDocument(f"cannot compare: the earlier record is of {before}, this one of {device}")


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row that both have, or that only the earlier one could measure, with a ``verdict``.

    ``slower`` (a regression) where the median grew by more than both spreads (the distances of the quartiles) together
    and by at least 1%; ``faster`` the same way down; else ``same``. ``gone`` (a regression): it was measured before,
    and failed now; a row that was not asked for now is left out.
    """
    found = []
    later = {(row["group"], row["name"]): row for row in new["rows"]}
    for row in old["rows"]:
        now = later.get((row["group"], row["name"]))
        if row["status"] != "ok" or row.get("median") is None or now is None or now["status"] == "skipped":
            continue
        entry = {"group": row["group"], "name": row["name"], "before": row["median"], "unit": row.get("unit")}
        if now["status"] != "ok" or now.get("median") is None:
            found.append(entry | {"now": None, "verdict": "gone", "reason": now.get("reason")})
            continue
        noise = max((row["q3"] - row["q1"]) + (now["q3"] - now["q1"]), LEAST * row["median"])
        change = now["median"] - row["median"]
        verdict = "slower" if change > noise else "faster" if -change > noise else "same"
        found.append(entry | {"now": now["median"], "noise": noise, "verdict": verdict})
    return found


def regressions(comparison: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in comparison if entry["verdict"] in ("slower", "gone")]
