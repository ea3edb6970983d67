"""Configurations from overrides, as the command line of ``hybrid.train`` composes them. Imports no torch."""

from __future__ import annotations

from hybrid.config import CONF_DIR, resolve
from hybrid.schema import Config


def configuration(overrides: list[str]) -> Config:
    """What ``python -m hybrid.train OVERRIDES`` would train.

    Raises ``hybrid.config.ConfigError``, or what Hydra says of a choice that it does not know.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve(compose("config", overrides=overrides))
