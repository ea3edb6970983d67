"""What a layer of Mamba-2 does between its two products as one operator: filters, recurrence, gated norm.

The kernels are those of ``conv_triton.py``, ``ssd_triton.py`` and ``norms_triton.py``. Together they need none of the
copies that stand between them otherwise: the gradients of the gate, the filters' input and the step sizes are written
where they lie side by side, as that of the layer's first product, and those of x, B and C as that of the filters'
output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid.kernels import conv_triton, norms_triton, ssd_triton
from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import by_model, register_seeds
from hybrid.kernels.tiles import check_dtypes


class Layout:
    """How wide what is, and views of it: z, xBC, dt and zeros side by side [B,T,W], and x, B and C [B,T,C]."""

    def __init__(self, zxBCdt: Tensor, filters: Tensor, D: Tensor, norm: Tensor, groups: int) -> None:
        self.B, self.T, self.width = zxBCdt.shape
        self.inner, self.heads, self.groups = norm.shape[1], D.shape[1], groups
        self.channels = filters.shape[1]
        self.P, self.N = self.inner // self.heads, (self.channels - self.inner) // (2 * groups)
        self.fill = self.width - self.inner - self.channels - self.heads
        self.chunks = ssd_triton.chunks_of(self.T, self.P, self.N, zxBCdt.dtype)

    def of_product(self, zxBCdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xBC, dt, _ = zxBCdt.split([self.inner, self.channels, self.heads, self.fill], dim=-1)
        return z, xBC, dt

    def of_filters(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = self.groups * self.N
        x, B, C = convolved.split([self.inner, shared, shared], dim=-1)
        return x.unflatten(2, (self.heads, self.P)), *(t.unflatten(2, (self.groups, self.N)) for t in (B, C))

    def empty(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the forward pass gives, not written yet."""
        borders = ssd_triton.border_shape((self.B, self.T, self.heads, self.P), self.N, like.dtype)
        out, convolved, y = (like.new_empty(self.B, self.T, n) for n in (self.inner, self.channels, self.inner))
        dt = like.new_empty(self.B, self.T, self.heads, dtype=torch.float32)
        return out, dt, convolved, y, like.new_empty(borders)

    def empty_gradients(self, like: Tensor, models: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the backward pass gives, not written yet."""
        norms = norms_triton.sums_shape((self.B, self.T, self.inner), models, self.groups)
        sums = (conv_triton.sums_shape(self.B, self.T, self.channels), (self.B, self.chunks, 3, self.heads), norms)
        return like.new_empty(self.B, self.T, self.width), *(like.new_empty(s, dtype=torch.float32) for s in sums)


@operator("mamba2_triton")
def _forward(
    zxBCdt: Tensor, filters: Tensor, filter_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm: Tensor,
    groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output [B,T,inner], dt, the filters' output, the recurrence's, and the states between its chunks, if any."""
    layout = Layout(zxBCdt, filters, D, norm, groups)
    out, dt, convolved, y, borders = layout.empty(zxBCdt)
    z, xBC, raw = layout.of_product(zxBCdt)
    x, B, C = layout.of_filters(convolved)
    with torch.cuda.device_of(zxBCdt):
        conv_triton.run_forward(xBC, filters, filter_bias, convolved)
        ssd_triton.run_steps(raw, dt_bias, dt)
        given = ssd_triton.Inputs(x, dt, A_log, B, C, D, raw=True)
        ssd_triton.run_forward(given, y, borders, None, y.new_empty(0))
        norms_triton.run_forward(y, z, norm, None, out, groups, eps)
    return out, dt, convolved, y, borders


@_forward.register_fake
def _(zxBCdt, filters, filter_bias, dt_bias, A_log, D, norm, groups, eps):
    return Layout(zxBCdt, filters, D, norm, groups).empty(zxBCdt)


@operator("mamba2_triton_backward")
def _backward(
    zxBCdt: Tensor, filters: Tensor, filter_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm: Tensor,
    dt: Tensor, convolved: Tensor, y: Tensor, borders: Tensor, dout: Tensor, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dzxBCdt, and what is to be added up over each model's programs.

    For filters and their bias [B,programs,5,C], for A_log, D and dt_bias [B,chunks,3,H], for norm [programs,inner].
    """
    layout = Layout(zxBCdt, filters, D, norm, groups)
    dzxBCdt, of_filters, of_steps, of_norm = layout.empty_gradients(zxBCdt, norm.shape[0])
    dy, dconvolved = torch.empty_like(y), torch.empty_like(convolved)
    (z, xBC, _), (dz, dxBC, ddt) = layout.of_product(zxBCdt), layout.of_product(dzxBCdt)
    (x, B, C), (dx, dB, dC) = layout.of_filters(convolved), layout.of_filters(dconvolved)
    none = y.new_empty(0)
    with torch.cuda.device_of(zxBCdt):
        norms_triton.run_backward(y, z, norm, None, dout, dy, dz, of_norm, None, groups, eps)
        given = ssd_triton.Inputs(x, dt, A_log, B, C, D, raw=True)
        dy = dy.unflatten(2, (layout.heads, layout.P))
        ssd_triton.run_backward(given, borders, dy, None, dx, ddt, dB, dC, of_steps, none, layout.fill)
        conv_triton.run_backward(xBC, filters, filter_bias, dconvolved, dxBC, of_filters)
    return dzxBCdt, of_filters, of_steps, of_norm


@_backward.register_fake
def _(zxBCdt, filters, filter_bias, dt_bias, A_log, D, norm, dt, convolved, y, borders, dout, groups, eps):
    return Layout(zxBCdt, filters, D, norm, groups).empty_gradients(zxBCdt, norm.shape[0])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd(ctx, dout, *_):
    filters, filter_bias, dt_bias, A_log, D, norm = ctx.saved_tensors[1:7]
    dzxBCdt, of_filters, of_steps, of_norm = _backward(*ctx.saved_tensors, dout, ctx.groups, ctx.eps)
    dfilters, dfilter_bias = conv_triton.of_filters(of_filters, filters, filter_bias)
    steps = by_model(of_steps, A_log.shape[0], own=2).unbind(1)
    dA_log, dD, ddt_bias = (d.to(t.dtype) for d, t in zip(steps, (A_log, D, dt_bias), strict=True))
    dnorm = by_model(of_norm, norm.shape[0]).to(norm.dtype)
    return dzxBCdt, dfilters, dfilter_bias, ddt_bias, dA_log, dD, dnorm, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def mamba2_triton(
    zxBCdt: Tensor, filters: Tensor, filter_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm: Tensor,
    groups: int, eps: float,
) -> Tensor:  # fmt: skip
    """As ``hybrid.kernels.mamba2_between`` with states, products and sums as its parts have them."""
    check_dtypes("mamba2", zxBCdt, filters, filter_bias, dt_bias, A_log, D, norm)
    filters = conv_triton.filled(filters)
    # One set of weights for the whole batch; stacked models (vmap) have several.
    own = (filters, filter_bias, dt_bias, A_log, D, norm)
    return _forward(zxBCdt.contiguous(), *(t[None] for t in own), groups, eps)[0]
