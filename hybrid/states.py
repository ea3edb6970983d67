"""How healthy a recurrent state is: whether it still moves, how many directions it uses, whether it saturates.

Of what a branch's ``observer`` saw, the last states are formed step by step, so that successive ones can be compared.
Readings are per head: the median over sequences and positions, because one token that writes little is no fault.

**Cosine of successive states.** The specification calls a state frozen above 0.99. A head with a half-life of 280
tokens keeps 99.75% of its state a step and is above that while everything is well, so the bare cosine flags exactly the
heads that remember longest.

**Novelty**, the calibrated reading, asks instead what the specification means: is the state still being written? Of
the last updates, the part that differs from token to token has some size; kept up over the head's own memory of
``m = (1 - a^T) / (1 - a)`` steps (a: decay a step and channel, T: steps so far) it can build a state of up to m times
that size. Novelty is this size over that of the state there is. A state that was made by updates like the last ones is
at most m times as large as one of them (triangle inequality), so novelty is at least about the share of an update that
differs from token to token, however slow the decay: near 1, where updates differ by as much as they are large. It is 0
where nothing is written any more (no update, with any decay, also one of exactly 1, where m = T), and where every token
writes the same. Two other calibrations were considered. ``(1 - cosine) / (1 - expected cosine)`` with the expectation
from decay and update alone is 0/0 for the state that is truly frozen, because without an update both are 0. The share
of the update, ``|u| / |S|``, against the sqrt(1 - a^2) that keeps the size of a state with independent updates, calls
healthy heads frozen: updates of real text share a direction (Mamba-2's x and B have passed a SiLU and are positive on
average), so states grow like m and not like sqrt(m).

``calibrated_cosine`` = sqrt(1 - min(1, novelty)^2) is the same as an angle, so that the specification's 0.95 and 0.99
can be applied: 0 where the state is renewed, 1 where it is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.kernels import ssd, wkv6

EMPTY = 1e-6  # a state whose values are smaller (root mean square) holds nothing: a step size of 0, say
SATURATED = 5.0  # the specification's
TOP = 5  # singular values
SPECTRA = 2  # sequences of a batch whose states are decomposed, the dearest of the readings
# Reading -> whether larger values are the worse ones.
WORSE = {"cosine": True, "novelty": False, "top5_share": False, "effective_rank": False, "saturated": True}


@dataclass
class LastSteps:
    """The end of a recurrence over ``steps`` tokens: S_{t+1} = exp(log_decay_t) * S_t + update_t for the last n."""

    states: Tensor  # [B, n + 1, H, I, J], float32
    updates: Tensor  # [B, n, H, I, J]
    log_decay: Tensor  # [B, n, H, I or 1, J or 1], <= 0
    steps: int


def wkv6_last_steps(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, last: int) -> LastSteps:
    """The last states [K,V] of RWKV-6; inputs as for ``hybrid.kernels.wkv6``."""
    B, T, H, K = k.shape
    before = T - min(last, T)
    state = k.new_zeros(B, H, K, v.shape[-1], dtype=torch.float32)
    if before:
        _, state = wkv6(*(x[:, :before] for x in (r, k, v, w)), u)
    updates = k[:, before:].float().unsqueeze(-1) * v[:, before:].float().unsqueeze(-2)
    return LastSteps(*rolled(state, updates, w[:, before:].float().unsqueeze(-1)), steps=T)


def ssd_last_steps(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, last: int
) -> LastSteps:  # fmt: skip
    """The last states [P,N] of Mamba-2; inputs as for ``hybrid.kernels.ssd``."""
    batch, T, H, P = x.shape
    before = T - min(last, T)
    state = x.new_zeros(batch, H, P, B.shape[-1], dtype=torch.float32)
    if before:
        first = (t[:, :before] for t in (B, C))
        _, state = ssd(x[:, :before], dt[:, :before], A, *first)
    step = dt[:, before:].float()[..., None, None]  # [B,n,H,1,1]
    to_state = B[:, before:].float().repeat_interleave(H // B.shape[2], dim=2)
    updates = step * x[:, before:].float().unsqueeze(-1) * to_state.unsqueeze(-2)
    return LastSteps(*rolled(state, updates, step * A[:, None, None]), steps=T)


def rolled(state: Tensor, updates: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states before, between and after the updates; with the arguments of ``LastSteps``."""
    states = [state]
    for t in range(updates.shape[1]):
        states.append(log_decay[:, t].exp() * states[-1] + updates[:, t])
    return torch.stack(states, dim=1), updates, log_decay


