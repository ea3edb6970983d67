"""Tokenizers: text there and back, and what they learn from."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid.data import BPETokenizer, CharTokenizer, load_tokenizer, prepare
from hybrid.schema import DataConfig
from tests.hybrid.data.texts import prose, same_tokens, with_text

# What byte-level BPE and line cutting could get wrong: blank lines, spaces around newlines, other newlines, wide
# characters, an accent of its own, a character from beyond the Basic Multilingual Plane.
AWKWARD = (
    "a\n\n\n  b\r\n\tc \n d\x0b\x1c\u2028e\n\u00a0f\n\n\n\ng  \n日本語\n 日本\ncafe\u0301 naïve 😀😀\n\x00\n'tis\n\n"
)


@pytest.mark.parametrize("text", [AWKWARD, AWKWARD * 50, prose(3_000), "x", ""])
def test_roundtrip(text: str) -> None:
    for tokenizer in (CharTokenizer.train(AWKWARD + prose(3_000) + "x", ""), BPETokenizer.train(prose(3_000) * 2, 400)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.decode(ids.tolist()) == text
        assert ids.dtype == np.int64 and ids.ndim == 1
        assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


def test_char_blocks_join_without_a_seam(monkeypatch) -> None:
    tokenizer = CharTokenizer("abc")
    monkeypatch.setattr(CharTokenizer, "BLOCK", 4)
    assert tokenizer.encode("abcabcabca").tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_bpe_in_pieces_is_bpe_of_the_whole(monkeypatch) -> None:
    spaces = "\n \n \r\t\x0b\x1c\x85\u2028\u180e\u200b\u0301\ufeff"  # what engines may disagree about is among them
    noise = "".join(random.Random(0).choices([*spaces, "'s", "本", "ab", "7", "!", "_"], k=20_000))
    text = "\n\n".join([AWKWARD, prose(5_000), AWKWARD, noise])
    tokenizer = BPETokenizer.train(text, 600)
    whole = tokenizer._encoder.encode(text).ids
    assert len(whole) < len(text.encode()) * 0.7  # it did merge, over newlines too
    assert any(token.startswith("ĊĊ") for token in tokenizer.tokens)
    for lines, block in ((1, 1), (1, 7), (5, 2)):
        monkeypatch.setattr(BPETokenizer, "LINES", lines)
        monkeypatch.setattr(BPETokenizer, "BLOCK", block)
        assert len(list(tokenizer.encode_blocks(text))) > 20
        assert tokenizer.encode(text).tolist() == whole


def test_bpe_is_deterministic_and_learns_from_the_training_split_only(cfg: DataConfig, tmp_path: Path) -> None:
    head = prose(18_000)
    bpe = replace(cfg, tokenizer="bpe", vocab_size=300)
    corpora = []
    for turn, tail in enumerate(("zzqq " * 400, "zzqq " * 400, "vvww " * 400)):
        cache_dir = str(tmp_path / f"cache{turn}")
        corpora.append(prepare(replace(with_text(bpe, head + tail), cache_dir=cache_dir)))
    one, again, other = corpora
    assert one.tokenizer.sha256 == again.tokenizer.sha256 == other.tokenizer.sha256
    assert same_tokens(one, again) and not np.array_equal(one.val, other.val)
    assert one.vocab_size == 300


def test_tokenizer_file_carries_everything(tmp_path: Path) -> None:
    text = AWKWARD + prose(2_000)
    known = [CharTokenizer.train(text, text), CharTokenizer.train(text, "Ж"), BPETokenizer.train(text, 300)]
    for number, tokenizer in enumerate(known):
        path = tmp_path / f"{number}.json"
        tokenizer.save(path)
        loaded = load_tokenizer(path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == tokenizer.sha256 == loaded.sha256
        assert (loaded.kind, loaded.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
        assert np.array_equal(loaded.encode(text), tokenizer.encode(text))
        assert loaded.decode(loaded.encode(text)) == text
    assert len({tokenizer.sha256 for tokenizer in known}) == 3


def test_characters_that_only_validation_has_become_unknown(cfg: DataConfig) -> None:
    known = prepare(with_text(cfg, "abcd" * 900 + "dcba" * 100))
    assert (known.vocab_size, known.unknown_in_val) == (4, 0)
    corpus = prepare(with_text(cfg, "abcd" * 900 + "é" + "dcba" * 99 + "d日é"))
    assert (corpus.vocab_size, corpus.unknown_in_val) == (5, 3)
    assert np.flatnonzero(corpus.val == 4).tolist() == [0, 398, 399]
    assert corpus.val_bytes == 99 * 4 + 1 + 3 + 2  # the first character is not predicted
    assert corpus.tokenizer.decode(corpus.val[-3:]) == "d\ufffd\ufffd"
    assert corpus.tokenizer.encode("aÄ").tolist() == [0, 4]


@pytest.mark.parametrize("first", ["é", "日", "a"])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_val_bytes_are_those_of_the_predicted_tokens(cfg: DataConfig, tokenizer: str, first: str) -> None:
    text = prose(17_999) + "é" + first + prose(1_999)
    corpus = prepare(replace(with_text(cfg, text), tokenizer=tokenizer, vocab_size=257))
    # In a vocabulary of 257, é and 日 are two and three tokens of one byte each.
    first_token = 1 if tokenizer == "bpe" else len(first.encode())
    assert corpus.val_bytes == len((first + prose(1_999)).encode()) - first_token
