"""Hydra's sweeper for GroundThink: checks every run before the first starts, skips what is done, counts the rest."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper as HydraSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybrid.config import ConfigError, read_composed, resolve, validate
from hybrid.data import Corpus, prepare
from hybrid.progress import duration
from hybrid.records import variant_name
from hybrid.run import ENDED, PlannedRun, SweepFailed, fit_to_corpus, plan, probe
from hybrid.schema import Config, SweepConfig
from hybrid.sizes import count_params
from sweeps import launching
from sweeps.child import ProcessDied
from sweeps.expand import SEED_KEYS, Job, expand, name_of_axes
from sweeps.grouping import group_alike, group_overrides
from sweeps.launching import at_once, launch, record_death
from sweeps.registry import make_known
from sweeps.sweep_file import write_sweep_file


class Sweeper(HydraSweeper):
    """Runs arms x grid x seeds (``conf/sweep/*.yaml`` and the command line) through any Hydra launcher."""

    held_back: tuple[str, ...] = ()  # overrides that Hydra has not seen (``hybrid.train.hold_back``)

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Any]:
        sweep = read_composed(self.config).sweep
        arguments = [*arguments, *self.held_back]
        if sweep.search.n_trials is not None:
            return self.search(sweep, arguments)
        jobs = expand(sweep, arguments)
        sweep.name = sweep.name or name_of_axes(arguments)
        runs = self.plan_runs(jobs, sweep.name)
        check_baseline(sweep, runs)
        root = runs[0].folder.path.parent
        console = Console(highlight=False)
        skipped = ENDED if sweep.retry_failed else (*ENDED, "failed")
        todo = [i for i, run in enumerate(runs) if run.status not in skipped]
        console.print(headline(sweep, runs, len(runs) - len(todo)), soft_wrap=True, markup=False)
        if sweep.dry_run:
            show_plan(console, runs)
            return []
        write_sweep_file(root, sweep, jobs, runs)

        started = time.time()
        batch = []
        groups = group_alike(runs, todo)
        number = 1
        for members in groups:
            display = [
                f"display.run_index={number}",
                f"display.run_total={len(todo)}",
                f"display.sweep_started={started}",
            ]
            first = members[0]
            lines = group_overrides(jobs[first].overrides, [runs[i] for i in members])
            batch.append([*lines, f"variant='{runs[first].variant}'", f"sweep.name='{root.name}'", *display])
            number += len(members)

        def done() -> str:
            return f"{sum(run.ended for run in runs)} of {len(runs)} runs are done"

        style = runs[0].cfg.display.progress
        returns = launch(self.launcher, batch, root, total=len(todo), style=style, done=done)
        errors = {
            i: ret._return_value
            for members, ret in zip(groups, returns, strict=True)
            if ret.status == JobStatus.FAILED
            for i in members
        }
        for i, error in errors.items():
            if isinstance(error, ProcessDied):
                record_death(runs[i], list(jobs[i].overrides), error)
        conclude(console, runs, errors)
        return returns

    def search(self, sweep: SweepConfig, arguments: list[str]) -> list[Any]:
        """An Optuna search in every arm: the jobs are workers that take trials until none is left."""
        from sweeps import search  # Optuna only where it is asked for
        from sweeps.worker import work

        def compose(lines: Sequence[str]) -> DictConfig:
            return self.hydra_context.config_loader.load_sweep_config(self.config, list(lines))

        arms = search.plan_search(sweep, arguments, compose)
        console = Console(highlight=False)
        if sweep.retry_failed and not sweep.dry_run:
            for arm in arms:
                arm.study.queue_failed()
        for line in (search.headline(arms), *(note for arm in arms for note in arm.study.notes)):
            console.print(line, soft_wrap=True, markup=False)
        if sweep.dry_run:
            search.show_plan(console, arms)
            return []
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=work, config=self.config
        )
        batch = search.batch_of(arms, at_once(launcher, search.batch_of(arms, at_once=1)))

        def done() -> str:
            progress = [arm.study.progress() for arm in arms]
            return (
                f"{sum(p.n_trials - p.left for p in progress)} of {sum(p.n_trials for p in progress)} trials are done"
            )

        left = sum(arm.study.progress().left for arm in arms)
        style = arms[0].cfg.display.progress
        returns = launch(launcher, batch, arms[0].study.root, total=left, style=style, done=done, restarts=3)
        errors = [str(ret._return_value) for ret in returns if ret.status == JobStatus.FAILED]
        search.conclude(console, arms, compose, errors)
        return returns

    def compose_all(self, jobs: list[Job]) -> list[Config]:
        """The configuration of every job. Jobs that differ in their seeds alone are composed once: it takes 0.1 s."""
        arms: dict[tuple[str, ...], Config | None] = {}  # None: something else refers to a seed
        configs = []
        for job in jobs:
            lines = [(line.partition("=")[0], line) for line in job.overrides]
            seeds = {key: line.partition("=")[2] for key, line in lines if key in SEED_KEYS}
            arm = (*(line for key, line in lines if key not in SEED_KEYS), *sorted(seeds))
            known = arms.get(arm) if all(value.isdecimal() for value in seeds.values()) else None
            if known is None:
                composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(job.overrides))
                cfg = resolve(composed)
                written = OmegaConf.to_yaml({key: composed._get_node(key) for key in composed if key != "hydra"})
                arms[arm] = None if "${seed_" in written else cfg
            else:
                cfg = copy.deepcopy(known)
                for key, value in seeds.items():
                    setattr(cfg, key, int(value))
                validate(cfg)
            configs.append(cfg)
        return configs

    def plan_runs(self, jobs: list[Job], name: str) -> list[PlannedRun]:
        """Every run's configuration checked, data prepared, identity known. Raises for the first that cannot run."""
        configs = self.compose_all(jobs)
        for cfg in configs:
            cfg.sweep.name = name
        corpora: dict[str, Corpus] = {}
        for cfg in configs:
            key = repr(cfg.data)
            if key not in corpora:
                corpora[key] = prepare(cfg.data)
            fit_to_corpus(cfg, corpora[key])
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


def check_baseline(sweep: SweepConfig, runs: list[PlannedRun]) -> None:
    """The baseline must be an arm of the sweep, though maybe not of the part of it that is run now."""
    arms = {run.variant for run in runs} | {job.variant for job in expand(replace(sweep, only=None), []) if job.variant}
    if sweep.baseline is not None and sweep.baseline not in arms:
        raise ConfigError(
            f"sweep.baseline={sweep.baseline} is no arm of this sweep (there are {', '.join(sorted(arms))})"
        )


def headline(sweep: SweepConfig, runs: list[PlannedRun], done: int) -> str:
    seeds = {(run.cfg.seed_init, run.cfg.seed_data) for run in runs}
    arms = {run.variant for run in runs}
    already = f", {done} already done" if done else ""
    root = runs[0].folder.path.parent
    return f"{sweep.name}: {len(runs)} runs ({len(arms)} arms x {len(seeds)} seeds){already} -> {root}"


def show_plan(console: Console, runs: list[PlannedRun]) -> None:
    """Every run with parameters, tokens, estimated time (measured once per arm) and status."""
    table = Table()
    for column in ("run", "seed", "parameters", "tokens", "time", "status"):
        table.add_column(column, overflow="fold", justify="left" if column in ("run", "status") else "right")
    measured: dict[str, float] = {}
    left = 0.0
    for run in runs:
        if run.variant not in measured:
            measured[run.variant] = probe(run)
        trainer = run.cfg.trainer
        tokens = trainer.max_steps * trainer.batch_size * trainer.grad_accum * run.cfg.data.seq_len
        left += 0 if run.status in ENDED else measured[run.variant]
        counts = count_params(run.cfg)
        cells = (run.variant, str(run.cfg.seed_init), f"{counts['total']:,}", f"{tokens:,}",
                 duration(measured[run.variant]), run.status or "to do")  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    console.print(f"about {duration(left)} left, one run after another on this machine as busy as it is now")


def conclude(console: Console, runs: list[PlannedRun], errors: dict[int, Any]) -> None:
    """Print what became of the runs. Raises ``SweepFailed`` if any failed, diverged or is unfinished."""
    rows = []
    for i, run in enumerate(runs):
        status, reason = run.status, (run.folder.summary() or {}).get("stop_reason") or ""
        if status in ("completed", "stopped"):
            continue
        if status is None and i in errors:
            reason = str(errors[i]).splitlines()[0]
        elif status is None and run.folder.busy:
            status, reason = "elsewhere", "another process is running it"
        rows.append((run, status or "unfinished", reason))
    console.print(f"{len(runs) - len(rows)} of {len(runs)} runs have a record")
    if not rows:
        return
    table = Table()
    for column in ("run", "seed", "status", "reason"):
        table.add_column(column, overflow="fold")
    for run, status, reason in rows:
        table.add_row(*(Text(cell) for cell in (run.variant, str(run.cfg.seed_init), status, reason)))
    console.print(table)
    for run, *_ in rows:
        if run.folder.log.exists():
            console.print(
                f"log of {run.variant} seed {run.cfg.seed_init}: {run.folder.log}", soft_wrap=True, markup=False
            )
    bad = [status for _, status, _ in rows if status != "elsewhere"]
    if "failed" in bad:
        console.print("failed runs are tried again only with sweep.retry_failed=true")
    if bad:
        raise SweepFailed(f"{len(bad)} of {len(runs)} runs failed, diverged or are unfinished")


def register(held_back: list[str]) -> None:
    """Make the sweeper and the launchers known to Hydra."""
    Sweeper.held_back = tuple(held_back)
    make_known(Sweeper)
    launching.register()
