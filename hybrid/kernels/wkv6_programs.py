"""The RWKV-6 recurrence as one Triton kernel each way, three for long sequences.

FLA's kernels split the work over a dozen launches, which cost more than the arithmetic for short sequences. Here a
program walks chunks of one head of one sequence with the state in registers; only inputs, outputs and the states at
chunk borders, which the backward pass needs, touch memory. Several programs share a sequence: of a short one each goes
over what comes before its own chunks for the state alone, of a long one two kernels before it find all their states.

With S the state that enters a chunk, and of its log decays w: before_i = w_1 + ... + w_{i-1}, upto_j = w_1 + ... + w_j
and total = upto_C::

    o_i = (r_i exp(before_i)) S + sum_{j<i} A_ij v_j + (r_i . u k_i) v_i,  A_ij = sum_k r_ik k_jk exp(before_i - upto_j)
    S'  = exp(total) S + sum_j (k_j exp(total - upto_j))^T v_j

Every exponent is at most zero and is a sum of the decays that are in it, or such a sum less its own first or last
term, never a difference of two sums: no decay overflows, and small ones keep their digits beside large ones. For A, a
chunk is halved again and again. A pair of steps i > j is parted at one of these levels, i in a right half and j in
the left one beside it; between them lie the steps before i in its half and those after j in its. So with d_i the decay
of a step's own side, A_ij = (r_i d_i) . (k_j d_j): each level is one product of tiles. Pairs of neighbours, the last
level, have nothing between them.

The gradient of w_t sums every term whose exponent holds w_t, level by level, as products with ones and zeros. No term
without w_t is in these sums, so what cancels has all been decayed, and strong decays keep their digits.

Channels k do not mix except in o and dv: where K is large they are shared out over programs, and torch sums o and dv.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid.kernels.tiles import LOWEST, load, store


@triton.jit
def _halves(HALF: tl.constexpr, C: tl.constexpr):
    """The blocks of two halves that a chunk of ``C`` steps falls into.

    Between a step of the right half and one of the left lie the steps before the one in its half and those after the
    other in its: ``within`` [C,C] has a one where the decay of a step (column) counts for a step (row). ``pairs`` [C,C]
    tells the steps of right halves (rows) and those of the left halves of the same blocks (columns).
    """
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    block = i // (2 * HALF) == j // (2 * HALF)
    right_i, right_j = i % (2 * HALF) >= HALF, j % (2 * HALF) >= HALF
    within = block & ((right_i & right_j & (j < i)) | (~right_i & ~right_j & (j > i)))
    return tl.where(within, 1.0, 0.0), block & right_i & ~right_j


@triton.jit
def _neighbours(C: tl.constexpr):
    """The last level of halving: odd steps (rows) and the even ones before them (columns)."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return (i == j + 1) & (i % 2 == 1)


@triton.jit
def _log_decays(w_ptr, first, stop, w_step, width, RAW: tl.constexpr, STEPS: tl.constexpr, BK: tl.constexpr):
    """w [STEPS,BK], at least ``LOWEST`` and zero beyond the end; of ``RAW`` numbers x it is -exp(x)."""
    w = load(w_ptr, first, stop, w_step, width, STEPS, BK).to(tl.float32)
    if RAW:
        here = first + tl.arange(0, STEPS) < stop
        w = tl.where(here[:, None], -tl.exp(w), 0.0)
    return tl.maximum(w, LOWEST)


