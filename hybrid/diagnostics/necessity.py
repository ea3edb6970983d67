"""What a branch is needed for: the loss when its output is replaced, against a push of the same size to anywhere.

An output [B,T,d] is taken where it leaves the branch, before normalisation and fusion, and is replaced by

- ``zero``;
- ``mean``: its mean over all windows and positions of the undisturbed model, by channel: what is left is what the
  branch says whatever the text;
- ``shuffle``: what it was in another window at the same position: a true output, of the wrong text.

The control adds to the output a random direction per position, as long as what the intervention changes there. An
output that matters no more than its size loses as much under the control.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.data import IGNORE
from hybrid.diagnostics.substitutes import Fixed, Moved, branch_names, entered, substituted
from hybrid.diagnostics.windows import Windows
from hybrid.model import HybridLM
from hybrid.observed import Place, Recording, places, recorded

INTERVENTIONS = ("zero", "mean", "shuffle")


@dataclass(frozen=True)
class Trial:
    """One way to disturb the model: an intervention or its control, in one layer or (None) in all with the branch."""

    layer: int | None
    branch: str
    intervention: str
    control: bool


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of every position, [B,T]; 0 where nothing is predicted."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(targets)


def measure_necessity(model: HybridLM, windows: Windows, means: dict[Place, Tensor], seed: int = 0) -> list[dict]:
    """The necessity entries of the document, for every branch of every layer and for all layers at once.

    ``means`` are the mean outputs [d] of every branch. Without a second window there is nothing to shuffle with, and
    no standard error: both are NaN.
    """
    sums: dict[Trial, list[Tensor]] = defaultdict(list)
    clean: list[Tensor] = []
    random = torch.Generator(windows.device).manual_seed(seed)
    for tokens, targets in windows.batches():
        with torch.no_grad(), recorded(model) as recording:
            clean.append(token_losses(model(tokens), targets).sum(dim=1).double().cpu())
        for trial, losses in disturbed(model, tokens, targets, recording, means, random):
            sums[trial].append(losses.sum(dim=1).double().cpu())
    undisturbed, counts = torch.cat(clean), windows.counts
    increases = {trial: mean_and_error(torch.cat(found) - undisturbed, counts) for trial, found in sums.items()}
    return [entry(trial, increases) for trial in increases if not trial.control]


def entry(trial: Trial, increases: dict[Trial, tuple[float, float]]) -> dict[str, Any]:
    increase, error = increases[trial]
    control, control_error = increases[Trial(trial.layer, trial.branch, trial.intervention, True)]
    return {
        "layer": trial.layer,
        "branch": trial.branch,
        "intervention": trial.intervention,
        "loss_increase": increase,
        "standard_error": error,
        "control": control,
        "control_standard_error": control_error,
    }


@torch.no_grad()
def disturbed(
    model: HybridLM,
    tokens: Tensor,
    targets: Tensor,
    recording: Recording,
    means: dict[Place, Tensor],
    random: torch.Generator,
) -> Iterator[tuple[Trial, Tensor]]:
    """Every trial on one batch with its losses [B,T]. ``recording`` is of the undisturbed model on this batch."""
    outputs = recording.outputs
    replaced = replacements(outputs, means, derangement(len(tokens), random))
    for layer, block in enumerate(model.blocks):
        # The layer's input is the undisturbed one, and so is the output of a branch that is left alone.
        undisturbed = {(1, name): Fixed(outputs[layer, name]) for name in block.branches}
        with entered(model, layer, recording.inputs[layer]):  # the layer is now block 1
            for name in block.branches:
                out = outputs[layer, name]
                for intervention in INTERVENTIONS:
                    target = replaced[layer, name][intervention]
                    for control, value in ((False, target), (True, out + push(out, target, random))):
                        with substituted(model, undisturbed | {(1, name): Fixed(value)}):
                            yield Trial(layer, name, intervention, control), token_losses(model(tokens), targets)
    for name in branch_names(model):
        own = [place for place in places(model) if place[1] == name]
        for intervention in INTERVENTIONS:
            with substituted(model, {place: Fixed(replaced[place][intervention]) for place in own}):
                yield Trial(None, name, intervention, False), token_losses(model(tokens), targets)
            moved = {}
            for layer, _ in own:
                shift = push(outputs[layer, name], replaced[layer, name][intervention], random)
                moved[layer, name] = Moved(getattr(model.blocks[layer], name), shift)
            with substituted(model, moved):
                yield Trial(None, name, intervention, True), token_losses(model(tokens), targets)


def replacements(
    outputs: dict[Place, Tensor], means: dict[Place, Tensor], others: Tensor
) -> dict[Place, dict[str, Tensor]]:
    """What every intervention puts in place of every output [B,T,d]; row i is shuffled to row ``others[i]``'s."""
    alone = len(others) == 1
    return {
        place: {
            "zero": torch.zeros_like(out),
            "mean": means[place].to(out).expand_as(out),
            "shuffle": torch.full_like(out, torch.nan) if alone else out[others],
        }
        for place, out in outputs.items()
    }


def derangement(rows: int, random: torch.Generator) -> Tensor:
    """For every row another one, int64 [rows]: a random cycle through all of them."""
    order = torch.randperm(rows, generator=random, device=random.device)
    others = torch.empty_like(order)
    others[order] = order.roll(-1)
    return others


def push(out: Tensor, target: Tensor, random: torch.Generator) -> Tensor:
    """At every position a random direction, as long as the way from ``out`` to ``target`` [B,T,d] there."""
    direction = torch.randn(out.shape, generator=random, device=out.device, dtype=out.dtype)
    return F.normalize(direction, dim=-1) * (target - out).norm(dim=-1, keepdim=True)


def mean_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """The mean per token and its standard error over windows, of sums over the tokens of each window [windows].

    A window weighs as many tokens as it predicts. The error is that of a weighted mean of independent windows (the
    sample's standard deviation over the root of the number, where all weigh the same); NaN for a single one.
    """
    number = len(sums)
    mean = sums.sum() / counts.sum()
    weights = counts / counts.sum()
    spread = (weights * (sums / counts - mean)).square().sum()
    error = math.sqrt(number / (number - 1) * spread.item()) if number > 1 else math.nan
    return mean.item(), error
