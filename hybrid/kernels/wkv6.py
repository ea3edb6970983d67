"""The RWKV-6 recurrence in plain PyTorch: matrix products inside chunks, one short loop over chunks.

Per head, with state S [K,V], receptance r_t, key k_t, value v_t, log decay w_t <= 0 and bonus u
(Peng et al. 2024, "Eagle and Finch", arXiv:2404.05892, eq. 18-19)::

    o_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
    S_t = diag(exp(w_t)) S_{t-1} + k_t^T v_t

Inside a chunk the weight of step j for step i > j is sum_k r_ik k_jk exp(w_{j+1} + ... + w_{i-1}). Splitting that
exponent at the start of the chunk would need exp of a positive sum and overflow for strong decays. Here every pair
(i, j) is split at a point between j and i, so that both factors are at most one whatever the decay: the chunk is
halved again and again, each time the right half attends to the left half, down to neighbours, between which nothing
decays. Sums of decays are kept in float64, because a sum over a chunk with some decays of e^-20 a step would swallow
the small ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # steps a chunk
# exp of less than this is zero in float32. Log decays are raised to it, so that their sums stay small enough to keep
# the digits of the others.
LOWEST = -104.0


def log_decay(x: Tensor) -> Tensor:
    """The log decay ``-exp(x)`` in float32 of what RWKV-6's layer computes for it."""
    # exp(-exp(30)) is zero in any precision; beyond, the log decay would overflow and its differences be NaN.
    return -torch.exp(x.float().clamp(max=30.0))


def wkv6_torch(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Chunked form on any device; shapes as in ``hybrid.kernels.wkv6``. Computes in float32 (float64 for float64)."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    compute = torch.promote_types(v.dtype, torch.float32)
    r, k, v, u = (x.to(compute) for x in (r, k, v, u))
    if T == 1:
        o, state = _single_step(r, k, v, w.to(compute), u, initial_state)
        return o, state if output_final_state else None

    chunk = min(CHUNK, 1 << (T - 1).bit_length())
    pad = -T % chunk
    r, k, v, w = (_to_chunks(x, chunk, pad) for x in (r, k, v, w.double().clamp_min(LOWEST)))  # [B,H,N,C,K or V]
    upto = w.cumsum(dim=-2)  # w_1 + ... + w_i, from the start of the chunk
    before = upto - w  # w_1 + ... + w_{i-1}

    o = ((r * k) * u[:, None, None, :]).sum(-1, keepdim=True) * v
    o = o + _within(r, k, v, before, upto)

    # States at the chunk borders. The padded steps have k = 0 and w = 0: they leave the state as it is.
    total = upto[..., -1:, :]
    gained = (k * (total - upto).to(compute).exp()).transpose(-1, -2) @ v  # [B,H,N,K,V]
    kept = total.squeeze(-2).to(compute).exp().unsqueeze(-1)  # [B,H,N,K,1]
    chunks = gained.shape[2]
    state = k.new_zeros(B, H, K, V) if initial_state is None else initial_state.to(compute)
    if initial_state is not None or chunks > 1:
        borders = []
        for n in range(chunks):
            borders.append(state)
            if n + 1 < chunks or output_final_state:
                state = kept[:, :, n] * state + gained[:, :, n]
        o = o + (r * before.to(compute).exp()) @ torch.stack(borders, dim=2)
    elif output_final_state:
        state = gained[:, :, 0]
    o = o.reshape(B, H, -1, V)[:, :, :T].transpose(1, 2)
    return o, state if output_final_state else None


def _within(r: Tensor, k: Tensor, v: Tensor, before: Tensor, upto: Tensor) -> Tensor:
    """Contribution of earlier to later steps inside blocks of size ``C``; all arguments [..., C, K or V]."""
    size = r.shape[-2]
    if size == 2:  # nothing decays between neighbours
        across = (r[..., 1:, :] * k[..., :1, :]).sum(-1, keepdim=True) * v[..., :1, :]
        return F.pad(across, (0, 0, 1, 0))
    half = size // 2
    mid = upto[..., half - 1 : half, :]
    left_k = k[..., :half, :] * (mid - upto[..., :half, :]).to(k.dtype).exp()
    right_r = r[..., half:, :] * (before[..., half:, :] - mid).to(r.dtype).exp()
    across = (right_r @ left_k.transpose(-1, -2)) @ v[..., :half, :]
    # Both halves go down together, as two blocks of half the size.
    r, k, v, before, upto = (x.unflatten(-2, (2, half)) for x in (r, k, v, before, upto))
    inner = _within(r, k, v, before, upto)
    left, right = inner.unbind(-3)
    return torch.cat((left, right + across), dim=-2)


def _single_step(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    r, k, v, w = (x.squeeze(1) for x in (r, k, v, w))
    new = k.unsqueeze(-1) * v.unsqueeze(-2)
    past = new.new_zeros(new.shape) if initial_state is None else initial_state.to(new.dtype)
    o = (r.unsqueeze(-2) @ (past + u.unsqueeze(-1) * new)).squeeze(-2)
    return o.unsqueeze(1), w.exp().unsqueeze(-1) * past + new


def _to_chunks(x: Tensor, chunk: int, pad: int) -> Tensor:
    """[B,T,H,D] -> [B,H,N,C,D], padded with zeros at the end."""
    x = x.transpose(1, 2)
    if pad:
        x = F.pad(x, (0, 0, 0, pad))
    return x.unflatten(2, (-1, chunk))
