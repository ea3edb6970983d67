"""The Mamba-2 recurrence as one to four Triton kernels each way (why: ``wkv6_programs.py``).

A program has one chunk of one head of one sequence. With h the state that enters it, a_t = dt_t A,
upto_i = a_1 + ... + a_i and total = upto_L::

    y_i = sum_{j<=i} (C_i . B_j) exp(upto_i - upto_j) dt_j x_j + exp(upto_i) h C_i + D x_i
    h'  = exp(total) h + sum_j exp(total - upto_j) dt_j x_j B_j^T

Where the sequence is one chunk and no state goes in or out, only the first sum is left. Else a kernel before it walks
the chunks for the states between them, or from the last to the first for their gradients; of few sequences it reads
all chunks at the same time, and another finds the states (``carry``). Products of tiles run in the inputs' precision
(TF32 for float32) and add up in float32; exponents are float32 and at most zero. The gradient of a_t sums every term
whose exponent holds it; the terms i = j hold none and are kept out of the sums that cancel.

The heads of a group share B and C. Backward, a head's program writes the gradients of its C_i . B_j, L / 2N as many as
those of B and C, and another kernel adds these up over the heads and makes the products that remain.

RAW means numbers as a layer of Mamba-2 holds them: A is the logarithm of -A, and gradients are those of the logarithm
and of what dt is the softplus of (``ssd_steps_kernel``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid.kernels.tiles import LOWEST, load, store


@triton.jit
def ssd_steps_kernel(raw_ptr, bias_ptr, dt_ptr, steps, H, bias_model, raw_step, ROWS: tl.constexpr, BH: tl.constexpr):
    """dt = softplus(raw + bias), float32, for some of a model's steps.

    Not where dt is read: the compiler would do it again for every row and column of a tile that dt is multiplied with.
    """
    model = tl.program_id(1).to(tl.int64)
    bias = tl.load(bias_ptr + model * bias_model + tl.arange(0, BH), mask=tl.arange(0, BH) < H, other=0.0)
    first = tl.program_id(0) * ROWS
    u = load(raw_ptr + model * steps * raw_step, first, steps, raw_step, H, ROWS, BH).to(tl.float32)
    u += bias.to(tl.float32)[None, :]
    grown = tl.exp(tl.minimum(u, 20.0))
    one = 1.0 + grown
    # log(1 + grown) to the last digit: the last factor makes up for what rounding did to the sum.
    small = tl.where(one == 1.0, grown, tl.log(one) * (grown / tl.where(one == 1.0, 1.0, one - 1.0)))
    store(dt_ptr + model * steps * H, tl.where(u <= 20.0, small, u), first, steps, H, H, ROWS, BH)


@triton.jit
def _steps(dt_ptr, A_ptr, b, h, model, A_model, first, T, dt_batch, dt_step, RAW: tl.constexpr, L: tl.constexpr):
    """A, and of L steps from ``first`` on dt (zero beyond the last), a and their sums."""
    row = first + tl.arange(0, L)
    A = tl.load(A_ptr + model * A_model + h).to(tl.float32)
    if RAW:
        A = -tl.exp(A)
    at = dt_ptr + b * dt_batch + h + row.to(tl.int64) * dt_step
    dt = tl.load(at, mask=row < T, other=0.0).to(tl.float32)
    a = tl.maximum(dt * A, LOWEST)
    return A, dt, a, tl.cumsum(a, 0)


@triton.jit
def ssd_walk_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, outer_ptr, states_ptr, last_ptr, left_ptr,
    T, H, G, P, N, sequences_per_model, chunks, A_model, each,
    x_batch, x_step, dt_batch, dt_step, B_batch, B_step,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, OUTER: tl.constexpr, LAST: tl.constexpr, LEFT: tl.constexpr,
    BACK: tl.constexpr, RAW: tl.constexpr,
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
    B_ptr += b * B_batch + h // (H // G) * N + column
    before = head.to(tl.int64) * chunks
    model = b // sequences_per_model
    state = tl.zeros((BP, BN), dtype=tl.float32)
    if OUTER:
        state += load(outer_ptr + head.to(tl.int64) * P * N + column, 0, P, N, width, BP, BN).to(tl.float32)
    if start == 0 and not LEFT:
        at = before + chunks - 1 if BACK else before
        store(states_ptr + at * P * N + column, state, 0, P, N, width, BP, BN)
    for m in range(start, stop):
        n = chunks - 1 - m if BACK else m
        _, dt, a, upto = _steps(dt_ptr, A_ptr, b, h, model, A_model, n * L, T, dt_batch, dt_step, RAW, L)
        x = load(x_ptr, n * L, T, x_step, P, L, BP).to(tl.float32)
        B = load(B_ptr, n * L, T, B_step, width, L, BN).to(low)
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
def _chunk(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, T, H, G, P, N, sequences_per_model, A_model,
           x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step,
           RAW: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """This program's sequence, head and model, the head's A, and of the chunk dt, x, B, C, a and upto.

    Last two [L,L], zero but for j <= i: decay, exp(upto_i - upto_j), and (C_i . B_j) decay.
    """
    low = x_ptr.dtype.element_ty
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    model = b // sequences_per_model
    first = tl.program_id(1) * L
    group = h // (H // G)
    B = load(B_ptr + b * B_batch + group * N, first, T, B_step, N, L, BN).to(low)
    C = load(C_ptr + b * C_batch + group * N, first, T, C_step, N, L, BN).to(low)
    scores = tl.dot(C, tl.trans(B))
    x = load(x_ptr + b * x_batch + h * P, first, T, x_step, P, L, BP)
    A, dt, a, upto = _steps(dt_ptr, A_ptr, b, h, model, A_model, first, T, dt_batch, dt_step, RAW, L)
    gap = tl.minimum(upto[:, None] - upto[None, :], 0.0)
    causal = tl.arange(0, L)[:, None] >= tl.arange(0, L)[None, :]
    decay = tl.exp(tl.where(causal, gap, float("-inf")))
    return b, h, model, A, dt, x, B, C, a, upto, decay, scores * decay


@triton.jit
def ssd_forward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, borders_ptr, y_ptr,
    T, H, G, P, N, sequences_per_model, chunks, A_model, D_model,
    x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step,
    RAW: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    low = x_ptr.dtype.element_ty
    n = tl.program_id(1)
    b, h, model, _, dt, x, _, C, _, upto, _, scores = _chunk(
        x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, T, H, G, P, N, sequences_per_model, A_model,
        x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step, RAW, L, BP, BN,
    )  # fmt: skip
    y = tl.dot((scores * dt[None, :]).to(low), x)
    if SKIP:
        y += tl.load(D_ptr + model * D_model + h).to(tl.float32) * x.to(tl.float32)
    if STATE:
        state = load(borders_ptr + ((b * H + h) * chunks + n) * P * N, 0, P, N, N, BP, BN)
        y += tl.dot(C, tl.trans(state)) * tl.exp(upto)[:, None]
    store(y_ptr + (b * T * H + h) * P, y, n * L, T, H * P, P, L, BP)


@triton.jit
def ssd_backward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, borders_ptr, dstates_ptr, dy_ptr,
    dx_ptr, ddt_ptr, dscores_ptr, sums_ptr,
    T, H, G, P, N, sequences_per_model, chunks, A_model, D_model, fill,
    x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step, dy_batch, dy_step,
    dx_batch, dx_step, ddt_batch, ddt_step,
    RAW: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """dx, ddt, of the scores C_i . B_j what is left for ``ssd_shared_backward_kernel``, and a chunk's sums for A and D.

    RAW, these are followed by that for the bias, and ddt by ``fill`` zeros, fewer than 16.
    """
    low = x_ptr.dtype.element_ty
    b, h, model, A, dt, x, B, C, a, upto, decay, scores = _chunk(
        x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, T, H, G, P, N, sequences_per_model, A_model,
        x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step, RAW, L, BP, BN,
    )  # fmt: skip
    n = tl.program_id(1)
    sums_ptr += (b * chunks + n) * (3 if RAW else 2) * H + h
    at = (b * H + h) * chunks + n
    first = n * L
    row = first + tl.arange(0, L)
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    dy = load(dy_ptr + b * dy_batch + h * P, first, T, dy_step, P, L, BP).to(low)
    # Of (weighted scores) dt. Of float32 three products of TF32: the gradients of all but x are made of these.
    dweighted = tl.dot(dy, tl.trans(x), input_precision="tf32x3")
    if SKIP:
        tl.store(sums_ptr + H, tl.sum(tl.sum(tl.where(i == j, dweighted, 0.0), 1), 0))
    dscores = dweighted * decay * dt[None, :]
    tl.store(dscores_ptr + at * L * L + i * L + j, dscores.to(low))
    through = scores * dweighted  # per unit of dt_j
    ddt = tl.sum(through, 0)
    through = tl.where(i > j, through * dt[None, :], 0.0)
    later = tl.sum(through, 1) - tl.sum(through, 0)  # counts for every step up to this one
    dx = tl.dot(tl.trans((scores * dt[None, :]).to(low)), dy)
    if SKIP:
        dx += tl.load(D_ptr + model * D_model + h).to(tl.float32) * dy.to(tl.float32)
    if STATE:
        total = tl.sum(a, 0)
        dstate = load(dstates_ptr + at * P * N, 0, P, N, N, BP, BN)
        through_state = tl.dot(B, tl.trans(dstate)) * tl.exp(tl.minimum(total - upto, 0.0))[:, None]
        dx += through_state * dt[:, None]
        earlier = tl.sum(through_state * x.to(tl.float32), 1)  # times dt counts for every step after this one
        ddt += earlier
    store(dx_ptr + b * dx_batch + h * P, dx, first, T, dx_step, P, L, BP)
    if STATE:
        state = load(borders_ptr + at * P * N, 0, P, N, N, BP, BN)
        from_state = tl.dot(C, tl.trans(state)) * tl.exp(upto)[:, None]
        later += tl.sum(from_state * dy.to(tl.float32), 1)
        da = tl.sum(tl.where(i >= j, later[:, None], (earlier * dt)[:, None]), 0)
        if BP * BN <= 64 * 128:
            product = tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
        else:  # which do not fit into registers side by side
            product = 0.0
            for p in range(0, BP, 16):
                some = load(borders_ptr + at * P * N, p, P, N, N, 16, BN).to(tl.float32)
                some *= load(dstates_ptr + at * P * N, p, P, N, N, 16, BN).to(tl.float32)
                product += tl.sum(tl.sum(some, 1), 0)
        da += tl.exp(total) * product
    else:
        da = tl.sum(tl.where(i >= j, later[:, None], 0.0), 0)
    # Where nothing is kept there is no gradient, nor may rounding be one: dt can be huge.
    da = tl.where(a > LOWEST, da, 0.0)
    dA = tl.sum(da * dt, 0)
    ddt += da * A
    ddt_ptr += b * ddt_batch + row.to(tl.int64) * ddt_step
    if RAW:
        dA *= A
        # The derivative of softplus, a sigmoid, is 1 - exp(-dt): of small dt by its series, which loses no digits.
        series = dt * (1.0 - dt / 2.0 * (1.0 - dt / 3.0 * (1.0 - dt / 4.0 * (1.0 - dt / 5.0))))
        ddt *= tl.where(dt < 0.1, series, 1.0 - tl.exp(-dt))
        tl.store(sums_ptr + 2 * H, tl.sum(ddt, 0))
        if h == H - 1:
            column = tl.arange(0, 16)[None, :]
            zeros = tl.zeros((L, 16), dtype=ddt_ptr.dtype.element_ty)
            tl.store(ddt_ptr[:, None] + H + column, zeros, mask=(row < T)[:, None] & (column < fill))
    tl.store(sums_ptr, dA)
    tl.store(ddt_ptr + h, ddt.to(ddt_ptr.dtype.element_ty), mask=row < T)


@triton.jit
def ssd_shared_backward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, borders_ptr, dstates_ptr, dy_ptr, dscores_ptr, dB_ptr, dC_ptr,
    T, H, G, P, N, sequences_per_model, chunks, A_model,
    x_batch, x_step, dt_batch, dt_step, B_batch, B_step, C_batch, C_step, dy_batch, dy_step,
    dB_batch, dB_step, dC_batch, dC_step,
    RAW: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """One chunk's gradients of what the heads of a group share: of B (the third of the grid's axes 0) or C (1)."""
    low = x_ptr.dtype.element_ty
    b = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    n = tl.program_id(1)
    first = n * L
    model = b // sequences_per_model
    heads = H // G
    begin = group * heads
    own = tl.arange(0, L)[:, None] * L + tl.arange(0, L)[None, :]
    dscores = tl.zeros((L, L), dtype=tl.float32)
    for h in range(begin, begin + heads):
        dscores += tl.load(dscores_ptr + ((b * H + h) * chunks + n) * L * L + own).to(tl.float32)
    if tl.program_id(2) == 0:
        C = load(C_ptr + b * C_batch + group * N, first, T, C_step, N, L, BN).to(low)
        dB = tl.dot(tl.trans(dscores.to(low)), C)
        if STATE:
            for h in range(begin, begin + heads):
                _, dt, a, upto = _steps(dt_ptr, A_ptr, b, h, model, A_model, first, T, dt_batch, dt_step, RAW, L)
                x = load(x_ptr + b * x_batch + h * P, first, T, x_step, P, L, BP)
                dstate = load(dstates_ptr + ((b * H + h) * chunks + n) * P * N, 0, P, N, N, BP, BN)
                share = dt * tl.exp(tl.minimum(tl.sum(a, 0) - upto, 0.0))
                dB += tl.dot(x, dstate) * share[:, None]
        store(dB_ptr + b * dB_batch + group * N, dB, first, T, dB_step, N, L, BN)
    else:
        B = load(B_ptr + b * B_batch + group * N, first, T, B_step, N, L, BN).to(low)
        dC = tl.dot(dscores.to(low), B)
        if STATE:
            for h in range(begin, begin + heads):
                _, _, _, upto = _steps(dt_ptr, A_ptr, b, h, model, A_model, first, T, dt_batch, dt_step, RAW, L)
                dy = load(dy_ptr + b * dy_batch + h * P, first, T, dy_step, P, L, BP).to(low)
                state = load(borders_ptr + ((b * H + h) * chunks + n) * P * N, 0, P, N, N, BP, BN)
                dC += tl.dot(dy, state) * tl.exp(upto)[:, None]
        store(dC_ptr + b * dC_batch + group * N, dC, first, T, dC_step, N, L, BN)
