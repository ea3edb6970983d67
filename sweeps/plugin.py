"""Hydra's sweeper for GroundThink: checks every run before the first starts, skips what is done, counts the rest."""

from __future__ import annotations

import importlib
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper as HydraSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from hybrid.config import ConfigError, resolve
from hybrid.data import Corpus
from hybrid.records import RunFolder, variant_name, write_atomically
from hybrid.run import PlannedRun, SweepFailed, check_data, plan
from sweeps.expand import Job, expand

SCHEMA = "groundthink.sweep/1"


class Sweeper(HydraSweeper):
    """Runs arms x grid x seeds (``conf/sweep/*.yaml`` and the command line) through any Hydra launcher."""

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Any]:
        sweep = resolve(self.config).sweep
        jobs = expand(sweep, arguments)
        runs = self.plan_runs(jobs)
        root = runs[0].folder.path.parent
        write_sweep_file(root, sweep.name, sweep.question, sweep.baseline, jobs, runs)

        todo = [i for i, run in enumerate(runs) if not run.ended]
        console = Console(highlight=False)
        seeds = {(run.cfg.seed_init, run.cfg.seed_data) for run in runs}
        arms = {run.variant for run in runs}
        done = f", {len(runs) - len(todo)} already done" if len(todo) < len(runs) else ""
        console.print(
            f"{sweep.name or 'multirun'}: {len(runs)} runs ({len(arms)} arms x {len(seeds)} seeds){done} -> {root}",
            soft_wrap=True,
        )
        started = time.time()
        batch = []
        for number, i in enumerate(todo, start=1):
            display = [
                f"display.run_index={number}",
                f"display.run_total={len(todo)}",
                f"display.sweep_started={started}",
            ]
            batch.append([*jobs[i].overrides, f"variant='{runs[i].variant}'", f"sweep.name='{root.name}'", *display])
        returns = list(self.launcher.launch(batch, initial_job_idx=0)) if batch else []
        errors = {i: ret._return_value for i, ret in zip(todo, returns, strict=True) if ret.status == JobStatus.FAILED}
        conclude(console, runs, errors)
        return returns

    def plan_runs(self, jobs: list[Job]) -> list[PlannedRun]:
        """Every run's configuration checked, data prepared, identity known. Raises for the first that cannot run."""
        loader = self.hydra_context.config_loader
        configs = []
        for job in jobs:
            cfg = resolve(loader.load_sweep_config(self.config, list(job.overrides)))
            cfg.sweep.name = cfg.sweep.name or "multirun"
            configs.append(cfg)
        corpora: dict[str, Corpus] = {}
        for cfg in configs:
            key = repr(cfg.data)
            if key not in corpora:
                corpora[key] = check_data(cfg)
            cfg.model.vocab_size = cfg.model.vocab_size or corpora[key].vocab_size
        runs = []
        for job, cfg in zip(jobs, configs, strict=True):
            variant = job.variant or variant_name(cfg, list(job.overrides))
            runs.append(plan(cfg, corpora[repr(cfg.data)], variant))
        seen: dict[Path, int] = {}
        for i, run in enumerate(runs):
            if run.folder.path in seen:
                raise ConfigError(f"two runs of this sweep are the same: {' '.join(jobs[i].overrides)}")
            seen[run.folder.path] = i
        return runs


def write_sweep_file(
    root: Path, name: str | None, question: str | None, baseline: str | None, jobs: list[Job], runs: list[PlannedRun]
) -> None:
    """``sweep.json``: what the sweep consists of, so that analysis knows what is missing."""
    root.mkdir(parents=True, exist_ok=True)
    facts = {
        "schema": SCHEMA,
        "name": name,
        "question": question,
        "baseline": baseline,
        "arms": list(dict.fromkeys(run.variant for run in runs)),
        "seeds": sorted({run.cfg.seed_init for run in runs}),
        "runs": [
            {
                "variant": run.variant,
                "seed_init": run.cfg.seed_init,
                "seed_data": run.cfg.seed_data,
                "run_id": run.run_id,
                "folder": run.folder.path.name,
                "overrides": list(job.overrides),
            }
            for job, run in zip(jobs, runs, strict=True)
        ],
    }
    write_atomically(root / "sweep.json", json.dumps(facts, indent=1) + "\n")


def conclude(console: Console, runs: list[PlannedRun], errors: dict[int, Any]) -> None:
    """Print what became of the runs. Raises ``SweepFailed`` if any has no good record."""
    bad = []
    for i, run in enumerate(runs):
        summary = run.folder.summary() or {}
        status = summary.get("status", "unfinished")
        if status not in ("completed", "stopped"):
            reason = summary.get("stop_reason") or (str(errors[i]).splitlines()[0] if i in errors else "")
            bad.append((run.variant, str(run.cfg.seed_init), status, reason, folder_log(run.folder)))
    console.print(f"{len(runs) - len(bad)} of {len(runs)} runs have a record")
    if not bad:
        return
    table = Table("run", "seed", "status", "reason", "log")
    for row in bad:
        table.add_row(*row)
    console.print(table)
    raise SweepFailed(f"{len(bad)} of {len(runs)} runs failed, diverged or are unfinished")


def folder_log(folder: RunFolder) -> str:
    return str(folder.log) if folder.log.exists() else ""


def register() -> None:
    """Make the sweeper known to Hydra, which finds plugins only in modules named ``hydra_plugins.*``.

    The module is made here, so that the package needs no folder of that name beside its own.
    """
    try:
        parent = importlib.import_module("hydra_plugins")  # there if any plugin is installed
    except ModuleNotFoundError:
        parent = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        parent.__path__ = []
    Sweeper.__module__ = "hydra_plugins.groundthink"
    module = types.ModuleType(Sweeper.__module__)
    module.Sweeper = Sweeper
    parent.groundthink = sys.modules[Sweeper.__module__] = module
    Plugins.instance().register(Sweeper)