@triton.jit
def _read(a_ptr, b_ptr, w_ptr, first, stop, a_step, b_step, w_step, width, V, BACK: tl.constexpr, RAW: tl.constexpr,
          PRECISION: tl.constexpr, STEPS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """What the steps from ``first``, before ``stop``, leave of a state [BK] and add to it; a are keys, b values.

    With ``BACK`` the same of the gradient of the state after them, for that before them; a are receptances, b the
    gradients of outputs.
    """
    a = load(a_ptr, first, stop, a_step, width, STEPS, BK).to(tl.float32)
    w = _log_decays(w_ptr, first, stop, w_step, width, RAW, STEPS, BK)
    b = load(b_ptr, first, stop, b_step, V, STEPS, BV).to(tl.float32)
    faded = a * tl.exp(tl.minimum(tl.cumsum(w, 0, reverse=not BACK) - w, 0.0))
    return tl.exp(tl.sum(w, 0)), tl.dot(tl.trans(faded), b, input_precision=PRECISION)


@triton.jit
def wkv6_parts_kernel(
    a_ptr, b_ptr, w_ptr, states_ptr, left_ptr, T, H, K, V, parts,
    a_batch, a_step, b_batch, b_step, w_batch, w_step,
    PRECISION: tl.constexpr, STEPS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BACK: tl.constexpr,
    RAW: tl.constexpr,
):  # fmt: skip
    """What each ``STEPS`` steps leave of a state and add to it, as ``carry`` takes it; a and b are as in ``_read``."""
    head = tl.program_id(0)
    n = tl.program_id(1) + 1 if BACK else tl.program_id(1)  # nobody asks for the last one
    to = n - 1 if BACK else n + 1
    sequence = (head // H).to(tl.int64)
    h = head % H
    k0 = tl.program_id(2) * BK
    width = K - k0
    a_ptr += sequence * a_batch + h * K + k0
    w_ptr += sequence * w_batch + h * K + k0
    b_ptr += sequence * b_batch + h * V
    left, added = _read(a_ptr, b_ptr, w_ptr, n * STEPS, T, a_step, b_step, w_step, width, V, BACK, RAW, PRECISION,
                        STEPS, BK, BV)  # fmt: skip
    before = head.to(tl.int64) * parts
    channel = tl.arange(0, BK)
    tl.store(left_ptr + (before + n) * K + k0 + channel, left, mask=channel < width)
    store(states_ptr + (before + to) * K * V + k0 * V, added, 0, width, V, V, BK, BV)


@triton.jit
def _place(r_ptr, k_ptr, v_ptr, w_ptr, u_ptr, H, K, V, u_model, sequences_per_u, r_batch, k_batch, v_batch, w_batch,
           BK: tl.constexpr):  # fmt: skip
    """Sequence, head, first channel and channels left of this program, where its inputs begin, and its bonus [BK]."""
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    k0 = tl.program_id(2) * BK
    width = K - k0
    of_keys = h * K + k0
    channel = tl.arange(0, BK)
    u = tl.load(u_ptr + b // sequences_per_u * u_model + of_keys + channel, mask=channel < width, other=0.0)
    r_ptr += b * r_batch + of_keys
    k_ptr += b * k_batch + of_keys
    v_ptr += b * v_batch + h * V
    w_ptr += b * w_batch + of_keys
    return b, h, k0, width, r_ptr, k_ptr, v_ptr, w_ptr, u.to(tl.float32)


@triton.jit
def _chunk(r_ptr, k_ptr, v_ptr, w_ptr, first, T, V, width, r_step, k_step, v_step, w_step,
           RAW: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """The chunk's r, k, v and w, the decays to each step from the chunk's start and from it to the end, and of all."""
    r = load(r_ptr, first, T, r_step, width, C, BK).to(tl.float32)
    k = load(k_ptr, first, T, k_step, width, C, BK).to(tl.float32)
    w = _log_decays(w_ptr, first, T, w_step, width, RAW, C, BK)
    v = load(v_ptr, first, T, v_step, V, C, BV).to(tl.float32)
    entering = tl.exp(tl.minimum(tl.cumsum(w, 0) - w, 0.0))
    leaving = tl.exp(tl.minimum(tl.cumsum(w, 0, reverse=True) - w, 0.0))
    return r, k, v, w, entering, leaving, tl.exp(tl.sum(w, 0))


@triton.jit
def wkv6_forward_kernel(
    r_ptr, k_ptr, v_ptr, w_ptr, u_ptr, initial_ptr, starts_ptr, o_ptr, final_ptr, borders_ptr,
    T, H, K, V, u_model, sequences_per_u, chunks, chunks_per_program, o_part,
    r_batch, r_step, k_batch, k_step, v_batch, v_step, w_batch, w_step,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, SAVE: tl.constexpr, GIVEN: tl.constexpr,
    RAW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b, h, k0, width, r_ptr, k_ptr, v_ptr, w_ptr, u = _place(
        r_ptr, k_ptr, v_ptr, w_ptr, u_ptr, H, K, V, u_model, sequences_per_u, r_batch, k_batch, v_batch, w_batch, BK
    )
    o_ptr += tl.program_id(2).to(tl.int64) * o_part + (b * T * H + h) * V
    state_at = head.to(tl.int64) * K * V + k0 * V

    start = tl.program_id(1) * chunks_per_program
    stop = tl.minimum(start + chunks_per_program, chunks)
    if GIVEN:
        at = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * K * V + k0 * V
        state = load(starts_ptr + at, 0, width, V, V, BK, BV)
    else:
        state = tl.zeros((BK, BV), dtype=tl.float32)
        if INITIAL:
            state += load(initial_ptr + state_at, 0, width, V, V, BK, BV).to(tl.float32)
        for first in range(0, start * C, AHEAD):  # what came before this program's chunks
            left, added = _read(k_ptr, v_ptr, w_ptr, first, start * C, k_step, v_step, w_step, width, V, False, RAW,
                                PRECISION, AHEAD, BK, BV)  # fmt: skip
            state = state * left[:, None] + added

    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    for n in range(start, stop):
        first = n * C
        r, k, v, w, entering, leaving, total = _chunk(
            r_ptr, k_ptr, v_ptr, w_ptr, first, T, V, width, r_step, k_step, v_step, w_step, RAW, C, BK, BV
        )
        if SAVE:
            at = (head.to(tl.int64) * chunks + n) * K * V + k0 * V
            store(borders_ptr + at, state, 0, width, V, V, BK, BV)
        scores = tl.where(i == j, tl.sum(r * u[None, :] * k, 1)[:, None], 0.0)
        for level in tl.static_range(1, LEVELS + 1):
            within, pairs = _halves(C >> level, C)
            decay = tl.exp(tl.dot(within, w, input_precision="tf32x3"))
            scores += tl.where(pairs, tl.dot(r * decay, tl.trans(k * decay), input_precision=PRECISION), 0.0)
        scores += tl.where(_neighbours(C), tl.dot(r, tl.trans(k), input_precision=PRECISION), 0.0)
        o = tl.dot(scores, v, input_precision=PRECISION)
        o += tl.dot(r * entering, state, input_precision=PRECISION)
        store(o_ptr, o, first, T, H * V, V, C, BV)
        state = state * total[:, None] + tl.dot(tl.trans(k * leaving), v, input_precision=PRECISION)
    if FINAL and stop == chunks:
        store(final_ptr + state_at, state, 0, width, V, V, BK, BV)


@triton.jit
def wkv6_backward_kernel(
    r_ptr, k_ptr, v_ptr, w_ptr, u_ptr, borders_ptr, do_ptr, dfinal_ptr, ends_ptr,
    dr_ptr, dk_ptr, dv_ptr, dw_ptr, du_ptr, dinitial_ptr,
    T, H, K, V, u_model, sequences_per_u, chunks, chunks_per_program, dv_part,
    r_batch, r_step, k_batch, k_step, v_batch, v_step, w_batch, w_step, do_batch, do_step,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, GIVEN: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b, h, k0, width, r_ptr, k_ptr, v_ptr, w_ptr, u = _place(
        r_ptr, k_ptr, v_ptr, w_ptr, u_ptr, H, K, V, u_model, sequences_per_u, r_batch, k_batch, v_batch, w_batch, BK
    )
    do_ptr += b * do_batch + h * V
    out = (b * T * H + h) * K + k0
    dv_ptr += tl.program_id(2).to(tl.int64) * dv_part + (b * T * H + h) * V
    state_at = head.to(tl.int64) * K * V + k0 * V
    channel = tl.arange(0, BK)

    start = tl.program_id(1) * chunks_per_program
    stop = tl.minimum(start + chunks_per_program, chunks)
    if GIVEN:  # dstate is the gradient of the state that leaves the chunk
        at = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * K * V + k0 * V
        dstate = load(ends_ptr + at, 0, width, V, V, BK, BV)
    else:
        dstate = tl.zeros((BK, BV), dtype=tl.float32)
        if FINAL:
            dstate += load(dfinal_ptr + state_at, 0, width, V, V, BK, BV).to(tl.float32)
        blocks = tl.cdiv(tl.maximum(T - stop * C, 0), AHEAD)
        for m in range(0, blocks):  # what comes after this program's chunks, from the end
            first = stop * C + (blocks - 1 - m) * AHEAD
            left, added = _read(r_ptr, do_ptr, w_ptr, first, T, r_step, do_step, w_step, width, V, True, RAW,
                                PRECISION, AHEAD, BK, BV)  # fmt: skip
            dstate = dstate * left[:, None] + added

    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    du = tl.zeros((BK,), dtype=tl.float32)
    for m in range(0, stop - start):
        n = stop - 1 - m
        first = n * C
        r, k, v, w, entering, leaving, total = _chunk(
            r_ptr, k_ptr, v_ptr, w_ptr, first, T, V, width, r_step, k_step, v_step, w_step, RAW, C, BK, BV
        )
        do = load(do_ptr, first, T, do_step, V, C, BV).to(tl.float32)
        at = (head.to(tl.int64) * chunks + n) * K * V + k0 * V
        state = load(borders_ptr + at, 0, width, V, V, BK, BV)

        dscores = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        own = tl.sum(tl.where(i == j, dscores, 0.0), 1)[:, None]
        dr_state = tl.dot(do, tl.trans(state), input_precision=PRECISION) * entering
        dk_state = tl.dot(v, tl.trans(dstate), input_precision=PRECISION) * leaving
        dr = dr_state + own * u[None, :] * k
        dk = dk_state + own * u[None, :] * r
        du += tl.sum(own * r * k, 0)
        # What later steps and what earlier steps give to each, as products with ones and zeros rather than differences
        # of running sums: taking a term off a running sum would leave its rounding behind.
        dw = tl.dot(tl.where(i < j, 1.0, 0.0), r * dr_state, input_precision=PRECISION)
        dw += tl.dot(tl.where(i > j, 1.0, 0.0), k * dk_state, input_precision=PRECISION)
        dw += (total * tl.sum(state * dstate, 1))[None, :]
        scores = tl.where(i == j, tl.sum(r * u[None, :] * k, 1)[:, None], 0.0)
        for level in tl.static_range(1, LEVELS + 1):
            within, pairs = _halves(C >> level, C)
            decay = tl.exp(tl.dot(within, w, input_precision="tf32x3"))
            r_decayed, k_decayed = r * decay, k * decay
            scores += tl.where(pairs, tl.dot(r_decayed, tl.trans(k_decayed), input_precision=PRECISION), 0.0)
            dpairs = tl.where(pairs, dscores, 0.0)
            dr_level = tl.dot(dpairs, k_decayed, input_precision=PRECISION) * decay
            dk_level = tl.dot(tl.trans(dpairs), r_decayed, input_precision=PRECISION) * decay
            dr += dr_level
            dk += dk_level
            dw += tl.dot(tl.trans(within), r * dr_level + k * dk_level, input_precision=PRECISION)
        neighbours = _neighbours(C)
        scores += tl.where(neighbours, tl.dot(r, tl.trans(k), input_precision=PRECISION), 0.0)
        dpairs = tl.where(neighbours, dscores, 0.0)
        dr += tl.dot(dpairs, k, input_precision=PRECISION)
        dk += tl.dot(tl.trans(dpairs), r, input_precision=PRECISION)
        # Where nothing is kept there is no gradient, nor may rounding be one: the step's input can be huge.
        dw = tl.where(w > LOWEST, dw * w if RAW else dw, 0.0)
        store(dw_ptr + out, dw, first, T, H * K, width, C, BK)
        dv = tl.dot(tl.trans(scores), do, input_precision=PRECISION)
        dv += tl.dot(k * leaving, dstate, input_precision=PRECISION)
        store(dr_ptr + out, dr, first, T, H * K, width, C, BK)
        store(dk_ptr + out, dk, first, T, H * K, width, C, BK)
        store(dv_ptr, dv, first, T, H * V, V, C, BV)
        dstate = dstate * total[:, None] + tl.dot(tl.trans(r * entering), do, input_precision=PRECISION)

    programs = tl.num_programs(1)
    tl.store(du_ptr + ((b * programs + tl.program_id(1)) * H + h) * K + k0 + channel, du, mask=channel < width)
    if INITIAL and start == 0:
        store(dinitial_ptr + state_at, dstate, 0, width, V, V, BK, BV)
