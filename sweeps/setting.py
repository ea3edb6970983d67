"""What all trials of one study have in common: a study is not gone on with under another setting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hybrid.config import identity
from hybrid.data import Corpus
from hybrid.schema import Config

# Each run's own: a login node may start what GPUs train. The vocabulary follows from the data.
OWN = {"trainer.device", "trainer.dtype", "model.vocab_size"}


def setting_of(cfg: Config, corpus: Corpus) -> dict[str, Any]:
    """All that can change a result but the code, by dotted key, of one configuration in the space."""
    return _flat(identity(cfg)) | {"data.sha256": corpus.sha256, "data.tokenizer.sha256": corpus.tokenizer.sha256}


def difference(one: dict[str, Any], other: dict[str, Any], searched: Iterable[str]) -> str | None:
    """The first key in which two settings differ, but for what is searched. A key that is missing is one not set."""
    free = _decided_by(set(searched)) | OWN
    for key in {**one, **other}:
        if one.get(key) != other.get(key) and not any(key == part or key.startswith(f"{part}.") for part in free):
            return key
    return None


def _decided_by(searched: set[str]) -> set[str]:
    """The keys and sections that a search over ``searched`` sets."""
    if "gate_init" in searched:
        searched = searched | {"fusion.gate_init"}
    if searched & {"model", "blocks", "model.pattern", "model.branches"}:  # which parts there are
        searched = searched | {"model", "fusion", "kernels"}
    return searched


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
