"""The Mamba-2 recurrence as one to three Triton kernels each way (why: ``wkv6_programs.py``).

A program has one chunk of one head of one sequence. With h the state that enters it, a_t = dt_t A,
upto_i = a_1 + ... + a_i and total = upto_L::

    y_i = sum_{j<=i} (C_i . B_j) exp(upto_i - upto_j) dt_j x_j + exp(upto_i) h C_i + D x_i
    h'  = exp(total) h + sum_j exp(total - upto_j) dt_j x_j B_j^T

Where the sequence is one chunk and no state goes in or out, only the first sum is left. Else a kernel before it walks
the chunks for the states between them, or from the last to the first for their gradients; of few sequences it reads
all chunks at the same time, and another finds the states (``carry``). Products of tiles run in the inputs' precision
(TF32 for float32) and add up in float32; exponents are float32 and at most zero. The gradient of a_t sums every term
whose exponent holds it; the terms i = j hold none and are kept out of the sums that cancel. Gradients of B and C are
written per head and summed over the heads of a group by torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid.kernels.tiles import LOWEST, load, store


@triton.jit
def ssd_walk_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, outer_ptr, states_ptr, last_ptr, left_ptr,
    T, H, G, P, N, sequences_per_A, chunks, each, x_batch, x_step, dt_batch, dt_step, B_batch, B_step,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, OUTER: tl.constexpr, LAST: tl.constexpr, LEFT: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """The states that enter the chunks, for some of their columns, and the one that leaves the last of them.

    With ``BACK``, from the last to the first, the gradients of those that leave them, and of the one that enters the
    first; then x are the gradients of outputs, B is C. ``outer`` is what comes from outside of the sequence. A program
    walks ``each`` chunks from an empty state if it is not the first; with one each, and ``left`` written, that is what
    ``carry`` takes.
    """
    low = x_ptr.dtype.element_ty
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = head % H
    column = tl.program_id(1) * BN
    width = N - column
    start = tl.program_id(2) * each
    stop = tl.minimum(start + each, chunks)
    x_ptr += b * x_batch + h * P
    dt_ptr += b * dt_batch + h
    B_ptr += b * B_batch + h // (H // G) * N + column
    before = head.to(tl.int64) * chunks
    A = tl.load(A_ptr + b // sequences_per_A * H + h).to(tl.float32)
    state = tl.zeros((BP, BN), dtype=tl.float32)
    if OUTER:
        state += load(outer_ptr + head.to(tl.int64) * P * N + column, 0, P, N, width, BP, BN).to(tl.float32)
    if start == 0 and not LEFT:
        at = before + chunks - 1 if BACK else before
        store(states_ptr + at * P * N + column, state, 0, P, N, width, BP, BN)
    for m in range(start, stop):
        n = chunks - 1 - m if BACK else m
        row = n * L + tl.arange(0, L)
        dt = tl.load(dt_ptr + row.to(tl.int64) * dt_step, mask=row < T, other=0.0).to(tl.float32)
        x = load(x_ptr, n * L, T, x_step, P, L, BP).to(tl.float32)
        B = load(B_ptr, n * L, T, B_step, width, L, BN).to(low)
        a = tl.maximum(dt * A, LOWEST)
        upto = tl.cumsum(a, 0)
        total = tl.sum(a, 0)
        share = tl.exp(upto) if BACK else dt * tl.exp(tl.minimum(total - upto, 0.0))
        state = state * tl.exp(total) + tl.dot(tl.trans((x * share[:, None]).to(low)), B)
        if LEFT:
            tl.store(left_ptr + before + n, tl.exp(total))
        if m + 1 < chunks:
            at = before + n - 1 if BACK else before + n + 1
            store(states_ptr + at * P * N + column, state, 0, P, N, width, BP, BN)
    if LAST and stop == chunks:
        store(last_ptr + head.to(tl.int64) * P * N + column, state, 0, P, N, width, BP, BN)


@triton.jit
def _chunk(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, T, H, G, P, N, sequences_per_A,
           x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step,
           L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """This program's sequence, head and model, the head's A, and of the chunk dt, x, B, C, a and upto.

    Last decay [L,L], exp(upto_i - upto_j) for j <= i and zero elsewhere.
    """
    low = x_ptr.dtype.element_ty
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    model = b // sequences_per_A
    first = tl.program_id(1) * L
    row = first + tl.arange(0, L)
    group = h // (H // G)
    A = tl.load(A_ptr + model * H + h).to(tl.float32)
    dt = tl.load(dt_ptr + b * dt_batch + h + row.to(tl.int64) * dt_step, mask=row < T, other=0.0).to(tl.float32)
    x = load(x_ptr + b * x_batch + h * P, first, T, x_step, P, L, BP)
    B = load(B_ptr + b * B_batch + group * N, first, T, B_step, N, L, BN).to(low)
    C = load(C_ptr + b * C_batch + group * N, first, T, C_step, N, L, BN).to(low)
    a = tl.maximum(dt * A, LOWEST)
    upto = tl.cumsum(a, 0)
    gap = tl.minimum(upto[:, None] - upto[None, :], 0.0)
    causal = tl.arange(0, L)[:, None] >= tl.arange(0, L)[None, :]
    decay = tl.exp(tl.where(causal, gap, float("-inf")))
    return b, h, model, A, dt, x, B, C, a, upto, decay


@triton.jit
def ssd_forward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, borders_ptr, y_ptr,
    T, H, G, P, N, sequences_per_A, chunks, D_model,
    x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    low = x_ptr.dtype.element_ty
    n = tl.program_id(1)
    b, h, model, _, dt, x, B, C, _, upto, decay = _chunk(
        x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, T, H, G, P, N, sequences_per_A,
        x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step, L, BP, BN,
    )  # fmt: skip
    scores = tl.dot(C, tl.trans(B)) * (decay * dt[None, :])
    y = tl.dot(scores.to(low), x)
    if SKIP:
        y += tl.load(D_ptr + model * D_model + h).to(tl.float32) * x.to(tl.float32)
    if STATE:
        state = load(borders_ptr + ((b * H + h) * chunks + n) * P * N, 0, P, N, N, BP, BN)
        y += tl.dot(C, tl.trans(state)) * tl.exp(upto)[:, None]
    store(y_ptr + (b * T * H + h) * P, y, n * L, T, H * P, P, L, BP)


@triton.jit
def ssd_backward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, borders_ptr, dstates_ptr, dy_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr,
    T, H, G, P, N, sequences_per_A, chunks, D_model,
    x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step, dy_batch, dy_step,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    low = x_ptr.dtype.element_ty
    b, h, model, A, dt, x, B, C, a, upto, decay = _chunk(
        x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, T, H, G, P, N, sequences_per_A,
        x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step, L, BP, BN,
    )  # fmt: skip
    n = tl.program_id(1)
    of_chunk = (b * chunks + n) * H + h
    first = n * L
    row = first + tl.arange(0, L)
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    dy = load(dy_ptr + b * dy_batch + h * P, first, T, dy_step, P, L, BP).to(low)
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
        at = ((b * H + h) * chunks + n) * P * N
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
