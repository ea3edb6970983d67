"""The Mamba-2 recurrence as one or two Triton kernels each way (why: ``wkv6_triton.py``).

A program has one chunk of one head of one sequence. With h the state that enters it, a_t = dt_t A,
upto_i = a_1 + ... + a_i and total = upto_L::

    y_i = sum_{j<=i} (C_i . B_j) exp(upto_i - upto_j) dt_j x_j + exp(upto_i) h C_i + D x_i
    h'  = exp(total) h + sum_j exp(total - upto_j) dt_j x_j B_j^T

Where the sequence is one chunk and no state goes in or out, only the first sum is left. Else a kernel before it walks
the chunks for the states between them, or from the last to the first for their gradients. Products of tiles run in the
inputs' precision (TF32 for float32) and add up in float32; exponents are float32 and at most zero. The gradient of a_t
sums every term whose exponent holds it; the terms i = j hold none and are kept out of the sums that cancel. Gradients
of B and C are written per head and summed over the heads of a group by torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels.seeds import register_seeds
from hybrid.kernels.tiles import (
    LOWEST,
    check_dtypes,
    load,
    power_of_two,
    store,
    strides,
    with_dense_heads,
    with_dense_models,
    with_dense_rows,
)

_STATE = torch.float32
_COLUMNS = 64  # of a state, at most, a program that walks the chunks


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: steps a chunk, warps."""

    chunk: int
    num_warps: int


def choose(T: int, P: int, N: int, dtype: torch.dtype) -> Launch:
    """A launch, as measured on an H100 in bfloat16 with P=64, N=128. Both directions have the same chunk."""
    # Float32 tiles of 64 steps do not fit in shared memory, nor a larger state beside those of 64 steps in registers.
    large, wide = power_of_two(P) * power_of_two(N) > 64 * 128, dtype == torch.float32
    longest = 16 if large and wide else 32 if large or wide else 64
    return Launch(min(longest, power_of_two(T)), 8 if wide else 4)


