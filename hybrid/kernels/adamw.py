"""AdamW on stacked parameters, clipping included: every member by its own gradient norm and learning rate.

With g the gradient times min(1, max_norm / (|gradients of the member| + 1e-6)), as ``torch.optim.AdamW`` without
``amsgrad`` has it (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101)::

    x <- (1 - lr weight_decay) x
    m <- m + (1 - beta1) (g - m)
    v <- beta2 v + (1 - beta2) g^2
    x <- x - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

This is the form in plain PyTorch, for any device; ``adamw_triton.py`` has the kernels for CUDA. Neither waits for the
device, so that a CUDA graph can hold the update, and neither changes the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@torch.no_grad()
def adamw_torch(
    values: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lrs: Tensor,
    weight_decays: list[float],
    betas: tuple[float, float],
    eps: float,
    max_norm: float,
) -> None:
    """One update, in place, of ``values``, both moments and ``steps``.

    Args:
        values, gradients, exp_avgs, exp_avg_sqs: a tensor a leaf, float32, [members, numbers].
        steps: updates so far, a tensor a leaf, float32, [].
        lrs: learning rates, float32, [leaves, members].
        weight_decays: a number a leaf.
        max_norm: largest total gradient norm of a member; 0 for any.
    """
    torch._foreach_add_(steps, 1)
    if max_norm > 0:
        total = torch.stack([g.square().sum(dim=1) for g in gradients]).sum(dim=0).sqrt()
        factor = (max_norm / (total + NORM_EPS)).clamp(max=1.0)[:, None]
    beta1, beta2 = betas
    for x, g, m, v, step, lr, decay in zip(
        values, gradients, exp_avgs, exp_avg_sqs, steps, lrs.unsqueeze(-1), weight_decays, strict=True
    ):
        if max_norm > 0:
            g = g * factor
        count = step.double()  # beta2^step is close to 1 at first
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        x.mul_(1 - lr * decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        ratio = (v.sqrt() / correction2.sqrt()).add_(eps)
        torch.div(m, ratio, out=ratio)
        x.sub_(ratio.mul_(lr / correction1))
