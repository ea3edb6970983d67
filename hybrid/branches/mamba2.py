"""The Mamba-2 branch: FLA's layer, with a forward that runs anywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.branches import BranchState, fla_layers
from hybrid.kernels import causal_conv, gate_then_norm, mamba2_backend, mamba2_between, ssd
from hybrid.padding import wide_linear
from hybrid.schema import KernelsConfig, MambaConfig


class Mamba2(fla_layers.Mamba2):
    """Mamba-2: a selective state space model with A, B, C, D and a step size dt, in its SSD form.

    Parameters, shapes and names are FLA's; the forward (arXiv:2405.21060, section 7) is plain PyTorch around
    ``kernels.causal_conv``, ``kernels.ssd`` and ``kernels.gate_then_norm``, or ``kernels.mamba2_between`` for all three
    where kernels serve them and nobody asks for a state or what the recurrence gets.
    """

    only_linear = True

    def __init__(self, d_model: int, cfg: MambaConfig, kernels: KernelsConfig) -> None:
        super().__init__(
            hidden_size=d_model,
            head_dim=cfg.head_dim,
            state_size=cfg.state_size,
            expand=cfg.expand,
            n_groups=cfg.n_groups,
            conv_kernel=cfg.conv_kernel,
            backend="triton",  # of FLA's own forward, which is not used here
        )
        self.kernel_backend = kernels.ssd
        self.observer: Callable[[dict[str, Tensor]], None] | None = None  # called with the recurrence's inputs

    def initial_state(self, batch: int) -> BranchState:
        """The last inputs of the convolution [B,kernel-1,conv_dim] and the recurrent state [B,H,P,N], all zero."""
        zeros = self.out_proj.weight.new_zeros
        return {
            "conv": zeros(batch, self.conv_kernel_size - 1, self.conv_dim),
            "ssm": zeros(batch, self.num_heads, self.head_dim, self.ssm_state_size, dtype=torch.float32),
        }

    def forward(self, x: Tensor, state: BranchState | None = None) -> tuple[Tensor, BranchState | None]:
        zxBCdt = wide_linear(x, self.in_proj) if x.is_cuda else self.in_proj(x)
        if state is None and self.observer is None and self.fused(x):
            y = mamba2_between(
                zxBCdt, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, self.A_log, self.D,
                self.norm.weight, self.n_groups, self.norm.eps,
            )  # fmt: skip
            return self.out_proj(y), None
        y, state = self.between(zxBCdt, state)
        return self.out_proj(y), state

    def fused(self, x: Tensor) -> bool:
        """Whether one operator serves x [B,T,d_model]."""
        sizes = self.conv_kernel_size, self.head_dim, self.ssm_state_size, self.intermediate_size // self.n_groups
        return mamba2_backend(self.kernel_backend, x.device.type, x.shape[1], *sizes) == "triton fused"

    def between(self, zxBCdt: Tensor, state: BranchState | None) -> tuple[Tensor, BranchState | None]:
        """``kernels.mamba2_between`` in its parts, with states."""
        B, T, _ = zxBCdt.shape
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        # Filling is a piece of its own: cut off before, its gradient would be another copy of all others.
        z, xBC, dt, _ = zxBCdt.split([*sizes, zxBCdt.shape[-1] - sum(sizes)], dim=-1)

        past = None if state is None else state["conv"]
        convolved = causal_conv(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, past, self.kernel_backend)
        groups = self.n_groups * self.ssm_state_size
        channels, Bs, Cs = convolved.split([self.intermediate_size, groups, groups], dim=-1)

        inputs = {
            "x": channels.view(B, T, self.num_heads, self.head_dim),
            "dt": F.softplus(dt.float() + self.dt_bias),
            "A": -torch.exp(self.A_log.float()),
            "B": Bs.view(B, T, self.n_groups, self.ssm_state_size),
            "C": Cs.view(B, T, self.n_groups, self.ssm_state_size),
            "D": self.D,
        }
        if self.observer is not None:
            self.observer(inputs)
        y, ssm = ssd(
            **inputs,
            initial_state=None if state is None else state["ssm"],
            backend=self.kernel_backend,
            output_final_state=state is not None,
        )
        y = gate_then_norm(
            y.reshape(B, T, -1), z, self.norm.weight, self.n_groups, self.norm.eps, backend=self.kernel_backend
        )
        if state is None:
            return y, None
        return y, {"conv": torch.cat((past.to(xBC.dtype), xBC), dim=1)[:, T:], "ssm": ssm}
