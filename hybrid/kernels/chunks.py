"""What both recurrences share in plain PyTorch: chunks, the states between them, and their operators' gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.kernels.seeds import by_model


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B,T,H,...] -> [B,H,N,C,...], padded with zeros at the end."""
    x = x.transpose(1, 2)
    if pad := -x.shape[2] % chunk:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, pad))
    return x.unflatten(2, (-1, chunk)).contiguous()


def carry_forth(gained: Tensor, kept: Tensor, initial_state: Tensor | None) -> Tensor:
    """The states around N chunks [B,H,N+1,...], of what each adds [B,H,N,...] and keeps of the state before it."""
    B, H, N, *state = gained.shape
    borders = gained.new_empty(B, H, N + 1, *state)
    borders[:, :, 0] = 0 if initial_state is None else initial_state
    for n in range(N):
        torch.addcmul(gained[:, :, n], kept[:, :, n], borders[:, :, n], out=borders[:, :, n + 1])
    return borders


def carry_back(dstates: Tensor, kept: Tensor, dfinal: Tensor | None) -> Tensor:
    """Gradients of states through chunks: gives that of the first and changes ``dstates`` [B,H,N,...].

    That holds what the chunks themselves ask of the states that they begin with, and then the whole gradients of the
    states that they end with.
    """
    dstate = torch.zeros_like(dstates[:, :, 0]) if dfinal is None else dfinal
    for n in reversed(range(dstates.shape[2])):
        dborder = torch.addcmul(dstates[:, :, n], kept[:, :, n], dstate)
        dstates[:, :, n] = dstate
        dstate = dborder
    return dstate


def register_gradients(forward: Callable, backward: Callable) -> None:
    """Let ``backward`` give the gradients of the operator ``forward``.

    They are ``forward(*tensors, initial_state, final)``, for an output, the final state and the states around chunks,
    and ``backward(*tensors, borders, dy, dfinal)`` for the gradients of the tensors, of what models hold one for every
    sequence, and of the initial state.
    """

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, initial_state, final = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[2])
        ctx.shape, ctx.initial, ctx.final = output[0].shape, initial_state is not None, final

    def autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _dborders: Tensor | None) -> tuple:
        *tensors, borders = ctx.saved_tensors
        dfinal = dfinal if ctx.final else None  # a compiled graph gives one of an empty state too
        dy = tensors[0].new_zeros(ctx.shape) if dy is None else dy
        *grads, dinitial = backward(*tensors, borders, dy, dfinal)
        of_models = (
            grad if grad.shape == x.shape else by_model(grad, x.shape[0], own=x.dim() - 1)
            for x, grad in zip(tensors, grads, strict=True)
        )
        return *of_models, dinitial if ctx.initial else None, None

    forward.register_autograd(autograd, setup_context=setup_context)
