"""The short causal convolution of Mamba-2 with its SiLU as one Triton kernel forward and one backward.

With u_t = bias + w0 x_{t-3} + w1 x_{t-2} + w2 x_{t-1} + w3 x_t and y_t = SiLU(u_t), a program has some channels of one
sequence and walks some steps, forward from the first, backward from the last, with the inputs that it needs again in
registers: a program loads each once. u is not kept but computed again in the backward pass, where
dx_t = w3 du_t + w2 du_{t+1} + w1 du_{t+2} + w0 du_{t+3}. Shorter filters have zeros in front.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels import LONGEST_FILTER
from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import by_model, register_seeds
from hybrid.kernels.tiles import check_dtypes, silu, strides, with_dense_models, with_dense_rows

CHANNELS = 128  # of a program
# Steps of a program, without a branch between them, so that their loads are under way together, and its warps. More
# steps mean fewer partial sums backward.
FORWARD, BACKWARD = {"STEPS": 8, "num_warps": 2}, {"STEPS": 16, "num_warps": 1}


@triton.jit
def _at(pointer, t, T, stride, here):
    return tl.load(pointer + t * stride, mask=here & (t >= 0) & (t < T), other=0.0).to(tl.float32)


@triton.jit
def _filter(weight_ptr, bias_ptr, C, BC: tl.constexpr):
    """The channels of this program, which of them are there, and their weights and biases."""
    channel = tl.program_id(2) * BC + tl.arange(0, BC)
    here = channel < C
    weight_ptr += channel * 4
    w0 = tl.load(weight_ptr, mask=here, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + 1, mask=here, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + 2, mask=here, other=0.0).to(tl.float32)
    w3 = tl.load(weight_ptr + 3, mask=here, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32)
    return channel, here, w0, w1, w2, w3, bias


@triton.jit
def _conv_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, T, C, weight_model, bias_model, sequences_per_model, x_batch, x_step,
    STEPS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    model = b // sequences_per_model
    channel, here, w0, w1, w2, w3, bias = _filter(
        weight_ptr + model * weight_model, bias_ptr + model * bias_model, C, BC
    )
    x_ptr += b * x_batch + channel
    y_ptr += b * T * C + channel
    start = tl.program_id(1).to(tl.int64) * STEPS
    x0 = _at(x_ptr, start - 3, T, x_step, here)
    x1 = _at(x_ptr, start - 2, T, x_step, here)
    x2 = _at(x_ptr, start - 1, T, x_step, here)
    for i in tl.static_range(STEPS):
        t = start + i
        x3 = _at(x_ptr, t, T, x_step, here)
        u = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        y, _ = silu(u)
        tl.store(y_ptr + t * C, y.to(y_ptr.dtype.element_ty), mask=here & (t < T))
        x0, x1, x2 = x1, x2, x3


@triton.jit
def _conv_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, dy_ptr, dx_ptr, sums_ptr,
    T, C, weight_model, bias_model, sequences_per_model, x_batch, x_step, dy_batch, dy_step,
    dx_batch, dx_step,
    STEPS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    model = b // sequences_per_model
    channel, here, w0, w1, w2, w3, bias = _filter(
        weight_ptr + model * weight_model, bias_ptr + model * bias_model, C, BC
    )
    x_ptr += b * x_batch + channel
    dy_ptr += b * dy_batch + channel
    dx_ptr += b * dx_batch + channel
    start = tl.program_id(1).to(tl.int64) * STEPS
    stop = start + STEPS
    x1 = _at(x_ptr, stop, T, x_step, here)
    x2 = _at(x_ptr, stop + 1, T, x_step, here)
    x3 = _at(x_ptr, stop + 2, T, x_step, here)
    du1 = tl.zeros((BC,), dtype=tl.float32)
    du2 = du1
    du3 = du1
    for i in tl.static_range(3):  # the steps after the program's own, which take from them
        t = stop + 2 - i
        x0 = _at(x_ptr, t - 3, T, x_step, here)
        u = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        _, slope = silu(u)
        du = _at(dy_ptr, t, T, dy_step, here) * slope
        du1, du2, du3 = du, du1, du2
        x1, x2, x3 = x0, x1, x2
    dw0 = tl.zeros((BC,), dtype=tl.float32)
    dw1 = dw0
    dw2 = dw0
    dw3 = dw0
    dbias = dw0
    for i in tl.static_range(STEPS):
        t = stop - 1 - i
        x0 = _at(x_ptr, t - 3, T, x_step, here)
        u = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        _, slope = silu(u)
        du = _at(dy_ptr, t, T, dy_step, here) * slope
        dx = w3 * du + w2 * du1 + w1 * du2 + w0 * du3
        tl.store(dx_ptr + t * dx_step, dx.to(dx_ptr.dtype.element_ty), mask=here & (t < T))
        dw0 += du * x0
        dw1 += du * x1
        dw2 += du * x2
        dw3 += du * x3
        dbias += du
        du1, du2, du3 = du, du1, du2
        x1, x2, x3 = x0, x1, x2
    sums_ptr += (b * tl.num_programs(1) + tl.program_id(1)) * 5 * C + channel
    tl.store(sums_ptr, dw0, mask=here)
    tl.store(sums_ptr + C, dw1, mask=here)
    tl.store(sums_ptr + 2 * C, dw2, mask=here)
    tl.store(sums_ptr + 3 * C, dw3, mask=here)
    tl.store(sums_ptr + 4 * C, dbias, mask=here)


def run_forward(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> None:
    """Write y [B,T,C] for weight [models,C,4] and bias [models,C]."""
    B, T, C = x.shape
    x, weight, bias = with_dense_rows(x), with_dense_models(weight), with_dense_models(bias)
    _conv_forward_kernel[B, triton.cdiv(T, FORWARD["STEPS"]), triton.cdiv(C, CHANNELS)](
        x, weight, bias, y, T, C, weight.stride(0), bias.stride(0), B // weight.shape[0], *strides(x),
        BC=CHANNELS, **FORWARD,
    )  # fmt: skip


def run_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, dx: Tensor, sums: Tensor) -> None:
    """Write dx, whose steps may lie apart, and every program's sums (``sums_shape``) for the weights and the bias."""
    B, T, C = x.shape
    x, dy = with_dense_rows(x), with_dense_rows(dy)
    weight, bias = with_dense_models(weight), with_dense_models(bias)
    _conv_backward_kernel[B, sums.shape[1], triton.cdiv(C, CHANNELS)](
        x, weight, bias, dy, dx, sums,
        T, C, weight.stride(0), bias.stride(0), B // weight.shape[0], *strides(x, dy, dx),
        BC=CHANNELS, **BACKWARD,
    )  # fmt: skip


