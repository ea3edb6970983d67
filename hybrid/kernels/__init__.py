"""The two recurrences, each behind one function that picks the code for the device, and what else has kernels.

``wkv6`` is RWKV-6 (Finch), ``ssd`` is Mamba-2. Backends:

- ``torch``: chunked matrix products in plain PyTorch, any device, the default on CPU (``wkv6.py``, ``ssd.py``, and
  ``chunks.py`` for both);
- ``triton``: one to four kernels forward and backward each, CUDA (``wkv6_triton.py``, ``ssd_triton.py``, the
  ``_programs`` of both, and ``carry.py``);
- ``fla`` for ``wkv6``: the Triton kernels of flash-linear-attention, CUDA only (``wkv6_fla.py``);
- ``mamba_ssm`` for ``ssd``: the Triton kernels of mamba_ssm, CUDA only (``ssd_mamba.py``);
- ``triton+fla``, ``triton+mamba_ssm``: ``triton`` for calls of at most ``LONGEST`` steps whose heads it can hold, the
  other for the rest.

``auto`` is ``torch`` on CPU, and on CUDA the best of what is installed; ``resolve_backend`` says which, and every run
records it. All of them can be mapped over stacked models with ``torch.vmap``; none has second derivatives.

``causal_conv``, Mamba-2's short convolution, and ``gate_then_norm``, its gated norm, go with ``ssd``;
``ddlerp_linear``, RWKV-6's token shift and projections, and ``norm_then_gate`` with ``wkv6``: Triton kernels where
kernels serve that, else plain PyTorch (``conv.py``, ``ddlerp.py``, ``norms.py`` and their ``_triton``; the token shift
together with its projections is ``ddlerp_linear_triton.py``). Where kernels serve all that a layer of Mamba-2 does
between its products, they are one operator, ``mamba2_between`` (``mamba2_triton.py``).

Beside them lies the optimiser's update of stacked parameters (``adamw.py``, ``adamw_triton.py``), which
``hybrid/training/stacked_adamw.py`` chooses between. Custom operators get their names in ``operators.py`` and their
rule for ``torch.vmap`` in ``seeds.py``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.kernels.conv import conv_torch
from hybrid.kernels.ddlerp import ddlerp_torch
from hybrid.kernels.norms import gate_then_norm_torch, norm_then_gate_torch
from hybrid.kernels.ssd import ssd_torch
from hybrid.kernels.wkv6 import log_decay, wkv6_torch

CHUNKED = {"wkv6": "fla", "ssd": "mamba_ssm"}  # kernels for long sequences
LONGEST = {"wkv6": 16384, "ssd": 16384}  # steps of a call up to which ``triton`` serves where there is a choice
LARGEST_V = 128  # value channels of a head that the fused wkv6 kernels hold
LARGEST_STATE = 64 * 256  # state channels of a head, P N, each rounded up to a power of two, for the fused ssd kernels
LONGEST_FILTER = 4  # weights a channel of a convolution that its kernels hold
MIXES = 5  # of a token shift: for r, w, k, v and g
WIDEST_FUSED = 256  # bytes of a row, of inputs or outputs, up to which a token shift is one kernel with its projections
WIDEST_SHIFT, HIGHEST_RANK = 256, 64  # channels of a token shift, and the rank of a mix, that its kernels hold
WIDEST_NORM = 512  # channels that are normalised together, which the kernels of the gated norms hold
_PACKAGE = {"triton": "triton", "fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm"}
_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in _PACKAGE}


class BackendError(RuntimeError):
    """A backend that was asked for by name and cannot be used; the message is one line."""


def resolve_backend(op: str, backend: str, device_type: str) -> str:
    """The backend that serves ``op`` ("wkv6" or "ssd") on a device type ("cpu", "cuda").

    Raises ``BackendError`` for a named backend that is unknown, not installed, or not for this device.
    """
    chunked = CHUNKED[op]
    both = f"triton+{chunked}"
    if backend == "torch":
        return backend
    if backend == "auto":
        if device_type != "cuda":
            return "torch"
        parts = [name for name in ("triton", chunked) if _INSTALLED[name]]
        return "+".join(parts) or "torch"
    if backend not in ("triton", chunked, both):
        raise BackendError(f"{op} has the backends torch, triton, {chunked} and {both}, not '{backend}'")
    # Triton's interpreter runs its kernels without a GPU, slowly: for tests.
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        raise BackendError(f"the {backend} kernels of {op} need a CUDA device, not {device_type}; use torch or auto")
    for name in backend.split("+"):
        if not _INSTALLED[name]:
            raise BackendError(f"the {name} kernels of {op} are not installed: pip install {_PACKAGE[name]}")
    return backend


def serving_backend(op: str, backend: str, device_type: str, steps: int, fits: bool = True) -> str:
    """The one backend ("torch", "triton", "fla" or "mamba_ssm") that serves a call of ``steps`` steps.

    ``fits`` says whether the fused kernels can hold a head. Raises ``ValueError`` where nothing else may serve.
    """
    short, plus, long = resolve_backend(op, backend, device_type).partition("+")
    if plus:
        return short if steps <= LONGEST[op] and fits else long
    if short == "triton" and not fits:
        raise ValueError(f"the heads of {op} are too large for its triton kernels; use torch or {CHUNKED[op]}")
    return short


def _by_kernels(op: str, backend: str, device_type: str) -> bool:
    """Whether kernels serve ``op``, and Triton is there for those of what goes with it."""
    return resolve_backend(op, backend, device_type) != "torch" and _INSTALLED["triton"]


def conv_backend(backend: str, device_type: str, width: int) -> str:
    """What serves the convolution with filters of ``width`` beside an ``ssd`` of ``backend``: "triton" or "torch"."""
    return "triton" if _by_kernels("ssd", backend, device_type) and width <= LONGEST_FILTER else "torch"


def ddlerp_backend(backend: str, device_type: str, width: int, rank: int, outputs: int, dtype: torch.dtype) -> str:
    """What serves a token shift of ``width`` channels beside a ``wkv6`` of ``backend``.

    "triton" or "torch", and "triton fused" where its projections, of at most ``outputs`` channels, are part of it.
    """
    if not _by_kernels("wkv6", backend, device_type) or width > WIDEST_SHIFT or rank > HIGHEST_RANK:
        return "torch"
    return "triton fused" if max(width, outputs) * dtype.itemsize <= WIDEST_FUSED else "triton"


def norm_backend(op: str, backend: str, device_type: str, width: int) -> str:
    """What serves the gated norm, of ``width`` channels a group, behind ``op`` of ``backend``: "triton" or "torch"."""
    return "triton" if _by_kernels(op, backend, device_type) and width <= WIDEST_NORM else "torch"


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def values_fit(V: int) -> bool:
    """Whether the fused wkv6 kernels hold the values of a head."""
    return V <= LARGEST_V


def state_fits(P: int, N: int) -> bool:
    """Whether the fused ssd kernels hold the state of a head."""
    return _rounded(P) * _rounded(N) <= LARGEST_STATE


def mamba2_backend(
    backend: str, device_type: str, steps: int, filter_width: int, head_dim: int, state_size: int, norm_width: int
) -> str:
    """What serves all between the products of a Mamba-2 layer beside an ``ssd`` of ``backend``.

    "triton fused" where ``mamba2_between`` can do it as one operator, "parts" where it is left to the operators for
    filters of ``filter_width``, the recurrence, and a norm of ``norm_width`` channels a group.
    """
    fused = (
        state_fits(head_dim, state_size)
        and serving_backend("ssd", backend, device_type, steps) == "triton"
        and conv_backend(backend, device_type, filter_width) == "triton"
        and norm_backend("ssd", backend, device_type, norm_width) == "triton"
    )
    return "triton fused" if fused else "parts"


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    backend: str = "auto",
    output_final_state: bool = True,
    raw_decay: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-6 time mixing: ``o_t = r_t (S_{t-1} + diag(u) k_t^T v_t)``, ``S_t = diag(exp(w_t)) S_{t-1} + k_t^T v_t``.

    Args:
        r, k: receptance and key, [B,T,H,K].
        v: value, [B,T,H,V].
        w: log decay per step and key channel, <= 0, [B,T,H,K].
        u: bonus of the current step, [H,K].
        initial_state: [B,H,K,V], zero when absent.
        output_final_state: give the final state as well (otherwise None).
        raw_decay: w is what RWKV-6's layer computes, any number x, and the log decay ``-exp(x)`` (``log_decay``).

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
    serving = serving_backend("wkv6", backend, r.device.type, r.shape[1], fits=values_fit(V))
    if serving == "triton":
        from hybrid.kernels.wkv6_triton import wkv6_triton

        return wkv6_triton(r, k, v, w, u, initial_state, output_final_state, raw_decay)
    if raw_decay:
        w = log_decay(w)
    if serving == "fla":
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
    serving = serving_backend("ssd", backend, x.device.type, T, state_fits(P, N))
    if serving == "triton":
        from hybrid.kernels.ssd_triton import ssd_triton

        return ssd_triton(x, dt, A, B, C, D, initial_state, output_final_state)
    if serving == "mamba_ssm":
        from hybrid.kernels.ssd_mamba import ssd_mamba

        y, state = ssd_mamba(x, dt, A, B, C, D, initial_state)
        return y, state if output_final_state else None
    with torch.autocast(x.device.type, enabled=False):
        y, state = ssd_torch(x, dt, A, B, C, D, initial_state, output_final_state)
    return y.to(x.dtype), state


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None, backend: str = "auto") -> Tensor:
    """``y_t = SiLU(bias + sum_i weight_i x_{t-K+1+i})``, one filter a channel, for x [B,T,C].

    ``weight`` is [C,K], ``bias`` [C], ``past`` the K-1 inputs before the first [B,K-1,C], zero when absent; ``backend``
    is the one asked for ``ssd``. Returns [B,T,C] in x's dtype.
    """
    C, K = weight.shape
    if x.dim() != 3 or x.shape[2] != C or bias.shape != (C,):
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in (("x", x), ("weight", weight), ("bias", bias)))
        raise ValueError(f"causal_conv needs x [B,T,C], weight [C,K], bias [C]; got {shapes}")
    if x.shape[1] == 0:
        raise ValueError("causal_conv needs at least one step, got T=0")
    if past is not None and past.shape != (x.shape[0], K - 1, C):
        raise ValueError(f"causal_conv needs a past of {[x.shape[0], K - 1, C]}, got {list(past.shape)}")
    if past is None and conv_backend(backend, x.device.type, K) == "triton":
        from hybrid.kernels.conv_triton import conv_triton

        return conv_triton(x, weight, bias)
    return conv_torch(x, weight, bias, past)


def mamba2_between(
    zxBCdt: Tensor, filters: Tensor, filter_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm: Tensor,
    groups: int, eps: float,
) -> Tensor:  # fmt: skip
    """What a layer of Mamba-2 does between its two products (arXiv:2405.21060, section 7), by kernels in one operator.

    ``zxBCdt`` [B,T,W] is the first product: the gate z [inner], the filters' inputs x [inner], B and C [groups N each],
    the step sizes [H] before their softplus, and fewer than 16 numbers of no meaning, whose gradient is zero. Then
    ``causal_conv`` with filters [C,K] and their bias [C], ``ssd`` with ``dt = softplus(dt + dt_bias)`` and
    ``A = -exp(A_log)``, D [H], and ``gate_then_norm`` with ``norm`` [inner], from an empty state. Returns [B,T,inner].
    """
    inner, H = norm.shape[0], max(1, D.shape[0])
    T, width = zxBCdt.shape[-2:]
    N, rest = divmod(filters.shape[0] - inner, 2 * groups)
    fill = width - inner - filters.shape[0] - H
    of_heads, of_filters = dt_bias.shape == A_log.shape == D.shape == (H,), filter_bias.shape == filters.shape[:1]
    fits = not (inner % H or H % groups or rest) and N > 0 and 0 <= fill < 16
    if zxBCdt.dim() != 3 or not fits or not of_heads or not of_filters:
        named = {"zxBCdt": zxBCdt, "filters": filters, "filter_bias": filter_bias, "dt_bias": dt_bias, "A_log": A_log}
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in (named | {"D": D, "norm": norm}).items())
        raise ValueError(f"mamba2_between needs zxBCdt [B,T,2 inner + 2 groups N + H] and parts that fit; got {shapes}")
    if eps <= 0:
        raise ValueError(f"mamba2_between needs an eps above 0, got {eps}")
    held = state_fits(inner // H, N) and inner // groups <= WIDEST_NORM
    if not held or filters.shape[1] > LONGEST_FILTER:
        raise ValueError("the heads, norms or filters are too large for the kernels of mamba2_between")
    if T == 0:
        raise ValueError("mamba2_between needs at least one step, got T=0")
    from hybrid.kernels.mamba2_triton import mamba2_triton

    return mamba2_triton(zxBCdt, filters, filter_bias, dt_bias, A_log, D, norm, groups, eps)


def ddlerp_linear(
    x: Tensor, delta: Tensor, low: Tensor, weight: Tensor, bias: Tensor, projections: Sequence[Tensor],
    backend: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Five mixes of every step with the one before, each projected: ``y_k = (x + delta m_k) P_k^T``.

    With ``m_k = low_k W_k^T + bias_k``, the data-dependent linear interpolation of RWKV-6 and what its outputs are
    multiplied by (arXiv:2404.05892, section 4): x [B,T,D], delta [B,T,D] the step before minus this one, low [B,T,5R]
    the five low-rank activations side by side, weight W [D,5R], bias [5,D], five projections P_k [width_k,D];
    ``backend`` is the one asked for ``wkv6``. Returns five [B,T,width_k]: from kernels in the dtype of ``low``, else as
    ``F.linear`` gives them.
    """
    B, T, D = x.shape
    if delta.shape != x.shape or low.shape[:2] != (B, T) or weight.shape != (D, low.shape[2]) or low.shape[2] % MIXES:
        named = (("x", x), ("delta", delta), ("low", low), ("weight", weight))
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in named)
        raise ValueError(f"ddlerp_linear needs x, delta [B,T,D], low [B,T,{MIXES}R], weight [D,{MIXES}R]; got {shapes}")
    if bias.shape != (MIXES, D):
        raise ValueError(f"ddlerp_linear needs a bias of {[MIXES, D]}, got {list(bias.shape)}")
    if len(projections) != MIXES or any(p.dim() != 2 or p.shape[1] != D for p in projections):
        shapes = ", ".join(str(list(p.shape)) for p in projections)
        raise ValueError(f"ddlerp_linear needs {MIXES} projections [width,{D}], got {shapes}")
    if T == 0:
        raise ValueError("ddlerp_linear needs at least one step, got T=0")
    outputs = max(p.shape[0] for p in projections)
    serving = ddlerp_backend(backend, x.device.type, D, low.shape[2] // MIXES, outputs, low.dtype)
    if serving != "torch":  # what is read five times, in the precision of the products that follow
        x, delta = x.to(low.dtype), delta.to(low.dtype)
    if serving == "triton fused":
        from hybrid.kernels.ddlerp_linear_triton import ddlerp_linear_triton

        return ddlerp_linear_triton(x, delta, low, weight, bias, projections)
    if serving == "triton":
        from hybrid.kernels.ddlerp_triton import ddlerp_triton

        shifted = ddlerp_triton(x, delta, low, weight, bias)
        projections = [p.to(low.dtype) for p in projections]
    else:
        shifted = ddlerp_torch(x, delta, low, weight, bias)
    return tuple(F.linear(y, p) for y, p in zip(shifted, projections, strict=True))


def _check_norm(name: str, x: Tensor, gate: Tensor, groups: int, eps: float, **of_channels: Tensor) -> None:
    if eps <= 0:
        raise ValueError(f"{name} needs an eps above 0, got {eps}")
    C = x.shape[-1]
    if x.dim() != 3 or gate.shape != x.shape or C % groups or any(p.shape != (C,) for p in of_channels.values()):
        named = {"x": x, "gate": gate, **of_channels}
        shapes = ", ".join(f"{key} {list(t.shape)}" for key, t in named.items())
        wanted = ", ".join(["x and gate [B,T,C]", *(f"{key} [C]" for key in of_channels)])
        raise ValueError(f"{name} needs {wanted} and {groups} groups that divide C; got {shapes}")


def norm_then_gate(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, backend: str = "auto"
) -> Tensor:
    """``GroupNorm(x) SiLU(gate)``, RWKV-6's output before its last product (arXiv:2404.05892, section 4).

    x and gate are [B,T,C], weight and bias [C]; ``backend`` is the one asked for ``wkv6``. Every step's ``groups`` of
    channels are normalised by themselves. Returns [B,T,C] in gate's dtype.
    """
    _check_norm("norm_then_gate", x, gate, groups, eps, weight=weight, bias=bias)
    if norm_backend("wkv6", backend, x.device.type, x.shape[2] // groups) == "triton":
        from hybrid.kernels.norms_triton import gated_norm_triton

        return gated_norm_triton(x, gate, weight, bias, groups, eps)
    return norm_then_gate_torch(x, gate, weight, bias, groups, eps)


def gate_then_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float, backend: str = "auto") -> Tensor:
    """``RMSNorm(x SiLU(gate))``, Mamba-2's output before its last product (arXiv:2405.21060, section 7).

    x and gate are [B,T,C], weight [C]; ``backend`` is the one asked for ``ssd``. Every step's ``groups`` of channels
    are normalised by themselves. Returns [B,T,C] in gate's dtype.
    """
    _check_norm("gate_then_norm", x, gate, groups, eps, weight=weight)
    if norm_backend("ssd", backend, x.device.type, x.shape[2] // groups) == "triton":
        from hybrid.kernels.norms_triton import gated_norm_triton

        return gated_norm_triton(x, gate, weight, None, groups, eps)
    return gate_then_norm_torch(x, gate, weight, groups, eps)
