"""RWKV-6 with the Triton programs of ``wkv6_programs.py``: how they are cut, and as operators with gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hybrid.kernels.carry import carry
from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import by_model, register_seeds
from hybrid.kernels.tiles import check_dtypes, power_of_two, precision, strides, with_dense_heads, with_dense_models
from hybrid.kernels.wkv6_programs import wkv6_backward_kernel, wkv6_forward_kernel, wkv6_parts_kernel

CHUNK = 16  # steps: the smallest side of a tile product
LEVELS = CHUNK.bit_length() - 2  # of halving a chunk, before pairs of neighbours are left
AHEAD = 64  # steps at once where only the state is wanted
_STATE = torch.float32


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: chunks a program, channels a program, warps.

    Programs find the state they start with each by itself or, with ``between``, in what kernels before them have left.
    """

    chunks_per_program: int
    block_k: int
    num_warps: int
    between: bool


def choose(B: int, T: int, H: int, K: int, V: int, backward: bool) -> Launch:
    """A launch for a shape, as measured on an H100 with K=16, V=32 and K=24, V=48."""
    # The state has to fit in registers.
    block_k = 16 if power_of_two(V) > 64 else min(32, power_of_two(K))
    large = block_k * power_of_two(V) > 512
    warps = 1 if not large else 4 if backward else 2
    if T > 256:
        return Launch(AHEAD // CHUNK, block_k, warps, between=True)
    # Few and short sequences leave a GPU idle: then several programs share one.
    programs = B * H * triton.cdiv(K, block_k)
    shared = max(1, min(4, 1024 // programs))
    return Launch(triton.cdiv(triton.cdiv(T, CHUNK), shared), block_k, warps, between=False)


def _between(
    a: Tensor, b: Tensor, w: Tensor, outer: Tensor | None, programs: int, launch: Launch, tiles: dict, back: bool
) -> Tensor:
    """The states [B,H,programs,K,V] that programs start with; with ``back``, the gradients of those they end with."""
    B, T, H, K = w.shape
    V = b.shape[-1]
    states, left = (w.new_empty(B, H, programs, *size, dtype=_STATE) for size in ((K, V), (K,)))
    wkv6_parts_kernel[B * H, programs - 1, triton.cdiv(K, launch.block_k)](
        a, b, w, states, left, T, H, K, V, programs, *strides(a, b, w),
        **tiles, STEPS=launch.chunks_per_program * CHUNK, BACK=back, num_warps=2,
    )  # fmt: skip
    carry(states, left, outer, w.new_empty(0), back)
    return states


@operator("wkv6_triton")
def _forward(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    final: bool,
    save: bool,
    raw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, K = r.shape
    V = v.shape[-1]
    launch = choose(B, T, H, K, V, backward=False)
    chunks, parts = triton.cdiv(T, CHUNK), triton.cdiv(K, launch.block_k)
    programs = triton.cdiv(chunks, launch.chunks_per_program)
    o = v.new_empty(v.shape) if parts == 1 else v.new_empty(parts, *v.shape, dtype=torch.float32)
    final_state = v.new_empty((B, H, K, V) if final else (0,), dtype=_STATE)
    borders = v.new_empty((B, H, chunks, K, V) if save else (0,), dtype=_STATE)
    r, k, v, w = (with_dense_heads(x) for x in (r, k, v, w))
    u = with_dense_models(u)
    initial_state = None if initial_state is None else initial_state.contiguous()
    tiles = {"PRECISION": precision(r, k, v), "BK": launch.block_k, "BV": power_of_two(V), "RAW": raw}
    with torch.cuda.device_of(r):
        starts = _between(k, v, w, initial_state, programs, launch, tiles, back=False) if launch.between else None
        wkv6_forward_kernel[B * H, programs, parts](
            r, k, v, w, u, initial_state, starts, o, final_state, borders,
            T, H, K, V, u.stride(0), B // u.shape[0], chunks, launch.chunks_per_program, B * T * H * V,
            *strides(r, k, v, w),
            **tiles, C=CHUNK, LEVELS=LEVELS, AHEAD=AHEAD, INITIAL=initial_state is not None, FINAL=final, SAVE=save,
            GIVEN=launch.between, num_warps=launch.num_warps, num_stages=1,
        )  # fmt: skip
    return o if parts == 1 else o.sum(0).to(v.dtype), final_state, borders


@_forward.register_fake
def _(r, k, v, w, u, initial_state, final, save, raw):
    B, T, H, K = r.shape
    V = v.shape[-1]
    chunks = (T + CHUNK - 1) // CHUNK
    final_state = v.new_empty((B, H, K, V) if final else (0,), dtype=_STATE)
    return v.new_empty(v.shape), final_state, v.new_empty((B, H, chunks, K, V) if save else (0,), dtype=_STATE)


@operator("wkv6_triton_backward")
def _backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, borders: Tensor, do: Tensor, dfinal: Tensor | None,
    initial: bool, raw: bool,
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
    u, borders = with_dense_models(u), borders.contiguous()
    tiles = {"PRECISION": precision(r, k, v), "BK": launch.block_k, "BV": power_of_two(V), "RAW": raw}
    with torch.cuda.device_of(r):
        ends = _between(r, do, w, dfinal, programs, launch, tiles, back=True) if launch.between else None
        wkv6_backward_kernel[B * H, programs, parts](
            r, k, v, w, u, borders, do, dfinal, ends, dr, dk, dv, dw, du, dinitial,
            T, H, K, V, u.stride(0), B // u.shape[0], chunks, launch.chunks_per_program, B * T * H * V,
            *strides(r, k, v, w, do),
            **tiles, C=CHUNK, LEVELS=LEVELS, AHEAD=AHEAD, INITIAL=initial, FINAL=dfinal is not None,
            GIVEN=launch.between, num_warps=launch.num_warps, num_stages=1,
        )  # fmt: skip
    return dr, dk, dv if parts == 1 else dv.sum(0).to(v.dtype), dw, du, dinitial


@_backward.register_fake
def _(r, k, v, w, u, borders, do, dfinal, initial, raw):
    B, T, H, K = r.shape
    launch = choose(B, T, H, K, v.shape[3], backward=True)
    programs = triton.cdiv(triton.cdiv(T, CHUNK), launch.chunks_per_program)
    du = u.new_empty(B, programs, H, K, dtype=torch.float32)
    dinitial = v.new_empty((B, H, K, v.shape[3]) if initial else (0,), dtype=_STATE)
    return (*(x.new_empty(x.shape) for x in (r, k, v, w)), du, dinitial)


def _setup_context(ctx, inputs, output):
    *tensors, initial_state, final, _, raw = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.initial, ctx.final, ctx.raw = initial_state is not None, final, raw


def _autograd(ctx, do, dfinal, _dborders):
    *inputs, borders = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(inputs[2])
    *grads, du, dinitial = _backward(*inputs, borders, do, dfinal if ctx.final else None, ctx.initial, ctx.raw)
    u = inputs[4]
    du = by_model(du, u.shape[0], own=2).to(u.dtype)
    return (*grads, du, dinitial if ctx.initial else None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def wkv6_triton(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None, output_final_state: bool,
    raw_decay: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As ``hybrid.kernels.wkv6``; inputs in any of float32, bfloat16 and float16, products in TF32 for the last two."""
    check_dtypes("wkv6", r, k, v, w, u)
    initial_state = None if initial_state is None else initial_state.float()
    # One set of bonuses for the whole batch; stacked models (vmap) have several.
    o, state, _ = _forward(r, k, v, w, u[None], initial_state, output_final_state, torch.is_grad_enabled(), raw_decay)
    return o, state if output_final_state else None
