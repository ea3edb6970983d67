"""The RWKV-6 recurrence as one Triton kernel forward and one backward.

FLA's kernels split the work over a dozen launches, which cost more than the arithmetic for short sequences. Here a
program walks the chunks of one head of one sequence with the state in registers; only inputs, outputs and the states
at chunk borders, which the backward pass needs, touch memory.

With S the state that enters a chunk, and of its log decays w: before_i = w_1 + ... + w_{i-1}, upto_j = w_1 + ... + w_j
and total = upto_C::

    o_i = (r_i exp(before_i)) S + sum_{j<i} A_ij v_j + (r_i . u k_i) v_i,  A_ij = sum_k r_ik k_jk exp(before_i - upto_j)
    S'  = exp(total) S + sum_j (k_j exp(total - upto_j))^T v_j

Every exponent is at most zero and is formed as it stands, pair by pair, so no decay overflows. The gradient of w_t
sums every term whose exponent holds w_t. Terms of neighbouring steps (i = j + 1) hold none, and are kept out of the
sums that cancel; what is left has all been decayed, so strong decays keep their digits.

Channels k do not mix except in o and dv: where K is large they are shared out over programs, and torch sums o and dv.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels.seeds import register_seeds
from hybrid.kernels.tiles import LOWEST, check_dtypes, load, power_of_two, store, strides, with_dense_heads

CHUNK = 16  # steps; pairs of them are formed channel by channel, so more cost more
_STATE = torch.float32


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: chunks a program, channels a program, steps at once outside these chunks, warps."""

    chunks_per_program: int
    block_k: int
    ahead: int
    num_warps: int