def readings(end: LastSteps) -> dict[str, dict[str, Tensor]]:
    """Every reading of ``WORSE`` as its ``median`` over everything and the ``worst`` head's own median.

    Scalars on the states' device, NaN where they do not exist: a single step has no two states to compare.
    """
    final = end.states[:, -1]  # [B,H,I,J]
    found = {
        "cosine": successive_cosine(end),
        "novelty": novelty(end),
        "saturated": (final.abs() > SATURATED).float().mean((-1, -2)),
        **spectrum(final[:: max(1, len(final) // SPECTRA)]),
    }
    return {name: {"median": middle(v), "worst": worst_head(v, WORSE[name])} for name, v in found.items()}


def worst_head(values: Tensor, larger_is_worse: bool) -> Tensor:
    """Of the heads' medians in [..., H]."""
    if not values.numel():
        return values.new_tensor(torch.nan)
    heads = values.flatten(0, -2).quantile(0.5, dim=0)
    return heads.max() if larger_is_worse else heads.min()


def middle(values: Tensor) -> Tensor:
    return values.flatten().quantile(0.5) if values.numel() else values.new_tensor(torch.nan)


def successive_cosine(end: LastSteps) -> Tensor:
    """[B, pairs, H]; the zero state before the first token makes no pair. Two empty states are the same: 1."""
    states = end.states.flatten(-2)
    if states.shape[1] > end.steps:
        states = states[:, 1:]
    one, next_one = states[:, :-1], states[:, 1:]
    sizes = one.norm(dim=-1) * next_one.norm(dim=-1)
    cosine = (one * next_one).sum(-1) / sizes
    empty = (rms(one) < EMPTY) & (rms(next_one) < EMPTY)
    return torch.where(empty, 1.0, torch.where(sizes > 0, cosine, 0.0)) + states[:, :-1, :, 0] * 0  # NaN stays


def novelty(end: LastSteps) -> Tensor:
    """[B,H]: see above."""
    if end.updates.shape[1] < 2:
        return end.updates.new_zeros(0, end.updates.shape[2])
    log_decay = end.log_decay.double().mean(dim=1)  # [B,H,I or 1,J or 1]
    still = log_decay > -1e-9
    # (1 - a^T) / (1 - a), exact for decays close to 1
    memory = torch.expm1(end.steps * log_decay) / torch.expm1(log_decay.masked_fill(still, -1.0))
    memory = memory.masked_fill(still, float(end.steps)).float()
    varying = end.updates.std(dim=1) * memory
    final = end.states[:, -1]
    share = varying.flatten(-2).norm(dim=-1) / final.flatten(-2).norm(dim=-1)
    return torch.where(rms(final.flatten(-2)) < EMPTY, 0.0, share)


def spectrum(state: Tensor) -> dict[str, Tensor]:
    """Of states [B,H,I,J]: the share of the largest five singular values in the sum of all, and the effective rank.

    The effective rank is exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007). A
    state with a side of five or less has a top-five share of 1 whatever it holds; an empty one has 1, and rank 0.
    """
    size = state.double().abs().amax((-1, -2), keepdim=True)
    usable = size.isfinite() & (size > 0)
    state = state.double().masked_fill(~usable, 0.0) / size.where(usable, 1.0)
    finite = size.isfinite()[..., 0, 0]
    if state.shape[-2] > state.shape[-1]:
        state = state.transpose(-1, -2)
    # On the CPU: for a few small matrices a GPU's solver takes longer than the way there and back.
    squares = torch.linalg.eigvalsh((state @ state.transpose(-1, -2)).cpu()).to(state.device)  # ascending
    values = squares.clamp_min(0).sqrt()
    total = values.sum(-1)
    empty = total == 0
    shares = values / total.masked_fill(empty, 1.0).unsqueeze(-1)
    rank = torch.special.entr(shares).sum(-1).exp()
    top = shares[..., -TOP:].sum(-1)
    return {
        "top5_share": torch.where(finite, torch.where(empty, 1.0, top), torch.nan).float(),
        "effective_rank": torch.where(finite, torch.where(empty, 0.0, rank), torch.nan).float(),
    }


def rms(flat: Tensor) -> Tensor:
    return flat.square().mean(-1).sqrt()
