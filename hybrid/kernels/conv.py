"""The short causal convolution of Mamba-2 in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import by_model, register_seeds


def conv_torch(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None) -> Tensor:
    """As a sum of shifted products, on any device; shapes as in ``hybrid.kernels.causal_conv``."""
    compute = torch.promote_types(x.dtype, weight.dtype)
    inputs = x if past is None else torch.cat((past.to(x.dtype), x), dim=1)
    # One set of filters for the whole batch; stacked models (vmap) have several.
    convolved = _forward(inputs.to(compute), weight.to(compute)[None], bias.to(compute)[None], x.shape[1])
    return F.silu(convolved.to(x.dtype))


def _shifts(inputs: int, outputs: int, width: int) -> list[tuple[int, slice, slice]]:
    """Which weight of a filter multiplies which inputs for which outputs, where the last steps of both are the same."""
    more, shifts = inputs - outputs, []
    for back in range(width):
        first = max(0, back - more)  # output with an input so far back
        if first < outputs:
            shifts.append((width - 1 - back, slice(first + more - back, inputs - back), slice(first, outputs)))
    return shifts


def _taps(weight: Tensor, B: int) -> Tensor:
    """Filters [models,C,K] as [K,B or 1,1,C], for B sequences of the models."""
    models = weight.shape[0]
    return weight.repeat_interleave(1 if models == 1 else B // models, dim=0).permute(2, 0, 1).contiguous().unsqueeze(2)


@operator("conv_torch")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, steps: int) -> Tensor:
    """The last ``steps`` outputs [B,steps,C] for x [B,T,C], weight [models,C,K] and bias [models,C], in one dtype."""
    B, T, C = x.shape
    taps, bias = _taps(weight, B), _taps(bias.unsqueeze(-1), B)[0]
    y = bias.expand(B, steps, C).clone(memory_format=torch.contiguous_format)
    for i, of_x, of_y in _shifts(T, steps, len(taps)):
        y[:, of_y].addcmul_(x[:, of_x], taps[i])
    return y


@_forward.register_fake
def _(x, weight, bias, steps):
    return x.new_empty(x.shape[0], steps, x.shape[2])


@operator("conv_torch_backward")
def _backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, and of the weights [B,C,K] and the bias [B,C] for every sequence."""
    B, T, _ = x.shape
    taps = _taps(weight, B)
    dx, dweight = x.new_zeros(x.shape), weight.new_zeros(B, *weight.shape[1:])
    for i, of_x, of_y in _shifts(T, dy.shape[1], len(taps)):
        dx[:, of_x].addcmul_(dy[:, of_y], taps[i])
        dweight[..., i] = (dy[:, of_y] * x[:, of_x]).sum(1)
    return dx, dweight, dy.sum(1)


@_backward.register_fake
def _(x, weight, dy):
    B, _, C = x.shape
    return x.new_empty(x.shape), weight.new_empty(B, *weight.shape[1:]), weight.new_empty(B, C)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _autograd(ctx, dy):
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _backward(x, weight, dy)
    models = weight.shape[0]
    return dx, by_model(dweight, models, own=2), by_model(dbias, models), None


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)
