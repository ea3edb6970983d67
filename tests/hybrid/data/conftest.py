"""A small corpus' configuration, and a stand-in for the downloaded one."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid.data import sources
from hybrid.schema import DataConfig
from tests.hybrid.data.texts import prose


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    """data=text on 20,000 characters, with a cache of its own."""
    path = tmp_path / "text.txt"
    path.write_bytes(prose(20_000).encode())
    return DataConfig(name="text", path=str(path), seq_len=32, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def tiny(cfg: DataConfig, tmp_path: Path, monkeypatch) -> DataConfig:
    """data=tinyshakespeare, whose original is a local stand-in for the public address."""
    original = tmp_path / "original.txt"
    original.write_text(prose(5_000, seed=1))
    monkeypatch.setattr(sources, "TINYSHAKESPEARE_URL", original.as_uri())
    monkeypatch.setattr(sources, "TINYSHAKESPEARE_SHA256", hashlib.sha256(original.read_bytes()).hexdigest())
    return replace(cfg, name="tinyshakespeare", path=None)
