"""RWKV-6's token shift as one Triton kernel forward and two backward.

With m_k = low_k W_k^T + bias_k and y_k = x + delta m_k for k = 1..5, the mixes m [5,B,T,D] are five times as large as
the block's input. They are formed tile by tile and never written; the backward pass forms them again::

    dx = sum_k dy_k,  ddelta = sum_k dy_k m_k,  dlow_k = (dy_k delta) W_k,  dW_k = (dy_k delta)^T low_k

One kernel has the sums over k and channels, the other, whose programs have one k and many steps, those over steps.
Products of tiles run in the precision of ``low`` (full float32 for float32) and add up in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels import MIXES
from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import by_model, register_seeds
from hybrid.kernels.tiles import check_dtypes, load, power_of_two, precision, store, with_dense_models

STEPS = 32  # of a tile in the sums over steps
BUSY = 512  # programs of the sums over steps: more mean more partial sums


@triton.jit
def of_mix(weight_ptr, bias_ptr, k, D, R, MIXES: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    """W_k [BD,BR] and bias_k [BD]."""
    weight = load(weight_ptr + k * R, 0, D, MIXES * R, R, BD, BR)
    channel = tl.arange(0, BD)
    return weight, tl.load(bias_ptr + k * D + channel, mask=channel < D, other=0.0).to(tl.float32)


@triton.jit
def mix(low_ptr, weight_ptr, bias_ptr, k, first, stop, D, R, PRECISION: tl.constexpr,
        MIXES: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """m_k [STEPS,BD] and W_k [BD,BR]."""
    low = load(low_ptr + k * R, first, stop, MIXES * R, R, STEPS, BR)
    weight, bias = of_mix(weight_ptr, bias_ptr, k, D, R, MIXES, BD, BR)
    weight = weight.to(low.dtype)
    return tl.dot(low, tl.trans(weight), input_precision=PRECISION) + bias[None, :], weight


@triton.jit
def place(weight_ptr, bias_ptr, stop, D, R, weight_model, bias_model, MIXES: tl.constexpr, STEPS: tl.constexpr):
    """This program's first step, where its model's [steps,D] and [steps,5R] begin, and its W and bias."""
    model = tl.program_id(1).to(tl.int64)
    steps = model * stop
    return (
        tl.program_id(0) * STEPS, steps * D, steps * MIXES * R,
        weight_ptr + model * weight_model, bias_ptr + model * bias_model,
    )  # fmt: skip


@triton.jit
def pick(k, p0, p1, p2, p3, p4):
    """The k-th of five pointers or numbers."""
    p = p0
    if k == 1:
        p = p1
    elif k == 2:
        p = p2
    elif k == 3:
        p = p3
    elif k == 4:
        p = p4
    return p


@triton.jit
def _ddlerp_forward_kernel(
    x_ptr, delta_ptr, low_ptr, weight_ptr, bias_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, stop, D, R,
    weight_model, bias_model,
    PRECISION: tl.constexpr, MIXES: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    first, at, low_at, weight_ptr, bias_ptr = place(
        weight_ptr, bias_ptr, stop, D, R, weight_model, bias_model, MIXES, STEPS
    )
    low_ptr += low_at
    x = load(x_ptr + at, first, stop, D, D, STEPS, BD).to(tl.float32)
    delta = load(delta_ptr + at, first, stop, D, D, STEPS, BD).to(tl.float32)
    for k in range(0, MIXES):
        m, _ = mix(low_ptr, weight_ptr, bias_ptr, k, first, stop, D, R, PRECISION, MIXES, STEPS, BD, BR)
        y_ptr = pick(k, y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr)
        store(y_ptr + at, x + delta * m, first, stop, D, D, STEPS, BD)


@triton.jit
def _ddlerp_backward_kernel(
    delta_ptr, low_ptr, weight_ptr, bias_ptr, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr,
    dx_ptr, ddelta_ptr, dlow_ptr, stop, D, R, weight_model, bias_model,
    PRECISION: tl.constexpr, MIXES: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    first, at, low_at, weight_ptr, bias_ptr = place(
        weight_ptr, bias_ptr, stop, D, R, weight_model, bias_model, MIXES, STEPS
    )
    low_ptr += low_at
    dlow_ptr += low_at
    delta = load(delta_ptr + at, first, stop, D, D, STEPS, BD).to(tl.float32)
    dx = tl.zeros((STEPS, BD), dtype=tl.float32)
    ddelta = tl.zeros((STEPS, BD), dtype=tl.float32)
    for k in range(0, MIXES):
        dy_ptr = pick(k, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr)
        dy = load(dy_ptr + at, first, stop, D, D, STEPS, BD).to(tl.float32)
        m, weight = mix(low_ptr, weight_ptr, bias_ptr, k, first, stop, D, R, PRECISION, MIXES, STEPS, BD, BR)
        dx += dy
        ddelta += dy * m
        dlow = tl.dot((dy * delta).to(weight.dtype), weight, input_precision=PRECISION)
        store(dlow_ptr + k * R, dlow, first, stop, MIXES * R, R, STEPS, BR)
    store(dx_ptr + at, dx, first, stop, D, D, STEPS, BD)
    store(ddelta_ptr + at, ddelta, first, stop, D, D, STEPS, BD)


@triton.jit
def _ddlerp_sums_kernel(
    delta_ptr, low_ptr, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr, dweight_ptr, dbias_ptr, stop, D, R, blocks,
    PRECISION: tl.constexpr, MIXES: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One k and ``blocks`` tiles of steps a program, its sums in row ``program_id(0)`` of its model's."""
    model = tl.program_id(1).to(tl.int64)
    k = tl.program_id(2)
    at = model * stop * D
    low_ptr += model * stop * MIXES * R + k * R
    dy_ptr = pick(k, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr)
    dweight = tl.zeros((BD, BR), dtype=tl.float32)
    dbias = tl.zeros((BD,), dtype=tl.float32)
    for block in range(0, blocks):
        first = (tl.program_id(0) * blocks + block) * STEPS
        low = load(low_ptr, first, stop, MIXES * R, R, STEPS, BR)
        dy = load(dy_ptr + at, first, stop, D, D, STEPS, BD).to(tl.float32)
        dm = dy * load(delta_ptr + at, first, stop, D, D, STEPS, BD).to(tl.float32)
        dbias += tl.sum(dm, 0)
        dweight += tl.dot(tl.trans(dm.to(low.dtype)), low, input_precision=PRECISION)
    row = model * tl.num_programs(0) + tl.program_id(0)
    store(dweight_ptr + row * D * MIXES * R + k * R, dweight, 0, D, MIXES * R, R, BD, BR)
    channel = tl.arange(0, BD)
    tl.store(dbias_ptr + (row * MIXES + k) * D + channel, dbias, mask=channel < D)


