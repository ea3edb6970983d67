"""Causal softmax attention with rotary positions: the transformer that the hybrids are held against."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hybrid.branches import BranchState
from hybrid.schema import AttentionConfig


class Attention(nn.Module):
    """Multi-head attention without biases; the state is the keys and values of everything before."""

    only_linear = True

    def __init__(self, d_model: int, cfg: AttentionConfig) -> None:
        super().__init__()
        self.num_heads, self.rope_base = cfg.num_heads, cfg.rope_base
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def initial_state(self, batch: int) -> BranchState:
        """Keys and values of no position yet, [B,H,0,D]."""
        width = self.o_proj.weight.shape[0] // self.num_heads
        empty = self.o_proj.weight.new_zeros(batch, self.num_heads, 0, width)
        return {"key": empty, "value": empty}

    def forward(self, x: Tensor, state: BranchState | None = None) -> tuple[Tensor, BranchState | None]:
        B, T, D = x.shape
        q, k, v = self.qkv_proj(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B,H,T,D/H]
        past = 0 if state is None else state["key"].shape[2]
        q, k = rotate(q, past, self.rope_base), rotate(k, past, self.rope_base)
        if state is not None:
            k = torch.cat((state["key"].to(k.dtype), k), dim=2)
            v = torch.cat((state["value"].to(v.dtype), v), dim=2)
        if past == 0:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out = self.o_proj(o.transpose(1, 2).reshape(B, T, D))
        return out, None if state is None else {"key": k, "value": v}


def rotate(x: Tensor, offset: int, base: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of [B,H,T,D] from position ``offset`` on."""
    T, half = x.shape[-2], x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (offset + torch.arange(T, device=x.device, dtype=torch.float32))[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
