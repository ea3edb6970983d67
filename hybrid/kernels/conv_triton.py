"""The short causal convolution of Mamba-2 with its SiLU as one Triton kernel forward and one backward.

With u_t = bias + sum_i weight_i x_{t-K+1+i} and y_t = SiLU(u_t), a program has some steps of one sequence and some
channels. u is not kept: the backward computes it again for the steps whose gradients reach its own,
dx_s = sum_j weight_{K-1-j} du_{s+j}, and what it loads for that several times lies in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels.seeds import register_seeds
from hybrid.kernels.tiles import check_dtypes, load, store

STEPS, CHANNELS, WARPS = 32, 128, 4  # of a program


@triton.jit
def _weight(weight_ptr, i, width, K: tl.constexpr, BC: tl.constexpr):
    channel = tl.arange(0, BC)
    return tl.load(weight_ptr + channel * K + i, mask=channel < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _convolved(x_ptr, weight_ptr, bias, first, T, x_step, width, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """u of the steps from ``first`` on."""
    u = tl.zeros((BT, BC), dtype=tl.float32) + bias[None, :]
    for i in tl.static_range(K):
        x = load(x_ptr, first + i - (K - 1), 0, T, x_step, width, BT, BC).to(tl.float32)
        u += x * _weight(weight_ptr, i, width, K, BC)
    return u


@triton.jit
def _conv_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, T, C, sequences_per_model, tiles, x_batch, x_step,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BT
    c0 = tl.program_id(1) * BC
    width = C - c0
    channel = b // sequences_per_model * C + c0
    x_ptr += b * x_batch + c0
    bias = tl.load(bias_ptr + channel + tl.arange(0, BC), mask=tl.arange(0, BC) < width, other=0.0).to(tl.float32)
    u = _convolved(x_ptr, weight_ptr + channel * K, bias, first, T, x_step, width, K, BT, BC)
    store(y_ptr + b * T * C + c0, u * tl.sigmoid(u), first, T, C, width, BT, BC)


@triton.jit
def _conv_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, dy_ptr, dx_ptr, sums_ptr,
    T, C, sequences_per_model, tiles, x_batch, x_step, dy_batch, dy_step,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BT
    c0 = tl.program_id(1) * BC
    width = C - c0
    channel = b // sequences_per_model * C + c0
    x_ptr += b * x_batch + c0
    dy_ptr += b * dy_batch + c0
    weight_ptr += channel * K
    column = tl.arange(0, BC)
    bias = tl.load(bias_ptr + channel + column, mask=column < width, other=0.0).to(tl.float32)
    sums_ptr += tl.program_id(0).to(tl.int64) * (K + 1) * C + c0 + column
    dx = tl.zeros((BT, BC), dtype=tl.float32)
    for j in tl.static_range(K):
        u = _convolved(x_ptr, weight_ptr, bias, first + j, T, x_step, width, K, BT, BC)
        kept = tl.sigmoid(u)
        dy = load(dy_ptr, first + j, 0, T, dy_step, width, BT, BC).to(tl.float32)
        du = dy * kept * (1.0 + u * (1.0 - kept))
        dx += du * _weight(weight_ptr, K - 1 - j, width, K, BC)
        if j == 0:  # the program's own steps: its share of the gradients of weight and bias
            for i in tl.static_range(K):
                x = load(x_ptr, first + i - (K - 1), 0, T, x_step, width, BT, BC).to(tl.float32)
                tl.store(sums_ptr + i * C, tl.sum(du * x, 0), mask=column < width)
            tl.store(sums_ptr + K * C, tl.sum(du, 0), mask=column < width)
    store(dx_ptr + b * T * C + c0, dx, first, T, C, width, BT, BC)


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("groundthink::conv_triton", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    B, T, C = x.shape
    y = x.new_empty(x.shape)
    x, tiles = _dense_channels(x), triton.cdiv(T, STEPS)
    with torch.cuda.device_of(x):
        _conv_forward_kernel[B * tiles, triton.cdiv(C, CHANNELS)](
            x, weight.contiguous(), bias.contiguous(), y, T, C, B // weight.shape[0], tiles, x.stride(0), x.stride(1),
            K=weight.shape[2], BT=STEPS, BC=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("groundthink::conv_triton_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and for every tile of steps the sums [B,tiles,K+1,C] for weight and (last) bias."""
    B, T, C = x.shape
    K = weight.shape[2]
    tiles = triton.cdiv(T, STEPS)
    dx, sums = x.new_empty(x.shape), x.new_empty(B, tiles, K + 1, C, dtype=torch.float32)
    x, dy = _dense_channels(x), _dense_channels(dy)
    with torch.cuda.device_of(x):
        _conv_backward_kernel[B * tiles, triton.cdiv(C, CHANNELS)](
            x, weight.contiguous(), bias.contiguous(), dy, dx, sums,
            T, C, B // weight.shape[0], tiles, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
            K=K, BT=STEPS, BC=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return dx, sums


@_backward.register_fake
def _(x, weight, bias, dy):
    tiles = (x.shape[1] + STEPS - 1) // STEPS
    sums = x.new_empty(x.shape[0], tiles, weight.shape[2] + 1, x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape), sums


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, sums = _backward(x, weight, bias, dy)
    # Over each model's sequences: here, where a compiler can fuse the sum.
    sums = sums.view(weight.shape[0], -1, *sums.shape[2:]).sum(1)
    return dx, sums[:, :-1].transpose(1, 2).to(weight.dtype), sums[:, -1].to(bias.dtype)


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def conv_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As ``hybrid.kernels.causal_conv`` without a past; arithmetic in float32."""
    check_dtypes("causal_conv", x, weight, bias)
    # One set of filters for the whole batch; stacked models (vmap) have several.
    return _forward(x, weight[None], bias[None])
