"""Mamba-2 with the Triton programs of ``ssd_programs.py``: how they are cut, and as operators with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hybrid.kernels.carry import carry
from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import by_model, register_seeds
from hybrid.kernels.ssd_programs import (
    ssd_backward_kernel,
    ssd_forward_kernel,
    ssd_shared_backward_kernel,
    ssd_steps_kernel,
    ssd_walk_kernel,
)
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
REGISTERS = 168  # of a thread, at most: three programs on a processor of an H100, 65 us where there were 79
_STEPS = 1024  # numbers that a program of ``ssd_steps_kernel`` has
_BUSY = 2**19  # numbers in the states of all sequences, above which one program walks all chunks


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: steps a chunk, warps."""

    chunk: int
    num_warps: int


def choose(T: int, P: int, N: int, dtype: torch.dtype) -> Launch:
    """A launch, as measured on an H100 in bfloat16 with P=64, N=128. Both directions have the same chunk.

    Small heads get chunks of 32: of products of tiles of 64 steps, Triton before 3.7.1 is known to compile some wrongly
    for a Hopper GPU (github.com/fla-org/flash-linear-attention, issues 640 and 984); larger heads were checked on one.
    """
    rows, columns, wide = power_of_two(P), power_of_two(N), dtype == torch.float32
    # Float32 tiles of 64 steps do not fit in shared memory, nor a larger state beside those of 64 steps in registers.
    large, small = rows * columns > 64 * 128, min(rows, columns) < 64
    longest = 16 if large and wide else 32 if large or wide or small else 64
    return Launch(min(longest, power_of_two(T)), 8 if wide else 4)


def chunks_of(T: int, P: int, N: int, dtype: torch.dtype) -> int:
    return -(-T // choose(T, P, N, dtype).chunk)


def border_shape(x: Sequence[int], N: int, dtype: torch.dtype, stateful: bool = False) -> tuple[int, ...]:
    """Of the states that enter the chunks of x [batch,T,H,P]; they have its precision, as products with them have.

    None are needed for one chunk without a state before or after it.
    """
    batch, T, H, P = x
    chunks = chunks_of(T, P, N, dtype)
    return (batch, H, chunks, P, N) if stateful or chunks > 1 else (0,)


class Inputs:
    """The recurrence's inputs as its kernels read them: copied where they lie otherwise.

    A and D are [models,H], the rest as for ``hybrid.kernels.ssd``; with ``raw``, as ``ssd_programs.py`` says.
    """

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, raw: bool = False
    ) -> None:
        batch, T, H, P = x.shape
        G, N = B.shape[-2:]
        self.launch = choose(T, P, N, x.dtype)
        self.x, self.B, self.C = (with_dense_heads(t) for t in (x, B, C))
        self.dt, self.A, self.D = with_dense_rows(dt), with_dense_models(A), None if D is None else with_dense_models(D)
        self.raw = raw
        self.chunks = triton.cdiv(T, self.launch.chunk)
        self.sizes = T, H, G, P, N, batch // A.shape[0], self.chunks, self.A.stride(0)

    def constants(self, borders: Tensor) -> dict[str, Any]:
        """Of all kernels but the walk."""
        P, N = self.x.shape[3], self.B.shape[3]
        return {
            "RAW": self.raw, "STATE": borders.numel() > 0,
            "L": self.launch.chunk, "BP": power_of_two(P), "BN": power_of_two(N),
            "num_warps": self.launch.num_warps, "num_stages": 1,
        }  # fmt: skip


def _between(
    given: Inputs, x: Tensor, B: Tensor, outer: Tensor | None, states: Tensor, last: Tensor, back: bool
) -> None:
    """Fill ``states`` [batch,H,chunks,P,N] and, unless it is empty, ``last``, as ``ssd_walk_kernel`` says."""
    batch, H, chunks, P, N = states.shape
    launch = given.launch
    some = min(_COLUMNS, power_of_two(N))
    # States of many sequences keep a GPU busy, and reading them once more costs more than a walk. Few are added up from
    # parts in the inputs' precision, which rounds them a little more.
    each = chunks if batch * H * P * N > _BUSY else 1
    outer = None if outer is None else outer.contiguous()
    left = x.new_empty((0,) if each == chunks else (batch, H, chunks), dtype=_STATE)
    own = outer is not None and each == chunks
    ssd_walk_kernel[batch * H, triton.cdiv(N, some), triton.cdiv(chunks, each)](
        x, given.dt, given.A, B, outer, states, last, left, *given.sizes, each, *strides(x, given.dt, B),
        L=launch.chunk, BP=power_of_two(P), BN=some, OUTER=own, LAST=last.numel() > 0, LEFT=left.numel() > 0, BACK=back,
        RAW=given.raw, num_warps=launch.num_warps,
    )  # fmt: skip
    if each < chunks:
        carry(states, left, outer, last, back)


