"""Find the run folders below a directory, read their summaries, and say which were left out and why.

Only the standard library is used here, so that a wrong directory or a misspelt arm is answered at once; the metrics
of the runs, which are large, are read later and only where a figure needs them (``analysis.records.steps``).
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from analysis.records.arms import drop_copies, keep_newest, label_arms
from analysis.records.json_files import load_object, number, whole
from analysis.records.plans import SweepPlan, name_of, read_plan
from analysis.search.trials import SEARCH_FILE, Search, is_trial_folder, read_search

RUN_SCHEMA = "groundthink.run/1"
USABLE_STATUS = ("completed", "stopped")  # these enter means; diverged and failed runs are only shown
_MAY_COME = ("unfinished", "missing")  # listed behind what went wrong
METRICS = ("final_val_loss", "best_val_loss")

_RUN_FOLDER_NAME = re.compile(r"^(?P<variant>.+)-(?P<run_id>[0-9a-f]{8})$")
_TAIL_BYTES = 65536

Seeds = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """One run that counts: ``arm`` is the label that it is compared under, ``summary`` its summary.json."""

    path: Path
    folder: str  # relative to the directory of the report
    arm: str
    summary: dict[str, Any]

    @property
    def seeds(self) -> Seeds:
        """(seed_init, seed_data), the block in which arms are paired."""
        return self.summary["seed_init"], self.summary["seed_data"]

    @property
    def run_id(self) -> str:
        return str(self.summary["run_id"])

    @property
    def trial(self) -> bool:
        """Whether this is a trial of a search, by its record."""
        return isinstance(self.summary.get("trial"), dict)


@dataclass(frozen=True)
class LeftOut:
    """One run that does not enter any mean. ``kind`` is a short word, ``reason`` a sentence."""

    folder: str
    kind: str  # unfinished, diverged, failed, corrupt, foreign, incomplete, duplicate, missing
    reason: str
    arm: str | None = None
    seed_init: int | None = None
    seed_data: int | None = None
    last_step: int | None = None
    path: Path | None = None  # None if there is no such folder
    run_id: str | None = None
    trial: bool = False  # of a search, by its record


@dataclass
class Records:
    """Everything found below a directory."""

    directory: Path
    runs: list[Run] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    plans: list[SweepPlan] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    trials: list[Run | LeftOut] = field(default_factory=list)  # runs of searches: one seed each, never arms
    notes: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """Arms with at least one usable run: in the order of the sweep's plan, then by name."""
        planned = {arm: i for i, arm in enumerate(a for plan in self.plans for a in plan.arms)}
        return sorted({run.arm for run in self.runs}, key=lambda arm: (planned.get(arm, len(planned)), arm))


def read_records(directory: Path, metric: str = "final_val_loss") -> Records:
    """Read every run below ``directory``, at any depth.

    A run counts if its summary has the schema ``groundthink.run/1``, its status is completed or stopped, and its
    ``metric`` is a number. Nothing in a record can raise an error: what cannot be used is listed in ``left_out``.
    """
    records = Records(directory)
    run_folders = _walk(directory, records)
    search_folders = {search.path for search in records.searches}
    for path in run_folders:
        found = _read_run(path, _relative(path, directory), metric)
        if found.trial or is_trial_folder(path, search_folders):
            records.trials.append(found)
        else:
            (records.runs if isinstance(found, Run) else records.left_out).append(found)  # type: ignore[arg-type]
    _settle_arms(records)
    records.left_out += _missing_runs(records)
    records.left_out.sort(key=lambda item: (item.kind in _MAY_COME, item.folder))
    return records


def _walk(directory: Path, records: Records) -> list[Path]:
    """The run folders, sorted; the plans of sweeps and the results of searches are read on the way."""
    run_folders = []

    def unreadable(error: OSError) -> None:
        records.notes.append(f"folder not readable: {_relative(Path(error.filename), directory)}")

    for root, folders, files in os.walk(directory, onerror=unreadable):
        names = set(files)
        is_run = bool(names & {"summary.json", "metrics.jsonl"}) or (
            "config.yaml" in names and ("log.txt" in names or "checkpoints" in folders)
        )
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not (is_run and f == "checkpoints"))
        if is_run:
            run_folders.append(Path(root))
        if "sweep.json" in names:
            _keep(read_plan(Path(root), directory), records.plans, records.notes)
        for name in sorted(filter(SEARCH_FILE.match, names)):
            _keep(read_search(Path(root) / name, directory), records.searches, records.notes)
    return run_folders


def _keep(found: Any, kept: list[Any], notes: list[str]) -> None:
    """``found`` is what was read, or a sentence that says why it cannot be used."""
    (notes if isinstance(found, str) else kept).append(found)


def _relative(path: Path, directory: Path) -> str:
    return path.relative_to(directory).as_posix()