def sums_shape(B: int, T: int, C: int) -> tuple[int, int, int, int]:
    return B, -(-T // BACKWARD["STEPS"]), LONGEST_FILTER + 1, C


@operator("conv_triton")
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        run_forward(x, weight, bias, y)
    return y


@_forward.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape)


@operator("conv_triton_backward")
def _backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and every program's sums [B,programs,5,C] for the four weights and the bias."""
    dx, sums = x.new_empty(x.shape), x.new_empty(sums_shape(*x.shape), dtype=torch.float32)
    with torch.cuda.device_of(x):
        run_backward(x, weight, bias, dy, dx, sums)
    return dx, sums


@_backward.register_fake
def _(x, weight, bias, dy):
    return x.new_empty(x.shape), x.new_empty(sums_shape(*x.shape), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, sums = _backward(x, weight, bias, dy)
    return dx, *of_filters(sums, weight, bias)


def of_filters(sums: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight [models,C,4] and bias [models,C]."""
    sums = by_model(sums, weight.shape[0], own=2)
    return sums[:, :-1].transpose(1, 2).to(weight.dtype), sums[:, -1].to(bias.dtype)


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def conv_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As ``hybrid.kernels.causal_conv`` without a past, in float32, for filters of at most ``LONGEST_FILTER``."""
    check_dtypes("causal_conv", x, weight, bias)
    # One set of filters for the whole batch; stacked models (vmap) have several.
    return _forward(x, filled(weight)[None], bias[None])


def filled(weight: Tensor) -> Tensor:
    """Filters [C,K] as the kernels have them, [C,4]."""
    missing = LONGEST_FILTER - weight.shape[1]
    return F.pad(weight, (missing, 0)) if missing else weight
