"""The one entry point: ``python -m hybrid.train key=value ...``, with ``-m`` for a sweep.

Hydra composes, ``hybrid.config`` checks, and only then is torch imported, so a mistake is answered within a second.
This is the one module of ``hybrid`` that knows ``sweeps``: it tells Hydra of the sweeper there.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import sys
from dataclasses import replace

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid.arguments import describe, fail
from hybrid.config import CONF_DIR, ConfigError, default_options, group_options, resolve, unknown_key
from hybrid.data import DataError
from hybrid.records import RunBusy, variant_name
from hybrid.run import PlannedRun, SweepFailed, check_data, execute, execute_together, plan
from hybrid.schema import Config
from hybrid.start import keep_imports
from sweeps.plugin import register

USAGE = """\
Train one model, or sweep over many.

  python -m hybrid.train                                    one run with the defaults
  python -m hybrid.train model=tiny fusion=gated fusion.gate_init=0.5 trainer.max_steps=200 schedule.warmup_steps=20
  python -m hybrid.train -m fusion=gated,gain seed_init=0,1     every combination
  python -m hybrid.train -m sweep=smoke                         a named comparison (conf/sweep/)
  python -m hybrid.train -m sweep=smoke --dry-run               its runs, sizes and estimated time; trains nothing
  python -m hybrid.train --cfg job ...                          print the configuration and stop

A run goes to OUT/SWEEP/VARIANT-ID/, and the same command finds it there: an ended run is not repeated, an interrupted
one goes on. `python -m analysis.report OUT/SWEEP` turns the records into tables and figures.
"""


def main(arguments: list[str] | None = None) -> None:
    arguments = tidy(sys.argv[1:] if arguments is None else arguments)
    if any(a in ("--help", "-h") for a in arguments):
        print_help()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as they are, and leave as one line
    for_hydra, for_sweeper = hold_back(arguments)
    sys.argv = [sys.argv[0], *for_hydra]
    try:
        if "-m" in arguments and any(re.match("--cfg|-c$", a) for a in arguments):
            raise ConfigError("--cfg shows the configuration of one run; leave -m out")
        check_choices(arguments)
        check_flags(for_hydra)
        register(for_sweeper)
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
    except (ConfigError, DataError) as error:
        fail(str(error), 2)
    except SweepFailed as error:
        fail(str(error), 1)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error), 2)
    except OSError as error:
        fail(describe(error), 2)
    except KeyboardInterrupt as error:
        fail(str(error) or "interrupted", 130)


def tidy(arguments: list[str]) -> list[str]:
    """``+sweep=NAME`` as ``sweep=NAME``, --dry-run as its key, and -m first: Hydra wants all overrides after it."""
    multirun = [a for a in arguments if a == "-m" or (a.startswith("--mu") and "--multirun".startswith(a))]
    rest = [re.sub(r"^\+sweep=", "sweep=", a) for a in arguments if a not in multirun]
    rest = [re.sub(r"^sweeps\.retry_failed=", "sweep.retry_failed=", a) for a in rest]
    rest = ["sweep.dry_run=true" if a == "--dry-run" else a for a in rest]
    rest = [re.sub(r"^(sweep\.search\.(sampler|pruner|space)[.=])", r"++\1", a) for a in rest]  # open to new keys
    return ["-m", *rest] if multirun else rest


def hold_back(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What Hydra itself needs of a multirun's arguments, and what is for the sweeper alone.

    Hydra would apply every single value to the defaults as well, which are no run of the sweep and may not have the
    key (``fusion=concat,residual fusion.proj_init=random``).
    """
    if "-m" not in arguments:
        return arguments, []
    held = [
        a
        for a in arguments
        if re.match(r"\+{0,2}\w[\w./@]*=|~", a) and not re.match(r"\+*(hydra|sweep|out|sampler|pruner)\b", a)
    ]
    return [a for a in arguments if a not in held], held


def job(composed: DictConfig) -> dict | None:
    """One run of what Hydra composed. One that cannot start or fails ends the process, in a sweep it raises."""
    given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    overrides = [line for line in given if not re.match(r"\+*(variant|sweep\.(name|together)|display)\b", line)]
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        cfg = resolve(composed)
        if single and (cfg.sweep.arms or cfg.sweep.grid or cfg.sweep.seeds or cfg.sweep.search.n_trials is not None):
            raise ConfigError(f"sweep={cfg.sweep.name} consists of several runs: add -m")
        if cfg.sweep.together:
            return several(cfg, overrides)
        run = plan(cfg, check_data(cfg), variant_name(cfg, overrides))
        if run.ended and cfg.display.progress != "off":
            print(f"already there: {run.folder.path}")
        summary = execute(run, overrides)
    except (ConfigError, DataError, RunBusy, OSError) as error:
        if isinstance(error, RunBusy) and not single:
            print(error, flush=True)  # someone else's sweep is at it; this one goes on with the next run
            return None
        if single:
            fail(describe(error) if isinstance(error, OSError) else str(error), 2)
        raise
    if single:
        conclude(cfg, run, summary)
    return summary


