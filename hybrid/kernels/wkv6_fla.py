"""flash-linear-attention's Triton kernels for RWKV-6 as one PyTorch operator with a gradient.

FLA's own ``chunk_rwkv6`` is excluded from ``torch.compile`` and breaks the graph; wrapping its forward and backward
as custom operators keeps a compiled model in one graph. The operators' bonus u is [M,H,K]: row m serves the m-th of M
equal parts of the batch (``seeds.py``). FLA knows one bonus a head, so with several rows the parts become heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import from_heads, register_seeds, state_from_heads, state_to_heads, to_heads

_STATE = torch.float32


@operator("wkv6_fla")
def _forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from fla.ops.rwkv6.chunk import chunk_rwkv6_fwd

    models = u.shape[0]
    r, k, v, w = (to_heads(x, models) for x in (r, k, v, w))
    initial_state = None if initial_state is None else state_to_heads(initial_state, models)
    with torch.cuda.device(r.device):
        A, _, final_state, o = chunk_rwkv6_fwd(r, k, v, w, u.flatten(0, 1), 1.0, initial_state, True)
    return from_heads(o, models), state_from_heads(final_state, models), from_heads(A, models)


@_forward.register_fake
def _(r, k, v, w, u, initial_state):
    B, T, H, K = k.shape
    # FLA's intra-chunk weights, one row a step: [B,T,H,64], saved for the backward pass.
    return torch.empty_like(v), r.new_empty(B, H, K, v.shape[-1], dtype=_STATE), r.new_empty(B, T, H, 64)


@operator("wkv6_fla_backward")
def _backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None, A: Tensor, do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fla.ops.rwkv6.chunk import chunk_rwkv6_bwd

    models = u.shape[0]
    r, k, v, w, A, do = (to_heads(x, models) for x in (r, k, v, w, A, do.contiguous()))
    dstate = state_to_heads(dstate, models)
    initial_state = None if initial_state is None else state_to_heads(initial_state, models)
    with torch.cuda.device(r.device):
        *grads, du, dh0 = chunk_rwkv6_bwd(r, k, v, w, u.flatten(0, 1), 1.0, initial_state, A, do, dstate)
    dr, dk, dv, dw = (from_heads(x, models).to(like.dtype) for x, like in zip(grads, (r, k, v, w), strict=True))
    # An operator's outputs are tensors; one that is not used is empty.
    dh0 = dstate.new_empty(0) if dh0 is None else state_from_heads(dh0.to(_STATE), models)
    return dr, dk, dv, dw, du.to(u.dtype).view(u.shape), dh0


@_backward.register_fake
def _(r, k, v, w, u, initial_state, A, do, dstate):
    dh0 = dstate.new_empty(0) if initial_state is None else torch.empty_like(initial_state, dtype=_STATE)
    return (*(torch.empty_like(x) for x in (r, k, v, w, u)), dh0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])


def _autograd(ctx, do, dstate, _dA):
    *inputs, A = ctx.saved_tensors
    initial_state = inputs[-1]
    if dstate is None:
        r, k, v = inputs[:3]
        dstate = v.new_zeros(r.shape[0], r.shape[2], k.shape[-1], v.shape[-1], dtype=_STATE)
    if do is None:
        do = torch.zeros_like(inputs[2])
    *grads, dh0 = _backward(*inputs, A, do, dstate.contiguous())
    return (*grads, None if initial_state is None else dh0)


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def wkv6_fla(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ``hybrid.kernels.wkv6``; r, k and v are taken in v's dtype, decays, bonus and state in float32."""
    r, k = r.to(v.dtype), k.to(v.dtype)
    w, u = w.float(), u.float()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    o, final_state, _ = _forward(
        r.contiguous(), k.contiguous(), v.contiguous(), w.contiguous(), u[None].contiguous(), initial_state
    )
    return o, final_state
