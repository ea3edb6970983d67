"""What a run leaves behind: folder, lock, metrics, summary, and a failed run's record."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid.config import ConfigError, from_yaml, identity
from hybrid.data import load_tokenizer
from hybrid.files import write_text_atomically
from hybrid.records import RunBusy, RunFolder, finite, run_id
from hybrid.run import check_data, execute, plan
from tests.runs import Setting, rows, strict_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(shared: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    """A completed small run with two blocks."""
    out = tmp_path_factory.mktemp("finished")
    setting = Setting((*shared, f"out={out}", "model.pattern='P R'", "seed_init=3", "seed_data=4"), out)
    return setting.run("trainer.max_steps=4", "trainer.log_every=2")


# ---- the lock


def test_a_locked_folder_is_busy_until_it_is_let_go(small: Setting) -> None:
    run = small.plan("display.progress=off")
    with run.folder.lock():
        with pytest.raises(RunBusy, match=r"is being run by another process$"), run.folder.lock():
            pytest.fail("two hold it")
        with pytest.raises(RunBusy):
            execute(run, [])
        assert [path.name for path in run.folder.path.iterdir()] == ["lock"]
    with run.folder.lock():
        pass


def test_a_lock_is_let_go_when_the_run_raises(small: Setting) -> None:
    folder = small.plan().folder
    with pytest.raises(KeyboardInterrupt), folder.lock():
        raise KeyboardInterrupt
    with folder.lock():
        pass


def test_a_busy_ended_run_is_left_as_it_is(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, summary = finished
    before = (folder.path / "summary.json").read_bytes()
    with folder.lock(), pytest.raises(RunBusy), folder.lock():
        pass
    assert (folder.path / "summary.json").read_bytes() == before and folder.summary() == summary


# ---- metrics, summary, atomic writes


@pytest.fixture
def folder(small: Setting) -> RunFolder:
    run = small.plan()
    run.folder.create(run.cfg, run.corpus)
    return run.folder


def test_rows_after_a_step_are_forgotten_and_a_torn_one(folder: RunFolder) -> None:
    for step in (0, 2, 4):
        folder.append({"step": step, "loss": 1 / 3 + step})
    with folder.metrics.open("a") as handle:
        handle.write('{"step": 2, "lo')
    kept = folder.metrics.read_text().splitlines()[:2]
    folder.forget_after(2)
    assert folder.metrics.read_text().splitlines() == kept
    folder.append({"step": 3})
    assert [row["step"] for row in rows(folder)] == [0, 2, 3]
    folder.forget_after(-1)
    assert folder.metrics.read_text() == ""


def test_forgetting_needs_no_metrics(folder: RunFolder) -> None:
    folder.forget_after(5)
    assert not folder.metrics.exists()


def test_json_is_strict(folder: RunFolder) -> None:
    folder.append({"step": 1, "loss": math.nan, "gates": [math.inf, 0.5, (-math.inf,)], "more": {"x": math.nan}})
    assert rows(folder) == [{"step": 1, "loss": None, "gates": [None, 0.5, [None]], "more": {"x": None}}]
    folder.write_summary({"status": "diverged", "final_val_loss": math.nan})
    assert strict_json((folder.path / "summary.json").read_text())["final_val_loss"] is None
    assert finite({"a": 1, "b": "nan", "c": None, "d": True}) == {"a": 1, "b": "nan", "c": None, "d": True}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"schema": "other/1", "status": "completed"}', b"\xff\xfe", b"{}"]
)
def test_a_summary_that_cannot_be_read_is_none(small: Setting, content: bytes) -> None:
    run = small.plan()
    run.folder.path.mkdir(parents=True)
    assert run.folder.summary() is None and not run.ended
    (run.folder.path / "summary.json").write_bytes(content)
    assert run.folder.summary() is None and not run.ended


@pytest.mark.parametrize(
    ("status", "ended"), [("completed", True), ("stopped", True), ("diverged", True), ("failed", False)]
)
def test_which_records_end_a_run(small: Setting, status: str, ended: bool) -> None:
    run = small.plan()
    run.folder.path.mkdir(parents=True)
    run.folder.write_summary({"run_id": run.run_id, "status": status})
    assert run.ended is ended
    run.folder.write_summary({"run_id": run.run_id[:8] + "of another run", "status": status})
    assert not run.ended  # the folder's name shows 8 characters of it only


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_text_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"


def test_two_writers_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two processes that start the same sweep and write its sweep.json."""
    barrier = threading.Barrier(2, timeout=20)
    monkeypatch.setattr(os, "fsync", lambda _: barrier.wait())  # both have written before one renames
    errors: list[OSError] = []

    def write(text: str) -> None:
        try:
            write_text_atomically(tmp_path / "sweep.json", text)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and (tmp_path / "sweep.json").read_text() in ("one", "two")


