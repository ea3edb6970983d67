"""What makes a run another run, and what its folder is called."""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid import records
from hybrid.config import from_yaml
from hybrid.records import RunFolder, run_id, safe_name, variant_name
from hybrid.run import check_data
from tests.runs import Setting

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- identity


def identifier(small: Setting, *overrides: str) -> str:
    return small.plan(*overrides).run_id


@pytest.mark.parametrize(
    "override",
    [
        "seed_init=1", "seed_data=1", "fusion=gain", "fusion.gate_init=0.5", "fusion.branch_norm=rms",
        "model.pattern='R M'", "model.d_model=64", "model.target_params=30K", "model.dropout=0.1", "init=fla",
        "model.rwkv.num_heads=4", "model.mamba.state_size=16", "data.seq_len=16", "data.val_fraction=0.2",
        "data.tokenizer=bpe", "optim.lr=0.001", "optim.rwkv_lr_mult=2", "optim.weight_decay=0", "schedule=linear",
        "schedule.warmup_steps=1", "trainer.max_steps=13", "trainer.batch_size=8", "trainer.grad_accum=2",
        "trainer.dtype=bfloat16", "trainer.eval_every=3",
    ],
)  # fmt: skip
def test_what_can_change_a_result_changes_identity_and_folder(small: Setting, override: str) -> None:
    more = ["data.vocab_size=300"] if "bpe" in override else []
    base, other = small.plan(), small.plan(override, *more)
    assert base.run_id != other.run_id and base.folder.path != other.folder.path


@pytest.mark.parametrize(
    "override",
    [
        "variant=x", "out=/tmp/elsewhere", "display.progress=off", "display.run_index=2",
        "trainer.checkpoint_every=7", "trainer.dtype=float32", "trainer.dtype=auto", "kernels.wkv6=torch",
    ],
)  # fmt: skip
def test_names_paths_and_display_do_not_change_identity(small: Setting, override: str) -> None:
    assert identifier(small) == identifier(small, override)


def test_a_sweeps_name_changes_identity_only_by_what_the_stopping_rules_do(small: Setting) -> None:
    one, other = (identifier(small, f"sweep.name={name}") for name in "xy")
    assert one == other == identifier(small, "stopping.act=false") == identifier(small, "stopping=off")
    assert identifier(small) == identifier(small, "stopping.act=true", "sweep.name=x") != one


def test_identity_sees_the_text_and_not_its_path(small: Setting, tmp_path: Path) -> None:
    original = Path(small.config().data.path).read_bytes()
    (tmp_path / "copy.txt").write_bytes(original)
    (tmp_path / "other.txt").write_bytes(original[:-1] + b"#")
    base = identifier(small)
    assert base == identifier(small, f"data.path={tmp_path}/copy.txt", f"data.cache_dir={tmp_path}/c")
    assert base != identifier(small, f"data.path={tmp_path}/other.txt", f"data.cache_dir={tmp_path}/c")


def test_identity_sees_tokenizer_and_code(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.plan()
    tokenizer = copy.copy(run.corpus.tokenizer)
    tokenizer.__dict__["sha256"] = "another"
    assert run_id(run.cfg, replace(run.corpus, tokenizer=tokenizer)) != run.run_id
    monkeypatch.setattr(records, "code_version", lambda: "another")
    assert run_id(run.cfg, run.corpus) != run.run_id


def test_one_number_written_in_two_ways_is_one_identity(small: Setting) -> None:
    assert identifier(small, "optim.lr=1e-3") == identifier(small, "optim.lr=0.001")
    assert identifier(small, "model.target_params=30K") == identifier(small, "model.target_params=30000")


def test_identity_is_the_same_in_another_process(small: Setting, tmp_path: Path) -> None:
    """No hash of Python's own, which changes with every process."""
    run = small.plan()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(identity_of, (str(write_config(run.folder, run, tmp_path)),)) == run.run_id


def write_config(folder: RunFolder, run: Any, tmp_path: Path) -> Path:
    RunFolder(run.cfg, run.run_id, "x").create(run.cfg, run.corpus)
    return RunFolder(run.cfg, run.run_id, "x").path / "config.yaml"


def identity_of(path: str) -> str:
    cfg = from_yaml(path)
    return run_id(cfg, check_data(cfg))


def test_code_version_changes_with_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> str:
        records.code_version.cache_clear()
        return records.code_version()

    monkeypatch.setattr(records, "PACKAGE", tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("x = 1\n")
    first = version()
    (tmp_path / "sub" / "a.py").write_text("x = 2\n")
    second = version()
    (tmp_path / "sub" / "a.py").rename(tmp_path / "a.py")
    third = version()
    (tmp_path / "notes.txt").write_text("no code")
    assert len({first, second, third}) == 3 and version() == third
    monkeypatch.undo()
    records.code_version.cache_clear()


# ---- names and folders


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "tiny-gated"),
        (["fusion=gain", "seed_init=3", "seed_data=4", "out=x", "display.progress=off"], "tiny-gain"),
        (["fusion.gate_init=0.5", "optim.lr=1e-3"], "tiny-gated-gate_init=0.5-lr=1e-3"),
        (["data.seq_len=64", "trainer.max_steps=5"], "tiny-gated"),
        (["variant=my arm"], "my_arm"),
    ],
)
def test_variant_names(small: Setting, overrides: list[str], expected: str) -> None:
    cfg = small.config(*(override.replace("my arm", "'my arm'") for override in overrides))
    cfg.model.pattern = "P*2"
    assert variant_name(cfg, ["model=tiny", *overrides]) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a/b",
        "../../etc/passwd",
        "a\\b",
        "a b",
        "a\nb",
        "a:b*?\"<>|'",
        "~",
        "$HOME",
        "naïve",
        "日本",
        "-",
        "x" * 300,
        "a\0b",
    ],
)
def test_any_variant_gives_one_folder_below_the_sweep(small: Setting, text: str) -> None:
    cfg = small.config("sweep.name=s")
    cfg.variant = text
    path = RunFolder(cfg, "0123456789abcdef", variant_name(cfg, [])).path
    assert path.parent == small.out / "s" and path.name.endswith("-01234567")
    assert os.path.normpath(path) == str(path) and re.fullmatch(r"[\w.=+-]+", path.name)
    path.mkdir(parents=True)  # a name that a file system takes


@pytest.mark.parametrize("text", ["/", "...", "_"])
def test_a_variant_of_no_usable_character_still_has_a_name(small: Setting, text: str) -> None:
    cfg = small.config()
    cfg.variant = text
    assert variant_name(cfg, [])


def test_a_long_name_in_wide_characters_fits_a_file_name() -> None:
    assert len(safe_name("\U00020000" * 100).encode()) + len("-01234567") <= 255


def test_single_runs_have_their_own_folder(small: Setting) -> None:
    run = small.plan("variant=x")
    assert run.folder.path == small.out / "single" / f"x-{run.run_id[:8]}"