@triton.jit
def _ssd_states_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, initial_ptr, borders_ptr, final_ptr,
    T, H, G, P, N, sequences_per_A, chunks, x_batch, x_step, dt_batch, dt_step, B_batch, B_step,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk, from the first to the last, for some of its columns."""
    low = x_ptr.dtype.element_ty
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = head % H
    column = tl.program_id(1) * BN
    width = N - column
    x_ptr += b * x_batch + h * P
    dt_ptr += b * dt_batch + h
    B_ptr += b * B_batch + h // (H // G) * N + column
    A = tl.load(A_ptr + b // sequences_per_A * H + h).to(tl.float32)
    state = tl.zeros((BP, BN), dtype=tl.float32)
    if INITIAL:
        state += load(initial_ptr + head.to(tl.int64) * P * N + column, 0, P, N, width, BP, BN).to(tl.float32)
    for n in range(0, chunks):
        store(borders_ptr + (head.to(tl.int64) * chunks + n) * P * N + column, state, 0, P, N, width, BP, BN)
        row = n * L + tl.arange(0, L)
        dt = tl.load(dt_ptr + row.to(tl.int64) * dt_step, mask=row < T, other=0.0).to(tl.float32)
        x = load(x_ptr, n * L, T, x_step, P, L, BP).to(tl.float32)
        B = load(B_ptr, n * L, T, B_step, width, L, BN).to(low)
        a = tl.maximum(dt * A, LOWEST)
        total = tl.sum(a, 0)
        gained = x * (dt * tl.exp(tl.minimum(total - tl.cumsum(a, 0), 0.0)))[:, None]
        state = state * tl.exp(total) + tl.dot(tl.trans(gained.to(low)), B)
    if FINAL:
        store(final_ptr + head.to(tl.int64) * P * N + column, state, 0, P, N, width, BP, BN)


@triton.jit
def _ssd_forward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, borders_ptr, y_ptr,
    T, H, G, P, N, sequences_per_A, chunks, D_model,
    x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    low = x_ptr.dtype.element_ty
    head = tl.program_id(0)
    n = tl.program_id(1)
    b = (head // H).to(tl.int64)
    h = head % H
    group = h // (H // G)
    model = b // sequences_per_A
    first = n * L
    row = first + tl.arange(0, L)
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    A = tl.load(A_ptr + model * H + h).to(tl.float32)
    dt = tl.load(dt_ptr + b * dt_batch + h + row.to(tl.int64) * dt_step, mask=row < T, other=0.0).to(tl.float32)
    x = load(x_ptr + b * x_batch + h * P, first, T, x_step, P, L, BP)
    B = load(B_ptr + b * B_batch + group * N, first, T, B_step, N, L, BN).to(low)
    C = load(C_ptr + b * C_batch + group * N, first, T, C_step, N, L, BN).to(low)
    upto = tl.cumsum(tl.maximum(dt * A, LOWEST), 0)
    gap = tl.minimum(upto[:, None] - upto[None, :], 0.0)
    weight = tl.exp(tl.where(i >= j, gap, float("-inf"))) * dt[None, :]
    scores = tl.dot(C, tl.trans(B)) * weight
    y = tl.dot(scores.to(low), x)
    if SKIP:
        y += tl.load(D_ptr + model * D_model + h).to(tl.float32) * x.to(tl.float32)
    if STATE:
        state = load(borders_ptr + (head.to(tl.int64) * chunks + n) * P * N, 0, P, N, N, BP, BN)
        y += tl.dot(C, tl.trans(state)) * tl.exp(upto)[:, None]
    store(y_ptr + (b * T * H + h) * P, y, first, T, H * P, P, L, BP)


@triton.jit
def _ssd_dstates_kernel(
    dt_ptr, A_ptr, C_ptr, dy_ptr, dfinal_ptr, dstates_ptr, dinitial_ptr,
    T, H, G, P, N, sequences_per_A, chunks, dt_batch, dt_step, C_batch, C_step, dy_batch, dy_step,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The gradient of the state that leaves each chunk, from the last to the first, for some of its columns."""
    low = dy_ptr.dtype.element_ty
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = head % H
    column = tl.program_id(1) * BN
    width = N - column
    dt_ptr += b * dt_batch + h
    C_ptr += b * C_batch + h // (H // G) * N + column
    dy_ptr += b * dy_batch + h * P
    A = tl.load(A_ptr + b // sequences_per_A * H + h).to(tl.float32)
    dstate = tl.zeros((BP, BN), dtype=tl.float32)
    if FINAL:
        dstate += load(dfinal_ptr + head.to(tl.int64) * P * N + column, 0, P, N, width, BP, BN).to(tl.float32)
    for m in range(0, chunks):
        n = chunks - 1 - m
        store(dstates_ptr + (head.to(tl.int64) * chunks + n) * P * N + column, dstate, 0, P, N, width, BP, BN)
        row = n * L + tl.arange(0, L)
        dt = tl.load(dt_ptr + row.to(tl.int64) * dt_step, mask=row < T, other=0.0).to(tl.float32)
        dy = load(dy_ptr, n * L, T, dy_step, P, L, BP).to(tl.float32)
        C = load(C_ptr, n * L, T, C_step, width, L, BN).to(low)
        a = tl.maximum(dt * A, LOWEST)
        faded = dy * tl.exp(tl.cumsum(a, 0))[:, None]
        dstate = dstate * tl.exp(tl.sum(a, 0)) + tl.dot(tl.trans(faded.to(low)), C)
    if INITIAL:
        store(dinitial_ptr + head.to(tl.int64) * P * N + column, dstate, 0, P, N, width, BP, BN)


@triton.jit
def _ssd_backward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, borders_ptr, dstates_ptr, dy_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr,
    T, H, G, P, N, sequences_per_A, chunks, D_model,
    x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step, dy_batch, dy_step,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    low = x_ptr.dtype.element_ty
    head = tl.program_id(0)
    n = tl.program_id(1)
    b = (head // H).to(tl.int64)
    h = head % H
    group = h // (H // G)
    model = b // sequences_per_A
    of_chunk = (b * chunks + n) * H + h
    first = n * L
    row = first + tl.arange(0, L)
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    A = tl.load(A_ptr + model * H + h).to(tl.float32)
    dt = tl.load(dt_ptr + b * dt_batch + h + row.to(tl.int64) * dt_step, mask=row < T, other=0.0).to(tl.float32)
    x = load(x_ptr + b * x_batch + h * P, first, T, x_step, P, L, BP)
    dy = load(dy_ptr + b * dy_batch + h * P, first, T, dy_step, P, L, BP).to(low)
    B = load(B_ptr + b * B_batch + group * N, first, T, B_step, N, L, BN).to(low)
    C = load(C_ptr + b * C_batch + group * N, first, T, C_step, N, L, BN).to(low)
    a = tl.maximum(dt * A, LOWEST)
    upto = tl.cumsum(a, 0)
    gap = tl.minimum(upto[:, None] - upto[None, :], 0.0)
    decay = tl.exp(tl.where(i >= j, gap, float("-inf")))
    dweighted = tl.dot(dy, tl.trans(x))  # of (weighted scores) dt
    if SKIP:
        tl.store(dD_ptr + of_chunk, tl.sum(tl.sum(tl.where(i == j, dweighted, 0.0), 1), 0))
    scores = tl.dot(C, tl.trans(B)) * decay
    through = scores * dweighted  # per unit of dt_j
    ddt = tl.sum(through, 0)
    through = tl.where(i > j, through * dt[None, :], 0.0)
    later = tl.sum(through, 1) - tl.sum(through, 0)  # counts for every step up to this one
    weighted = (scores * dt[None, :]).to(low)
    dscores = (dweighted * decay * dt[None, :]).to(low)
    # One gradient after another, each written before the next is begun: two of them would not fit in registers.
    dx = tl.dot(tl.trans(weighted), dy)
    if SKIP:
        dx += tl.load(D_ptr + model * D_model + h).to(tl.float32) * dy.to(tl.float32)
    if STATE:
        total = tl.sum(a, 0)
        at = (head.to(tl.int64) * chunks + n) * P * N
        leaving = tl.exp(tl.minimum(total - upto, 0.0))
        dstate = load(dstates_ptr + at, 0, P, N, N, BP, BN)
        dx += tl.dot(B, tl.trans(dstate)) * (leaving * dt)[:, None]
    store(dx_ptr + (b * T * H + h) * P, dx, first, T, H * P, P, L, BP)
    out = (b * T * H + h) * N
    dB = tl.dot(tl.trans(dscores), C)
    if STATE:
        dB_state = tl.dot(x, dstate) * leaving[:, None]
        earlier = tl.sum(dB_state * B.to(tl.float32), 1)  # times dt counts for every step after this one
        ddt += earlier
        dB += dB_state * dt[:, None]
    store(dB_ptr + out, dB, first, T, H * N, N, L, BN)
    dC = tl.dot(dscores, B)
    if STATE:
        state = load(borders_ptr + at, 0, P, N, N, BP, BN)
        dC_state = tl.dot(dy, state) * tl.exp(upto)[:, None]
        later += tl.sum(dC_state * C.to(tl.float32), 1)
        dC += dC_state
    store(dC_ptr + out, dC, first, T, H * N, N, L, BN)
    if STATE:
        da = tl.sum(tl.where(i >= j, later[:, None], (earlier * dt)[:, None]), 0)
        product = 0.0
        for p in range(0, BP, 16):
            some = load(borders_ptr + at, p, P, N, N, 16, BN).to(tl.float32)
            some *= load(dstates_ptr + at, p, P, N, N, 16, BN).to(tl.float32)
            product += tl.sum(tl.sum(some, 1), 0)
        da += tl.exp(total) * product
    else:
        da = tl.sum(tl.where(i >= j, later[:, None], 0.0), 0)
    # Where nothing is kept there is no gradient, nor may rounding be one: dt can be huge.
    da = tl.where(a > LOWEST, da, 0.0)
    tl.store(dA_ptr + of_chunk, tl.sum(da * dt, 0))
    ddt += da * A
    tl.store(ddt_ptr + (b * T + row) * H + h, ddt.to(ddt_ptr.dtype.element_ty), mask=row < T)


def _border_shape(x: Tensor, N: int, stateful: bool) -> tuple[int, ...]:
    batch, T, H, P = x.shape
    chunk = choose(T, P, N, x.dtype).chunk
    return (batch, H, (T + chunk - 1) // chunk, P, N) if stateful or chunk < T else (0,)


@torch.library.custom_op("groundthink::ssd_triton", mutates_args=())
def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that enter the chunks; of these two what there is no use for is empty.

    The states take N/chunk times y's memory, without a gradient until the call returns.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[-2:]
    launch = choose(T, P, N, x.dtype)
    chunks, rows, columns = triton.cdiv(T, launch.chunk), power_of_two(P), power_of_two(N)
    y = x.new_empty(x.shape)
    final_state = x.new_empty((batch, H, P, N) if final else (0,), dtype=_STATE)
    # The products that read them take the inputs' precision anyway.
    borders = x.new_empty(_border_shape(x, N, final or initial_state is not None))
    x, B, C = (with_dense_heads(t) for t in (x, B, C))
    dt, A, D = with_dense_rows(dt), A.contiguous(), None if D is None else with_dense_models(D)
    initial_state = None if initial_state is None else initial_state.contiguous()
    sizes = T, H, G, P, N, batch // A.shape[0], chunks
    with torch.cuda.device_of(x):
        if borders.numel():
            some = min(_COLUMNS, columns)
            _ssd_states_kernel[batch * H, triton.cdiv(N, some)](
                x, dt, A, B, initial_state, borders, final_state, *sizes, *strides(x, dt, B),
                L=launch.chunk, BP=rows, BN=some, INITIAL=initial_state is not None, FINAL=final,
                num_warps=launch.num_warps,
            )  # fmt: skip
        _ssd_forward_kernel[batch * H, chunks](
            x, dt, A, B, C, D, borders, y, *sizes, 0 if D is None else D.stride(0), *strides(x, dt, B, C),
            L=launch.chunk, BP=rows, BN=columns, SKIP=D is not None, STATE=borders.numel() > 0,
            num_warps=launch.num_warps, num_stages=1,
        )  # fmt: skip
    return y, final_state, borders


@_forward.register_fake
def _(x, dt, A, B, C, D, initial_state, final):
    batch, _, H, P = x.shape
    N = B.shape[-1]
    final_state = x.new_empty((batch, H, P, N) if final else (0,), dtype=_STATE)
    return x.new_empty(x.shape), final_state, x.new_empty(_border_shape(x, N, final or initial_state is not None))


@torch.library.custom_op("groundthink::ssd_triton_backward", mutates_args=())
def _backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, borders: Tensor, dy: Tensor,
    dfinal: Tensor | None, initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients; of A and D by chunk [batch,chunks,H], of B and C by head [batch,T,H,N]: see ``_autograd``."""
    batch, T, H, P = x.shape
    G, N = B.shape[-2:]
    launch = choose(T, P, N, x.dtype)
    chunks, rows, columns = triton.cdiv(T, launch.chunk), power_of_two(P), power_of_two(N)
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA, dD = (x.new_empty(batch, chunks, H, dtype=torch.float32) for _ in range(2))
    dB, dC = (t.new_empty(batch, T, H, N) for t in (B, C))
    dinitial = x.new_empty((batch, H, P, N) if initial else (0,), dtype=_STATE)
    borders = borders.contiguous()
    dstates = torch.empty_like(borders)
    x, B, C, dy = (with_dense_heads(t) for t in (x, B, C, dy))
    dt, A, D = with_dense_rows(dt), A.contiguous(), None if D is None else with_dense_models(D)
    sizes = T, H, G, P, N, batch // A.shape[0], chunks
    with torch.cuda.device_of(x):
        if borders.numel():
            some = min(_COLUMNS, columns)
            _ssd_dstates_kernel[batch * H, triton.cdiv(N, some)](
                dt, A, C, dy, None if dfinal is None else dfinal.contiguous(), dstates, dinitial,
                *sizes, *strides(dt, C, dy),
                L=launch.chunk, BP=rows, BN=some, INITIAL=initial, FINAL=dfinal is not None,
                num_warps=launch.num_warps,
            )  # fmt: skip
        _ssd_backward_kernel[batch * H, chunks](
            x, dt, A, B, C, D, borders, dstates, dy, dx, ddt, dA, dB, dC, dD,
            *sizes, 0 if D is None else D.stride(0), *strides(x, dt, B, C, dy),
            L=launch.chunk, BP=rows, BN=columns, SKIP=D is not None, STATE=borders.numel() > 0,
            num_warps=launch.num_warps, num_stages=1,
        )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dinitial


@_backward.register_fake
def _(x, dt, A, B, C, D, borders, dy, dfinal, initial):
    batch, T, H, P = x.shape
    N = B.shape[-1]
    chunk = choose(T, P, N, x.dtype).chunk
    dinitial = x.new_empty((batch, H, P, N) if initial else (0,), dtype=_STATE)
    dA, dD = (x.new_empty(batch, (T + chunk - 1) // chunk, H, dtype=torch.float32) for _ in range(2))
    dB, dC = (t.new_empty(batch, T, H, N) for t in (B, C))
    return x.new_empty(x.shape), dt.new_empty(dt.shape), dA, dB, dC, dD, dinitial


def _setup_context(ctx, inputs, output):
    *tensors, initial_state, final = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.initial, ctx.final = initial_state is not None, final


def _autograd(ctx, dy, dfinal, _dborders):
    *inputs, borders = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    grads = _backward(*inputs, borders, dy, dfinal if ctx.final else None, ctx.initial)
    dx, ddt, dA, dB, dC, dD, dinitial = grads
    # Sums over heads that share B and C, and over each model's sequences: here, where a compiler can fuse them.
    x, _, A, B, _, D = inputs
    H, G = x.shape[2], B.shape[2]
    if G < H:
        dB, dC = (t.unflatten(2, (G, H // G)).sum(3) for t in (dB, dC))
    dA = dA.view(A.shape[0], -1, H).sum(1).to(A.dtype)
    dD = None if D is None else dD.view(A.shape[0], -1, H).sum(1).to(D.dtype)
    return dx, ddt, dA, dB, dC, dD, dinitial if ctx.initial else None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def ssd_triton(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As ``hybrid.kernels.ssd``; x, B and C in any of float32, bfloat16 and float16, sums in float32."""
    check_dtypes("ssd", x, dt, A, B, C, *([] if D is None else [D]))
    initial_state = None if initial_state is None else initial_state.float()
    # One set of decay rates and skips for the whole batch; stacked models (vmap) have several.
    D = None if D is None else D[None]
    y, state, _ = _forward(x, dt, A[None], B, C, D, initial_state, output_final_state)
    return y, state if output_final_state else None
