"""Tokenised texts on disk, so that a sweep tokenises a corpus once.

An entry is a folder named by the hash of everything that decides its content. Each of its files is replaced in one
step and its content follows from the folder's name, so any number of processes may build the same entry at once.
``entry.json`` holds the hash of every other file: an entry that does not match it is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hybrid.data.files import DataError
from hybrid.data.vocabulary import Tokenizer, load_tokenizer
from hybrid.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same key would give other tokens
ATTEMPTS = 2  # one is not enough where two versions of the tokenizers library disagree and build an entry at once
TOKENIZER, TRAIN, VAL, ENTRY = "tokenizer.json", "train.npy", "val.npy", "entry.json"


@dataclass(frozen=True)
class Key:
    """What decides the content of an entry."""

    text_sha256: str
    val_fraction: float
    tokenizer: str
    vocab_size: int | None  # None where the text decides it
    format: int = FORMAT

    def folder(self, cache_dir: Path) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_dir / "tokens" / digest[:32]


@dataclass(frozen=True)
class Entry:
    tokenizer: Tokenizer
    train: np.ndarray  # memory-mapped, uint16 or uint32
    val: np.ndarray


def load_or_build(
    key: Key, cache_dir: Path, train_text: str, val_text: str, train_tokenizer: Callable[[], Tokenizer]
) -> Entry:
    """The entry of ``key``, from disk where it is whole. Raises ``OSError`` where it cannot be written."""
    folder = key.folder(cache_dir)
    for _ in range(ATTEMPTS):
        if (entry := _load(folder)) is not None:
            return entry
        _build(key, folder, train_text, val_text, train_tokenizer())
    if (entry := _load(folder)) is not None:
        return entry
    raise DataError(f"the cache entry {folder} does not hold what was written; remove it and run again")


def _load(folder: Path) -> Entry | None:
    """The entry in ``folder``; None where there is none or it is damaged."""
    try:
        hashes = json.loads((folder / ENTRY).read_bytes())["files"]
        for name in (TOKENIZER, TRAIN, VAL):
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != hashes[name]:
                    raise ValueError(f"{name} has another checksum than when it was written")
        return Entry(
            load_tokenizer(folder / TOKENIZER),
            np.load(folder / TRAIN, mmap_mode="r"),
            np.load(folder / VAL, mmap_mode="r"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:  # DataError and JSONDecodeError are ValueErrors
        if (folder / ENTRY).exists():  # without it the entry is new, or another process is at work on it
            log.warning("rebuilding the damaged cache entry %s (%s)", folder, error)
        return None


def _build(key: Key, folder: Path, train_text: str, val_text: str, tokenizer: Tokenizer) -> None:
    log.info("tokenising %s characters into %s", f"{len(train_text) + len(val_text):,}", folder)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER)
    hashes = {TOKENIZER: tokenizer.sha256}
    for name, text in ((TRAIN, train_text), (VAL, val_text)):
        tokens = np.concatenate([block.astype(dtype) for block in tokenizer.encode_blocks(text)])
        hashes[name] = write_atomically(folder / name, lambda file, tokens=tokens: np.save(file, tokens))
    described = json.dumps({"key": asdict(key), "files": hashes}, indent=1).encode() + b"\n"
    write_atomically(folder / ENTRY, lambda file: file.write(described))  # last: it says that the entry is whole
