"""``python -m hybrid.diagnose`` on real runs: the record, what is not done twice, and bad input."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hybrid.diagnose import main
from hybrid.diagnostics.necessity import INTERVENTIONS
from tests.runs import Answer, Setting, snapshot, strict_json

BRANCHES = ("rwkv", "mamba")


def diagnose(*arguments: object) -> Answer:
    """``hybrid.diagnose.main`` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return Answer(code, out.getvalue(), err.getvalue())


def read(folder: Path) -> dict[str, Any]:
    return strict_json((folder / "diagnosis.json").read_text())


def error_line(answer: Answer) -> str:
    (line,) = answer.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def trained(shared: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three small runs in one sweep's folder."""
    root = tmp_path_factory.mktemp("runs")
    setting = Setting((*shared, f"out={root}"), root)
    folders = {}
    for name, overrides in {
        "gated": ["fusion=gated"],
        "gain": ["fusion=gain"],
        "single": ["model.pattern='R M'"],
    }.items():
        folder, summary = setting.run(*overrides, f"variant={name}", "sweep.name=three")
        assert summary["status"] == "completed"
        folders[name] = folder.path
    return folders


@pytest.fixture
def runs(trained: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of them, for each test its own."""
    copied = shutil.copytree(next(iter(trained.values())).parent, tmp_path / "three")
    return {name: copied / path.name for name, path in trained.items()}


def test_the_record_of_a_run(runs):
    folder = runs["gated"]
    before = snapshot(folder)
    answer = diagnose(folder)
    assert (answer.code, answer.err) == (0, "")
    after = snapshot(folder)
    assert after.pop("diagnosis.json")
    assert after == before, "nothing else may change"
    found, summary = read(folder), json.loads((folder / "summary.json").read_text())

    for key in ("run_id", "variant", "seed_init", "seed_data"):
        assert found[key] == summary[key]
    assert found["schema"] == "groundthink.diagnosis/1"
    assert (found["checkpoint"], found["step"], found["dtype"]) == ("best", summary["best_step"], "float32")
    assert found["environment"]["kernels"] == {"wkv6": "torch", "ssd": "torch"}
    assert found["environment"]["trained_code_version"] == summary["environment"]["code_version"]
    # 8,000 characters, a tenth for validation, every one but the first predicted: the loss is that of the training.
    assert found["tokens"] == summary["data"]["val_tokens"] - 1 == 799
    assert found["loss"] == pytest.approx(summary["best_val_loss"], rel=1e-5)
    assert found["branches"] == list(BRANCHES)

    places = [(e["layer"], e["branch"], e["intervention"]) for e in found["necessity"]]
    assert sorted(places, key=str) == sorted(
        [(layer, branch, kind) for layer in (0, None) for branch in BRANCHES for kind in INTERVENTIONS], key=str
    )
    for entry in found["necessity"]:
        assert all(math.isfinite(entry[key]) for key in entry if key not in ("layer", "branch", "intervention"))
    for branch in BRANCHES:  # of one block, the block alone and all blocks are the same
        alone, together = (
            next(e for e in found["necessity"] if e["branch"] == branch and e["layer"] == layer) for layer in (0, None)
        )
        assert alone["loss_increase"] == pytest.approx(together["loss_increase"], abs=1e-6)

    (gate,) = found["gates"]["layers"]
    assert found["gates"]["start"] == [gate["start"]] == pytest.approx([0.3])
    assert gate["mean"] == pytest.approx(summary["gate_mean"][0], abs=0.02)
    assert len(gate["by_position"]) == len(found["gates"]["positions"]) == 32
    assert 0 < gate["by_class"]["letter"] < 1
    memory = found["memory"]
    assert memory["influence"]["lags"] == [1, 2, 4, 8, 16]
    assert list(memory["influence"]) == ["lags", "full", *BRANCHES] == list(memory["influence_standard_error"])
    assert [(e["branch"], e["head"]) for e in memory["half_lives"]] == [
        *(("mamba", head) for head in range(4)), *(("rwkv", head) for head in range(2)),
    ]  # fmt: skip
    assert sum(memory["loss_by_position"]["tokens"]) == found["tokens"]
    (output,) = found["outputs"]
    assert set(output["rms"]) == set(output["rms_normed"]) == set(output["share"]) == set(BRANCHES)
    assert set(found["updates"]) == {*BRANCHES, "fusion", "other"}
    assert found["updates_basis"] == {"batches": 20, "tokens_per_batch": 128}
    assert "rwkv" in answer.out and "carried by" in answer.out


def test_what_is_diagnosed_is_not_diagnosed_again_unless_asked(runs):
    folder = runs["gated"]
    first = diagnose(folder, "--tokens", 200)
    before = snapshot(folder)
    assert "already diagnosed" not in first.out
    again = diagnose(folder, "--tokens", 200)
    assert again.code == 0
    assert "already diagnosed" in again.out and "carried by" in again.out
    assert snapshot(folder) == before
    one = read(folder)
    assert one["tokens"] == 7 * 32  # seven windows of 32 hold 200 tokens
    assert "already diagnosed" not in diagnose(folder, "--tokens", 200, "--force").out
    two = read(folder)
    assert one.pop("wall_seconds") > 0
    assert {k: v for k, v in two.items() if k != "wall_seconds"} == one, "the same every time"
    assert "already diagnosed" not in diagnose(folder, "--tokens", 200, "--checkpoint", "final").out
    three = read(folder)
    assert (three["checkpoint"], three["step"]) == ("final", 12)
    broken = folder / "diagnosis.json"
    broken.write_text("{")
    assert "already diagnosed" not in diagnose(folder, "--tokens", 200).out
    assert read(folder)["necessity"] == one["necessity"]


def test_other_weights_or_code_are_diagnosed_again(runs):
    folder = runs["gain"]
    diagnose(folder, "--tokens", 64)
    with mock.patch("hybrid.diagnostics.document.diagnostics_version", lambda: "other"):
        assert "already diagnosed" not in diagnose(folder, "--tokens", 64).out
    diagnose(folder, "--tokens", 64)
    assert "already diagnosed" in diagnose(folder, "--tokens", 64).out
    before = read(folder)
    rewrite_norm(folder, 2.0)
    assert "already diagnosed" not in diagnose(folder, "--tokens", 64).out
    assert read(folder)["loss"] != before["loss"]


def test_a_sweep_is_all_of_its_finished_runs(runs):
    root = runs["gated"].parent
    unfinished = shutil.copytree(runs["gain"], root / "unfinished")
    (unfinished / "summary.json").unlink()
    diverged = shutil.copytree(runs["gain"], root / "wild")
    summary = json.loads((diverged / "summary.json").read_text())
    (diverged / "summary.json").write_text(json.dumps(summary | {"status": "diverged"}))
    answer = diagnose(root, runs["gated"], "--tokens", 64)
    assert (answer.code, answer.err) == (0, "")
    assert {name for name, folder in runs.items() if (folder / "diagnosis.json").exists()} == set(runs)
    assert not any((folder / "diagnosis.json").exists() for folder in (unfinished, diverged))
    assert "unfinished is left out: not finished" in answer.out
    assert "wild is left out: diverged" in answer.out
    assert "already diagnosed" not in answer.out, "each once, though one is named twice"

    assert read(runs["gain"])["gates"] is None
    single = read(runs["single"])
    assert single["gates"] is None
    assert [list(output["rms"]) for output in single["outputs"]] == [["rwkv"], ["mamba"]]
    assert "fusion" not in single["updates"]
    places = {(e["layer"], e["branch"]) for e in single["necessity"]}
    assert places == {(0, "rwkv"), (1, "mamba"), (None, "rwkv"), (None, "mamba")}


def spoil_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: [")


def other_model(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("d_model: 32", "d_model: 48"))


def no_weights(folder: Path) -> None:
    (folder / "checkpoints" / "best.safetensors").unlink()


def torn_weights(folder: Path) -> None:
    path = folder / "checkpoints" / "best.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def no_text(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("hamlet.txt", "nowhere.txt"))


def other_text(folder: Path) -> None:
    path = folder.parent / "other.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 200)
    lines = (folder / "config.yaml").read_text().splitlines()
    lines = [f"  path: {path}" if line.startswith("  path: ") else line for line in lines]
    (folder / "config.yaml").write_text("\n".join(lines))


def other_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"characters": found["characters"][::-1]}))


def not_finished(folder: Path) -> None:
    (folder / "summary.json").unlink()


def not_finite(folder: Path) -> None:
    rewrite_norm(folder, math.nan)


def rewrite_norm(folder: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "checkpoints" / "best.safetensors"
    tensors = load_file(path)
    tensors["norm.weight"].fill_(value)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_config, "cannot read"),
        (other_model, "does not hold this model's weights"),
        (no_weights, "has no weights checkpoints/best.safetensors"),
        (torn_weights, "does not hold this model's weights"),
        (no_text, "nowhere.txt"),
        (other_text, "another text"),
        (other_vocabulary, "another vocabulary"),
        (not_finished, "is not finished"),
        (not_finite, "not finite"),
    ],
)
def test_a_run_that_cannot_be_diagnosed_is_a_line_and_the_others_go_on(runs, spoil, words):
    spoil(runs["gated"])
    answer = diagnose(runs["gated"], runs["gain"], "--tokens", 64)
    assert answer.code == 1
    assert words in error_line(answer)
    assert not (runs["gated"] / "diagnosis.json").exists()
    assert read(runs["gain"])["tokens"] == 64


def test_folders_that_are_no_runs(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    answer = diagnose(tmp_path / "nowhere", tmp_path / "empty", runs["gain"], "--tokens", 64)
    assert answer.code == 1
    assert [line.split(" ", 1)[0] for line in answer.err.splitlines()] == ["error:", "error:"]
    assert "nowhere is no folder" in answer.err and "empty holds no finished run" in answer.err
    assert (runs["gain"] / "diagnosis.json").exists()
    assert diagnose(tmp_path / "empty").code == 2


def test_options_that_cannot_be(runs):
    for options, words in (
        (("--tokens", 0), "--tokens must be at least 1"),
        (("--device", "tpu"), "--device must be"),
        (("--checkpoint", "worst"), "invalid choice: 'worst'"),
    ):
        answer = diagnose(runs["gain"], *options)
        assert answer.code == 2
        assert words in error_line(answer)
    answer = diagnose(runs["gain"], "--device", "cuda:99")
    assert answer.code == 2
    assert error_line(answer).startswith("error: --device cuda:99: this machine has")
    assert not (runs["gain"] / "diagnosis.json").exists()
