"""The gated norms behind the two recurrences as one Triton kernel forward and one backward.

A program has some steps of one group of channels, each of which it normalises by itself; nothing is kept for the
backward pass but the inputs. With g SiLU(gate), mean over the group's channels, and n the normalised input::

    first the gate (Mamba-2)    s = x g             n = s / sqrt(mean(s^2) + eps)    y = n weight
    first the norm (RWKV-6)     s = x - mean(x)     n = s / sqrt(mean(s^2) + eps)    y = (n weight + bias) g

and, where dn is the gradient of n, ``ds = (dn - n mean(dn n)) / sqrt(mean(s^2) + eps)``; for x, where that was centred,
less ``mean(ds)``. Numbers are float32 inside, whatever they are stored in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import by_model, register_seeds
from hybrid.kernels.tiles import check_dtypes, load, power_of_two, silu, store, with_dense_models, with_dense_rows

# Numbers of a tile and warps of a program. Of wider groups tiles are larger, for fewer partial sums.
SMALL, LARGE, WIDEST_SMALL = (512, 1), (2048, 4), 256


@triton.jit
def _rows_of(pointer, model, first, rows, stride, column, width, ROWS: tl.constexpr, BC: tl.constexpr):
    """The tile's numbers in float32, zero beyond the model's rows and the group's ``width`` channels."""
    pointer += model * rows * stride + column
    return load(pointer, first, rows, stride, width, ROWS, BC).to(tl.float32)


@triton.jit
def _normalised(s, width, eps, CENTRE: tl.constexpr, BC: tl.constexpr):
    """n [ROWS,BC] and 1 / sqrt(mean(s^2) + eps) [ROWS]; channels beyond ``width`` are zero."""
    if CENTRE:
        inside = tl.arange(0, BC) < width
        s = tl.where(inside[None, :], s - (tl.sum(s, 1) / width)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, 1) / width + eps)
    return s * scale[:, None], scale