def _read_run(path: Path, folder: str, metric: str) -> Run | LeftOut:
    named = _RUN_FOLDER_NAME.match(path.name)
    arm = named["variant"] if named else None
    run_id = named["run_id"] if named else None
    if not (path / "summary.json").exists():
        step, of = last_step(path), _configured(path, "max_steps")
        reached = "nothing logged" if step is None else f"last step {step:,}" + (f" of {of:,}" if of else "")
        seeds = _configured(path, "seed_init"), _configured(path, "seed_data")
        return LeftOut(folder, "unfinished", f"no summary yet, {reached}", arm, *seeds, step, path, run_id)

    summary = load_object(path / "summary.json")
    if isinstance(summary, str):
        return LeftOut(folder, "corrupt", summary, arm, last_step=last_step(path), path=path, run_id=run_id)
    if summary.get("schema") != RUN_SCHEMA:
        reason = f"schema {str(summary.get('schema'))[:60]!r} instead of {RUN_SCHEMA!r}"
        return LeftOut(folder, "foreign", reason, arm, path=path)

    variant, status = summary.get("variant"), summary.get("status")
    arm = variant if isinstance(variant, str) and variant else arm
    seeds = whole(summary.get("seed_init")), whole(summary.get("seed_data"))
    step = whole(summary.get("steps"))
    found = LeftOut(folder, "", "", arm, *seeds, step, path, str(summary.get("run_id") or run_id or "") or None)
    found = replace(found, trial=isinstance(summary.get("trial"), dict))
    why = f": {str(summary['stop_reason'])[:200]}" if summary.get("stop_reason") else ""
    at = f" at step {step:,}" if step is not None else ""
    if status in ("diverged", "failed"):
        return replace(found, kind=status, reason=f"{status}{at}{why}")
    if status not in USABLE_STATUS:
        return replace(found, kind="incomplete", reason=f"unknown status {str(status)[:60]!r}")

    required = ("run_id", "variant", "seed_init", "seed_data", metric)
    missing = [key for key in required if key not in summary]
    if missing:
        return replace(found, kind="incomplete", reason=f"summary.json lacks {', '.join(missing)}")
    if None in seeds or not (isinstance(variant, str) and variant and summary["run_id"]):
        return replace(found, kind="incomplete", reason="summary.json has an unusable variant, run_id or seed")
    if math.isnan(number(summary[metric])):
        return replace(found, kind="incomplete", reason=f"{status}, but {metric} is not a finite number")
    return Run(path, folder, variant, summary | {"seed_init": seeds[0], "seed_data": seeds[1]})


def last_step(path: Path) -> int | None:
    """The last step logged in a run folder's metrics.jsonl; None if there is none."""
    try:
        with open(path / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):  # the last line may be torn
        try:
            step = whole(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if step is not None:
            return step
    return None


def _configured(path: Path, key: str) -> int | None:
    """A whole number in config.yaml. A YAML parser would be the right tool for more than this."""
    try:
        match = re.search(rf"^\s*{key}:\s*(\d+)\s*$", (path / "config.yaml").read_text("utf-8", "replace"), re.M)
    except OSError:
        return None
    return int(match[1]) if match else None


def _settle_arms(records: Records) -> None:
    """Label the arms of the usable runs and move double ones to ``left_out``."""
    kept, copies = drop_copies(records.runs)
    planned = {str(listed.get("run_id"))[:8] for plan in records.plans for listed in plan.runs}
    kept = label_arms(kept, lambda path: _sweep_of(path, records.directory))
    records.runs, superseded = keep_newest(kept, planned)
    for run, reason in copies + superseded:
        steps = whole(run.summary.get("steps"))
        records.left_out.append(
            LeftOut(run.folder, "duplicate", reason, run.arm, *run.seeds, steps, run.path, run.run_id)
        )

    # A diverged run belongs beside the usable ones of its arm, also where these got a sweep's name in front.
    labels = {run.arm for run in records.runs}
    for i, item in enumerate(records.left_out):
        if item.path and item.arm and item.arm not in labels:
            label = f"{_sweep_of(item.path, records.directory)}/{item.arm}"
            if label in labels:
                records.left_out[i] = replace(item, arm=label)


def _sweep_of(run_folder: Path, directory: Path) -> str:
    return name_of(run_folder.parent if run_folder != directory else directory, directory)


def _missing_runs(records: Records) -> list[LeftOut]:
    """Runs that a sweep's plan lists and of which there is no folder."""
    missing = []
    for plan in records.plans:
        here = [item for item in [*records.runs, *records.left_out] if item.path and plan.path in item.path.parents]
        ids = {(item.run_id or "")[:8] for item in here}
        blocks = {_block(item) for item in here}
        for listed in plan.runs:
            block = (listed.get("variant"), whole(listed.get("seed_init")), whole(listed.get("seed_data")))
            if str(listed.get("run_id"))[:8] in ids or block in blocks:
                continue
            folder = str(listed.get("folder") or listed.get("run_id"))
            arm = block[0] if isinstance(block[0], str) else None
            reason = f"listed in the plan of the sweep {plan.name}, no record"
            missing.append(LeftOut(folder, "missing", reason, arm, *block[1:]))
    return missing


def _block(item: Run | LeftOut) -> tuple[Any, Any, Any]:
    if isinstance(item, Run):
        return item.summary["variant"], *item.seeds
    return (item.arm or "").rpartition("/")[2], item.seed_init, item.seed_data