# ---- the record of a run


NUMBER = (int, float)


# DESIGN.md, contracts: the keys of summary.json and what they hold in a completed run with both branches.
CONTRACT: dict[str, type | tuple[type, ...]] = {
    "schema": str, "run_id": str, "status": str, "stop_reason": type(None), "variant": str, "overrides": list,
    "seed_init": int, "seed_data": int, "params": dict, "state_floats_per_layer": list, "flops_per_token": NUMBER,
    "steps": int, "tokens": int, "best_val_loss": float, "best_step": int, "final_val_loss": float,
    "final_train_loss": float, "val_bits_per_byte": float, "grad_ratio": float, "gates": dict,
    "tokens_per_second": float, "peak_memory_bytes": int, "wall_seconds": float, "data": dict, "environment": dict,
}  # fmt: skip


def test_summary_keeps_the_contract(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, returned = finished
    summary = strict_json((folder.path / "summary.json").read_text())
    assert summary == returned
    for key, kind in CONTRACT.items():
        assert isinstance(summary[key], kind) and not isinstance(summary[key], bool), key
    assert summary["schema"] == "groundthink.run/1" and summary["status"] == "completed"
    assert re.fullmatch(r"[0-9a-f]{64}", summary["run_id"]) and folder.path.name.endswith(summary["run_id"][:8])
    assert folder.path.name == f"{summary['variant']}-{summary['run_id'][:8]}"
    assert (summary["seed_init"], summary["seed_data"]) == (3, 4)
    assert (summary["steps"], summary["tokens"]) == (4, 4 * 4 * 32)
    assert all(isinstance(override, str) for override in summary["overrides"])
    assert "seed_init=3" in summary["overrides"]


def test_summary_counts_parameters_and_states(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    _, summary = finished
    params = summary["params"]
    assert params.keys() >= {"total", "embedding", "rwkv", "mamba", "fusion", "ffn"}
    assert all(isinstance(count, int) and count >= 0 for count in params.values())
    assert params["total"] == sum(count for part, count in params.items() if part != "total")
    assert params["fusion"] == 65 and params["embedding"] == 32 * summary["data"]["vocab_size"]
    rwkv, mamba = 2 * 8 * 16, 4 * 16 * 8  # heads x key x value, heads x head_dim x state
    assert summary["state_floats_per_layer"] == [rwkv + mamba, rwkv]
    assert summary["flops_per_token"] > 6 * params["ffn"]


def test_summary_says_what_it_was_made_with(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    import torch

    _, summary = finished
    data, environment = summary["data"], summary["environment"]
    assert data["name"] == "text" and len(data["sha256"]) == len(data["tokenizer_sha256"]) == 64
    assert environment["versions"]["torch"] == torch.__version__ and environment["device"] == "cpu"
    assert {"python", "flash-linear-attention", "hydra-core", "numpy"} <= environment["versions"].keys()
    parts = dict.fromkeys(("wkv6", "ssd", "conv", "ddlerp", "wkv6_norm", "ssd_norm"), "torch")
    assert environment["kernels"] == parts | {"mamba2": "parts"}
    assert environment.keys() >= {"git_commit", "git_dirty", "code_version"}
    commit = environment["git_commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}", commit)
    assert environment["git_dirty"] is None if commit is None else isinstance(environment["git_dirty"], bool)


def test_summary_agrees_with_the_metrics(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, summary = finished
    evaluations = [row for row in rows(folder) if row["kind"] == "eval"]
    assert summary["final_val_loss"] == evaluations[-1]["val_loss"]
    assert summary["best_val_loss"] == min(row["val_loss"] for row in evaluations)
    assert summary["val_bits_per_byte"] == evaluations[-1]["val_bits_per_byte"]
    assert summary["val_bits_per_byte"] == pytest.approx(summary["final_val_loss"] / math.log(2))  # ASCII characters
    assert summary["final_train_loss"] == evaluations[-1]["train_loss"]
    for row in evaluations:
        assert len(row["gate_mean"]) == 1 and 0 < row["gate_mean"][0] < 1
    train = [row for row in rows(folder) if row["kind"] == "train"]
    norms = {f"grad_norm{part}" for part in ("", "_rwkv", "_mamba", "_fusion", "_other")}
    rates = {f"lr{part}" for part in ("", "_rwkv", "_mamba", "_fusion", "_other")}
    for row in train:
        assert row.keys() >= {"step", "tokens", "loss", "grad_ratio", "grad_ratio_total"} | norms | rates


def test_the_folder_holds_what_the_design_says(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, summary = finished
    names = {path.name for path in folder.path.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "probe.jsonl", "summary.json", "log.txt", "checkpoints",
                     "tokenizer.json", "lock"}  # fmt: skip
    assert load_tokenizer(folder.path / "tokenizer.json").sha256 == summary["data"]["tokenizer_sha256"]
    log = folder.log.read_text()
    assert f"{summary['params']['total']:,}" in log and "rwkv" in log


def test_config_yaml_round_trips(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, summary = finished
    cfg = from_yaml(folder.path / "config.yaml")
    corpus = check_data(cfg)
    assert run_id(cfg, corpus) == summary["run_id"]
    again = plan(from_yaml(folder.path / "config.yaml"), corpus, summary["variant"])
    assert again.run_id == summary["run_id"] and again.folder.path == folder.path and again.ended


@pytest.mark.parametrize(
    "overrides",
    [
        ["fusion=gain", "fusion.gain_init=[0.7,0.3]", "model.target_params=30K"],
        ["fusion=cross_attention", "fusion.branch_norm=rms", "model.branches=[mamba,rwkv]"],
        ["model.pattern='A P*2'", "schedule.min_lr=1e-5", "optim.betas=[0.8,0.99]", "trainer.dtype=bfloat16"],
        ["data.tokenizer=bpe", "data.vocab_size=300", "seed_init=1234567890123456789", "variant='ñ: #x'"],
        ["optim.eps=1e-12", "optim.lr=1", "sweep=smoke", "data=text", "data.works=null"],
    ],
)
def test_any_configuration_round_trips_to_the_same_identity(small: Setting, overrides: list[str]) -> None:
    run = small.plan(*overrides)
    run.folder.create(run.cfg, run.corpus)
    again = from_yaml(run.folder.path / "config.yaml")
    assert identity(again) == identity(run.cfg)
    assert again.variant == run.cfg.variant and again.out == run.cfg.out


@pytest.mark.parametrize("content", [None, "- a\n", "model: {nmae: x}\n", "{", "model: {d_model: wide}\n"])
def test_a_configuration_that_is_none_is_an_error_of_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        from_yaml(path)
    assert "\n" not in str(caught.value)


# ---- a run that fails


@pytest.fixture
def failing(small: Setting, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[RunFolder, dict[str, Any]]]:
    """The small run, failing at step 5."""
    from hybrid.training.loop import Trainer

    original = Trainer._update

    def update(self: Trainer, step: int) -> Any:
        if step == 5:
            raise RuntimeError("the disk is on fire\nand more")
        return original(self, step)

    monkeypatch.setattr(Trainer, "_update", update)
    return small.run


def test_a_run_that_raises_has_a_record_of_it(failing: Callable[[], tuple[RunFolder, dict[str, Any]]]) -> None:
    folder, summary = failing()
    assert summary["status"] == "failed" and summary["stop_reason"] == "RuntimeError: the disk is on fire"
    assert strict_json((folder.path / "summary.json").read_text()) == summary
    assert summary["variant"] and summary["run_id"] and summary["params"]["total"] > 0
    log = folder.log.read_text()
    assert "Traceback (most recent call last)" in log and "and more" in log and "in update" in log
    assert [row["step"] for row in rows(folder)] == [0, 3]  # what was measured stays


def test_a_failed_run_is_tried_again_and_goes_on(
    failing: Callable[[], tuple[RunFolder, dict[str, Any]]], small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing()
    assert failing()[1]["status"] == "failed"
    monkeypatch.undo()
    folder, summary = small.run()
    assert summary["status"] == "completed" and summary["stop_reason"] is None
    assert "resumes after step 3" in folder.log.read_text()
    undisturbed, _ = small.run(f"out={small.out}2")
    assert rows(folder) == rows(undisturbed)


def test_a_failed_summary_keeps_the_contract(failing: Callable[[], tuple[RunFolder, dict[str, Any]]]) -> None:
    _, summary = failing()
    assert summary.keys() >= CONTRACT.keys()


def test_an_interrupted_run_has_no_summary(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.training.loop import Trainer

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_update", interrupt)
    run = small.plan("display.progress=off")
    with pytest.raises(KeyboardInterrupt):
        execute(run, [])
    assert run.folder.summary() is None and not (run.folder.path / "summary.json").exists()
    with run.folder.lock():
        pass


def test_an_unfinished_retry_of_a_failed_run_is_no_longer_failed(
    failing: Callable[[], tuple[RunFolder, dict[str, Any]]], small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid.training.loop import Trainer

    folder, _ = failing()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small.run()
    assert json.loads(folder.metrics.read_text().splitlines()[0])["step"] == 0 and folder.summary() is None
