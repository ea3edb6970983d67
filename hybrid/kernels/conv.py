"""The short causal convolution of Mamba-2 in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_torch(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None) -> Tensor:
    """As a sum of shifted products, on any device; shapes as in ``hybrid.kernels.causal_conv``."""
    T, width = x.shape[1], weight.shape[1]
    past = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if past is None else past.to(x.dtype)
    padded = torch.cat((past, x), dim=1)
    convolved = bias + sum(padded[:, i : i + T] * weight[:, i] for i in range(width))
    return F.silu(convolved.to(x.dtype))
