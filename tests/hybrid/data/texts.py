"""Texts and comparisons that tests of the data share."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from hybrid.data import Corpus
from hybrid.schema import DataConfig

LINE = "the king of Naples said nothing; but look'd upon her face, and wept. O thou good Kent!\n"


def prose(n_characters: int, seed: int = 0) -> str:
    words = random.Random(seed).choices(LINE.split(" "), k=n_characters // 3)
    return " ".join(words).replace("\n ", "\n")[:n_characters]


def with_text(cfg: DataConfig, text: str) -> DataConfig:
    Path(cfg.path).write_bytes(text.encode())
    return cfg


def same_tokens(one: Corpus, other: Corpus) -> bool:
    return np.array_equal(one.train, other.train) and np.array_equal(one.val, other.val)