@triton.jit
def _of_channels(pointer, model, stride, column, width, BC: tl.constexpr):
    channel = tl.arange(0, BC)
    at = pointer + model * stride + column + channel
    return tl.load(at, mask=channel < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tile(x_ptr, gate_ptr, weight_ptr, rows, width, x_row, gate_row, weight_model,
          ROWS: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """This program's first row, first channel and model, and its x, SiLU(gate) with its derivative, and weights."""
    first = tl.program_id(0) * ROWS
    column = tl.program_id(1) * width
    model = tl.program_id(2).to(tl.int64)
    x = _rows_of(x_ptr, model, first, rows, x_row, column, width, ROWS, BC)
    opened, opening = silu(_rows_of(gate_ptr, model, first, rows, gate_row, column, width, ROWS, BC))
    weight = _of_channels(weight_ptr, model, weight_model, column, width, BC)
    return first, column, model, x, opened, opening, weight


@triton.jit
def _gated_norm_forward_kernel(
    x_ptr, gate_ptr, weight_ptr, bias_ptr, y_ptr, rows, C, width, x_row, gate_row, weight_model, bias_model, norm_eps,
    GATE_FIRST: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first, column, model, x, opened, _, weight = _tile(
        x_ptr, gate_ptr, weight_ptr, rows, width, x_row, gate_row, weight_model, ROWS, BC
    )
    if GATE_FIRST:
        n, _ = _normalised(x * opened, width, norm_eps, False, BC)
        y = n * weight
    else:
        n, _ = _normalised(x, width, norm_eps, True, BC)
        y = (n * weight + _of_channels(bias_ptr, model, bias_model, column, width, BC)) * opened
    store(y_ptr + model * rows * C + column, y, first, rows, C, width, ROWS, BC)


@triton.jit
def _gated_norm_backward_kernel(
    x_ptr, gate_ptr, weight_ptr, bias_ptr, dy_ptr, dx_ptr, dgate_ptr, dweight_ptr, dbias_ptr,
    rows, C, width, x_row, gate_row, dy_row, dgate_row, weight_model, bias_model, norm_eps,
    GATE_FIRST: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first, column, model, x, opened, opening, weight = _tile(
        x_ptr, gate_ptr, weight_ptr, rows, width, x_row, gate_row, weight_model, ROWS, BC
    )
    dy = _rows_of(dy_ptr, model, first, rows, dy_row, column, width, ROWS, BC)
    channel = tl.arange(0, BC)
    sums = (model * tl.num_programs(0) + tl.program_id(0)) * C + column + channel
    if GATE_FIRST:
        n, scale = _normalised(x * opened, width, norm_eps, False, BC)
        dweight = dy * n
        dn = dy * weight
        ds = (dn - n * (tl.sum(dn * n, 1) / width)[:, None]) * scale[:, None]
        dx = ds * opened
        dgate = ds * x * opening
    else:
        n, scale = _normalised(x, width, norm_eps, True, BC)
        bias = _of_channels(bias_ptr, model, bias_model, column, width, BC)
        dgate = dy * (n * weight + bias) * opening
        dnormed = dy * opened
        tl.store(dbias_ptr + sums, tl.sum(dnormed, 0), mask=channel < width)
        dweight = dnormed * n
        dn = dnormed * weight
        mean, along = tl.sum(dn, 1) / width, tl.sum(dn * n, 1) / width
        dx = (dn - mean[:, None] - n * along[:, None]) * scale[:, None]
    tl.store(dweight_ptr + sums, tl.sum(dweight, 0), mask=channel < width)
    store(dx_ptr + model * rows * C + column, dx, first, rows, C, width, ROWS, BC)
    store(dgate_ptr + model * rows * dgate_row + column, dgate, first, rows, dgate_row, width, ROWS, BC)


def _cut(width: int) -> dict[str, int]:
    block = power_of_two(width)
    numbers, warps = SMALL if block <= WIDEST_SMALL else LARGE
    return {"ROWS": max(1, numbers // block), "BC": block, "num_warps": warps}


def _programs(rows: int, width: int) -> int:
    return -(-rows // _cut(width)["ROWS"])


def _as_rows(x: Tensor) -> Tensor:
    """x [B,T,C] as [B*T,C]: itself where its rows are evenly apart, else a copy."""
    return with_dense_rows(x).flatten(0, 1)


def run_forward(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, groups: int, eps: float
) -> None:
    """Write y [B,T,C]: first the gate where there is no bias, else first the norm. weight and bias are [models,C]."""
    B, T, C = x.shape
    models, width = weight.shape[0], C // groups
    rows = B // models * T
    x, gate, weight = _as_rows(x), _as_rows(gate), with_dense_models(weight)
    bias = None if bias is None else with_dense_models(bias)
    _gated_norm_forward_kernel[_programs(rows, width), groups, models](
        x, gate, weight, bias, y, rows, C, width, x.stride(0), gate.stride(0), weight.stride(0),
        0 if bias is None else bias.stride(0), eps, GATE_FIRST=bias is None, **_cut(width),
    )  # fmt: skip


def run_backward(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor,
    dx: Tensor, dgate: Tensor, dweight: Tensor, dbias: Tensor | None, groups: int, eps: float,
) -> None:  # fmt: skip
    """Write dx [B,T,C], dgate, whose rows may lie evenly apart, and the sums of each program (``sums_shape``)."""
    B, T, C = x.shape
    models, width = weight.shape[0], C // groups
    rows = B // models * T
    x, gate, dy, weight = _as_rows(x), _as_rows(gate), _as_rows(dy), with_dense_models(weight)
    bias = None if bias is None else with_dense_models(bias)
    _gated_norm_backward_kernel[_programs(rows, width), groups, models](
        x, gate, weight, bias, dy, dx, dgate, dweight, dbias,
        rows, C, width, x.stride(0), gate.stride(0), dy.stride(0), dgate.stride(1), weight.stride(0),
        0 if bias is None else bias.stride(0), eps, GATE_FIRST=bias is None, **_cut(width),
    )  # fmt: skip


def sums_shape(x: Sequence[int], models: int, groups: int) -> tuple[int, int]:
    """Of the gradient of weights, or of biases, before it is added up over each model's programs."""
    B, T, C = x
    return models * _programs(B // models * T, C // groups), C


@operator("gated_norm_triton")
def _forward(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    y = gate.new_empty(x.shape)
    with torch.cuda.device_of(x):
        run_forward(x, gate, weight, bias, y, groups, eps)
    return y


@_forward.register_fake
def _(x, gate, weight, bias, groups, eps):
    return gate.new_empty(x.shape)


@operator("gated_norm_triton_backward")
def _backward(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and gate; of weight and bias each program's sums [models*programs,C]."""
    dx, dgate = x.new_empty(x.shape), gate.new_empty(x.shape)
    dweight = x.new_empty(sums_shape(x.shape, weight.shape[0], groups), dtype=torch.float32)
    dbias = x.new_empty((0,) if bias is None else dweight.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        run_backward(x, gate, weight, bias, dy, dx, dgate, dweight, dbias, groups, eps)
    return dx, dgate, dweight, dbias


@_backward.register_fake
def _(x, gate, weight, bias, dy, groups, eps):
    dweight = x.new_empty(sums_shape(x.shape, weight.shape[0], groups), dtype=torch.float32)
    dbias = x.new_empty((0,) if bias is None else dweight.shape, dtype=torch.float32)
    return x.new_empty(x.shape), gate.new_empty(x.shape), dweight, dbias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dy):
    x, gate, weight, bias = ctx.saved_tensors
    dx, dgate, *sums = _backward(x, gate, weight, bias, dy, ctx.groups, ctx.eps)
    dweight, dbias = (
        None if of is None else by_model(s, of.shape[0]).to(of.dtype)
        for s, of in zip(sums, (weight, bias), strict=True)
    )
    return dx, dgate, dweight, dbias, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def gated_norm_triton(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """As ``hybrid.kernels.norm_then_gate`` with a bias, as ``gate_then_norm`` without."""
    check_dtypes("the gated norms", x, gate, weight, *([] if bias is None else [bias]))
    # One set of weights for the whole batch; stacked models (vmap) have several.
    return _forward(x, gate, weight[None], None if bias is None else bias[None], groups, eps)
