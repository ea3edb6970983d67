"""States carried along a long sequence whose parts were read at the same time, for both recurrences.

A linear recurrence is a scan: part n of a sequence turns the state S before it into ``left_n S + added_n``, and two
such steps are one again (Blelloch 1990, "Prefix sums and their applications", section 1.4). So all parts can be read at
once, each from an empty state, and what remains is a scan over the parts of numbers that do not meet each other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_PARTS, _NUMBERS = 8, 256  # of a sequence at once, of a state a program (of one warp)


@triton.jit
def _part(states_ptr, left_ptr, m, parts, head, size, rows, number, BACK: tl.constexpr):
    """Where the m-th part's numbers lie, what the part before it left of a state and what it added."""
    inside = (number < size) & (m < parts)
    between = inside & (m > 0)
    n = parts - 1 - m if BACK else m
    before = n + 1 if BACK else n - 1
    at = states_ptr + (head * parts + n) * size + number
    left = tl.load(left_ptr + (head * parts + before) * rows + number // (size // rows), mask=between, other=1.0)
    return at, inside, left, tl.load(at, mask=between, other=0.0).to(tl.float32)


@triton.jit
def carry_kernel(
    states_ptr, left_ptr, outer_ptr, last_ptr, parts, size, rows,
    OUTER: tl.constexpr, LAST: tl.constexpr, BACK: tl.constexpr, PARTS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    state = tl.zeros((NUMBERS,), dtype=tl.float32)
    if OUTER:
        state += tl.load(outer_ptr + head * size + number, mask=number < size, other=0.0).to(tl.float32)
    for start in range(0, parts, PARTS):
        # All are read before one is written, so that the reads are under way together.
        read = ()
        for i in tl.static_range(PARTS):
            part = _part(states_ptr, left_ptr, start + i, parts, head, size, rows, number, BACK)
            read = read + (part,)  # noqa: RUF005 (Triton unpacks no tuples)
        for i in tl.static_range(PARTS):
            at, inside, left, added = read[i]
            state = state * left + added
            tl.store(at, state.to(states_ptr.dtype.element_ty), mask=inside)
    if LAST:
        inside = number < size
        final = 0 if BACK else parts - 1
        left = tl.load(left_ptr + (head * parts + final) * rows + number // (size // rows), mask=inside, other=0.0)
        added = tl.load(last_ptr + head * size + number, mask=inside, other=0.0)
        tl.store(last_ptr + head * size + number, state * left + added, mask=inside)


def carry(states: Tensor, left: Tensor, outer: Tensor | None, last: Tensor, back: bool) -> None:
    """Turn what parts add to a state into the states before them, in place, on the current device.

    Args:
        states: [batch, heads, parts, rows, columns]; at part n what part n - 1 adds. At the first part nothing is read.
        left: [batch, heads, parts, rows] or [batch, heads, parts]: what a part leaves of each row, or of the state.
        outer: [batch, heads, rows, columns], the state before the first part; none is zero.
        last: [batch, heads, rows, columns] float32, what the last part adds, to become the state after it; or empty.
        back: the same from the last part to the first: at part n lies what part n + 1 adds, ``outer`` comes after the
            last part, and ``last`` before the first.
    """
    batch, heads, parts = states.shape[:3]
    size = states[0, 0, 0].numel()
    carry_kernel[batch * heads, triton.cdiv(size, _NUMBERS)](
        states, left, outer, last, parts, size, left.shape[3] if left.dim() == 4 else 1,
        OUTER=outer is not None, LAST=last.numel() > 0, BACK=back, PARTS=_PARTS, NUMBERS=_NUMBERS, num_warps=1,
    )  # fmt: skip
