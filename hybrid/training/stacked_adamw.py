"""AdamW for the leaves of a stack: each member with its own clipping and learning rate, in a few kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid.kernels import resolve_backend
from hybrid.kernels.adamw import adamw_torch
from hybrid.schema import Config, OptimConfig
from hybrid.training.optimizer import adamw_groups
from hybrid.training.stack import Leaf


def update_backend(cfg: Config) -> str:
    """What serves the update: "triton" where Triton serves the recurrences, "torch" where plain PyTorch does both.

    So ``kernels=torch`` keeps the whole step plain, and machines without Triton need no key of their own.
    """
    device_type = cfg.trainer.device.partition(":")[0]
    served = {resolve_backend(op, getattr(cfg.kernels, op), device_type) for op in ("wkv6", "ssd")}
    return "torch" if served == {"torch"} else "triton"  # fla and mamba_ssm are Triton kernels as well


def _function(backend: str) -> Callable[..., None]:
    if backend == "torch":
        return adamw_torch
    from hybrid.kernels.adamw_triton import adamw_triton

    return adamw_triton


class StackedAdamW(torch.optim.AdamW):
    """A ``torch.optim.AdamW`` with a group for every leaf, its state of the same form, that takes steps of its own."""

    def __init__(self, leaves: list[Leaf], cfg: OptimConfig, backend: str) -> None:
        cuda = leaves[0].values.is_cuda
        groups = adamw_groups([(leaf.part, leaf.decay, [leaf.values]) for leaf in leaves], cfg)
        super().__init__(groups, betas=tuple(cfg.betas), eps=cfg.eps, fused=cuda, capturable=cuda)
        self.leaves, self.max_norm = [leaf.values for leaf in leaves], cfg.grad_clip
        self.update = _function(backend)
        for leaf in self.leaves:  # here, as PyTorch would in its first step: a checkpoint is loaded into it
            self.state[leaf]["step"] = torch.zeros((), device=leaf.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                self.state[leaf][moment] = torch.zeros_like(leaf, requires_grad=False)

    def step(self, lrs: Tensor) -> None:
        """One update with the learning rates ``lrs`` [leaves, members]; gradients stay as they are, unclipped."""
        for leaf in self.leaves:
            if leaf.grad is None:  # without influence on this batch
                leaf.grad = torch.zeros_like(leaf)
        states = [self.state[leaf] for leaf in self.leaves]
        self.update(
            values=[leaf.data for leaf in self.leaves],
            gradients=[leaf.grad for leaf in self.leaves],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            steps=[state["step"] for state in states],
            lrs=lrs,
            weight_decays=[group["weight_decay"] for group in self.param_groups],
            betas=self.defaults["betas"],
            eps=self.defaults["eps"],
            max_norm=self.max_norm,
        )
