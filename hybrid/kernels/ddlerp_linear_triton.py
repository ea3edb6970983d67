"""RWKV-6's token shift and the five products behind it together: one Triton kernel forward, two backward.

With m_k = low_k W_k^T + bias_k and s_k = x + delta m_k, the outputs are y_k = s_k P_k^T, k = 1..5. Neither m nor, on
their way into the products, s are read from memory; of s a copy is written, as the gradients of P need it. Backward,
with ds_k = dy_k P_k and dm_k = ds_k delta::

    dP_k = dy_k^T s_k,  dlow_k = dm_k W_k,  dW_k = dm_k^T low_k,  dbias_k = sum_t dm_k
    dx = sum_k ds_k,  ddelta = sum_k ds_k m_k

The first line is one kernel, which also writes ds, the second the other, whose programs have few steps and every k. In
the others a program has one k, whose matrices it holds, and a share of the steps, tile after tile: the next is loaded
while one is computed.
Products of tiles run in the precision of ``low`` (full float32 for float32) and add up in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels import MIXES
from hybrid.kernels.ddlerp_triton import mix, of_mix, pick, place
from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import by_model, register_seeds
from hybrid.kernels.tiles import check_dtypes, load, power_of_two, precision, store, with_dense_models

PROGRAMS = 264  # at work at the same time where there are steps enough: two on each processor of an H100
STEPS = 16  # of a tile: small ones, of which several are on their way


@triton.jit
def _share(p0, p1, p2, p3, p4, p0_model, p1_model, p2_model, p3_model, p4_model,
           width0, width1, width2, width3, width4, stop, D, R, tiles, MIXES: tl.constexpr, TURNED: tl.constexpr,
           ALIGNED: tl.constexpr, STEPS: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """This program's k, model, first step and the one after its last, and how wide P_k is.

    Then where its model's steps, and its own numbers in [steps,5D] and [steps,5R], begin, and P_k [BO,BD], which lies
    column by column where it is ``TURNED``.
    """
    k = tl.program_id(0)
    model = tl.program_id(2).to(tl.int64)
    steps = model * stop
    begin = tl.program_id(1) * tiles * STEPS
    end = tl.minimum(begin + tiles * STEPS, stop)
    width = pick(k, width0, width1, width2, width3, width4)
    pointer = pick(k, p0, p1, p2, p3, p4) + model * pick(k, p0_model, p1_model, p2_model, p3_model, p4_model)
    if ALIGNED:  # by 16 bytes, so that loads are wide; the choice has made the compiler forget it
        pointer = tl.multiple_of(pointer, 16)
    row = tl.arange(0, BO)[:, None]
    column = tl.arange(0, BD)[None, :]
    at = column * width + row if TURNED else row * D + column
    p = tl.load(pointer + at, mask=(row < width) & (column < D), other=0.0)
    return k, model, begin, end, width, steps, steps * MIXES * D + k * D, steps * MIXES * R + k * R, p


@triton.jit
def _ddlerp_linear_forward_kernel(
    x_ptr, delta_ptr, low_ptr, weight_ptr, bias_ptr, p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr,
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, shifted_ptr,
    stop, D, R, width0, width1, width2, width3, width4, weight_model, bias_model,
    p0_model, p1_model, p2_model, p3_model, p4_model, tiles,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, ALIGNED: tl.constexpr, MIXES: tl.constexpr,
    STEPS: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    k, model, begin, end, width, steps, of_k, of_low, p = _share(
        p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, p0_model, p1_model, p2_model, p3_model, p4_model,
        width0, width1, width2, width3, width4, stop, D, R, tiles, MIXES, TURNED, ALIGNED, STEPS, BO, BD,
    )  # fmt: skip
    p = p.to(low_ptr.dtype.element_ty)
    x_ptr += steps * D
    delta_ptr += steps * D
    low_ptr += of_low
    shifted_ptr += of_k
    y_ptr = pick(k, y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr) + steps * width
    weight, bias = of_mix(weight_ptr + model * weight_model, bias_ptr + model * bias_model, k, D, R, MIXES, BD, BR)
    weight = weight.to(p.dtype)
    for first in range(begin, end, STEPS):
        x = load(x_ptr, first, end, D, D, STEPS, BD).to(tl.float32)
        delta = load(delta_ptr, first, end, D, D, STEPS, BD).to(tl.float32)
        low = load(low_ptr, first, end, MIXES * R, R, STEPS, BR)
        m = tl.dot(low, tl.trans(weight), input_precision=PRECISION) + bias[None, :]
        shifted = (x + delta * m).to(p.dtype)
        store(shifted_ptr, shifted, first, end, MIXES * D, D, STEPS, BD)
        y = tl.dot(shifted, tl.trans(p), input_precision=PRECISION)
        store(y_ptr, y, first, end, width, width, STEPS, BO)


@triton.jit
def _ddlerp_linear_backward_kernel(
    shifted_ptr, delta_ptr, low_ptr, weight_ptr, p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr,
    dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr, ds_ptr, dlow_ptr, sums_ptr,
    stop, D, R, width0, width1, width2, width3, width4, weight_model,
    p0_model, p1_model, p2_model, p3_model, p4_model, numbers, tiles,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, ALIGNED: tl.constexpr, MIXES: tl.constexpr,
    STEPS: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A row of ``sums``, one for every share of a model's steps: dW [D,5R], dbias [5,D], and of every k dP_k^T."""
    k, model, begin, end, width, steps, of_k, of_low, p = _share(
        p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, p0_model, p1_model, p2_model, p3_model, p4_model,
        width0, width1, width2, width3, width4, stop, D, R, tiles, MIXES, TURNED, ALIGNED, STEPS, BO, BD,
    )  # fmt: skip
    p = p.to(low_ptr.dtype.element_ty)
    delta_ptr += steps * D
    shifted_ptr += of_k
    ds_ptr += of_k
    low_ptr += of_low
    dlow_ptr += of_low
    dy_ptr = pick(k, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr) + steps * width
    weight = load(weight_ptr + model * weight_model + k * R, 0, D, MIXES * R, R, BD, BR).to(p.dtype)
    dp = tl.zeros((BD, BO), dtype=tl.float32)
    dweight = tl.zeros((BD, BR), dtype=tl.float32)
    dbias = tl.zeros((BD,), dtype=tl.float32)
    for first in range(begin, end, STEPS):
        dy = load(dy_ptr, first, end, width, width, STEPS, BO).to(p.dtype)
        shifted = load(shifted_ptr, first, end, MIXES * D, D, STEPS, BD)
        delta = load(delta_ptr, first, end, D, D, STEPS, BD).to(tl.float32)
        low = load(low_ptr, first, end, MIXES * R, R, STEPS, BR)
        ds = tl.dot(dy, p, input_precision=PRECISION)
        dp = tl.dot(tl.trans(shifted), dy, dp, input_precision=PRECISION)
        store(ds_ptr, ds, first, end, MIXES * D, D, STEPS, BD)
        ds *= delta
        dbias += tl.sum(ds, 0)
        dm = ds.to(p.dtype)
        dweight = tl.dot(tl.trans(dm), low, dweight, input_precision=PRECISION)
        dlow = tl.dot(dm, weight, input_precision=PRECISION)
        store(dlow_ptr, dlow, first, end, MIXES * R, R, STEPS, BR)
    sums_ptr += (model * tl.num_programs(1) + tl.program_id(1)) * numbers
    store(sums_ptr + k * R, dweight, 0, D, MIXES * R, R, BD, BR)
    sums_ptr += D * MIXES * R
    channel = tl.arange(0, BD)
    tl.store(sums_ptr + k * D + channel, dbias, mask=channel < D)
    before = MIXES  # numbers for every channel of what lies before this k's
    if k > 0:
        before += width0
    if k > 1:
        before += width1
    if k > 2:
        before += width2
    if k > 3:
        before += width3
    store(sums_ptr + before * D, dp, 0, D, width, width, BD, BO)


