"""What the gates of a trained model open to: by layer, by position in the context, by class of the token read.

A gate is what a fusion gives its observer: the share of the first branch (RWKV-6), a number per position, per position
and channel, or (fusion ``weighted``) one for all.
"""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import torch
from torch import Tensor

from hybrid.data import IGNORE, Tokenizer
from hybrid.diagnostics.windows import Windows, binned
from hybrid.model import HybridLM
from hybrid.observed import observed_gates

CLASSES = ("letter", "capital", "digit", "space", "newline", "punctuation", "other")
LOW, HIGH = 0.05, 0.95  # a gate beyond is saturated


class GateMaps:
    """Sums over the gates of one layer, batch after batch."""

    def __init__(self, length: int, device: torch.device) -> None:
        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        self.moments = zeros(5)  # number, sum, sum of squares, number below LOW, number above HIGH
        self.by_position = zeros(length), zeros(length)  # sum of the positions' means, number of positions
        self.by_class = zeros(len(CLASSES)), zeros(len(CLASSES))

    def add(self, gates: Tensor, classes: Tensor, real: Tensor) -> None:
        """``gates`` as observed; ``classes`` and ``real`` (positions that count) are [B,T]."""
        g = gates.detach().double().expand(*real.shape, gates.shape[-1] if gates.ndim else 1)
        each = g[real]  # [positions, channels]
        self.moments += torch.stack(
            [
                each.new_tensor(each.numel()), each.sum(), each.square().sum(),
                (each < LOW).sum().double(), (each > HIGH).sum().double(),
            ]
        )  # fmt: skip
        share = g.mean(dim=-1)
        for sums, value in zip(self.by_position, (share * real, real.double()), strict=True):
            sums += value.sum(dim=0)
        for sums, value in zip(self.by_class, (share[real], torch.ones_like(share[real])), strict=True):
            sums.index_add_(0, classes[real], value)

    @property
    def mean(self) -> float:
        number, total, *_ = self.moments.tolist()
        return total / number

    def describe(self) -> dict[str, Any]:
        number, total, squares, low, high = self.moments.tolist()
        sums, counts = (x.tolist() for x in self.by_class)
        return {
            "mean": total / number,
            "std": math.sqrt(max(0.0, squares / number - (total / number) ** 2)),
            "saturated_low": low / number,
            "saturated_high": high / number,
            "by_position": binned(*self.by_position),
            "by_class": {name: s / n if n else None for name, s, n in zip(CLASSES, sums, counts, strict=True)},
        }


@torch.no_grad()
def mean_gates(model: HybridLM, windows: Windows) -> dict[int, float]:
    """The mean gate of every block that has one."""
    maps: dict[int, GateMaps] = {}
    with observed_gates(model) as gates:
        for tokens, targets in windows.batches():
            model(tokens)
            for layer, g in gates.items():
                found = maps.setdefault(layer, GateMaps(windows.length, windows.device))
                found.add(g, torch.zeros_like(tokens), targets != IGNORE)
    return {layer: found.mean for layer, found in maps.items()}


def token_classes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """The class of every token id, as an index into ``CLASSES``, by the first character of its text, int64 [V].

    A token that is no text (a part of a character, an id beyond the tokenizer's) is "other".
    """
    classes = torch.full((vocab_size,), CLASSES.index("other"))
    for token in range(tokenizer.vocab_size):
        classes[token] = CLASSES.index(character_class(tokenizer.decode([token])[:1]))
    return classes


def character_class(character: str) -> str:
    """One of ``CLASSES``, by Unicode's general category; symbols count as punctuation."""
    category = unicodedata.category(character) if character else "Cn"
    if character in ("\n", "\r"):
        return "newline"
    if character == "\t" or category == "Zs":
        return "space"
    if category in ("Lu", "Lt"):
        return "capital"
    if character == "\ufffd":
        return "other"
    return {"L": "letter", "N": "digit", "P": "punctuation", "S": "punctuation"}.get(category[0], "other")
