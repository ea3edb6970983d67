"""One pass of the undisturbed model over the windows: its loss, its gates and its branches' outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.data import IGNORE
from hybrid.diagnostics.gates import GateMaps
from hybrid.diagnostics.necessity import token_losses
from hybrid.diagnostics.outputs import OutputStatistics
from hybrid.diagnostics.windows import Windows, bin_starts, binned
from hybrid.model import HybridLM
from hybrid.observed import Place, observed_gates, recorded


@dataclass
class Observation:
    loss_by_position: Tensor  # summed over windows, nats, float64 [T]
    count_by_position: Tensor  # predicted tokens, float64 [T]
    gates: dict[int, GateMaps]  # by block
    outputs: list[OutputStatistics]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return (self.loss_by_position.sum() / self.count_by_position.sum()).item()

    @property
    def means(self) -> dict[Place, Tensor]:
        """The mean output [d] of every branch."""
        return {place: mean for statistics in self.outputs for place, mean in statistics.means.items()}

    def describe_positions(self) -> dict[str, Any]:
        """Loss by position in the context; ``tokens`` is what each mean is over."""
        starts = bin_starts(len(self.loss_by_position))
        sizes = torch.diff(torch.tensor([*starts, len(self.loss_by_position)])).tolist()
        tokens = [int(part.sum()) for part in self.count_by_position.cpu().split(sizes)]
        loss = binned(self.loss_by_position, self.count_by_position)
        return {"positions": starts, "loss": loss, "tokens": tokens}


@torch.no_grad()
def observe(model: HybridLM, windows: Windows, classes: Tensor) -> Observation:
    """``classes`` [V] are those of ``hybrid.diagnostics.gates.token_classes``."""
    classes = classes.to(windows.device)
    zeros = torch.zeros(windows.length, dtype=torch.float64, device=windows.device)
    outputs = [OutputStatistics(layer, block) for layer, block in enumerate(model.blocks)]
    seen = Observation(zeros.clone(), zeros.clone(), {}, outputs)
    for tokens, targets in windows.batches():
        real = targets != IGNORE
        with recorded(model) as recording, observed_gates(model) as gates:
            losses = token_losses(model(tokens), targets)
        seen.loss_by_position += losses.double().sum(dim=0)
        seen.count_by_position += real.double().sum(dim=0)
        for layer, g in gates.items():
            found = seen.gates.setdefault(layer, GateMaps(windows.length, windows.device))
            found.add(g, classes[tokens], real)
        for statistics in outputs:
            statistics.add(recording.outputs, gates.get(statistics.layer), real)
    return seen
