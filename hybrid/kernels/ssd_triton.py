"""Mamba-2 with the Triton programs of ``ssd_programs.py``: how they are cut, and as operators with gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hybrid.kernels.carry import carry
from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import register_seeds
from hybrid.kernels.ssd_programs import ssd_backward_kernel, ssd_forward_kernel, ssd_walk_kernel
from hybrid.kernels.tiles import (
    check_dtypes,
    power_of_two,
    strides,
    with_dense_heads,
    with_dense_models,
    with_dense_rows,
)

_STATE = torch.float32
_COLUMNS = 64  # of a state, at most, a program that walks the chunks
_BUSY = 2**19  # numbers in the states of all sequences, above which one program walks all chunks


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


def _border_shape(x: Tensor, N: int, stateful: bool) -> tuple[int, ...]:
    batch, T, H, P = x.shape
    chunk = choose(T, P, N, x.dtype).chunk
    return (batch, H, (T + chunk - 1) // chunk, P, N) if stateful or chunk < T else (0,)


def _between(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, outer: Tensor | None, states: Tensor, last: Tensor,
    sizes: tuple[int, ...], launch: Launch, back: bool,
) -> None:  # fmt: skip
    """Fill ``states`` [batch,H,chunks,P,N] and, unless it is empty, ``last``, as ``ssd_walk_kernel`` says."""
    batch, H, chunks, P, N = states.shape
    some = min(_COLUMNS, power_of_two(N))
    # States of many sequences keep a GPU busy, and reading them once more costs more than a walk. Few are added up from
    # parts in the inputs' precision, which rounds them a little more.
    each = chunks if batch * H * P * N > _BUSY else 1
    outer = None if outer is None else outer.contiguous()
    left = dt.new_empty((0,) if each == chunks else (batch, H, chunks), dtype=_STATE)
    own = outer is not None and each == chunks
    ssd_walk_kernel[batch * H, triton.cdiv(N, some), triton.cdiv(chunks, each)](
        x, dt, A, B, outer, states, last, left, *sizes, each, *strides(x, dt, B),
        L=launch.chunk, BP=power_of_two(P), BN=some, OUTER=own, LAST=last.numel() > 0, LEFT=left.numel() > 0, BACK=back,
        num_warps=launch.num_warps,
    )  # fmt: skip
    if each < chunks:
        carry(states, left, outer, last, back)


@operator("ssd_triton")
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
    # In the inputs' precision, which the products that read them have anyway.
    borders = x.new_empty(_border_shape(x, N, final or initial_state is not None))
    x, B, C = (with_dense_heads(t) for t in (x, B, C))
    dt, A, D = with_dense_rows(dt), A.contiguous(), None if D is None else with_dense_models(D)
    sizes = T, H, G, P, N, batch // A.shape[0], chunks
    with torch.cuda.device_of(x):
        if borders.numel():
            _between(x, dt, A, B, initial_state, borders, final_state, sizes, launch, back=False)
        ssd_forward_kernel[batch * H, chunks](
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


@operator("ssd_triton_backward")
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
            _between(dy, dt, A, C, dfinal, dstates, dinitial, sizes, launch, back=True)
        ssd_backward_kernel[batch * H, chunks](
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
