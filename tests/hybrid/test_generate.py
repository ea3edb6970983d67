"""``python -m hybrid.generate`` on a trained run: what it writes, and bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hybrid.generate import main, pick
from tests.runs import Setting


@pytest.fixture(scope="module")
def folder(shared: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    return Setting((*shared, f"out={root}"), root).run()[0].path


def continuation(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    main([str(folder), "--prompt", "the ", "--tokens", "20", *more])
    text = capsys.readouterr().out
    assert text.startswith("the ") and text.endswith("\n") and len(text) == len("the ") + 20 + 1
    return text


def test_a_text_is_continued(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [continuation(capsys, folder, "--temperature", "2", "--seed", seed) for seed in "001"]
    assert drawn[0] == drawn[1] != drawn[2]
    likeliest = continuation(capsys, folder, "--temperature", "0")
    assert likeliest == continuation(capsys, folder, "--top-k", "1")
    checkpoint = folder / "checkpoints" / "best.safetensors"
    assert likeliest == continuation(capsys, checkpoint, "--temperature", "0")
    assert likeliest == continuation(capsys, folder, "--temperature", "1e-300")


def test_low_temperatures_draw_the_likeliest() -> None:
    logits, generator = torch.tensor([1.0, 3.0, 2.0]), torch.Generator().manual_seed(0)
    for temperature in (0.0, 1e-320, 1e-40, 1e-3):
        assert pick(logits, temperature, 0, generator) == 1
    assert {pick(logits, 1e3, 0, generator) for _ in range(50)} == {0, 1, 2}
    assert {pick(logits, 1e3, 2, generator) for _ in range(50)} == {1, 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "nan"], "finite"),
        (["--temperature", "-1"], "not negative"),
        (["--tokens", "-1"], "not negative"),
        (["--seed", "9" * 30], "--seed"),
        (["--prompt", ""], "--prompt is empty"),
        (["--top-k", "few"], "--top-k"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    expect_error([str(folder), *arguments], words, capsys)


def test_weights_that_cannot_be_read_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_error([str(tmp_path / "none")], "does not exist", capsys)
    expect_error([str(tmp_path)], "no run folder", capsys)
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    weights = copy / "checkpoints" / "best.safetensors"
    weights.write_bytes(b"no weights")
    expect_error([str(copy)], "does not hold this model's weights", capsys)
    weights.unlink()
    expect_error([str(copy)], "no weights yet", capsys)
    weights.mkdir()
    expect_error([str(copy)], "no weights yet", capsys)


def test_what_the_system_says_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "best.safetensors")

    monkeypatch.setattr("hybrid.training.checkpoint.load_weights", refuse)
    expect_error([str(folder)], "best.safetensors: Permission denied", capsys)


def expect_error(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err, said.err
    assert said.out == ""
