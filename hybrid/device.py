"""Which device and precision ``auto`` means on this machine."""

from __future__ import annotations

import torch

from hybrid.config import Config, ConfigError


def resolve_device(cfg: Config) -> None:
    """Replace ``auto`` in ``trainer.device`` and ``trainer.dtype`` by what it is here, so that the record says it.

    Raises ``ConfigError`` for a CUDA device that is not there.
    """
    trainer = cfg.trainer
    if trainer.device == "auto":
        trainer.device = "cuda" if torch.cuda.is_available() else "cpu"
    if trainer.device.startswith("cuda"):
        index = int(trainer.device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ConfigError(
                f"trainer.device={trainer.device}: this machine has {found} CUDA devices; use cpu or auto"
            )
    if trainer.dtype == "auto":
        trainer.dtype = "bfloat16" if trainer.device.startswith("cuda") else "float32"
