"""The RWKV-6 recurrence in plain PyTorch: matrix products inside chunks, one short loop over chunks.

Per head, with state S [K,V], receptance r_t, key k_t, value v_t, log decay w_t <= 0 and bonus u
(Peng et al. 2024, "Eagle and Finch", arXiv:2404.05892, eq. 18-19)::

    o_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
    S_t = diag(exp(w_t)) S_{t-1} + k_t^T v_t

Inside a chunk the weight of step j for step i > j is sum_k r_ik k_jk exp(w_{j+1} + ... + w_{i-1}). Splitting that
exponent at the start of the chunk would need exp of a positive sum and overflow for strong decays. Here neighbouring
blocks are joined again and again, from single steps up to the chunk, and each time the right block attends to the left
one: every pair (i, j) is split where its two blocks meet, so that both factors are at most one whatever the decay. The
exponents are sums inside a block, built up with the blocks: no sum is ever taken off another one, so none loses digits
beside a step that forgets all.

Forward and backward are one operator each: what autograd would keep of the many halves, and fill with zeros and add up
for them, takes longer than the recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hybrid.kernels.chunks import carry_back, carry_forth, register_gradients, to_chunks
from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import register_seeds

CHUNK = 32  # steps a chunk, a power of two


def log_decay(x: Tensor) -> Tensor:
    """The log decay ``-exp(x)`` in float32 of what RWKV-6's layer computes for it."""
    # exp(-exp(30)) is zero in any precision; beyond, the log decay would overflow and its differences be NaN.
    return -torch.exp(x.float().clamp(max=30.0))


