"""How large the outputs of the branches are, what they contribute to the fused sum, and how alike the two are."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.fusion import Fusion
from hybrid.model import Block
from hybrid.observed import Place

SUM_TOLERANCE = 1e-3  # relative; parts that miss the fused output by more are no parts of it


class OutputStatistics:
    """Sums over the outputs of one block's branches, batch after batch."""

    def __init__(self, layer: int, block: Block) -> None:
        self.layer, self.block = layer, block
        self.positions = 0
        self.sums: dict[str, Tensor] = {}  # by branch, of the outputs [d]
        self.squares: dict[tuple[str, str], float] = {}  # by kind (rms, rms_normed, share) and branch
        self.cosines, self.pairs = 0.0, 0  # of positions where both outputs have a direction
        self.is_sum = True

    def add(self, outputs: dict[Place, Tensor], gate: Tensor | None, real: Tensor) -> None:
        """``outputs`` [B,T,d] as recorded, the block's ``gate`` if it has one, ``real`` [B,T] the positions that count.

        No observer may be set on the fusion: it is computed again.
        """
        names = self.block.branches
        raw = [outputs[self.layer, name] for name in names]
        normed, parts = raw, raw
        if len(names) == 2:
            normed = [self.block.fusion.normalised(x) for x in raw]
            parts = contributions(self.block.fusion, normed[0], normed[1], gate)
            pairs = real & (raw[0] != 0).any(dim=-1) & (raw[1] != 0).any(dim=-1)
            self.cosines += F.cosine_similarity(raw[0], raw[1], dim=-1)[pairs].double().sum().item()
            self.pairs += int(pairs.sum())
            self.is_sum &= parts is not None
        self.positions += int(real.sum())
        for i, name in enumerate(names):
            self.sums[name] = self.sums.get(name, 0) + raw[i][real].double().sum(dim=0)
            for kind, tensors in (("rms", raw), ("rms_normed", normed), ("share", parts)):
                if tensors is not None:
                    square = tensors[i][real].double().square().mean(dim=-1).sum().item()
                    self.squares[kind, name] = self.squares.get((kind, name), 0.0) + square

    @property
    def means(self) -> dict[Place, Tensor]:
        """The mean output [d] of every branch, float64."""
        return {(self.layer, name): total / self.positions for name, total in self.sums.items()}

    def describe(self) -> dict[str, Any]:
        def rms(kind: str) -> dict[str, float]:
            return {name: math.sqrt(self.squares[kind, name] / self.positions) for name in self.block.branches}

        return {
            "layer": self.layer,
            "rms": rms("rms"),
            "rms_normed": rms("rms_normed"),
            "share": rms("share") if self.is_sum else None,
            "cosine": self.cosines / self.pairs if self.pairs else None,
        }


def contributions(fusion: Fusion, a: Tensor, b: Tensor, gate: Tensor | None) -> list[Tensor] | None:
    """What each branch adds to the fused output, given its normalised outputs [B,T,d].

    With a gate, ``g a`` and ``(1 - g) b``; without one, the fusion of a branch with nothing. Whether these are parts
    of the fused output is measured: None where they do not add up to it (attention between the branches).
    """
    fused = fusion.join_with_state(a, b, None)[0]
    if gate is not None:
        parts = [gate * a, (1 - gate) * b]
    else:
        nothing = torch.zeros_like(a)
        parts = [fusion.join_with_state(*pair, None)[0] for pair in ((a, nothing), (nothing, b))]
    missing = (parts[0] + parts[1] - fused).norm()
    return parts if missing <= SUM_TOLERANCE * fused.norm() else None
