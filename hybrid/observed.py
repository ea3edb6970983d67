"""What a forward pass shows besides its logits: what enters every block, comes out of every branch, opens every gate.

Each of these is a context in which the last forward pass stands; afterwards the model is as before. Probe and
diagnostics read the same model through them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch.nn as nn
from torch import Tensor

from hybrid.model import HybridLM

Place = tuple[int, str]  # block, counted from 0, and branch, e.g. (3, "mamba")
Key = TypeVar("Key", bound=Hashable)


def places(model: HybridLM) -> list[Place]:
    """Every branch of every block."""
    return [(layer, name) for layer, block in enumerate(model.blocks) for name in block.branches]


class Recording:
    """What the last forward pass gave: ``inputs[layer]`` of the blocks and ``outputs[layer, branch]``, [B,T,d]."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[Place, Tensor] = {}


@contextlib.contextmanager
def recorded(model: HybridLM) -> Iterator[Recording]:
    """The inputs of the blocks and the outputs of the branches."""
    recording = Recording()

    def keep_input(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            recording.inputs[layer] = arguments[0]

        return hook

    def keep_output(place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], result: tuple[Tensor, None]) -> None:
            recording.outputs[place] = result[0]

        return hook

    handles = [block.register_forward_pre_hook(keep_input(i)) for i, block in enumerate(model.blocks)]
    for layer, name in places(model):
        handles.append(getattr(model.blocks[layer], name).register_forward_hook(keep_output((layer, name))))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def observed_gates(model: HybridLM) -> contextlib.AbstractContextManager[dict[int, Tensor]]:
    """By block, the gates of those that have one: [B,T,1], [B,T,d] or a single number."""
    return _observed({layer: block.fusion for layer, block in enumerate(model.blocks) if hasattr(block, "fusion")})


def observed_kernels(model: HybridLM) -> contextlib.AbstractContextManager[dict[Place, dict[str, Tensor]]]:
    """By block and branch, the inputs of the recurrences' kernels, by the names of their arguments."""
    branches = {(layer, name): getattr(model.blocks[layer], name) for layer, name in places(model)}
    return _observed({place: branch for place, branch in branches.items() if hasattr(branch, "observer")})


@contextlib.contextmanager
def _observed(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Any]]:
    """What the ``observer`` of each module is last called with."""
    seen: dict[Key, Any] = {}
    before = {key: module.observer for key, module in modules.items()}
    try:
        for key, module in modules.items():
            module.observer = lambda value, key=key: seen.__setitem__(key, value)
        yield seen
    finally:
        for key, module in modules.items():
            module.observer = before[key]
