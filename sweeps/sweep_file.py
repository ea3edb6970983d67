"""``sweep.json``: what a sweep consists of, so that analysis knows what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybrid.files import write_text_atomically
from hybrid.records import code_version
from hybrid.run import PlannedRun
from hybrid.schema import SweepConfig
from sweeps.expand import Job

SCHEMA = "groundthink.sweep/1"


def write_sweep_file(root: Path, sweep: SweepConfig, jobs: list[Job], runs: list[PlannedRun]) -> None:
    """Write the arms, the seeds and the runs with their folders.

    What an earlier, wider call put there stays, unless the code has changed and it was never run.
    """
    root.mkdir(parents=True, exist_ok=True)
    entries = [
        {
            "variant": run.variant,
            "seed_init": run.cfg.seed_init,
            "seed_data": run.cfg.seed_data,
            "run_id": run.run_id,
            "folder": run.folder.path.name,
            "overrides": list(job.overrides),
            "code_version": code_version(),
        }
        for job, run in zip(jobs, runs, strict=True)
    ]
    now = {arm_and_seeds(entry) for entry in entries} | {entry["folder"] for entry in entries}
    for old in read_sweep_file(root):
        current = old.get("code_version") == code_version() or (root / old["folder"] / "summary.json").exists()
        if old["folder"] not in now and arm_and_seeds(old) not in now and current:
            entries.append(old)
    facts = {
        "schema": SCHEMA,
        "name": sweep.name,
        "question": sweep.question,
        "baseline": sweep.baseline,
        "arms": list(dict.fromkeys(entry["variant"] for entry in entries)),
        "seeds": sorted({entry["seed_init"] for entry in entries}),
        "runs": entries,
    }
    write_text_atomically(root / "sweep.json", json.dumps(facts, indent=1) + "\n")


def arm_and_seeds(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry.get("variant"), entry.get("seed_init"), entry.get("seed_data")


def read_sweep_file(root: Path) -> list[dict[str, Any]]:
    """The runs of an earlier call, none where there is no file that can be read."""
    try:
        found = json.loads((root / "sweep.json").read_text())
        return [entry for entry in found["runs"] if isinstance(entry["folder"], str)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
