"""The two recurrences, one step after another in float64: what the kernels are tested against.

Written from the formulas (RWKV-6: arXiv:2404.05892; Mamba-2: arXiv:2405.21060), not from the code under test.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    B, T, H, K = r.shape
    S = torch.zeros(B, H, K, v.shape[-1], dtype=torch.float64) if initial_state is None else initial_state
    outputs = []
    for t in range(T):
        kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S + u[None, :, :, None] * kv))
        S = torch.exp(w[:, t])[..., None] * S + kv
    return torch.stack(outputs, dim=1), S


def wkv6_of_raw_decays(w: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """``wkv6_reference`` where w are the numbers whose exponential is the log decay, but for its sign."""
    return wkv6_reference(w=-torch.exp(w.clamp(max=30.0)), **inputs)


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, T, H, P = x.shape
    G, N = B.shape[-2:]
    h = torch.zeros(batch, H, P, N, dtype=torch.float64) if initial_state is None else initial_state
    B, C = (t.repeat_interleave(H // G, dim=2) for t in (B, C))
    outputs = []
    for t in range(T):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D[:, None] * x), h


def with_gaps(x: Tensor) -> Tensor:
    """x [models,...] as a view into something wider, as a stack of models holds what they do not share."""
    wide = x.new_full((x.shape[0], x[0].numel() + 7), torch.nan)
    wide[:, 3:-4] = x.flatten(1)
    return wide[:, 3:-4].unflatten(1, x.shape[1:])
