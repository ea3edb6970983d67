"""Every way to join the outputs of the two branches of a block.

A fusion is a class in ``FUSIONS``: ``join(a, b)`` takes the outputs of the first and the second branch (RWKV-6 and
Mamba-2 in the main model), both [B,T,d], and returns [B,T,d]. A new one needs its class here, its YAML in
``conf/fusion/``, its parameter count in ``hybrid.sizes.FUSION_PARAMS`` and a row in ``tests/hybrid/test_fusion.py``.

At an even start (a gate, weight or gain of 0.5 and ``proj_init=identity``) every fusion gives the second branch half
its weight at step 0, and all but ``residual`` the first as well. With the official initialisation RWKV-6's output is
zero at step 0, so all arms then begin as the same function, and differ in what they can learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hybrid.branches import BranchState
from hybrid.schema import FusionConfig


class Fusion(nn.Module):
    """Base of all fusions: optional normalisation of each branch, then ``join``.

    ``observer``, when set, is called with the share that the first branch gets (gates only).
    """

    def __init__(self, d_model: int, cfg: FusionConfig, branches: tuple[str, str]) -> None:
        super().__init__()
        self.branch_norm = cfg.branch_norm == "rms"
        self.observer: Callable[[Tensor], None] | None = None

    def initial_state(self, batch: int) -> BranchState:
        return {}

    def forward(self, a: Tensor, b: Tensor, state: BranchState | None = None) -> tuple[Tensor, BranchState | None]:
        return self.join_with_state(self.normalised(a), self.normalised(b), state)

    def normalised(self, x: Tensor) -> Tensor:
        """A branch's output [B,T,d] as ``join`` gets it."""
        # Without weights, so that the switch changes no parameter count. Of an output that is exactly zero, as
        # RWKV-6's with the official initialisation, it makes the first gradient 1/sqrt(eps) = 316 times as large.
        return F.rms_norm(x, x.shape[-1:], eps=1e-5) if self.branch_norm else x

    def join_with_state(self, a: Tensor, b: Tensor, state: BranchState | None) -> tuple[Tensor, BranchState | None]:
        return self.join(a, b), state

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError


class Gain(Fusion):
    """``gain_a * a + gain_b * b`` with one gain per channel and branch."""

    def __init__(self, d_model: int, cfg: FusionConfig, branches: tuple[str, str]) -> None:
        super().__init__(d_model, cfg, branches)
        self.names = [f"{branch}_gain" for branch in branches]
        for name, start in zip(self.names, cfg.gain_init, strict=True):
            self.register_parameter(name, nn.Parameter(torch.full((d_model,), float(start))))

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        gain_a, gain_b = (getattr(self, name) for name in self.names)
        return gain_a * a + gain_b * b


class Weighted(Fusion):
    """``w * a + (1 - w) * b`` with one learnt number."""

    def __init__(self, d_model: int, cfg: FusionConfig, branches: tuple[str, str]) -> None:
        super().__init__(d_model, cfg, branches)
        self.weight = nn.Parameter(torch.tensor(float(cfg.weight_init)))

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(self.weight.detach())
        return self.weight * a + (1 - self.weight) * b


class Gated(Fusion):
    """``g * a + (1 - g) * b`` with ``g = sigmoid(Linear([a; b]))``, one gate per position.

    The weights start at zero and the bias at logit(gate_init), so the gate is gate_init everywhere at step 0.
    """

    def __init__(self, d_model: int, cfg: FusionConfig, branches: tuple[str, str], width: int = 1) -> None:
        super().__init__(d_model, cfg, branches)
        self.gate = nn.Linear(2 * d_model, width)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, math.log(cfg.gate_init / (1 - cfg.gate_init)))

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        g = torch.sigmoid(self.logits(torch.cat((a, b), dim=-1)))
        if self.observer is not None:
            self.observer(g.detach())
        return g * a + (1 - g) * b

    def logits(self, both: Tensor) -> Tensor:
        """The linear layer. A product with one column as a sum, which compilers fuse with what stands around it."""
        weight, bias = self.gate.weight, self.gate.bias
        if len(weight) > 1:
            return self.gate(both)
        precision = torch.promote_types(both.dtype, torch.float32)
        return (both.to(precision) * weight[0].to(precision)).sum(-1, keepdim=True) + bias


class GatedChannel(Gated):
    """As ``Gated``, with a gate per position and channel."""

    def __init__(self, d_model: int, cfg: FusionConfig, branches: tuple[str, str]) -> None:
        super().__init__(d_model, cfg, branches, width=d_model)