def _constants(D: int, R: int, low: Tensor) -> dict[str, int | str]:
    # Loads of the next mix or tile are under way in shared memory, where float32 has no room for them.
    stages = 1 if low.dtype == torch.float32 else 3
    return {
        "PRECISION": precision(low), "MIXES": MIXES, "BD": power_of_two(D), "BR": power_of_two(R), "num_stages": stages,
    }  # fmt: skip


def _steps(D: int) -> int:
    """Steps of a tile in the kernels that hold four of them at once, in the registers of eight warps."""
    return 64 if D <= 128 else 16


@operator("ddlerp_triton")
def _forward(
    x: Tensor, delta: Tensor, low: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    models, R = weight.shape[0], low.shape[2] // MIXES
    ys = [low.new_empty(B, T, D) for _ in range(MIXES)]
    steps = B // models * T
    weight, bias = with_dense_models(weight), with_dense_models(bias)
    with torch.cuda.device_of(x):
        _ddlerp_forward_kernel[triton.cdiv(steps, _steps(D)), models](
            x.contiguous(), delta.contiguous(), low.contiguous(), weight, bias, *ys,
            steps, D, R, weight.stride(0), bias.stride(0), **_constants(D, R, low), STEPS=_steps(D), num_warps=8,
        )  # fmt: skip
    return tuple(ys)


@_forward.register_fake
def _(x, delta, low, weight, bias):
    return tuple(low.new_empty(x.shape) for _ in range(MIXES))


def _programs(steps: int, models: int) -> int:
    """How many programs a model and mix share the sums over ``steps``."""
    blocks = triton.cdiv(steps, STEPS)
    each = triton.cdiv(blocks, max(1, triton.cdiv(BUSY, MIXES * models)))
    return triton.cdiv(blocks, each)


@operator("ddlerp_triton_backward")
def _backward(
    delta: Tensor, low: Tensor, weight: Tensor, bias: Tensor,
    dy0: Tensor, dy1: Tensor, dy2: Tensor, dy3: Tensor, dy4: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, delta, low; of weight and bias each program's sums [models*programs,D,5R], [..,5,D]."""
    B, T, D = delta.shape
    models, R = weight.shape[0], low.shape[2] // MIXES
    steps = B // models * T
    programs = _programs(steps, models)
    dx, ddelta, dlow = delta.new_empty(B, T, D), delta.new_empty(B, T, D), low.new_empty(B, T, MIXES * R)
    dweight = low.new_empty(models * programs, D, MIXES * R, dtype=torch.float32)
    dbias = low.new_empty(models * programs, MIXES, D, dtype=torch.float32)
    weight, bias = with_dense_models(weight), with_dense_models(bias)
    delta, low, dys = delta.contiguous(), low.contiguous(), [dy.contiguous() for dy in (dy0, dy1, dy2, dy3, dy4)]
    constants = _constants(D, R, low)
    with torch.cuda.device_of(delta):
        _ddlerp_backward_kernel[triton.cdiv(steps, _steps(D)), models](
            delta, low, weight, bias, *dys, dx, ddelta, dlow,
            steps, D, R, weight.stride(0), bias.stride(0), **constants, STEPS=_steps(D), num_warps=8,
        )  # fmt: skip
        _ddlerp_sums_kernel[programs, models, MIXES](
            delta, low, *dys, dweight, dbias, steps, D, R, triton.cdiv(triton.cdiv(steps, STEPS), programs),
            **constants, STEPS=STEPS, num_warps=4 if D <= 128 else 8,
        )  # fmt: skip
    return dx, ddelta, dlow, dweight, dbias


@_backward.register_fake
def _(delta, low, weight, bias, dy0, dy1, dy2, dy3, dy4):
    B, T, D = delta.shape
    models = weight.shape[0]
    rows = models * _programs(B // models * T, models)
    dweight = low.new_empty(rows, D, low.shape[2], dtype=torch.float32)
    dbias = low.new_empty(rows, MIXES, D, dtype=torch.float32)
    return *(delta.new_empty(B, T, D) for _ in range(2)), low.new_empty(low.shape), dweight, dbias


def _setup_context(ctx, inputs, output):
    x, *rest = inputs
    ctx.save_for_backward(*rest)
    ctx.dtype = x.dtype


def _autograd(ctx, *dys):
    delta, low, weight, bias = ctx.saved_tensors
    dys = [low.new_zeros(delta.shape) if dy is None else dy for dy in dys]
    dx, ddelta, dlow, dweight, dbias = _backward(delta, low, weight, bias, *dys)
    dweight, dbias = (by_model(s, weight.shape[0], own=2) for s in (dweight, dbias))
    return dx.to(ctx.dtype), ddelta, dlow, dweight.to(weight.dtype), dbias.to(bias.dtype)


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def ddlerp_triton(x: Tensor, delta: Tensor, low: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """As ``hybrid.kernels.ddlerp.ddlerp_torch``; sums in float32, outputs in the dtype of ``low``."""
    check_dtypes("ddlerp", x, delta, low, weight, bias)
    # One set of weights for the whole batch; stacked models (vmap) have several.
    return _forward(x, delta, low, weight.to(low.dtype)[None], bias[None])