def wkv6_torch(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Chunked form on any device; shapes as in ``hybrid.kernels.wkv6``. Computes in float32 (float64 for float64)."""
    T = k.shape[1]
    compute = torch.promote_types(v.dtype, torch.float32)
    r, k, v, w, u = (x.to(compute) for x in (r, k, v, w, u))
    initial_state = None if initial_state is None else initial_state.to(compute)
    if T == 1:
        o, state = _single_step(r, k, v, w, u, initial_state)
        return o, state if output_final_state else None

    chunk = min(CHUNK, 1 << (T - 1).bit_length())
    # The padded steps have k = 0 and w = 0: they leave the state as it is.
    r, k, v, w = (to_chunks(x, chunk) for x in (r, k, v, w))
    # One set of bonuses for the whole batch; stacked models (vmap) have several.
    o, state, _ = _forward(r, k, v, w, u[None], initial_state, output_final_state)
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), state if output_final_state else None


def _single_step(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    r, k, v, w = (x.squeeze(1) for x in (r, k, v, w))
    new = k.unsqueeze(-1) * v.unsqueeze(-2)
    past = new.new_zeros(new.shape) if initial_state is None else initial_state
    o = (r.unsqueeze(-1) * (past + u.unsqueeze(-1) * new)).sum(-2)
    return o.unsqueeze(1), w.exp().unsqueeze(-1) * past + new


def _blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The left and the right ones of neighbouring blocks of ``size`` steps of [...,C,D]: two views [pairs,size,D]."""
    left, right = x.view(-1, 2, size, x.shape[-1]).unbind(1)
    return left, right


def _product(scores: Tensor, x: Tensor) -> Tensor:
    """scores [pairs,size,size] times x [pairs,size,D]."""
    if scores.shape[-1] > 2:
        return scores @ x
    # A batched product of very small matrices costs several times as much as this.
    out = scores[..., :1] * x[:, :1]
    return out if scores.shape[-1] == 1 else out.addcmul_(scores[..., 1:], x[:, 1:])


def _total(x: Tensor) -> Tensor:
    """The sum of the steps of [pairs,size,D], as [pairs,1,D]."""
    if x.shape[1] > 2:
        return x.sum(1, keepdim=True)
    return x if x.shape[1] == 1 else x[:, :1] + x[:, 1:]


class _Decays:
    """What blocks of ``size`` steps keep, as base-2 logarithms; ``join`` makes one block of every two neighbours.

    ``after`` [...,C,K] is what is kept of a step's key until its block ends, the sum of w behind it; ``before``
    [...,C,K] what is kept of a state at the block's start when a step reads it, the sum of w in front of it; ``whole``
    [...,C/size,K] the sum of the block. (Base 2, because PyTorch's exp2 is the faster one.)
    """

    def __init__(self, w: Tensor) -> None:
        self.size = 1
        self.whole = w * math.log2(math.e)
        self.after, self.before = torch.zeros_like(w), torch.zeros_like(w)

    def join(self) -> None:
        first, second = _blocks(self.whole, 1)
        _blocks(self.after, self.size)[0].add_(second)
        _blocks(self.before, self.size)[1].add_(first)
        self.whole = (first + second).view(*self.whole.shape[:-2], -1, self.whole.shape[-1])
        self.size *= 2

    def joins(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Join until blocks have ``steps``; before each time, how left blocks decay until they end and right blocks
        from where they start: two [pairs,size,K], at most 1."""
        while self.size < steps:
            left, right = _blocks(self.after, self.size)[0], _blocks(self.before, self.size)[1]
            yield left.clone().exp2_(), right.clone().exp2_()
            self.join()


def _of_sequences(u: Tensor, B: int) -> Tensor:
    """The bonuses [models,H,K] of every sequence of the models, [B,H,1,1,K]."""
    return u.repeat_interleave(B // u.shape[0], dim=0)[:, :, None, None]


@operator("wkv6_torch")
def _forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B,H,N,C,V], the final state [B,H,K,V] and the states around the chunks [B,H,N+1,K,V].

    r, k, w are [B,H,N,C,K], v [B,H,N,C,V], u [models,H,K], all in one dtype. What is not needed is empty.
    """
    B, _, N, C, _ = r.shape
    r, k, v, w = (x.contiguous() for x in (r, k, v, w))
    o = (r * _of_sequences(u, B) * k).sum(-1, keepdim=True) * v
    decays = _Decays(w)
    for after, before in decays.joins(C):
        (left_k, _), (left_v, _), (_, right_r), (_, right_o) = (_blocks(x, decays.size) for x in (k, v, r, o))
        scores = (right_r * before) @ (left_k * after).mT
        right_o += _product(scores, left_v)

    state, borders = v.new_empty(0), v.new_empty(0)
    if initial_state is not None or N > 1 or final:
        gained = (k * decays.after.exp2()).mT @ v  # [B,H,N,K,V]
        kept = decays.whole.exp2().mT  # [B,H,N,K,1]
        borders = carry_forth(gained, kept, initial_state)
        o += (r * decays.before.exp2()) @ borders[:, :, :-1]
        state = borders[:, :, -1].clone() if final else state
    return o, state, borders


@_forward.register_fake
def _(r, k, v, w, u, initial_state, final):
    B, H, N, _, K = r.shape
    V = v.shape[-1]
    state = v.new_empty((B, H, K, V) if final else (0,))
    needed = initial_state is not None or N > 1 or final
    return v.new_empty(v.shape), state, v.new_empty((B, H, N + 1, K, V) if needed else (0,))


@operator("wkv6_torch_backward")
def _backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, borders: Tensor, do: Tensor, dfinal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of r, k, v, w, of u for every sequence [B,H,K], and of the initial state [B,H,K,V]."""
    B, _, _, C, _ = r.shape
    u = _of_sequences(u, B)
    with torch.autocast(r.device.type, enabled=False):
        r, k, v, w, do = (x.contiguous() for x in (r, k, v, w, do))
        bonus = (do * v).sum(-1, keepdim=True)
        dr, dk, du = bonus * u * k, bonus * u * r, (bonus * r * k).sum((2, 3))
        dv = (r * u * k).sum(-1, keepdim=True) * do

        decays = _Decays(w)
        levels = list(decays.joins(C))
        # The gradients of the decays' logarithms: dwhole at first of the chunk's, below of ever smaller blocks'.
        dinitial = v.new_empty(0)
        if borders.dim() == 1:
            dafter, dbefore, dwhole = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(decays.whole)
        else:
            after, before, kept = decays.after.exp2(), decays.before.exp2(), decays.whole.exp2().mT
            read, entering = r * before, borders[:, :, :-1]
            dread = do @ entering.mT
            dr.addcmul_(dread, before)
            dbefore = dread.mul_(read)
            dleft = read.mT @ do  # of the states that chunks begin with; below, of those that they end with
            dinitial = carry_back(dleft, kept, dfinal)
            gain = k * after
            dgain = v @ dleft.mT
            dk.addcmul_(dgain, after)
            dafter = dgain.mul_(gain)
            dv += gain @ dleft
            dwhole = (dleft * entering).sum(-1, keepdim=True).mul_(kept).mT

        for size, (after, before) in reversed([(1 << i, level) for i, level in enumerate(levels)]):
            (left_k, _), (left_v, _), (_, right_r), (_, right_do) = (_blocks(x, size) for x in (k, v, r, do))
            (left_dk, _), (left_dv, _), (_, right_dr) = (_blocks(x, size) for x in (dk, dv, dr))
            (left_dafter, _), (_, right_dbefore) = _blocks(dafter, size), _blocks(dbefore, size)
            # A block is a part of what lies before its right neighbour, after its left neighbour, and of both together.
            dwhole = dwhole.repeat_interleave(2, dim=-2)
            first, second = _blocks(dwhole, 1)
            first += _total(right_dbefore)
            second += _total(left_dafter)

            key, receptance = left_k * after, right_r * before
            scores, dscores = receptance @ key.mT, right_do @ left_v.mT
            left_dv += _product(scores.mT, right_do)
            dkey, dreceptance = _product(dscores.mT, receptance), _product(dscores, key)
            left_dk.addcmul_(dkey, after)
            right_dr.addcmul_(dreceptance, before)
            left_dafter.addcmul_(dkey, key)
            right_dbefore.addcmul_(dreceptance, receptance)
    return dr, dk, dv, dwhole, du, dinitial


@_backward.register_fake
def _(r, k, v, w, u, borders, do, dfinal):
    B, H, _, _, K = r.shape
    dinitial = v.new_empty((B, H, K, v.shape[-1]) if borders.dim() > 1 else (0,))
    return *(x.new_empty(x.shape) for x in (r, k, v, w)), u.new_empty(B, H, K), dinitial


register_gradients(_forward, _backward)
register_seeds(_forward)
register_seeds(_backward)
