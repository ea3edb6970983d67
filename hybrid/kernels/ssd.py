"""The Mamba-2 recurrence (state space duality) in plain PyTorch: matrix products inside chunks.

Per head, with state h [P,N], input x_t [P], step dt_t > 0, A < 0, and B_t, C_t [N] shared by the heads of a group
(Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, sections 2 and 6)::

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
    y_t = h_t C_t + D x_t

The decay is one number per head and step, so the weight of step j for step i is (C_i . B_j) exp(sum of dt A between
them) dt_j: exponents are differences of a cumulative sum, formed in float64 and masked before exp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.kernels.wkv6 import LOWEST

CHUNK = 64  # steps a chunk


def ssd_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Chunked form on any device; shapes as in ``hybrid.kernels.ssd``. Computes in float32 (float64 for float64)."""
    batch, T, H, P = x.shape
    G = B.shape[-2]
    compute = torch.promote_types(x.dtype, torch.float32)
    x, dt, B, C = (t.to(compute) for t in (x, dt, B, C))
    chunk = min(CHUNK, T)
    pad = -T % chunk
    log_decay = (dt.double() * A.double()).clamp_min(LOWEST)  # [batch,T,H]

    def to_chunks(t: Tensor) -> Tensor:  # [batch,T,heads,*] -> [batch,heads,n,C,*]
        t = t.transpose(1, 2)
        if pad:
            t = F.pad(t, (0, 0) * (t.dim() - 3) + (0, pad))
        return t.unflatten(2, (-1, chunk))

    # Heads are laid out as (group, head in group), so that B and C of a group broadcast over its heads.
    xs = to_chunks(x * dt.unsqueeze(-1)).unflatten(1, (G, H // G))  # [batch,G,h,n,C,P]
    upto = to_chunks(log_decay).cumsum(-1).unflatten(1, (G, H // G))  # [batch,G,h,n,C]
    Bs, Cs = to_chunks(B).unsqueeze(2), to_chunks(C).unsqueeze(2)  # [batch,G,1,n,C,N]

    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    gap = (upto.unsqueeze(-1) - upto.unsqueeze(-2)).to(compute).masked_fill(~causal, -torch.inf)
    y = ((Cs @ Bs.transpose(-1, -2)) * gap.exp()) @ xs  # [batch,G,h,n,C,P]

    # States at the chunk borders; padded steps have dt = 0 and leave the state as it is.
    chunks = xs.shape[3]
    state = None if initial_state is None else initial_state.to(compute).unflatten(1, (G, H // G))
    if state is not None or chunks > 1 or output_final_state:
        total = upto[..., -1:]
        gained = (xs * (total - upto).to(compute).exp().unsqueeze(-1)).transpose(-1, -2) @ Bs  # [batch,G,h,n,P,N]
        kept = total.to(compute).exp().unsqueeze(-1)  # [batch,G,h,n,1,1]
        if state is None and chunks == 1:
            state = gained[:, :, :, 0]
        else:
            state = torch.zeros_like(gained[:, :, :, 0]) if state is None else state
            borders = []
            for n in range(chunks):
                borders.append(state)
                if n + 1 < chunks or output_final_state:
                    state = kept[:, :, :, n] * state + gained[:, :, :, n]
            entering = torch.stack(borders, dim=3)
            y = y + (Cs @ entering.transpose(-1, -2)) * upto.to(compute).exp().unsqueeze(-1)
    y = y.flatten(1, 2).reshape(batch, H, -1, P)[:, :, :T].transpose(1, 2)
    if D is not None:
        y = y + D.to(compute).unsqueeze(-1) * x
    return y, state.flatten(1, 2) if output_final_state else None
