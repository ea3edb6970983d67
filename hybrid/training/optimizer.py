"""Parameter groups by part of the model, weight decay on matrices only, and gradient norms by part."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from hybrid.model import component
from hybrid.schema import OptimConfig

GROUPS = ("rwkv", "mamba", "fusion", "other")


def group_of(parameter_name: str) -> str:
    """The learning-rate group of a parameter: rwkv, mamba, fusion or other."""
    part = component(parameter_name)
    return part if part in GROUPS else "other"


def peak_lr(cfg: OptimConfig, group: str) -> float:
    """The learning rate of a group at its peak."""
    return cfg.lr * (1.0 if group == "other" else getattr(cfg, f"{group}_lr_mult"))


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, except where the layer says no.

    Mamba-2 flags dt_bias, A_log and D with ``_no_weight_decay``, RWKV-6 its mixes and bonus; vectors, gains and the
    filters of the short convolution are no matrices.
    """
    return parameter.ndim == 2 and not getattr(parameter, "_no_weight_decay", False)


def build_optimizer(model: nn.Module, cfg: OptimConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW with a group for every (part, decay); each group knows its ``name`` and ``peak_lr``."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((group_of(name), decays(parameter)), []).append(parameter)
    described = adamw_groups([(part, decay, parameters) for (part, decay), parameters in groups.items()], cfg)
    return torch.optim.AdamW(described, betas=tuple(cfg.betas), eps=cfg.eps, fused=fused)


def adamw_groups(groups: list[tuple[str, bool, list[nn.Parameter]]], cfg: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups for those of (part of the model, whether its weights decay, parameters)."""
    described = []
    for part, decay, parameters in groups:
        peak = peak_lr(cfg, part)
        weight_decay = cfg.weight_decay if decay else 0.0
        described.append(
            {"params": parameters, "name": part, "lr": peak, "peak_lr": peak, "weight_decay": weight_decay}
        )
    return described


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class GradientNorms:
    """Norms of all gradients in one pass; clips with their total and reports them by part."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        self.parameters = [parameter for _, parameter in named]
        self.names = [name for name, _ in named]

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their total norm is at most ``max_norm`` (0: leave them).

        Returns the norms before scaling, one per parameter, on the device.
        """
        for parameter in self.parameters:
            if parameter.grad is None:  # without influence on this batch, as decays are at a sequence length of 1
                parameter.grad = torch.zeros_like(parameter)
        norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in self.parameters]))
        if max_norm > 0:
            total = norms.norm()
            nn.utils.clip_grads_with_norm_(self.parameters, max_norm, total)
        return norms

    def by_part(self, norms: Tensor) -> dict[str, float]:
        """``part_norms`` of this model."""
        return part_norms(self.names, norms)


def part_norms(names: list[str], norms: Tensor) -> dict[str, float]:
    """What the log shows of the gradient norms of the parameters ``names``: the total, each part's, and their ratio.

    ``grad_ratio`` is the specification's (gate G4): mean norm of a part's tensors, RWKV over Mamba.
    ``grad_ratio_total`` divides the parts' total norms instead. Both are absent unless the model has both parts.
    """
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(group_of(name), []).append(index)
    norms = norms.detach().double().cpu()
    row = {"grad_norm": norms.norm().item()}
    for group in GROUPS:
        if group in members:
            row[f"grad_norm_{group}"] = norms[members[group]].norm().item()
    if "rwkv" in members and "mamba" in members:
        mean = {group: norms[members[group]].mean().item() for group in ("rwkv", "mamba")}
        row["grad_ratio"] = mean["rwkv"] / (mean["mamba"] + 1e-9)
        row["grad_ratio_total"] = row["grad_norm_rwkv"] / (row["grad_norm_mamba"] + 1e-9)
    return {key: value if math.isfinite(value) else math.nan for key, value in row.items()}
