"""A corpus ready for training: the split, the tokens and the batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid.data import sources, token_cache
from hybrid.data.files import DataError, user_path
from hybrid.data.vocabulary import KINDS, BPETokenizer, CharTokenizer, Tokenizer

if TYPE_CHECKING:
    from hybrid.schema import DataConfig

IGNORE = -100  # target of padded positions; torch's cross_entropy leaves it out by default


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of both splits. ``prepare`` makes it."""

    name: str
    sha256: str  # of the exact UTF-8 text, hex
    tokenizer: Tokenizer
    vocab_size: int
    seq_len: int
    train: np.ndarray  # [tokens], memory-mapped, uint16 or uint32
    val: np.ndarray
    val_bytes: int  # UTF-8 bytes of the predicted validation text: all of it but its first token
    unknown_in_val: int  # validation characters that the training split lacks
    skipped_files: int = 0  # files of the corpus that are not UTF-8 and were left out

    def train_batch(self, seed: int, index: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 ``[batch_size, seq_len]``: windows at random offsets, targets one token further.

        A pure function of its arguments and the corpus: no state, so a resumed run and every arm of a comparison see
        the same batches. ``seed`` and ``index`` are at least 0 and below 2**64.
        """
        starts = self.train_starts(seed, index, batch_size)
        windows = self.train[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def train_starts(self, seed: int, index: int, batch_size: int) -> np.ndarray:
        """Where the windows of ``train_batch`` begin in ``train``, int64 ``[batch_size]``."""
        if not (0 <= seed < 2**64 and 0 <= index < 2**64):
            raise DataError(f"seed_data and the batch index must be at least 0, got {seed} and {index}")
        random = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
        # Raw words and a remainder, because numpy keeps these the same from version to version, and not what
        # Generator.integers makes of them. The bias, (number of windows) / 2**64, is nothing.
        return (random.random_raw(batch_size) % np.uint64(len(self.train) - self.seq_len)).astype(np.int64)

    def val_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The validation split once: int64 inputs and targets ``[rows, seq_len]``, ``rows <= batch_size``.

        Consecutive windows, the same ones whatever the batch size. Every token but the first is a target exactly
        once; what the last window lacks is padded with inputs 0 and targets ``IGNORE``.
        """
        if batch_size < 1:
            raise DataError(f"trainer.eval_batch_size must be at least 1, got {batch_size}")
        T = self.seq_len
        n_windows = math.ceil((len(self.val) - 1) / T)
        for first in range(0, n_windows, batch_size):
            rows = min(batch_size, n_windows - first)
            tokens = self.val[first * T : (first + rows) * T + 1].astype(np.int64)
            inputs = np.zeros(rows * T, dtype=np.int64)
            targets = np.full(rows * T, IGNORE, dtype=np.int64)
            inputs[: len(tokens) - 1] = tokens[:-1]
            targets[: len(tokens) - 1] = tokens[1:]
            yield inputs.reshape(rows, T), targets.reshape(rows, T)

    def describe(self) -> dict[str, Any]:
        """What a run's record says about its data, as plain data."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "tokenizer": self.tokenizer.kind,
            "tokenizer_sha256": self.tokenizer.sha256,
            "vocab_size": self.vocab_size,
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "unknown_in_val": self.unknown_in_val,
            "skipped_files": self.skipped_files,
        }


def prepare(cfg: DataConfig) -> Corpus:
    """Read, split and tokenise the corpus that ``cfg`` names, or take its tokens from the cache.

    Raises ``DataError``, whose message is one line that says what to do next.
    """
    if cfg.tokenizer not in KINDS:
        raise DataError(f"data.tokenizer must be one of {', '.join(KINDS)}, got '{cfg.tokenizer}'")
    if not 0 < cfg.val_fraction < 1:
        raise DataError(f"data.val_fraction must be between 0 and 1, got {cfg.val_fraction}")
    if cfg.seq_len < 1:
        raise DataError(f"data.seq_len must be at least 1, got {cfg.seq_len}")
    source = sources.load(cfg)
    n_train = train_characters(len(source.text), cfg.val_fraction)
    train_text, val_text = source.text[:n_train], source.text[n_train:]
    if not train_text or not val_text:  # nothing to learn a vocabulary from, or nothing to predict
        _require_enough(cfg, len(train_text), len(val_text))

    def train_tokenizer() -> Tokenizer:
        if cfg.tokenizer == "bpe":
            return BPETokenizer.train(train_text, cfg.vocab_size)
        return CharTokenizer.train(train_text, val_text)

    sha256 = hashlib.sha256(source.text.encode()).hexdigest()
    vocab_size = cfg.vocab_size if cfg.tokenizer == "bpe" else None
    key = token_cache.Key(sha256, float(cfg.val_fraction), cfg.tokenizer, vocab_size)
    cache_dir = user_path("data.cache_dir", cfg.cache_dir)
    try:
        entry = token_cache.load_or_build(key, cache_dir, train_text, val_text, train_tokenizer)
    except OSError as error:
        raise sources.unwritable_cache(cfg.cache_dir, error) from error
    _require_enough(cfg, len(entry.train), len(entry.val))
    tokenizer = entry.tokenizer
    unknown_id = getattr(tokenizer, "unknown_id", None)
    return Corpus(
        name=cfg.name,
        sha256=sha256,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        seq_len=cfg.seq_len,
        train=entry.train,
        val=entry.val,
        val_bytes=len(val_text.encode()) - tokenizer.first_token_bytes(val_text, int(entry.val[0])),
        unknown_in_val=0 if unknown_id is None else int(np.count_nonzero(entry.val == unknown_id)),
        skipped_files=source.skipped_files,
    )


def train_characters(n_characters: int, val_fraction: float) -> int:
    """How many characters at the start of a text are the training split; the rest is validation.

    The fraction is taken as it is written (0.1 is one tenth), because in binary floating point ``n * (1 - f)`` can
    fall on the wrong side of a whole number.
    """
    return math.floor(n_characters * (1 - Fraction(str(val_fraction))))


def _require_enough(cfg: DataConfig, n_train: int, n_val: int) -> None:
    if n_train < cfg.seq_len + 1:
        smaller = f", or set data.seq_len to at most {n_train - 1}" if n_train > 1 else ""
        raise DataError(
            f"the training split of data={cfg.name} has {n_train} tokens, fewer than data.seq_len + 1 = "
            f"{cfg.seq_len + 1}; use a longer text{smaller}"
        )
    if n_val < 2:
        raise DataError(
            f"the validation split of data={cfg.name} has {n_val} tokens, fewer than 2; "
            f"use a longer text, or a data.val_fraction above {cfg.val_fraction}"
        )
