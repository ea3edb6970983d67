"""The validation text as windows, with every position that is not predicted told apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybrid.data import IGNORE, Corpus

MAX_BINS = 64


@dataclass(frozen=True)
class Windows:
    """``tokens`` and ``targets`` [windows, T], int64; a target of ``IGNORE`` is predicted by nobody.

    ``batch_size`` windows are on the device at a time.
    """

    tokens: Tensor
    targets: Tensor
    batch_size: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """T."""
        return self.tokens.shape[1]

    @property
    def predicted(self) -> int:
        """How many tokens a loss over all windows is the mean of."""
        return int((self.targets != IGNORE).sum())

    @property
    def counts(self) -> Tensor:
        """Predicted tokens of every window, float64 [windows]."""
        return (self.targets != IGNORE).sum(dim=1).double()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and targets [rows, T] on the device, in order; none has a single row unless there is only one."""
        parts = max(1, min(-(-len(self) // self.batch_size), len(self) // 2))
        tokens, targets = (torch.tensor_split(x, parts) for x in (self.tokens, self.targets))
        for inputs, labels in zip(tokens, targets, strict=True):
            yield inputs.to(self.device), labels.to(self.device)

    def spread(self, tokens: int) -> Windows:
        """Windows of about ``tokens`` tokens, at least two, at even distances over all of these."""
        wanted = min(len(self), max(2, -(-tokens // self.length)))
        chosen = torch.arange(wanted) * len(self) // wanted
        return Windows(self.tokens[chosen], self.targets[chosen], self.batch_size, self.device)


def validation_windows(corpus: Corpus, batch_size: int, device: torch.device) -> Windows:
    """The windows of ``hybrid.training.evaluation``: consecutive, every token but the first predicted once.

    What the last window lacks is filled with the first window's text rather than with one token over and over: a
    branch's output there stands in for another window's when outputs are shuffled.
    """
    parts = list(corpus.val_batches(batch_size))
    tokens, targets = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    tokens[-1] = torch.where(targets[-1] == IGNORE, tokens[0], tokens[-1])
    return Windows(tokens, targets, batch_size, device)


def bin_starts(length: int) -> list[int]:
    """The first positions of at most ``MAX_BINS`` bins of about equal width over a context of ``length``."""
    bins = min(MAX_BINS, length)
    return [i * length // bins for i in range(bins)]


def binned(sums: Tensor, counts: Tensor) -> list[float | None]:
    """Sums and counts by position [T] as means by bin; None for a bin without any."""
    starts = bin_starts(len(sums))
    sizes = torch.diff(torch.tensor([*starts, len(sums)])).tolist()
    pairs = zip(sums.cpu().split(sizes), counts.cpu().split(sizes), strict=True)
    return [(total.sum() / number.sum()).item() if number.sum() else None for total, number in pairs]
