"""The update of a stack against ``torch.optim.AdamW`` on each member alone, for the tests on CPU and GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from hybrid.schema import OptimConfig
from hybrid.training.optimizer import adamw_groups
from hybrid.training.stack import Leaf
from hybrid.training.stacked_adamw import StackedAdamW

ULP = 2.0**-23


@dataclass
class Problem:
    """Leaves of some parts of the model, and for every step their gradients and learning rates [leaves, members]."""

    cfg: OptimConfig
    parts: list[tuple[str, bool]]
    start: list[Tensor]
    gradients: list[list[Tensor]]
    lrs: Tensor

    def leaves(self) -> list[Leaf]:
        rows = zip(self.parts, self.start, strict=True)
        return [Leaf(part, decay, False, [], [], [], nn.Parameter(x.clone())) for (part, decay), x in rows]


def problem(cfg: OptimConfig, members: int, sizes: list[int], steps: int, device: str = "cpu") -> Problem:
    """Gradients of member k have a norm of about 0.02, 1 and 50 in turn; its learning rates differ by part and step."""
    generator = torch.Generator(device).manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    parts = [(("rwkv", "mamba", "fusion", "other")[i % 4], i % 2 == 0) for i in range(len(sizes))]
    scale = torch.tensor([(0.02, 1.0, 50.0)[k % 3] for k in range(members)], device=device)[:, None] / sum(sizes) ** 0.5
    gradients = [[noise(members, size) * scale for size in sizes] for _ in range(steps)]
    lrs = 10 ** (-3 + torch.rand(steps, len(sizes), members, device=device, generator=generator))
    start = [0.02 * noise(members, size) for size in sizes]  # small, so that they do not round the updates off
    return Problem(cfg, parts, start, gradients, lrs)


def alone(given: Problem, member: int) -> tuple[list[Tensor], torch.optim.AdamW, list[float]]:
    """Values, optimiser and total gradient norms of one member after PyTorch's own clipping and steps."""
    cfg = given.cfg
    values = [nn.Parameter(x[member].clone()) for x in given.start]
    groups = adamw_groups([(part, decay, [x]) for (part, decay), x in zip(given.parts, values, strict=True)], cfg)
    optimizer = torch.optim.AdamW(groups, betas=tuple(cfg.betas), eps=cfg.eps, foreach=False)
    norms = []
    for gradients, lrs in zip(given.gradients, given.lrs, strict=True):
        for x, gradient in zip(values, gradients, strict=True):
            x.grad = gradient[member].clone()
        largest = cfg.grad_clip if cfg.grad_clip > 0 else float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(values, largest).item())
        for group, lr in zip(optimizer.param_groups, lrs[:, member], strict=True):
            group["lr"] = lr.item()
        optimizer.step()
    return values, optimizer, norms


def check(given: Problem, leaves: list[Leaf], optimizer: StackedAdamW) -> None:
    """Values and state are those of every member alone, to float32 rounding.

    In a step each side rounds a value twice (decay, update), by half a unit each time, so they part by at most two
    units of the largest value. An update is at most a few learning rates large and the outcome of some ten roundings
    on each side: 20 units of the learning rate. Moments round three times a step, by units of the clipped gradient.
    """
    steps, largest_norm = len(given.gradients), given.cfg.grad_clip or float("inf")
    for member in range(given.start[0].shape[0]):
        values, reference, norms = alone(given, member)
        for i, (leaf, x) in enumerate(zip(leaves, values, strict=True)):
            largest = max(x.detach().abs().max().item(), given.start[i][member].abs().max().item())
            bound = ULP * (2 * steps * largest + 20 * given.lrs[:, i, member].sum().item())
            assert (leaf.values[member] - x).abs().max().item() <= bound, (member, i)
            ours, theirs = optimizer.state[leaf.values], reference.state[x]
            assert ours.keys() == theirs.keys() and ours["step"].item() == theirs["step"].item() == steps
            clipped = max(
                gradients[i][member].abs().max().item() * min(1.0, largest_norm / (norm + 1e-6))
                for gradients, norm in zip(given.gradients, norms, strict=True)
            )
            for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                error = (ours[name][member] - theirs[name]).abs().max().item()
                assert error <= 3 * steps * ULP * clipped**power, (name, member, i)
