"""Loads and stores of [rows, columns] tiles and what else the Triton kernels share.

A tile's rows are steps of one sequence and head, ``stride`` elements apart; its columns are contiguous. What lies
outside reads as zero and is not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels.ssd import LOWEST as LOWEST_DECAY

LOWEST = tl.constexpr(LOWEST_DECAY)


@triton.jit
def load(pointer, first, stop, stride, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows ``first`` to ``first + ROWS`` as far as they lie before ``stop``, in the dtype they are stored in."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < stop)[:, None] & (column < width)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store(pointer, value, first, stop, stride, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < stop)[:, None] & (column < width)[None, :]
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + row.to(tl.int64)[:, None] * stride + column[None, :], value, mask=inside)


@triton.jit
def silu(u):
    """SiLU(u) and its derivative."""
    share = tl.sigmoid(u)
    return u * share, share * (1.0 + u * (1.0 - share))


def with_dense_heads(x: Tensor) -> Tensor:
    """x [B,T,H,D] itself where the heads of a step lie side by side, as the kernels need it, else a copy."""
    D = x.shape[-1]
    dense = (x.stride(-1) == 1 or D == 1) and (x.stride(-2) == D or x.shape[-2] == 1)
    return x if dense else x.contiguous()


def with_dense_rows(x: Tensor) -> Tensor:
    """x [B,T,D] itself where the numbers of a step lie side by side, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def with_dense_models(x: Tensor) -> Tensor:
    """x [models,...] itself where the numbers of a model lie side by side, else a copy.

    What models hold themselves are views into a larger tensor, ``x.stride(0)`` from one model to the next.
    """
    return x if x[0].is_contiguous() else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Batch and step strides of each tensor, in the kernels' order."""
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def power_of_two(size: int) -> int:
    """The block size for ``size`` elements: a power of two, at least 16 (the smallest side of a tile product)."""
    return max(16, triton.next_power_of_2(size))


def precision(*inputs: Tensor) -> str:
    """Of products of tiles: TF32 holds the digits of half-precision inputs, three of them nearly those of float32."""
    return "tf32x3" if any(x.dtype == torch.float32 for x in inputs) else "tf32"


def check_dtypes(op: str, *tensors: Tensor) -> None:
    """Raises ``ValueError`` for inputs whose precision the kernels would lose, or that are no floating numbers."""
    for x in tensors:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"the triton kernels of {op} take float32, bfloat16 or float16, got {x.dtype}")