def several(cfg: Config, overrides: list[str]) -> list[dict | None]:
    """Runs of a sweep that differ by their seeds and learning rates, trained as one (``sweeps.grouping``)."""
    corpus = check_data(cfg)
    runs, lines = [], []
    for own in cfg.sweep.together:
        one = copy.deepcopy(cfg)
        one.sweep.together = None
        one.seed_init, one.seed_data = own["seed_init"], own["seed_data"]
        sections = {part: keys for part, keys in own.items() if isinstance(keys, dict)}
        for part, keys in sections.items():
            setattr(one, part, replace(getattr(one, part), **keys))
        runs.append(plan(one, corpus, own["variant"]))
        values = [(f"{part}.{key}", value) for part, keys in sections.items() for key, value in keys.items()]
        apart = [f"{key}={'null' if value is None else value}" for key, value in values]
        lines.append([*overrides, *apart, f"seed_init={one.seed_init}", f"seed_data={one.seed_data}"])
    return execute_together(runs, lines)


def conclude(cfg: Config, run: PlannedRun, summary: dict) -> None:
    if summary["status"] in ("failed", "diverged"):
        fail(f"the run {summary['status']}: {summary['stop_reason']} (log: {run.folder.log})", 1)
    if cfg.display.progress != "off":
        best = summary.get("best_val_loss")
        loss = f", best validation loss {best:.4f} nats at step {summary['best_step']}" if best is not None else ""
        print(f"{summary['status']}: {summary['params']['total']:,} parameters{loss}; record in {run.folder.path}")


def check_choices(arguments: list[str]) -> None:
    """Hydra answers a number, null or true where a choice is due with a traceback; say it in a line instead."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if not re.fullmatch(r"\w+", group) or not (CONF_DIR / group).is_dir():
            continue
        for choice in value.lower().split(","):
            empty = choice == "null" and group not in ("blocks", "gate_init")
            if empty or re.fullmatch(r"[\d.e+-]+|true|false", choice):
                raise ConfigError(f"{group}={choice}: no such choice (there are {', '.join(group_options(group))})")


def check_flags(arguments: list[str]) -> None:
    """Hydra answers a flag that it does not know with its usage; say it in a line instead."""
    parser = get_args_parser()
    parser.error = lambda message: fail(f"{message} (--help shows what there is)")  # type: ignore[method-assign]
    given = parser.parse_args(arguments)
    modes = [f"--{name}" for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(given, name)]
    if given.experimental_rerun:
        fail("--experimental-rerun is not there: the same command finds its run and goes on with it")
    if len(modes) > 1:
        fail(f"only one of {' and '.join(modes)} can be asked for")


def explain(error: Exception) -> str:
    """One line for what Hydra found wrong, with the nearest valid name."""
    text = " ".join(str(error).split())
    choice = re.search(r"Could not find '([\w/-]+)/([^/']*)'", text)
    if choice:
        group, option = choice.groups()
        options = group_options(group) + ["basic"] * (group == "hydra/launcher")  # Hydra's own
        near = difflib.get_close_matches(option, options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{group}={option}: no such choice{hint} (there are {', '.join(options)})"
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}': quote special characters, e.g. \"data.path='a b'\""
    key = re.search(r"Could not override '([\w./]+)'", text)
    if key and key.group(1).startswith("hydra"):
        return f"unknown key '{key.group(1)}' (conf/hydra/ has what can be set of the launchers)"
    return unknown_key(key.group(1)) if key else text


def print_help() -> None:
    try:
        print(help_text(), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; Python must not write again as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text() -> str:
    """Usage, the axes with their choices, and the keys of each axis's default choice, from the YAML files."""
    defaults = default_options()
    lines = [USAGE, "Axes (AXIS=CHOICE; * is the default):"]
    for group, choice in defaults.items():
        lines.append(f"  {group}")
        for option in group_options(group):
            comment = next((line for line in read(group, option) if line.startswith("# ") and "@" not in line), "# ")
            lines.append(f"    {'*' if option == choice else ' '} {option:<24}{comment[2:]}")
    lines.append("\nKeys (AXIS.KEY=VALUE) of the default choices:")
    for group, choice in defaults.items():
        if choice is None or group == "sweep":
            continue
        lines.append(f"  {group}={choice}")
        body = read(group, "_base") if (CONF_DIR / group / "_base.yaml").exists() else read(group, choice)
        lines += [f"    {line}" for line in body if line and not line.startswith(("#", "name:", "defaults:"))]
    top = [
        line for line in (CONF_DIR / "config.yaml").read_text().splitlines() if re.match(r"(seed|variant|out)", line)
    ]
    return "\n".join([*lines, "  (top level)", *(f"    {line}" for line in top)])


def read(group: str, option: str) -> list[str]:
    return (CONF_DIR / group / f"{option}.yaml").read_text().splitlines()


if __name__ == "__main__":
    keep_imports()
    main()
