"""The loss on the whole validation split, always in the same windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
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


def evaluate(model: HybridLM, corpus: Corpus, batch_size: int, device: torch.device, dtype: torch.dtype) -> Evaluation:
    """Mean loss over every token of the validation split but its first, and the mean of every gate on the way."""
    return Evaluator(model, corpus, batch_size, device, dtype)()


class Evaluator:
    """``evaluate`` again and again, with ``graph`` as the replay of a CUDA graph of one batch."""

    def __init__(
        self, model: HybridLM, corpus: Corpus, batch_size: int, device: torch.device, dtype: torch.dtype,
        graph: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.corpus, self.batch_size, self.device, self.dtype = model, corpus, batch_size, device, dtype
        self.fusions = {i: block.fusion for i, block in enumerate(model.blocks) if hasattr(block, "fusion")}
        self.wanted = graph
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        was_training = self.model.training
        self.model.eval()
        sums: Tensor | None = None
        count = 0
        try:
            for inputs, targets in self.corpus.val_batches(self.batch_size):
                count += int((targets != IGNORE).sum())
                if self.wanted:
                    inputs, targets = full(inputs, self.batch_size, 0), full(targets, self.batch_size, IGNORE)
                tokens, labels = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in (inputs, targets))
                found = self.replay(tokens, labels) if self.wanted else self.batch(tokens, labels)
                sums = found.clone() if sums is None else sums + found
        finally:
            self.model.train(was_training)
        nats, *shares = sums.tolist()
        gates = [share / count for share in shares] or None
        return Evaluation(nats / count, nats / math.log(2) / self.corpus.val_bytes, gates)

    def batch(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The summed loss of a batch, and for each gate the sum of its shares over the predicted positions."""
        shares: dict[int, Tensor] = {}
        real = labels != IGNORE

        def observe(block: int, g: Tensor) -> None:
            per_position = g.float().mean(-1) if g.ndim else g.float()
            shares[block] = (per_position * real).sum().double()

        for i, fusion in self.fusions.items():
            fusion.observer = lambda g, i=i: observe(i, g)
        try:
            with autocast(self.device, self.dtype):
                logits = self.model(tokens)
        finally:
            for fusion in self.fusions.values():
                fusion.observer = None
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return torch.stack([loss.double(), *(share for _, share in sorted(shares.items()))])

    def replay(self, tokens: Tensor, labels: Tensor) -> Tensor:
        if self.graph is None:
            self.tokens, self.labels = tokens.clone(), labels.clone()
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                self.batch(self.tokens, self.labels)  # kernels are compiled before the recording
            torch.cuda.synchronize(self.device)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.found = self.batch(self.tokens, self.labels)
        self.tokens.copy_(tokens)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.found


def full(rows: np.ndarray, count: int, filler: int) -> np.ndarray:
    """``rows`` [n, T] with rows of ``filler`` added up to ``count``."""
    return np.pad(rows, ((0, count - len(rows)), (0, 0)), constant_values=filler)