@triton.jit
def _ddlerp_linear_mixed_kernel(
    ds_ptr, low_ptr, weight_ptr, bias_ptr, dx_ptr, ddelta_ptr, stop, D, R, weight_model, bias_model,
    PRECISION: tl.constexpr, MIXES: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    first, at, low_at, weight_ptr, bias_ptr = place(
        weight_ptr, bias_ptr, stop, D, R, weight_model, bias_model, MIXES, STEPS
    )
    low_ptr += low_at
    dx = tl.zeros((STEPS, BD), dtype=tl.float32)
    ddelta = tl.zeros((STEPS, BD), dtype=tl.float32)
    for k in range(0, MIXES):
        ds = load(ds_ptr + at * MIXES + k * D, first, stop, MIXES * D, D, STEPS, BD).to(tl.float32)
        m, _ = mix(low_ptr, weight_ptr, bias_ptr, k, first, stop, D, R, PRECISION, MIXES, STEPS, BD, BR)
        dx += ds
        ddelta += ds * m
    store(dx_ptr + at, dx, first, stop, D, D, STEPS, BD)
    store(ddelta_ptr + at, ddelta, first, stop, D, D, STEPS, BD)


def _constants(D: int, R: int, low: Tensor) -> dict[str, int | str]:
    return {
        "PRECISION": precision(low), "MIXES": MIXES, "STEPS": STEPS, "BD": power_of_two(D), "BR": power_of_two(R),
        "num_warps": 4,
    }  # fmt: skip


def _of_projections(widths: list[int], low: Tensor) -> dict[str, int]:
    # Loads of the next tiles are under way in shared memory, where float32 has no room for them.
    return {"BO": power_of_two(max(widths)), "num_stages": 1 if low.dtype == torch.float32 else 3}


def _shares(steps: int, models: int) -> tuple[int, int]:
    """Into how many the ``steps`` of a model are cut, and tiles of one."""
    tiles = (steps + STEPS - 1) // STEPS
    each = -(-tiles // max(1, PROGRAMS // (MIXES * models)))
    return -(-tiles // each), each


def _lying(projections: list[Tensor]) -> tuple[list[Tensor], dict[str, bool]]:
    """Projections [models,width,D], copied where the kernels cannot take them, and how they lie."""
    turned = all(p[0].mT.is_contiguous() for p in projections)
    if not turned:
        projections = [with_dense_models(p) for p in projections]
    aligned = all(p.data_ptr() % 16 == 0 and (len(p) == 1 or p.stride(0) % 16 == 0) for p in projections)
    return projections, {"TURNED": turned, "ALIGNED": aligned}


@operator("ddlerp_linear_triton")
def _forward(
    x: Tensor, delta: Tensor, low: Tensor, weight: Tensor, bias: Tensor,
    p0: Tensor, p1: Tensor, p2: Tensor, p3: Tensor, p4: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The five outputs [B,T,width], and the shifted inputs [B,T,5D]."""
    B, T, D = x.shape
    models, R = weight.shape[0], low.shape[2] // MIXES
    projections, lying = _lying([p0, p1, p2, p3, p4])
    widths = [p.shape[1] for p in projections]
    ys = [low.new_empty(B, T, width) for width in widths]
    shifted = low.new_empty(B, T, MIXES * D)
    steps = B // models * T
    shares, tiles = _shares(steps, models)
    weight, bias = with_dense_models(weight), with_dense_models(bias)
    with torch.cuda.device_of(x):
        _ddlerp_linear_forward_kernel[MIXES, shares, models](
            x.contiguous(), delta.contiguous(), low.contiguous(), weight, bias, *projections, *ys, shifted,
            steps, D, R, *widths, weight.stride(0), bias.stride(0), *(p.stride(0) for p in projections), tiles,
            **_constants(D, R, low), **_of_projections(widths, low), **lying,
        )  # fmt: skip
    return *ys, shifted


@_forward.register_fake
def _(x, delta, low, weight, bias, *projections):
    ys = [low.new_empty(*x.shape[:2], p.shape[1]) for p in projections]
    return *ys, low.new_empty(*x.shape[:2], MIXES * x.shape[2])


@operator("ddlerp_linear_triton_backward")
def _backward(
    delta: Tensor, low: Tensor, weight: Tensor, bias: Tensor, shifted: Tensor,
    p0: Tensor, p1: Tensor, p2: Tensor, p3: Tensor, p4: Tensor,
    dy0: Tensor, dy1: Tensor, dy2: Tensor, dy3: Tensor, dy4: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, delta and low; of the others [models*shares,numbers] (``_ddlerp_linear_backward_kernel``)."""
    B, T, D = delta.shape
    models, R = weight.shape[0], low.shape[2] // MIXES
    projections, lying = _lying([p0, p1, p2, p3, p4])
    widths = [p.shape[1] for p in projections]
    steps = B // models * T
    shares, tiles = _shares(steps, models)
    numbers = D * (MIXES * R + MIXES + sum(widths))
    dx, ddelta, dlow = delta.new_empty(B, T, D), delta.new_empty(B, T, D), low.new_empty(B, T, MIXES * R)
    ds = torch.empty_like(shifted)
    sums = low.new_empty(models * shares, numbers, dtype=torch.float32)
    weight, bias = with_dense_models(weight), with_dense_models(bias)
    delta, low, shifted = delta.contiguous(), low.contiguous(), shifted.contiguous()
    with torch.cuda.device_of(delta):
        _ddlerp_linear_backward_kernel[MIXES, shares, models](
            shifted, delta, low, weight, *projections, *(dy.contiguous() for dy in (dy0, dy1, dy2, dy3, dy4)),
            ds, dlow, sums, steps, D, R, *widths, weight.stride(0), *(p.stride(0) for p in projections), numbers, tiles,
            **_constants(D, R, low), **_of_projections(widths, low), **lying,
        )  # fmt: skip
        _ddlerp_linear_mixed_kernel[triton.cdiv(steps, STEPS), models](
            ds, low, weight, bias, dx, ddelta, steps, D, R, weight.stride(0), bias.stride(0),
            **_constants(D, R, low), num_stages=2,
        )  # fmt: skip
    return dx, ddelta, dlow, sums


@_backward.register_fake
def _(delta, low, weight, bias, shifted, *rest):
    B, T, D = delta.shape
    models = weight.shape[0]
    numbers = D * (low.shape[2] + MIXES + sum(p.shape[1] for p in rest[:MIXES]))
    sums = low.new_empty(models * _shares(B // models * T, models)[0], numbers, dtype=torch.float32)
    return *(delta.new_empty(B, T, D) for _ in range(2)), low.new_empty(low.shape), sums


def _setup_context(ctx, inputs, output):
    x, *rest = inputs
    ctx.save_for_backward(*rest, output[-1])
    ctx.dtype = x.dtype


def _autograd(ctx, *dys):
    delta, low, weight, bias, *projections, shifted = ctx.saved_tensors
    models, D = weight.shape[0], delta.shape[2]
    widths = [p.shape[1] for p in projections]
    dys = [
        low.new_zeros(*delta.shape[:2], width) if dy is None else dy
        for dy, width in zip(dys[:MIXES], widths, strict=True)
    ]
    dx, ddelta, dlow, sums = _backward(delta, low, weight, bias, shifted, *projections, *dys)
    sums = by_model(sums, models)
    dweight, dbias, *dprojections = sums.split([D * n for n in (low.shape[2], MIXES, *widths)], dim=1)
    # Cast as they lie: a compiler would walk what is turned first as if its columns lay side by side.
    dprojections = [dp.to(p.dtype).view(models, D, -1).mT for dp, p in zip(dprojections, projections, strict=True)]
    dweight, dbias = dweight.view(models, D, -1).to(weight.dtype), dbias.view(models, MIXES, D).to(bias.dtype)
    return dx.to(ctx.dtype), ddelta, dlow, dweight, dbias, *dprojections


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def ddlerp_linear_triton(
    x: Tensor, delta: Tensor, low: Tensor, weight: Tensor, bias: Tensor, projections: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """As ``hybrid.kernels.ddlerp_linear``; sums in float32, outputs in the dtype of ``low``."""
    check_dtypes("ddlerp_linear", x, delta, low, weight, bias, *projections)
    # One set of weights for the whole batch; stacked models (vmap) have several.
    weight, *projections = (w.to(low.dtype)[None] for w in (weight, *projections))
    return _forward(x, delta, low, weight, bias[None], *projections)[:MIXES]
