"""The cache of tokens: found again, rebuilt, shared."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid.data import CharTokenizer, prepare
from hybrid.schema import DataConfig
from tests.hybrid.data.texts import prose, same_tokens, with_text
from tests.runs import ROOT


def test_tokens_are_memory_mapped_and_reused(cfg: DataConfig, monkeypatch) -> None:
    first = prepare(cfg)
    assert isinstance(first.train, np.memmap) and first.train.dtype == np.uint16
    monkeypatch.setattr(CharTokenizer, "encode_blocks", None)  # a second tokenising would fail
    second = prepare(replace(cfg, seq_len=16))
    assert same_tokens(first, second) and second.tokenizer.sha256 == first.tokenizer.sha256
    assert first.describe() == second.describe() and first.val_bytes == second.val_bytes


def test_large_vocabularies_get_wider_tokens(cfg: DataConfig) -> None:
    characters = "".join(chr(0x10000 + number) for number in range(1 << 16))
    at_limit = prepare(with_text(replace(cfg, val_fraction=0.01), characters + characters[:1_000]))
    assert at_limit.vocab_size == 1 << 16 and at_limit.train.dtype == np.uint16
    assert at_limit.train[(1 << 16) - 1] == (1 << 16) - 1
    wider = prepare(with_text(replace(cfg, val_fraction=0.01), "a" + characters + characters[:1_000]))
    assert wider.vocab_size == (1 << 16) + 1 and wider.train.dtype == np.uint32
    assert wider.train[1 << 16] == 1 << 16


def test_entries_differ_by_what_decides_their_content(cfg: DataConfig) -> None:
    variants = [
        cfg,
        replace(cfg, val_fraction=0.2),
        replace(cfg, tokenizer="bpe", vocab_size=300),
        replace(cfg, tokenizer="bpe", vocab_size=310),
    ]
    for _ in range(2):
        sizes = {(len(corpus.train), corpus.vocab_size) for corpus in map(prepare, variants)}
        assert len(sizes) == 4
    assert len(list(Path(cfg.cache_dir).glob("tokens/*"))) == 4
    prepare(replace(cfg, vocab_size=300, seq_len=8))  # neither matters with data.tokenizer=char
    assert len(list(Path(cfg.cache_dir).glob("tokens/*"))) == 4
    prepare(with_text(cfg, prose(20_000, seed=9)))
    assert len(list(Path(cfg.cache_dir).glob("tokens/*"))) == 5


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["train.npy", "val.npy", "tokenizer.json", "entry.json"])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_damaged_cache_entry_is_rebuilt(cfg: DataConfig, tokenizer: str, name: str, damage, caplog) -> None:
    cfg = replace(cfg, tokenizer=tokenizer, vocab_size=260)
    first = prepare(cfg)
    before = np.array(first.train), np.array(first.val), first.tokenizer.sha256
    (folder,) = Path(cfg.cache_dir).glob("tokens/*")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 4  # and no temporary file is left
    damage(folder / name)
    with caplog.at_level(logging.WARNING):
        again = prepare(cfg)
    assert np.array_equal(again.train, before[0]) and np.array_equal(again.val, before[1])
    assert again.tokenizer.sha256 == before[2]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert "damaged" in caplog.text or (name, damage) == ("entry.json", Path.unlink)


def test_a_rebuild_leaves_open_corpora_alone(cfg: DataConfig) -> None:
    running = prepare(cfg)
    before = np.array(running.train)
    (folder,) = Path(cfg.cache_dir).glob("tokens/*")
    mapped = (folder / "train.npy").stat().st_ino
    (folder / "val.npy").unlink()
    prepare(cfg)
    assert (folder / "train.npy").stat().st_ino != mapped  # a new file in its place, not the old one written over
    assert np.array_equal(running.train, before)


PREPARE = """
import json, sys, time
from pathlib import Path
from hybrid.schema import DataConfig
from hybrid.data import prepare
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    pass
corpora = [prepare(DataConfig(**fields)) for fields in json.loads(sys.argv[1])]
print(json.dumps([[c.describe(), c.train_batch(0, 0, 4)[0].tolist(), c.val_bytes] for c in corpora]))
"""


def test_two_processes_prepare_the_same_corpus_at_once(cfg: DataConfig, tmp_path: Path) -> None:
    with_text(cfg, prose(200_000))
    variants = [replace(cfg, val_fraction=0.1 + turn / 100, tokenizer="char") for turn in range(8)]
    variants += [replace(cfg, tokenizer="bpe", vocab_size=size) for size in (300, 320)]
    go = tmp_path / "go"
    command = [sys.executable, "-c", PREPARE, json.dumps([vars(variant) for variant in variants]), str(go)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    go.touch()
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    alone = [prepare(replace(variant, cache_dir=str(tmp_path / "alone"))) for variant in variants]
    expected = [[corpus.describe(), corpus.train_batch(0, 0, 4)[0].tolist(), corpus.val_bytes] for corpus in alone]
    assert answers == [expected, expected]
    assert not list(Path(cfg.cache_dir).rglob("*.partial"))
