"""Configurations from overrides, as the command line of ``hybrid.train`` composes them. Torch is imported late."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid.config import CONF_DIR, resolve
from hybrid.schema import Config
from hybrid.start import import_torch

if TYPE_CHECKING:
    from hybrid.data import Corpus


def configuration(overrides: list[str]) -> Config:
    """What ``python -m hybrid.train OVERRIDES`` would train.

    Raises ``hybrid.config.ConfigError``, or what Hydra says of a choice that it does not know.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve(compose("config", overrides=overrides))


def smoke(quick: bool) -> list[str]:
    """One run of the sweep ``smoke``; with ``quick`` a few of its steps."""
    run = ["sweep=smoke", "sweep.arms={}", "sweep.seeds=null", "fusion=gated", "fusion.gate_init=0.5"]
    few = ["trainer.max_steps=12", "schedule.warmup_steps=2", "trainer.eval_every=12"]
    return [*run, *few] if quick else run


def settle(cfgs: list[Config]) -> Corpus:
    """Load the corpus of runs that train together, and replace what is open in them by what it is on this machine."""
    from hybrid.run import check_data

    import_torch(cfgs[0].trainer.device)
    import torch

    from hybrid.device import resolve_device

    corpus = check_data(cfgs[0])
    for cfg in cfgs:
        cfg.model.vocab_size = cfgs[0].model.vocab_size
        resolve_device(cfg)
    torch.set_num_threads(cfgs[0].trainer.cpu_threads)
    return corpus
