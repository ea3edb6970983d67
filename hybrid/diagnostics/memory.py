"""How far back a model remembers: by what a changed token still changes later, and by the decays themselves.

A token is replaced, and the next-token distributions k positions later are compared. What can carry the change there
are the branches (recurrence, convolution, token shift) and, in ``cross_attention``, the fusion; everything else works
position by position. Pinning a branch to its undisturbed outputs at all later positions, in all layers, takes it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid.data import DataError
from hybrid.diagnostics.substitutes import Pinned, branch_names, substituted
from hybrid.diagnostics.windows import Windows
from hybrid.fusion import CrossAttention
from hybrid.model import HybridLM
from hybrid.observed import Place, observed_kernels, places, recorded

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


@dataclass(frozen=True)
class Changes:
    """One token replaced in each of some windows."""

    tokens: Tensor  # [changes, T], the undisturbed text
    positions: Tensor  # [changes]
    replacements: Tensor  # [changes], other tokens than were there


def lags_of(length: int) -> list[int]:
    """1, 2, 4, ... below the context."""
    return [2**i for i in range((length - 1).bit_length()) if 2**i < length]


def draw_changes(windows: Windows, number: int, seed: int = 0) -> Changes:
    """Windows at even distances, positions from which every lag fits, and tokens as frequent as in the text.

    Raises ``DataError`` where the text has one token only.
    """
    random = torch.Generator().manual_seed(seed)
    tokens = windows.tokens[torch.arange(number) * len(windows) // number]
    room = windows.length - max(lags_of(windows.length), default=0)
    positions = torch.randint(room, (number,), generator=random)
    frequency = torch.bincount(windows.tokens.flatten()).double()
    if (frequency > 0).sum() < 2:
        raise DataError("the validation text has one token only; there is nothing to replace it with")
    allowed = frequency.repeat(number, 1)
    allowed[torch.arange(number), tokens[torch.arange(number), positions]] = 0
    return Changes(tokens, positions, torch.multinomial(allowed, 1, generator=random).squeeze(1))


@torch.no_grad()
def measure_influence(
    model: HybridLM, changes: Changes, batch_size: int, device: torch.device
) -> tuple[dict[str, list], dict[str, list]]:
    """Mean KL divergence (nats) of the undisturbed from the disturbed next-token distribution at every lag.

    Returns it and its standard error over the changes, both with the lags and one list for each carrier: ``full``
    (all of them), each branch alone, and with ``cross_attention`` the ``fusion`` alone. There a branch's list is that
    of the branch and the fusion together, because the fusion hands on whatever the branch has carried.
    """
    lags = lags_of(changes.tokens.shape[1])
    found: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(changes.tokens)).split(batch_size):
        part = Changes(*(x[rows].to(device) for x in (changes.tokens, changes.positions, changes.replacements)))
        for carrier, divergences in influence_of(model, part, lags):
            found.setdefault(carrier, []).append(divergences.cpu())
    curves, errors = {"lags": lags}, {"lags": lags}
    for carrier, parts in found.items():
        divergences = torch.cat(parts)
        curves[carrier] = divergences.mean(dim=0).tolist()
        spread = divergences.std(dim=0) if lags else divergences.new_zeros(0)  # a context of one token has no lags
        errors[carrier] = (spread / math.sqrt(len(divergences))).tolist()
    return curves, errors


def influence_of(model: HybridLM, changes: Changes, lags: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Of every carrier the KL divergence of every change at every lag, float64 [changes, lags]."""
    tokens, positions = changes.tokens, changes.positions
    read = positions[:, None] + torch.tensor(lags, dtype=torch.int64, device=tokens.device)

    def predictions(of: Tensor) -> Tensor:
        logits = model(of)
        return logits.gather(1, read[..., None].expand(-1, -1, logits.shape[-1])).double().log_softmax(-1)

    with recorded(model) as recording:
        undisturbed = predictions(tokens)
    outputs = dict(recording.outputs)
    changed = tokens.scatter(1, positions[:, None], changes.replacements[:, None])
    later = torch.arange(tokens.shape[1], device=tokens.device) > positions[:, None]
    names = branch_names(model)
    carriers: dict[str, list[str]] = {"full": names} | {name: [name] for name in names}
    if any(isinstance(getattr(block, "fusion", None), CrossAttention) for block in model.blocks):
        carriers["fusion"] = []
    for carrier, free in carriers.items():
        pinned = {
            (layer, name): Pinned(getattr(model.blocks[layer], name), outputs[layer, name], later)
            for layer, name in places(model)
            if name not in free
        }
        with substituted(model, pinned):
            disturbed = predictions(changed)
        yield carrier, (undisturbed.exp() * (undisturbed - disturbed)).sum(dim=-1)


@torch.no_grad()
def measure_half_lives(model: HybridLM, windows: Windows) -> list[dict[str, Any]]:
    """Quantiles of the half-life of every head of every recurrence, in tokens; infinite where nothing decays.

    A state that is multiplied by ``exp(-r)`` at a step would be half gone after ``ln 2 / r`` such steps. RWKV-6: r is
    minus the log decay, over key channels and positions. Mamba-2: r = dt |A|, over positions.
    """
    rates: dict[Place, list[np.ndarray]] = {}
    with observed_kernels(model) as calls:
        for tokens, _ in windows.batches():
            model(tokens)
            for place, arguments in calls.items():
                rates.setdefault(place, []).append(decay_rates(arguments).double().cpu().numpy())
    entries = []
    for (layer, branch), parts in sorted(rates.items()):
        for head, rate in enumerate(np.concatenate(parts, axis=1)):
            with np.errstate(divide="ignore"):
                half_lives = math.log(2) / rate
            # No interpolation: between a number and infinity there is none.
            values = np.quantile(half_lives, list(QUANTILES.values()), method="inverted_cdf")
            entries.append({"layer": layer, "branch": branch, "head": head}
                           | dict(zip(QUANTILES, values.tolist(), strict=True)))  # fmt: skip
    return entries


def decay_rates(arguments: dict[str, Tensor]) -> Tensor:
    """Minus the log decay of every head at every step, [H, steps x channels], from the inputs of its kernel."""
    if "w" in arguments:
        return (-arguments["w"]).movedim(2, 0).flatten(1)
    return (arguments["dt"].float() * -arguments["A"].float()).movedim(2, 0).flatten(1)
