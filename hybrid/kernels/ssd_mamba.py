"""mamba_ssm's Triton kernels for Mamba-2 as one PyTorch operator with a gradient (see ``wkv6_fla.py`` for why).

The operators' A and D are [M,H], as the bonus there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid.kernels.operators import operator
from hybrid.kernels.seeds import from_heads, register_seeds, state_from_heads, state_to_heads, to_heads

_STATE = torch.float32
CHUNK = 64


@operator("ssd_mamba")
def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd

    models = A.shape[0]
    x, dt, B, C = (to_heads(t, models) for t in (x, dt, B, C))
    D = None if D is None else D.flatten()
    initial_state = None if initial_state is None else state_to_heads(initial_state, models)
    with torch.cuda.device(x.device):
        y, _, _, _, _, final_state = _mamba_chunk_scan_combined_fwd(
            x, dt, A.flatten(), B, C, CHUNK, D=D, initial_states=initial_state
        )
    return from_heads(y, models), state_from_heads(final_state.to(_STATE), models)


@_forward.register_fake
def _(x, dt, A, B, C, D, initial_state):
    batch, _, H, P = x.shape
    return torch.empty_like(x), x.new_empty(batch, H, P, B.shape[-1], dtype=_STATE)


@operator("ssd_mamba_backward")
def _backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, y: Tensor, D: Tensor | None,
    initial_state: Tensor | None, dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd

    models = A.shape[0]
    dy, x, dt, B, C, y = (to_heads(t, models) for t in (dy.contiguous(), x, dt, B, C, y))
    initial_state = None if initial_state is None else state_to_heads(initial_state, models)
    dstate = None if dstate is None else state_to_heads(dstate, models)
    with torch.cuda.device(x.device):
        dx, ddt, dA, dB, dC, dD, _, _, dh0 = _mamba_chunk_scan_combined_bwd(
            dy, x, dt, A.flatten(), B, C, y, CHUNK, D=None if D is None else D.flatten(),
            initial_states=initial_state, dfinal_states=dstate,
        )  # fmt: skip
    none = x.new_empty(0, dtype=_STATE)  # an operator's outputs are tensors; unused ones are empty
    dD = none if dD is None else dD.to(_STATE).view(models, -1)
    dh0 = none.clone() if dh0 is None else state_from_heads(dh0.to(_STATE), models)
    grads, likes = (dx, ddt, dB, dC), (x, dt, B, C)
    dx, ddt, dB, dC = (from_heads(t, models).to(like.dtype) for t, like in zip(grads, likes, strict=True))
    return dx, ddt, dA.to(A.dtype).view(A.shape), dB, dC, dD, dh0


@_backward.register_fake
def _(dy, x, dt, A, B, C, y, D, initial_state, dstate):
    none = x.new_empty(0, dtype=_STATE)
    dD = none if D is None else torch.empty_like(D, dtype=_STATE)
    dh0 = none.clone() if initial_state is None else torch.empty_like(initial_state, dtype=_STATE)
    return (*(torch.empty_like(t) for t in (x, dt, A, B, C)), dD, dh0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0])


def _autograd(ctx, dy, dstate):
    x, dt, A, B, C, D, initial_state, y = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(y)
    if dstate is not None:
        dstate = dstate.contiguous()
    dx, ddt, dA, dB, dC, dD, dh0 = _backward(dy, x, dt, A, B, C, y, D, initial_state, dstate)
    return dx, ddt, dA, dB, dC, None if D is None else dD, None if initial_state is None else dh0


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_seeds(_forward)
register_seeds(_backward)


def ssd_mamba(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ``hybrid.kernels.ssd``; B and C are taken in x's dtype, dt, A, D and the state in float32."""
    B, C = B.to(x.dtype).contiguous(), C.to(x.dtype).contiguous()
    D = None if D is None else D[None].float()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    return _forward(x.contiguous(), dt.float().contiguous(), A[None].float(), B, C, D, initial_state)