class Concat(Fusion):
    """``Linear([a; b])``: concatenate and project."""

    def __init__(self, d_model: int, cfg: FusionConfig, branches: tuple[str, str]) -> None:
        super().__init__(d_model, cfg, branches)
        self.proj = nn.Linear(2 * d_model, d_model, bias=False)
        if cfg.proj_init == "identity":
            with torch.no_grad():
                self.proj.weight.copy_(torch.eye(d_model).repeat(1, 2) / 2)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return self.proj(torch.cat((a, b), dim=-1))


class Residual(Fusion):
    """``a + Linear(b)``: the first branch as base, a projection of the second added."""

    def __init__(self, d_model: int, cfg: FusionConfig, branches: tuple[str, str]) -> None:
        super().__init__(d_model, cfg, branches)
        self.proj = nn.Linear(d_model, d_model, bias=False)
        if cfg.proj_init == "identity":
            with torch.no_grad():
                self.proj.weight.copy_(torch.eye(d_model) / 2)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return a + self.proj(b)


class CrossAttention(Fusion):
    """The average of the branches plus what each finds by querying the other.

    Attention is causal inside a window of ``window`` positions (the current one included), so its cost is linear in
    T. The output projection starts at zero.
    """

    def __init__(self, d_model: int, cfg: FusionConfig, branches: tuple[str, str]) -> None:
        super().__init__(d_model, cfg, branches)
        self.num_heads, self.window = cfg.num_heads, cfg.window
        width = cfg.num_heads * cfg.head_dim
        self.qkv_a = nn.Linear(d_model, 3 * width, bias=False)
        self.qkv_b = nn.Linear(d_model, 3 * width, bias=False)
        self.out = nn.Linear(2 * width, d_model, bias=False)
        nn.init.zeros_(self.out.weight)

    def initial_state(self, batch: int) -> BranchState:
        """Keys and values of the last window-1 positions of both branches, none yet."""
        head_dim = self.out.weight.shape[1] // (2 * self.num_heads)
        empty = self.out.weight.new_zeros(batch, self.num_heads, 0, head_dim)
        return {name: empty for name in ("key_a", "value_a", "key_b", "value_b")}

    def join_with_state(self, a: Tensor, b: Tensor, state: BranchState | None) -> tuple[Tensor, BranchState | None]:
        B, T, _ = a.shape
        q_a, key_a, value_a = self.qkv_a(a).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q_b, key_b, value_b = self.qkv_b(b).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        memory = {"key_a": key_a, "value_a": value_a, "key_b": key_b, "value_b": value_b}
        past = 0
        if state is not None:
            past = state["key_a"].shape[2]
            memory = {name: torch.cat((state[name].to(x.dtype), x), dim=2) for name, x in memory.items()}
        found_b = window_attention(q_a, memory["key_b"], memory["value_b"], past, self.window)
        found_a = window_attention(q_b, memory["key_a"], memory["value_a"], past, self.window)
        found = torch.cat((found_b, found_a), dim=-1).transpose(1, 2).reshape(B, T, -1)
        keep = self.window - 1
        tail = None if state is None else {name: x[:, :, max(0, past + T - keep) :] for name, x in memory.items()}
        return (a + b) / 2 + self.out(found), tail


def window_attention(q: Tensor, k: Tensor, v: Tensor, past: int, window: int) -> Tensor:
    """Softmax attention of each query to the last ``window`` positions, itself included.

    q [B,H,T,D]; k, v [B,H,past+T,D] with the ``past`` < window positions before the first query. Works block by
    block: the queries of one block of ``window`` see that block and the one before, so the cost is T*2*window.
    """
    T = q.shape[2]
    pad = -T % window
    blocks = (T + pad) // window
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (blocks, window))
    # Keys from one window before the first query on, so that block n is at n*window .. (n+2)*window.
    k, v = (F.pad(x, (0, 0, window - past, pad)).unfold(2, 2 * window, window).transpose(-1, -2) for x in (k, v))
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device)[None, :] - window  # relative to the block's first query
    seen = (j <= i) & (i - j < window)
    exists = torch.arange(blocks, device=q.device)[:, None, None] * window + j + past >= 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen & exists).flatten(2, 3)[:, :, :T]


FUSIONS: dict[str, type[Fusion]] = {
    "gain": Gain,
    "weighted": Weighted,
    "gated": Gated,
    "gated_channel": GatedChannel,
    "concat": Concat,
    "residual": Residual,
    "cross_attention": CrossAttention,
}


def build_fusion(d_model: int, cfg: FusionConfig, branches: tuple[str, str]) -> Fusion:
    """The fusion that ``cfg.name`` names; ``branches`` are the names of the two modules it joins."""
    return FUSIONS[cfg.name](d_model, cfg, branches)
