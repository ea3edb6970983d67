"""``adamw_torch`` as two Triton kernels a leaf: sums of squares by member, and the update with clipping in it.

PyTorch's fused AdamW gives a block 65,536 numbers, too few blocks to fill a GPU with the few leaves of a small model,
and knows one learning rate a leaf. Here a block has ``BLOCK`` numbers of one member. Every block writes its own sum of
squares, and PyTorch adds them: always in the same order, as atomic additions would not.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels.adamw import NORM_EPS

BLOCK = 1024  # numbers a program: 2^20 of them are 1024 programs, 7.8 for each multiprocessor of an H100
WARPS = 4  # 8 numbers a thread: two loads of 16 bytes from each tensor


# What differs between leaves of one kind is not specialised on, or it would be compiled for every leaf.
@triton.jit(do_not_specialize=["columns", "first"])
def _squares_kernel(gradient_ptr, sums_ptr, numbers, columns, first, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient_ptr + member * numbers + i, mask=i < numbers, other=0.0)
    tl.store(sums_ptr + member * columns + first + block, tl.sum(g * g, axis=0))


@triton.jit(do_not_specialize=["leaf"])
def _adamw_kernel(
    value_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, step_ptr, lr_ptr, squares_ptr,
    numbers, leaf, weight_decay, beta2, log_beta1, log_beta2, one_minus_beta1, one_minus_beta2, eps, max_norm, norm_eps,
    CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    members = tl.num_programs(1)
    lr = tl.load(lr_ptr + leaf * members + member)
    # In float64 (but for the logarithms, which arrive in float32): beta2^step is close to 1 at first.
    step = tl.load(step_ptr).to(tl.float64)
    correction1 = (1.0 - tl.exp(step * log_beta1)).to(tl.float32)
    correction2 = tl.sqrt(1.0 - tl.exp(step * log_beta2)).to(tl.float32)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numbers
    at = member * numbers + i
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    m = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
    x = tl.load(value_ptr + at, mask=inside, other=0.0)
    if CLIP:
        factor = tl.div_rn(max_norm, tl.sqrt_rn(tl.load(squares_ptr + member)) + norm_eps)
        g *= tl.where(factor > 1.0, 1.0, factor)  # keeps a NaN, as a minimum would not
    x *= 1.0 - lr * weight_decay
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    x -= tl.div_rn(tl.div_rn(lr, correction1) * m, tl.div_rn(tl.sqrt_rn(v), correction2) + eps)
    tl.store(exp_avg_ptr + at, m, mask=inside)
    tl.store(exp_avg_sq_ptr + at, v, mask=inside)
    tl.store(value_ptr + at, x, mask=inside)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def sums_of_squares(gradients: list[Tensor]) -> Tensor:
    """Of every member over all leaves [members, numbers], [members]."""
    members = gradients[0].shape[0]
    blocks = [triton.cdiv(g.shape[1], BLOCK) for g in gradients]
    sums = torch.empty(members, sum(blocks), device=gradients[0].device)
    first = 0
    for g, count in zip(gradients, blocks, strict=True):
        with torch.cuda.device_of(g):
            _squares_kernel[(count, members)](g, sums, g.shape[1], sums.shape[1], first, BLOCK=BLOCK, num_warps=WARPS)
        first += count
    return sums.sum(dim=1)


@torch.no_grad()
def adamw_triton(
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
    """See ``adamw_torch``. All but the gradients must be contiguous."""
    torch._foreach_add_(steps, 1)
    gradients, lrs = [g.contiguous() for g in gradients], lrs.contiguous()
    clip = max_norm > 0
    squares = sums_of_squares(gradients) if clip else lrs
    beta1, beta2 = betas
    of_betas = (beta2, _log(beta1), _log(beta2), 1 - beta1, 1 - beta2)
    tensors = zip(values, gradients, exp_avgs, exp_avg_sqs, steps, weight_decays, strict=True)
    for leaf, (x, g, m, v, step, decay) in enumerate(tensors):
        members, numbers = x.shape
        with torch.cuda.device_of(x):
            _adamw_kernel[(triton.cdiv(numbers, BLOCK), members)](
                x, g, m, v, step, lrs, squares,
                numbers, leaf, float(decay), *of_betas, float(eps), float(max_norm), NORM_EPS,
                CLIP=clip, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
