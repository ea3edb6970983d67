"""A look inside a model on a few fixed windows of text: entropy, branch outputs, recurrent states.

One plain forward pass without gradients. Nothing of it stays: weights, training mode, observers and the generators of
random numbers are as before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.branches.mamba2 import Mamba2
from hybrid.branches.rwkv6 import RWKV6
from hybrid.data import Corpus
from hybrid.model import HybridLM, autocast
from hybrid.observed import Place, observed_gates, observed_kernels, recorded
from hybrid.states import WORSE, readings, ssd_last_steps, wkv6_last_steps

ROWS, LENGTH = 8, 256  # windows, and tokens of each at most
LAST = 8  # steps at the end of a window whose states are looked at
CLOSED = 0.01  # a gate this near to 0 or 1 leaves a branch out


class Probe:
    """``probe(step)`` gives the record's row of kind ``probe`` for the model as it is."""

    def __init__(self, model: HybridLM, corpus: Corpus, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.tokens = torch.from_numpy(windows(corpus)).to(device)

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, Any]:
        was_training = self.model.training
        self.model.eval()
        try:
            with (
                observed_kernels(self.model) as inputs,
                recorded(self.model) as recording,
                observed_gates(self.model) as gates,
                autocast(self.device, self.dtype),
            ):
                logits = self.model(self.tokens)
        finally:
            self.model.train(was_training)
        seen = Seen(self.model, inputs, recording.outputs, gates)
        vocab, width = self.model.embedding.weight.shape
        shape_ok = logits.shape == (*self.tokens.shape, vocab) and seen.shapes_ok((*self.tokens.shape, width))
        # Sequence by sequence: with a large vocabulary the probabilities are larger than the rest of the pass.
        entropy = torch.stack([row_entropy(row) for row in logits.flatten(0, -3)]).mean()
        row = {
            "kind": "probe",
            "step": step,
            "entropy": entropy,
            "entropy_normalised": entropy / math.log(vocab) if vocab > 1 else None,
            "finite": logits.isfinite().all(),
            "shape_ok": shape_ok,
            "layers": [seen.layer(index) for index in range(len(self.model.blocks))],
        }
        row = numbers(row)
        return row | {"finite": row["finite"] == 1.0}


def windows(corpus: Corpus) -> np.ndarray:
    """[rows, tokens]: the same for every model, evenly spread over the validation split."""
    length = min(corpus.seq_len, LENGTH, len(corpus.val))
    rows = min(ROWS, len(corpus.val) // length)
    room = len(corpus.val) - length
    starts = [room * i // max(rows - 1, 1) for i in range(rows)]
    return np.stack([corpus.val[start : start + length] for start in starts]).astype(np.int64)


def row_entropy(logits: Tensor) -> Tensor:
    """Mean entropy in nats of the distributions that logits [T,V] stand for."""
    return torch.special.entr(F.softmax(logits.float(), dim=-1)).sum(-1).mean()


@dataclass
class Seen:
    """What one forward pass shows of every branch and gate, kept on the device."""

    model: HybridLM
    inputs: dict[Place, dict[str, Tensor]]  # of the recurrences
    outputs: dict[Place, Tensor]
    gates: dict[int, Tensor]

    def shapes_ok(self, wanted: tuple[int, ...]) -> bool:
        return all(out.shape == wanted for out in self.outputs.values())

    def layer(self, index: int) -> dict[str, Any]:
        names = self.model.blocks[index].branches
        gate = self.gates.get(index)
        return {
            "layer": index,
            "cosine": branch_cosine(*(self.outputs[index, name] for name in names)) if len(names) == 2 else None,
            "gate": None if gate is None or not gate.ndim else gate_readings(gate.float()),
            "branches": {name: self.branch(index, name) for name in names},
        }

    def branch(self, index: int, name: str) -> dict[str, Any]:
        module, out = getattr(self.model.blocks[index], name), self.outputs[index, name].float()
        found: dict[str, Any] = {"rms": out.square().mean().sqrt(), "variance": out.flatten(0, -2).var(0).mean()}
        inputs = self.inputs.get((index, name))
        if isinstance(module, RWKV6):
            return found | readings(wkv6_last_steps(**inputs, last=LAST))
        if isinstance(module, Mamba2):
            return found | readings(ssd_last_steps(**inputs, last=LAST))
        return found | dict.fromkeys(WORSE)


def branch_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over positions of the cosine between two outputs [B,T,d]; NaN where one of them is zero everywhere."""
    a, b = a.float(), b.float()
    sizes = a.norm(dim=-1) * b.norm(dim=-1)
    there = sizes > 0
    cosine = torch.where(there, (a * b).sum(-1) / sizes.masked_fill(~there, 1.0), 0.0)
    return cosine.sum() / there.sum()


def gate_readings(gate: Tensor) -> dict[str, Tensor]:
    """The mean share of the first branch, and the share of gate values that leave a branch out."""
    closed = (gate < CLOSED) | (gate > 1 - CLOSED)
    return {"mean": gate.mean(), "closed": closed.float().mean()}


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with its tensors as numbers, moved in one go; None for what is not finite."""
    leaves: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            leaves.append(value)
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    def fill(value: Any) -> Any:
        if isinstance(value, Tensor):
            number = next(moved)
            return number if math.isfinite(number) else None
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, list) else value

    collect(row)
    moved = iter(torch.stack([leaf.double() for leaf in leaves]).tolist())
    return fill(row)