def choose(B: int, T: int, H: int, K: int, V: int, backward: bool) -> Launch:
    """A launch for a shape, as measured on an H100 with K=16, V=32."""
    # The state and the pairs of steps have to fit in registers.
    block_k = 16 if power_of_two(V) > 64 else min(32, power_of_two(K))
    chunks = triton.cdiv(T, CHUNK)
    # Few and short sequences leave a GPU idle: then several programs share one, each finding its own state.
    programs = B * H * triton.cdiv(K, block_k)
    shared = max(1, min(4, 1024 // programs)) if T <= 256 else 1
    each = triton.cdiv(chunks, shared)
    large = block_k * power_of_two(V) > 512
    return Launch(each, block_k, 64, 8 if large else 1 if each == 1 else 2)


@triton.jit
def _wkv6_forward_kernel(
    r_ptr, k_ptr, v_ptr, w_ptr, u_ptr, initial_ptr, o_ptr, final_ptr, borders_ptr,
    T, H, K, V, sequences_per_u, chunks, chunks_per_program, o_part,
    r_batch, r_step, k_batch, k_step, v_batch, v_step, w_batch, w_step,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, AHEAD: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = head % H
    k0 = tl.program_id(2) * BK
    width = K - k0
    r_ptr += b * r_batch + h * K + k0
    k_ptr += b * k_batch + h * K + k0
    w_ptr += b * w_batch + h * K + k0
    v_ptr += b * v_batch + h * V
    o_ptr += tl.program_id(2).to(tl.int64) * o_part + (b * T * H + h) * V
    state_at = head.to(tl.int64) * K * V + k0 * V
    u = tl.load(u_ptr + (b // sequences_per_u * H + h) * K + k0 + tl.arange(0, BK),
                mask=tl.arange(0, BK) < width, other=0.0).to(tl.float32)  # fmt: skip

    start = tl.program_id(1) * chunks_per_program
    stop = tl.minimum(start + chunks_per_program, chunks)
    state = tl.zeros((BK, BV), dtype=tl.float32)
    if INITIAL:
        state += load(initial_ptr + state_at, 0, 0, width, V, V, BK, BV).to(tl.float32)
    for first in range(0, start * C, AHEAD):  # what came before this program's chunks
        k = load(k_ptr, first, 0, start * C, k_step, width, AHEAD, BK).to(tl.float32)
        w = tl.maximum(load(w_ptr, first, 0, start * C, w_step, width, AHEAD, BK).to(tl.float32), LOWEST)
        v = load(v_ptr, first, 0, start * C, v_step, V, AHEAD, BV).to(tl.float32)
        total = tl.sum(w, 0)
        faded = k * tl.exp(tl.minimum(total[None, :] - tl.cumsum(w, 0), 0.0))
        state = state * tl.exp(total)[:, None] + tl.dot(tl.trans(faded), v, input_precision="tf32x3")

    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    for n in range(start, stop):
        first = n * C
        r = load(r_ptr, first, 0, T, r_step, width, C, BK).to(tl.float32)
        k = load(k_ptr, first, 0, T, k_step, width, C, BK).to(tl.float32)
        w = tl.maximum(load(w_ptr, first, 0, T, w_step, width, C, BK).to(tl.float32), LOWEST)
        v = load(v_ptr, first, 0, T, v_step, V, C, BV).to(tl.float32)
        if SAVE:
            at = (head.to(tl.int64) * chunks + n) * K * V + k0 * V
            store(borders_ptr + at, state, 0, width, V, V, BK, BV)
        upto = tl.cumsum(w, 0)
        before = upto - w
        total = tl.sum(w, 0)
        gap = tl.minimum(before[:, None, :] - upto[None, :, :], 0.0)
        decay = tl.exp(tl.where((i > j)[:, :, None], gap, float("-inf")))
        decay = tl.where((i == j)[:, :, None], u[None, None, :], decay)
        scores = tl.sum(r[:, None, :] * k[None, :, :] * decay, 2)
        o = tl.dot(scores, v, input_precision="tf32x3")
        o += tl.dot(r * tl.exp(before), state, input_precision="tf32x3")
        store(o_ptr, o, first, T, H * V, V, C, BV)
        faded = k * tl.exp(tl.minimum(total[None, :] - upto, 0.0))
        state = state * tl.exp(total)[:, None] + tl.dot(tl.trans(faded), v, input_precision="tf32x3")
    if FINAL and stop == chunks:
        store(final_ptr + state_at, state, 0, width, V, V, BK, BV)


@triton.jit
def _wkv6_backward_kernel(
    r_ptr, k_ptr, v_ptr, w_ptr, u_ptr, borders_ptr, do_ptr, dfinal_ptr,
    dr_ptr, dk_ptr, dv_ptr, dw_ptr, du_ptr, dinitial_ptr,
    T, H, K, V, sequences_per_u, chunks, chunks_per_program, dv_part,
    r_batch, r_step, k_batch, k_step, v_batch, v_step, w_batch, w_step, do_batch, do_step,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, AHEAD: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = head % H
    k0 = tl.program_id(2) * BK
    width = K - k0
    r_ptr += b * r_batch + h * K + k0
    k_ptr += b * k_batch + h * K + k0
    w_ptr += b * w_batch + h * K + k0
    v_ptr += b * v_batch + h * V
    do_ptr += b * do_batch + h * V
    out = (b * T * H + h) * K + k0
    dv_ptr += tl.program_id(2).to(tl.int64) * dv_part + (b * T * H + h) * V
    state_at = head.to(tl.int64) * K * V + k0 * V
    channel = tl.arange(0, BK)
    u = tl.load(u_ptr + (b // sequences_per_u * H + h) * K + k0 + channel, mask=channel < width, other=0.0)
    u = u.to(tl.float32)

    start = tl.program_id(1) * chunks_per_program
    stop = tl.minimum(start + chunks_per_program, chunks)
    dstate = tl.zeros((BK, BV), dtype=tl.float32)  # of the state that leaves the chunk
    if FINAL:
        dstate += load(dfinal_ptr + state_at, 0, 0, width, V, V, BK, BV).to(tl.float32)
    blocks = tl.cdiv(tl.maximum(T - stop * C, 0), AHEAD)
    for m in range(0, blocks):  # what comes after this program's chunks, from the end
        first = stop * C + (blocks - 1 - m) * AHEAD
        r = load(r_ptr, first, 0, T, r_step, width, AHEAD, BK).to(tl.float32)
        w = tl.maximum(load(w_ptr, first, 0, T, w_step, width, AHEAD, BK).to(tl.float32), LOWEST)
        do = load(do_ptr, first, 0, T, do_step, V, AHEAD, BV).to(tl.float32)
        faded = r * tl.exp(tl.minimum(tl.cumsum(w, 0) - w, 0.0))
        dstate = dstate * tl.exp(tl.sum(w, 0))[:, None] + tl.dot(tl.trans(faded), do, input_precision="tf32x3")

    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    du = tl.zeros((BK,), dtype=tl.float32)
    for m in range(0, stop - start):
        n = stop - 1 - m
        first = n * C
        r = load(r_ptr, first, 0, T, r_step, width, C, BK).to(tl.float32)
        k = load(k_ptr, first, 0, T, k_step, width, C, BK).to(tl.float32)
        w = tl.maximum(load(w_ptr, first, 0, T, w_step, width, C, BK).to(tl.float32), LOWEST)
        v = load(v_ptr, first, 0, T, v_step, V, C, BV).to(tl.float32)
        do = load(do_ptr, first, 0, T, do_step, V, C, BV).to(tl.float32)
        at = (head.to(tl.int64) * chunks + n) * K * V + k0 * V
        state = load(borders_ptr + at, 0, 0, width, V, V, BK, BV)
        upto = tl.cumsum(w, 0)
        before = upto - w
        total = tl.sum(w, 0)
        entering = tl.exp(tl.minimum(before, 0.0))
        leaving = tl.exp(tl.minimum(total[None, :] - upto, 0.0))

        gap = tl.minimum(before[:, None, :] - upto[None, :, :], 0.0)
        decay = tl.exp(tl.where((i > j)[:, :, None], gap, float("-inf")))
        with_bonus = tl.where((i == j)[:, :, None], u[None, None, :], decay)
        scores = tl.sum(r[:, None, :] * k[None, :, :] * with_bonus, 2)
        dscores = tl.dot(do, tl.trans(v), input_precision="tf32x3")
        distant = tl.where(i > j + 1, dscores, 0.0)[:, :, None] * decay
        dr_distant = tl.sum(distant * k[None, :, :], 1)
        dk_distant = tl.sum(distant * r[:, None, :], 0)
        beside = tl.where(i == j + 1, dscores, 0.0)
        k_previous = load(k_ptr, first - 1, first, T, k_step, width, C, BK).to(tl.float32)
        r_next = load(r_ptr, first + 1, first, T, r_step, width, C, BK).to(tl.float32)
        own = tl.sum(tl.where(i == j, dscores, 0.0), 1)[:, None]

        dr_state = tl.dot(do, tl.trans(state), input_precision="tf32x3") * entering
        dk_state = tl.dot(v, tl.trans(dstate), input_precision="tf32x3") * leaving
        dr = dr_state + dr_distant + tl.sum(beside, 1)[:, None] * k_previous + own * u[None, :] * k
        dk = dk_state + dk_distant + tl.sum(beside, 0)[:, None] * r_next + own * u[None, :] * r
        dv = tl.dot(tl.trans(scores), do, input_precision="tf32x3")
        dv += tl.dot(k * leaving, dstate, input_precision="tf32x3")
        du += tl.sum(own * r * k, 0)
        # Axis 0 holds the steps that are summed, axis 1 those that get the sum. Sums rather than differences of running
        # sums: taking a term off a running sum would leave its rounding behind.
        through = tl.exp(total) * tl.sum(state * dstate, 1)
        before_it = k * dk_state
        from_it = -k * dk_distant
        after_it = r * (dr_state + dr_distant) + from_it
        across = tl.where((i < j)[:, :, None], before_it[:, None, :], from_it[:, None, :])
        dw = tl.sum(tl.where((i > j)[:, :, None], after_it[:, None, :], across), 0)
        # Where nothing is kept there is no gradient, nor may rounding be one: the step's input can be huge.
        dw = tl.where(w > LOWEST, dw + through[None, :], 0.0)
        store(dr_ptr + out, dr, first, T, H * K, width, C, BK)
        store(dk_ptr + out, dk, first, T, H * K, width, C, BK)
        store(dw_ptr + out, dw, first, T, H * K, width, C, BK)
        store(dv_ptr, dv, first, T, H * V, V, C, BV)
        dstate = dstate * tl.exp(total)[:, None] + tl.dot(tl.trans(r * entering), do, input_precision="tf32x3")

    programs = tl.num_programs(1)
    tl.store(du_ptr + ((b * programs + tl.program_id(1)) * H + h) * K + k0 + channel, du, mask=channel < width)
    if INITIAL and start == 0:
        store(dinitial_ptr + state_at, dstate, 0, width, V, V, BK, BV)


@torch.library.custom_op("groundthink::wkv6_triton", mutates_args=())
def _forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None, final: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, K = r.shape
    V = v.shape[-1]
    launch = choose(B, T, H, K, V, backward=False)
    chunks, parts = triton.cdiv(T, CHUNK), triton.cdiv(K, launch.block_k)
    o = v.new_empty(v.shape) if parts == 1 else v.new_empty(parts, *v.shape, dtype=torch.float32)
    final_state = v.new_empty((B, H, K, V) if final else (0,), dtype=_STATE)
    borders = v.new_empty((B, H, chunks, K, V) if save else (0,), dtype=_STATE)
    r, k, v, w = (with_dense_heads(x) for x in (r, k, v, w))
    with torch.cuda.device_of(r):
        _wkv6_forward_kernel[B * H, triton.cdiv(chunks, launch.chunks_per_program), parts](
            r, k, v, w, u.contiguous(), initial_state, o, final_state, borders,
            T, H, K, V, B // u.shape[0], chunks, launch.chunks_per_program, B * T * H * V, *strides(r, k, v, w),
            C=CHUNK, BK=launch.block_k, BV=power_of_two(V), AHEAD=launch.ahead,
            INITIAL=initial_state is not None, FINAL=final, SAVE=save, num_warps=launch.num_warps, num_stages=1,
        )  # fmt: skip
    return o if parts == 1 else o.sum(0).to(v.dtype), final_state, borders


@_forward.register_fake
def _(r, k, v, w, u, initial_state, final, save):
    B, T, H, K = r.shape
    V = v.shape[-1]
    chunks = (T + CHUNK - 1) // CHUNK
    final_state = v.new_empty((B, H, K, V) if final else (0,), dtype=_STATE)
    return v.new_empty(v.shape), final_state, v.new_empty((B, H, chunks, K, V) if save else (0,), dtype=_STATE)


@torch.library.custom_op("groundthink::wkv6_triton_backward", mutates_args=())
def _backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, borders: Tensor, do: Tensor, dfinal: Tensor | None,
    initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients; that of u still as one [B,programs,H,K] a program, so that a compiler can fuse their sum."""
    B, T, H, K = r.shape
    V = v.shape[-1]
    launch = choose(B, T, H, K, V, backward=True)
    chunks, parts = triton.cdiv(T, CHUNK), triton.cdiv(K, launch.block_k)
    programs = triton.cdiv(chunks, launch.chunks_per_program)
    dr, dk, dw = (x.new_empty(x.shape) for x in (r, k, w))
    dv = v.new_empty(v.shape) if parts == 1 else v.new_empty(parts, *v.shape, dtype=torch.float32)
    du = u.new_empty(B, programs, H, K, dtype=torch.float32)
    dinitial = v.new_empty((B, H, K, V) if initial else (0,), dtype=_STATE)
    dfinal = None if dfinal is None else dfinal.contiguous()
    r, k, v, w, do = (with_dense_heads(x) for x in (r, k, v, w, do))
    with torch.cuda.device_of(r):
        _wkv6_backward_kernel[B * H, programs, parts](
            r, k, v, w, u.contiguous(), borders, do, dfinal, dr, dk, dv, dw, du, dinitial,
            T, H, K, V, B // u.shape[0], chunks, launch.chunks_per_program, B * T * H * V, *strides(r, k, v, w, do),
            C=CHUNK, BK=launch.block_k, BV=power_of_two(V), AHEAD=launch.ahead,
            INITIAL=initial, FINAL=dfinal is not None, num_warps=launch.num_warps, num_stages=1,
        )  # fmt: skip
    return dr, dk, dv if parts == 1 else dv.sum(0).to(v.dtype), dw, du, dinitial


@_backward.register_fake
def _(r, k, v, w, u, borders, do, dfinal, initial):
    B, T, H, K = r.shape
    launch = choose(B, T, H, K, v.shape[3], backward=True)
    programs = triton.cdiv(triton.cdiv(T, CHUNK), launch.chunks_per_program)
    du = u.new_empty(B, programs, H, K, dtype=torch.float32)
    dinitial = v.new_empty((B, H, K, v.shape[3]) if initial else (0,), dtype=_STATE)
    return (*(x.new_empty(x.shape) for x in (r, k, v, w)), du, dinitial)


def _setup_context(ctx, inputs, output):
    *tensors, initial_state, final, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.initial, ctx.final = initial_state is not None, final


def _autograd(ctx, do, dfinal, _dborders):
    *inputs, borders = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(inputs[2])
    *grads, du, dinitial = _backward(*inputs, borders, do, dfinal if ctx.final else None, ctx.initial)
    u = inputs[4]
    du = du.view(u.shape[0], -1, *u.shape[1:]).sum(1).to(u.dtype)
    return (*grads, du, dinitial if ctx.initial else None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def wkv6_triton(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """As ``hybrid.kernels.wkv6``; inputs in any of float32, bfloat16 and float16, arithmetic in float32."""
    check_dtypes("wkv6", r, k, v, w, u)
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    # One set of bonuses for the whole batch; stacked models (vmap) have several.
    o, state, _ = _forward(r, k, v, w, u[None], initial_state, output_final_state, torch.is_grad_enabled())
    return o, state if output_final_state else None
