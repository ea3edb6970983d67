"""Configurations and models for the tests: composed from the YAML files, so that these are what is tested."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn as nn
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from hybrid import build_model
from hybrid.config import CONF_DIR, resolve
from hybrid.model import HybridLM
from hybrid.schema import Config

# Tensors this small gain nothing from a second thread, and lose a lot where another process wants the core.
torch.set_num_threads(1)

VOCAB = 23
# Overrides that make any preset a matter of milliseconds.
SMALL = (
    "model.d_model=16",
    "model.rwkv.shift_low_rank=4",
    "model.rwkv.decay_low_rank=6",
    "model.mamba.head_dim=8",
    "model.mamba.state_size=8",
)
# Every way to mix a sequence: kinds alone, together, in both orders of a sequence, twins. Name -> overrides.
STACKS = {
    "P": ("model.pattern=P*2",),
    "R": ("model.pattern=R*2",),
    "M": ("model.pattern=M*2",),
    "A": ("model.pattern=A*2",),
    "R M R": ("model.pattern='R M R'",),
    "all kinds": ("model.pattern='A P R M'",),
    "rwkv||rwkv": ("model.pattern=P*2", "model.branches=[rwkv,rwkv]"),
    "mamba||mamba": ("model.pattern=P*2", "model.branches=[mamba,mamba]"),
    "mamba||rwkv": ("model.pattern=P*2", "model.branches=[mamba,rwkv]"),
}


@functools.cache
def _compose(choices: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return OmegaConf.to_container(compose("config", list(choices)))


@functools.cache
def _resolve(overrides: tuple[str, ...]) -> Config:
    choices = tuple(o for o in overrides if (CONF_DIR / o.partition("=")[0]).is_dir())
    composed = copy.deepcopy(_compose(choices))
    for override in overrides:
        if override not in choices:  # a key: Hydra would set it just so, at a quarter of a second a time
            key, _, value = override.partition("=")
            *parents, leaf = key.split(".")
            functools.reduce(dict.__getitem__, parents, composed)[leaf] = yaml.safe_load(value)
    return resolve(OmegaConf.create(composed))


def config(*overrides: str) -> Config:
    """What ``python -m hybrid.train OVERRIDES`` would run; a fresh copy for each caller."""
    return copy.deepcopy(_resolve(overrides))


def small(*overrides: str) -> Config:
    """As ``config``, at width 16 with a vocabulary of ``VOCAB``."""
    return config("model=tiny", f"model.vocab_size={VOCAB}", *SMALL, *overrides)


def stirred(*overrides: str, seed: int = 0) -> HybridLM:
    """A small model in which every parameter matters: none is zero as the official initialisation leaves many."""
    model = build_model(small(*overrides)).eval()
    stir(model, seed)
    return model


@torch.no_grad()
def stir(module: nn.Module, seed: int = 0) -> None:
    """Add noise to every parameter: of the size of a sensible initialisation to matrices, 0.3 to the rest."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()
