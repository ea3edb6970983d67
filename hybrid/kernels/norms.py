"""The gated norms behind the two recurrences in plain PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_then_gate_torch(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """As ``hybrid.kernels.norm_then_gate``."""
    y = F.group_norm(x.flatten(0, -2).float(), groups, weight, bias, eps).view(x.shape)
    return y.to(gate.dtype) * F.silu(gate)


def gate_then_norm_torch(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """As ``hybrid.kernels.gate_then_norm``."""
    y = (x.float() * F.silu(gate.float())).unflatten(-1, (groups, -1))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y.flatten(-2) * weight).to(gate.dtype)