def run_steps(raw: Tensor, bias: Tensor, dt: Tensor) -> None:
    """Write dt [batch,T,H] float32, softplus(raw + bias), for bias [models,H]."""
    batch, T, H = raw.shape
    models, block = bias.shape[0], power_of_two(H)
    steps, bias, raw = batch // models * T, with_dense_models(bias), with_dense_rows(raw).flatten(0, 1)
    rows = max(1, _STEPS // block)
    ssd_steps_kernel[triton.cdiv(steps, rows), models](
        raw, bias, dt, steps, H, bias.stride(0), raw.stride(0), ROWS=rows, BH=block, num_warps=4
    )


def run_forward(given: Inputs, y: Tensor, borders: Tensor, initial_state: Tensor | None, final_state: Tensor) -> None:
    """Write y [batch,T,H,P], the states that enter the chunks and the final one, unless they are empty."""
    x, dt, A, B, C, D = given.x, given.dt, given.A, given.B, given.C, given.D
    if borders.numel():
        _between(given, x, B, initial_state, borders, final_state, back=False)
    ssd_forward_kernel[x.shape[0] * x.shape[2], given.chunks](
        x, dt, A, B, C, D, borders, y, *given.sizes, 0 if D is None else D.stride(0), *strides(x, dt, B, C),
        SKIP=D is not None, **given.constants(borders),
    )  # fmt: skip


def run_backward(
    given: Inputs, borders: Tensor, dy: Tensor, dfinal: Tensor | None,
    dx: Tensor, ddt: Tensor, dB: Tensor, dC: Tensor, sums: Tensor, dinitial: Tensor, fill: int = 0,
) -> None:  # fmt: skip
    """Write the gradients, ``dinitial`` unless it is empty.

    dx [batch,T,H,P], dB and dC [batch,T,G,N] lie as inputs may, ddt [batch,T,H] with room for ``fill`` zeros after it.
    ``sums`` [batch,chunks,2,H] is for A and D; with raw numbers [batch,chunks,3,H], for the bias of dt as well.
    """
    x, dt, A, B, C, D = given.x, given.dt, given.A, given.B, given.C, given.D
    batch, _, H, _ = x.shape
    length = given.launch.chunk
    borders, dy = borders.contiguous(), with_dense_heads(dy)
    dstates = torch.empty_like(borders)
    dscores = x.new_empty(batch, H, given.chunks, length, length)
    if borders.numel():
        _between(given, dy, C, dfinal, dstates, dinitial, back=True)
    # Without states a program does with fewer registers than the compiler takes, so that more fit on a processor; one
    # of fewer steps takes fewer anyway, one of larger heads needs them.
    fewer = {"maxnreg": REGISTERS} if length > 32 and x.shape[3] <= 64 and not borders.numel() else {}
    ssd_backward_kernel[batch * H, given.chunks](
        x, dt, A, B, C, D, borders, dstates, dy, dx, ddt, dscores, sums,
        *given.sizes, 0 if D is None else D.stride(0), fill, *strides(x, dt, B, C, dy, dx, ddt),
        SKIP=D is not None, **given.constants(borders), **fewer,
    )  # fmt: skip
    ssd_shared_backward_kernel[batch * B.shape[2], given.chunks, 2](
        x, dt, A, B, C, borders, dstates, dy, dscores, dB, dC,
        *given.sizes, *strides(x, dt, B, C, dy, dB, dC), **given.constants(borders),
    )  # fmt: skip


def _empty_state(x: Tensor, N: int, wanted: bool) -> Tensor:
    batch, _, H, P = x.shape
    return x.new_empty((batch, H, P, N) if wanted else (0,), dtype=_STATE)


def _empty(x: Tensor, N: int, initial_state: Tensor | None, final: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward pass gives, not written yet."""
    borders = border_shape(x.shape, N, x.dtype, final or initial_state is not None)
    return x.new_empty(x.shape), _empty_state(x, N, final), x.new_empty(borders)


def _empty_gradients(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial: bool) -> tuple[Tensor, ...]:
    """What the backward pass gives, not written yet."""
    batch, T, H, P = x.shape
    N = B.shape[-1]
    sums = x.new_empty(batch, chunks_of(T, P, N, x.dtype), 2, H, dtype=torch.float32)
    return *(t.new_empty(t.shape) for t in (x, dt, B, C)), sums, _empty_state(x, N, initial)


@operator("ssd_triton")
def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that enter the chunks; of these two what there is no use for is empty.

    The states take N/chunk times y's memory, without a gradient until the call returns.
    """
    y, final_state, borders = _empty(x, B.shape[-1], initial_state, final)
    with torch.cuda.device_of(x):
        run_forward(Inputs(x, dt, A, B, C, D), y, borders, initial_state, final_state)
    return y, final_state, borders


@_forward.register_fake
def _(x, dt, A, B, C, D, initial_state, final):
    return _empty(x, B.shape[-1], initial_state, final)


@operator("ssd_triton_backward")
def _backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, borders: Tensor, dy: Tensor,
    dfinal: Tensor | None, initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, dt, B and C; of A and D by chunk [batch,chunks,2,H]; of the initial state."""
    dx, ddt, dB, dC, sums, dinitial = _empty_gradients(x, dt, B, C, initial)
    with torch.cuda.device_of(x):
        run_backward(Inputs(x, dt, A, B, C, D), borders, dy, dfinal, dx, ddt, dB, dC, sums, dinitial)
    return dx, ddt, dB, dC, sums, dinitial


@_backward.register_fake
def _(x, dt, A, B, C, D, borders, dy, dfinal, initial):
    return _empty_gradients(x, dt, B, C, initial)


def _setup_context(ctx, inputs, output):
    *tensors, initial_state, final = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.initial, ctx.final = initial_state is not None, final


def _autograd(ctx, dy, dfinal, _dborders):
    *inputs, borders = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    grads = _backward(*inputs, borders, dy, dfinal if ctx.final else None, ctx.initial)
    dx, ddt, dB, dC, sums, dinitial = grads
    A, D = inputs[2], inputs[5]
    dA, dD = by_model(sums, A.shape[0], own=2).unbind(1)
    dD = None if D is None else dD.to(D.dtype)
    return dx, ddt, dA.to(A.dtype), dB, dC, dD, dinitial if ctx.initial else None, None


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
