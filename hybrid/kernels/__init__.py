"""The two recurrences, each behind one function that picks the code for the device.

``wkv6`` is RWKV-6 (Finch), ``ssd`` is Mamba-2. Backends:

- ``torch``: chunked matrix products in plain PyTorch, any device, the default on CPU (``wkv6.py``, ``ssd.py``);
- ``fla`` for ``wkv6``: the Triton kernels of flash-linear-attention, CUDA only (``wkv6_fla.py``);
- ``mamba_ssm`` for ``ssd``: the Triton kernels of mamba_ssm, CUDA only (``ssd_mamba.py``).

``auto`` is the Triton backend on CUDA where its package is installed, ``torch`` otherwise; ``resolve_backend`` says
which, and every run records it.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from hybrid.kernels.ssd import ssd_torch
from hybrid.kernels.wkv6 import wkv6_torch

TRITON_BACKEND = {"wkv6": "fla", "ssd": "mamba_ssm"}
_PACKAGE = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm"}
_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in _PACKAGE}


class BackendError(RuntimeError):
    """A backend that was asked for by name and cannot be used; the message is one line."""


def resolve_backend(op: str, backend: str, device_type: str) -> str:
    """The backend that serves ``op`` ("wkv6" or "ssd") on a device type ("cpu", "cuda").

    Raises ``BackendError`` for a named backend that is unknown, not installed, or not for this device.
    """
    triton = TRITON_BACKEND[op]
    if backend == "torch":
        return backend
    installed = _INSTALLED[triton]
    if backend == "auto":
        return triton if device_type == "cuda" and installed else "torch"
    if backend != triton:
        raise BackendError(f"{op} has the backends torch and {triton}, not '{backend}'")
    if device_type != "cuda":
        raise BackendError(f"the {backend} kernels of {op} need a CUDA device, not {device_type}; use torch or auto")
    if not installed:
        raise BackendError(f"the {backend} kernels of {op} are not installed: pip install {_PACKAGE[backend]}")
    return backend


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    backend: str = "auto",
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-6 time mixing: ``o_t = r_t (S_{t-1} + diag(u) k_t^T v_t)``, ``S_t = diag(exp(w_t)) S_{t-1} + k_t^T v_t``.

    Args:
        r, k: receptance and key, [B,T,H,K].
        v: value, [B,T,H,V].
        w: log decay per step and key channel, <= 0, [B,T,H,K].
        u: bonus of the current step, [H,K].
        initial_state: [B,H,K,V], zero when absent.
        output_final_state: give the final state as well (otherwise None).

    Returns:
        o [B,T,H,V] in v's dtype, and the final state [B,H,K,V] in float32.
    """
    B, _, H, K = r.shape
    V = v.shape[-1]
    if k.shape != r.shape or w.shape != r.shape or v.shape[:3] != r.shape[:3] or u.shape != (H, K):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip("rkvwu", (r, k, v, w, u), strict=True))
        raise ValueError(f"wkv6 needs r, k, w [B,T,H,K], v [B,T,H,V], u [H,K]; got {shapes}")
    if r.shape[1] == 0:
        raise ValueError("wkv6 needs at least one step, got T=0")
    if initial_state is not None and initial_state.shape != (B, H, K, V):
        raise ValueError(f"wkv6 initial_state must be {[B, H, K, V]}, got {list(initial_state.shape)}")
    if resolve_backend("wkv6", backend, r.device.type) == "fla":
        from hybrid.kernels.wkv6_fla import wkv6_fla

        o, state = wkv6_fla(r, k, v, w, u, initial_state)
        return o, state if output_final_state else None
    with torch.autocast(r.device.type, enabled=False):
        o, state = wkv6_torch(r, k, v, w, u, initial_state, output_final_state)
    return o.to(v.dtype), state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2: ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t``.

    Args:
        x: input, [B,T,H,P].
        dt: step size after softplus, > 0, [B,T,H].
        A: decay rate per head, < 0, [H].
        B, C: input and output projections, [B,T,G,N]; head h uses group h // (H/G).
        D: skip per head, [H].
        initial_state: [B,H,P,N], zero when absent.
        output_final_state: give the final state as well (otherwise None).

    Returns:
        y [B,T,H,P] in x's dtype, and the final state [B,H,P,N] in float32.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[-2:]
    if dt.shape != x.shape[:3] or A.shape != (H,) or B.shape != (batch, T, G, N) or C.shape != B.shape or H % G:
        shapes = ", ".join(
            f"{n} {list(t.shape)}" for n, t in zip(("x", "dt", "A", "B", "C"), (x, dt, A, B, C), strict=True)
        )
        raise ValueError(f"ssd needs x [B,T,H,P], dt [B,T,H], A [H], B and C [B,T,G,N] with G dividing H; got {shapes}")
    if T == 0:
        raise ValueError("ssd needs at least one step, got T=0")
    if D is not None and D.shape != (H,):
        raise ValueError(f"ssd needs D [{H}], got {list(D.shape)}")
    if initial_state is not None and initial_state.shape != (batch, H, P, N):
        raise ValueError(f"ssd initial_state must be {[batch, H, P, N]}, got {list(initial_state.shape)}")
    if resolve_backend("ssd", backend, x.device.type) == "mamba_ssm":
        from hybrid.kernels.ssd_mamba import ssd_mamba

        y, state = ssd_mamba(x, dt, A, B, C, D, initial_state)
        return y, state if output_final_state else None
    with torch.autocast(x.device.type, enabled=False):
        y, state = ssd_torch(x, dt, A, B, C, D, initial_state, output_final_state)
    return y.to(x.dtype), state
