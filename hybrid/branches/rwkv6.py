"""The RWKV-6 (Finch, x060) branch: FLA's layer, with a forward that runs anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from hybrid.branches import BranchState
from hybrid.branches.fla_layers import RWKV6Attention, weights_are_initialised
from hybrid.kernels import ddlerp_linear, log_decay, norm_then_gate, wkv6
from hybrid.schema import KernelsConfig, RWKVConfig


class RWKV6(RWKV6Attention):
    """RWKV-6 time mixing: data-dependent token shift, data-dependent decay, matrix-valued state.

    Parameters, shapes and names are FLA's; the forward is the published one (arXiv:2404.05892, section 4) in plain
    PyTorch around ``kernels.ddlerp_linear``, ``kernels.wkv6`` and ``kernels.norm_then_gate``. FLA's own warning that
    its RWKV "is potentially buggy" is answered by a test against an independent statement of the formulas.
    """

    only_linear = False

    def __init__(self, d_model: int, cfg: RWKVConfig, kernels: KernelsConfig) -> None:
        with warnings.catch_warnings(), weights_are_initialised():
            warnings.filterwarnings("ignore", message="According to Bo")
            super().__init__(
                hidden_size=d_model,
                num_heads=cfg.num_heads,
                expand_k=cfg.expand_k,
                expand_v=cfg.expand_v,
                proj_low_rank_dim=cfg.shift_low_rank,
                gate_low_rank_dim=cfg.decay_low_rank,
            )
        # Bonus, mixes and decay, their low-rank pairs too, are not decayed (as in RWKV-LM's optimiser groups).
        decay = self.w_proj.linear.lora
        pairs = (self.x_proj[0].linear, self.x_proj[2], decay[0], decay[2])
        for parameter in (self.x_bias, self.bonus, *(layer.weight for layer in pairs)):
            parameter._no_weight_decay = True
        self.x_proj[2].weight._read_by_rows = True  # never a linear layer: ``ddlerp_linear`` takes it row by row
        self.backend = kernels.wkv6
        self.observer: Callable[[dict[str, Tensor]], None] | None = None  # called with the recurrence's inputs

    def initial_state(self, batch: int) -> BranchState:
        """The last input (for the token shift) [B,d] and the recurrent state [B,H,K,V], all zero."""
        zeros = self.o_proj.weight.new_zeros
        return {
            "shift": zeros(batch, self.hidden_size),
            "wkv": zeros(batch, self.num_heads, self.head_k_dim, self.head_v_dim, dtype=torch.float32),
        }

    def forward(self, x: Tensor, state: BranchState | None = None) -> tuple[Tensor, BranchState | None]:
        B, T, D = x.shape
        previous = x.new_zeros(B, 1, D) if state is None else state["shift"].to(x.dtype).unsqueeze(1)
        delta = torch.cat((previous, x[:, :-1]), dim=1) - x

        # Token shift with a mix that depends on the data: x_proj is (to rank 5R, tanh, up again), x_bias its offset.
        to_low, tanh, to_full = self.x_proj
        low = tanh(to_low.linear(x + delta * to_low.mu))
        decay_to_low, decay_tanh, decay_to_full = self.w_proj.linear.lora
        plain = (self.k_proj, self.v_proj, self.g_proj)
        projections = [layer.weight for layer in (self.r_proj.linear, decay_to_low, *(p.linear for p in plain))]
        r, w, k, v, g = ddlerp_linear(x, delta, low, to_full.weight, self.x_bias, projections, self.backend)
        w = decay_to_full(decay_tanh(w))

        r, k, w = (y.view(B, T, self.num_heads, self.head_k_dim) for y in (r, k, w))
        v = v.view(B, T, self.num_heads, self.head_v_dim)

        if self.observer is not None:
            self.observer({"r": r, "k": k, "v": v, "w": log_decay(w), "u": self.bonus})
        o, wkv = wkv6(
            r, k, v, w, self.bonus,
            initial_state=None if state is None else state["wkv"],
            backend=self.backend,
            output_final_state=state is not None,
            raw_decay=True,
        )  # fmt: skip
        norm, heads = self.g_norm, self.num_heads
        o = norm_then_gate(o.reshape(B, T, -1), g, norm.weight, norm.bias, heads, norm.eps, backend=self.backend)
        out = self.o_proj(o)
        return out, None if state is None else {"shift": x[:, -1], "wkv": wkv}
