"""What stands in for a branch, or for the first blocks, while the model itself runs as it is.

Everything here has the interface of a branch and of a block: ``forward(x, state) -> (out, state)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn as nn
from torch import Tensor

from hybrid.model import HybridLM
from hybrid.observed import Place, places


class Fixed(nn.Module):
    """Whatever comes in, ``out`` comes out."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        return self.out, None


class Moved(nn.Module):
    """A branch whose output is moved by ``shift`` [B,T,d]."""

    def __init__(self, branch: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.branch, self.shift = branch, shift

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        return self.branch(x)[0] + self.shift, None


class Pinned(nn.Module):
    """A branch that gives ``reference`` [B,T,d] wherever ``pinned`` [B,T] says so."""

    def __init__(self, branch: nn.Module, reference: Tensor, pinned: Tensor) -> None:
        super().__init__()
        self.branch, self.reference, self.pinned = branch, reference, pinned

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        return torch.where(self.pinned.unsqueeze(-1), self.reference, self.branch(x)[0]), None


def branch_names(model: HybridLM) -> list[str]:
    """The names of all branches, each once, in the order of their first block."""
    return list(dict.fromkeys(name for _, name in places(model)))


@contextlib.contextmanager
def substituted(model: HybridLM, modules: Mapping[Place, nn.Module]) -> Iterator[None]:
    """The model with other modules in place of some branches."""
    before = {(layer, name): getattr(model.blocks[layer], name) for layer, name in modules}
    try:
        for (layer, name), module in modules.items():
            setattr(model.blocks[layer], name, module)
        yield
    finally:
        for (layer, name), module in before.items():
            setattr(model.blocks[layer], name, module)


@contextlib.contextmanager
def entered(model: HybridLM, layer: int, x: Tensor) -> Iterator[None]:
    """The model with ``x`` [B,T,d] coming into block ``layer``: what is before it is not computed."""
    blocks = model.blocks
    try:
        model.blocks = nn.ModuleList([Fixed(x), *blocks[layer:]])
        yield
    finally:
        model.blocks = blocks
