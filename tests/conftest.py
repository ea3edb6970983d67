"""Fixtures that the rooms' tests share: a text and a small run on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import SMALL, Setting


@pytest.fixture(autouse=True)
def same_draws_every_time() -> None:
    """What a test draws from PyTorch's own generator is the same in every session."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of the small run on 8,000 characters of Hamlet, with a token cache of the session."""
    from hybrid.data import sources
    from hybrid.schema import DataConfig

    folder = tmp_path_factory.mktemp("data")
    hamlet = sources.load(DataConfig(name="shakespeare", works=["hamlet"])).text
    (folder / "hamlet.txt").write_bytes(hamlet[10_000:18_000].encode())
    return (*SMALL, f"data.path={folder}/hamlet.txt", f"data.cache_dir={folder}/cache")


@pytest.fixture
def small(shared: tuple[str, ...], tmp_path: Path) -> Setting:
    """The small run, its records below this test's own folder."""
    return Setting((*shared, f"out={tmp_path}/out"), tmp_path / "out")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, as the subprocesses have: how sums are split must not differ."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
