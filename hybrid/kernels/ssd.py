"""The Mamba-2 recurrence (state space duality) in plain PyTorch: matrix products inside chunks.

Per head, with state h [P,N], input x_t [P], step dt_t > 0, A < 0, and B_t, C_t [N] shared by the heads of a group
(Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, sections 2 and 6)::

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
    y_t = h_t C_t + D x_t

The decay is one number per head and step, so the weight of step j for step i is (C_i . B_j) exp(sum of dt A between
them) dt_j: exponents are differences of a cumulative sum in float64. The weights of later steps are overwritten by
zeros, because the exp of their exponents may be infinite.

Forward and backward are one operator each, so that what autograd would keep and add up of the many [C,C] matrices is
changed in place.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.kernels.chunks import carry_back, carry_forth, register_gradients, to_chunks
from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import register_seeds

CHUNK = 64  # steps a chunk
# exp of less than this is zero in float32. Log decays are raised to it, so that their sums stay small enough to keep
# the digits of the others: here, in float64 too, and in the Triton kernels of both recurrences.
LOWEST = -104.0


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
    T = x.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    x, dt, B, C = (t.to(compute) for t in (x, dt, B, C))
    initial_state = None if initial_state is None else initial_state.to(compute)
    chunk = min(CHUNK, T)
    log_decay = (dt.double() * A.double()).clamp_min(LOWEST)  # [batch,T,H]
    # Padded steps have dt = 0 and leave the state as it is.
    chunked = (to_chunks(t, chunk) for t in (x * dt.unsqueeze(-1), log_decay, B, C))
    y, state, _ = _forward(*chunked, initial_state, output_final_state)
    y = y.flatten(2, 3)[:, :, :T].transpose(1, 2)
    if D is not None:
        y = y + D.to(compute).unsqueeze(-1) * x
    return y, state if output_final_state else None


def _in_groups(x: Tensor, G: int) -> Tensor:
    """[batch,H,...] -> [batch,G,H/G,...], beside which B and C of a group broadcast over its heads."""
    return x.unflatten(1, (G, -1))


def _between(upto: Tensor, dtype: torch.dtype) -> Tensor:
    """The decays exp(a_{j+1} + ... + a_i) between the steps of a chunk [...,C,C], zero for j > i; of upto [...,C]."""
    upto = upto * math.log2(math.e)
    # The difference of two float64 by float32: of their first digits, then of the rest.
    first = upto.to(dtype)
    rest = (upto - first).to(dtype)
    gap = first.unsqueeze(-1) - first.unsqueeze(-2)
    gap.add_(rest.unsqueeze(-1)).sub_(rest.unsqueeze(-2))
    return gap.exp2_().tril_()


@operator("ssd_torch")
def _forward(
    x: Tensor, a: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [batch,H,n,C,P], the final state [batch,H,P,N] and the states around the chunks [batch,H,n+1,P,N].

    x, times dt, is [batch,H,n,C,P], a the log decays in float64 [batch,H,n,C], B and C [batch,G,n,C,N]. What is not
    needed is empty.
    """
    G, n = B.shape[1], B.shape[2]
    upto = a.cumsum(-1)
    weights = _in_groups(_between(upto, x.dtype), G).mul_((C @ B.mT).unsqueeze(2)).flatten(1, 2)
    y = weights @ x
    state, borders = x.new_empty(0), x.new_empty(0)
    if initial_state is not None or n > 1 or final:
        total = upto[..., -1:]
        left = x * (total - upto).to(x.dtype).exp().unsqueeze(-1)
        gained = (_in_groups(left, G).mT @ B.unsqueeze(2)).flatten(1, 2)  # [batch,H,n,P,N]
        kept = total.to(x.dtype).exp().unsqueeze(-1)  # [batch,H,n,1,1]
        borders = carry_forth(gained, kept, initial_state)
        read = (C.unsqueeze(2) @ _in_groups(borders[:, :, :-1], G).mT).flatten(1, 2)
        y.addcmul_(read, upto.to(x.dtype).exp().unsqueeze(-1))
        state = borders[:, :, -1].clone() if final else state
    return y, state, borders


@_forward.register_fake
def _(x, a, B, C, initial_state, final):
    batch, H, n, _, P = x.shape
    N = B.shape[-1]
    state = x.new_empty((batch, H, P, N) if final else (0,))
    needed = initial_state is not None or n > 1 or final
    return x.new_empty(x.shape), state, x.new_empty((batch, H, n + 1, P, N) if needed else (0,))


@operator("ssd_torch_backward")
def _backward(
    x: Tensor, a: Tensor, B: Tensor, C: Tensor, borders: Tensor, dy: Tensor, dfinal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, a, B, C, and of the initial state [batch,H,P,N]."""
    G = B.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        dy = dy.contiguous()
        upto = a.cumsum(-1)
        between = _between(upto, x.dtype)
        products = (C @ B.mT).unsqueeze(2)
        dweights = dy @ x.mT
        dproducts = dweights.mul_(between)  # for every head
        weights = (_in_groups(between, G).mul_(products)).flatten(1, 2)
        dx = weights.mT @ dy
        # Without the diagonal, which no decay changes: beside strong decays it is far more than all else.
        dgap = (_in_groups(dproducts, G) * products).flatten(1, 2).tril_(-1)
        # Of the sums of log decays; in float64, in which what the two sums share is taken off to the last digits.
        dupto = dgap.sum(-1, dtype=torch.float64) - dgap.sum(-2, dtype=torch.float64)
        da = torch.zeros_like(dupto)
        dproducts = _in_groups(dproducts, G).sum(2)
        dB, dC = dproducts.mT @ C, dproducts @ B
        dinitial = x.new_empty(0)
        if borders.dim() > 1:
            total = upto[..., -1:]
            before, after, kept = (t.to(x.dtype).exp().unsqueeze(-1) for t in (upto, total - upto, total))
            entering = borders[:, :, :-1]
            dread = _in_groups(dy * before, G)
            read = C.unsqueeze(2) @ _in_groups(entering, G).mT
            dupto += (dread * read).sum(-1).flatten(1, 2)
            dC += (dread @ _in_groups(entering, G)).sum(2)
            dleft = (dread.mT @ C.unsqueeze(2)).flatten(1, 2)  # of the states that chunks begin with; below, end with
            dinitial = carry_back(dleft, kept, dfinal)
            dgained = _in_groups(dleft, G)
            dkey = (B.unsqueeze(2) @ dgained.mT).flatten(1, 2).mul_(after)
            dafter = (dkey * x).sum(-1)
            dx += dkey
            dB += (_in_groups(x * after, G) @ dgained).sum(2)
            dwhole = (dleft * entering).sum((-2, -1)).unsqueeze(-1) * kept.squeeze(-1)
            # A step's part in the final state decays by all that is behind it.
            da += F.pad(dafter.cumsum(-1)[..., :-1], (1, 0)) + dwhole
        da += dupto.flip(-1).cumsum(-1).flip(-1)
    return dx, da.to(a.dtype), dB, dC, dinitial


@_backward.register_fake
def _(x, a, B, C, borders, dy, dfinal):
    batch, H, _, _, P = x.shape
    dinitial = x.new_empty((batch, H, P, B.shape[-1]) if borders.dim() > 1 else (0,))
    return *(t.new_empty(t.shape) for t in (x, a, B, C)), dinitial


register_gradients(_forward, _backward)
register_seeds(_forward)
register_seeds(_backward)
