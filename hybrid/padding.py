"""Linear layers whose width a GPU has no fast products for, filled with zeros to one that it has."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def wide_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x)``, filled with zeros to a multiple of 16: fast products need a width of 8, wide loads of it 16."""
    missing = -layer.out_features % 16
    if not missing or layer.bias is not None:
        return layer(x)
    # Filled as it lies in a stack of models, where its gradient is wanted: column by column.
    return F.linear(x, F.pad(layer.weight.mT, (0, missing)).mT)


def linear_of_wide(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer`` of the first ``layer.in_features`` channels of x, which is wider or just as wide."""
    missing = x.shape[-1] - layer.in_features
    return F.linear(x, F.pad(layer.weight, (0, missing)), layer.bias) if missing else layer(x)
