"""RWKV-6's token shift in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def ddlerp_torch(x: Tensor, delta: Tensor, low: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The five shifted inputs ``x + delta m_k`` [B,T,D]; shapes as in ``hybrid.kernels.ddlerp_linear``."""
    B, T, D = x.shape
    mixes = bias.shape[0]
    mix = torch.einsum("btnr,dnr->nbtd", low.view(B, T, mixes, -1), weight.view(D, mixes, -1)) + bias[:, None, None]
    return tuple(x + delta * m for m in mix.unbind(0))
