"""The loss on the whole validation split, always in the same windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.data import IGNORE, Corpus
from hybrid.model import HybridLM, autocast


@dataclass
class Evaluation:
    loss: float  # nats per token
    bits_per_byte: float
    gate_mean: list[float] | None  # share of the first branch, per block with a gate; None without gates


@torch.no_grad()
def evaluate(model: HybridLM, corpus: Corpus, batch_size: int, device: torch.device, dtype: torch.dtype) -> Evaluation:
    """Mean loss over every token of the validation split but its first, and the mean of every gate on the way."""
    shares: dict[int, Tensor] = {}  # per block: sum over the predicted positions
    real = torch.empty(0)  # which positions of the batch are text, not padding

    def observe(block: int, g: Tensor) -> None:
        per_position = g.float().mean(-1) if g.ndim else g.float()
        shares[block] = shares.get(block, 0) + (per_position * real).sum().double()

    fusions = {i: block.fusion for i, block in enumerate(model.blocks) if hasattr(block, "fusion")}
    for i, fusion in fusions.items():
        fusion.observer = lambda g, i=i: observe(i, g)
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        for inputs, targets in corpus.val_batches(batch_size):
            tokens = torch.from_numpy(inputs).to(device)
            labels = torch.from_numpy(targets).to(device)
            real = labels != IGNORE
            with autocast(device, dtype):
                logits = model(tokens)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
            total += loss
            count += int((targets != IGNORE).sum())
    finally:
        for fusion in fusions.values():
            fusion.observer = None
        model.train(was_training)
    nats = total.item()
    gates = [total.item() / count for _, total in sorted(shares.items())] or None
    return Evaluation(nats / count, nats / math.log(2) / corpus.val_bytes, gates)
