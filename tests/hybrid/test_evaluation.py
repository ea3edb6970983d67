"""The loss on the whole validation split, and the gates measured on the way."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hybrid import build_model
from hybrid.data import Corpus
from hybrid.training.evaluation import evaluate
from tests.hybrid.trainers import CPU, stir
from tests.runs import Setting, rows, same_weights

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- evaluation


@pytest.fixture
def stirred(small: Setting) -> tuple[nn.Module, Corpus]:
    """A model of two fused blocks and one plain one in which every parameter matters, and its corpus."""
    run = small.plan("model.pattern='P R P'")
    model = build_model(run.cfg)
    stir(model)
    return model, run.corpus


def test_evaluation_is_the_mean_over_every_token_of_the_split(stirred: tuple[nn.Module, Corpus]) -> None:
    model, corpus = stirred
    found = evaluate(model, corpus, 7, CPU, torch.float32)
    nats, tokens = 0.0, torch.from_numpy(corpus.val.astype(np.int64))
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, corpus.seq_len):
            piece = tokens[start : start + corpus.seq_len + 1]
            logits = model(piece[None, :-1])[0].double()
            nats -= logits.log_softmax(-1)[torch.arange(len(piece) - 1), piece[1:]].sum().item()
    assert (len(tokens) - 1) % corpus.seq_len  # the last window is a part of one
    assert found.loss == pytest.approx(nats / (len(tokens) - 1), rel=1e-6)


def test_evaluation_depends_on_no_batch_size(small: Setting, stirred: tuple[nn.Module, Corpus]) -> None:
    model, corpus = stirred
    found = {size: evaluate(model, corpus, size, CPU, torch.float32) for size in (1, 3, 8, 1000)}
    for other in found.values():
        assert other.loss == pytest.approx(found[1].loss, rel=1e-6)
        assert other.bits_per_byte == pytest.approx(found[1].bits_per_byte, rel=1e-6)
        assert other.gate_mean == pytest.approx(found[1].gate_mean, rel=1e-6)
    first = [rows(small.run(f"trainer.batch_size={size}", "trainer.max_steps=3")[0])[0] for size in (1, 6)]
    assert first[0]["val_loss"] == first[1]["val_loss"]


def test_bits_per_byte_of_characters_of_many_bytes(small: Setting, tmp_path: Path) -> None:
    text = "".join("añ日😀 b"[i * i % 6] for i in range(3000))
    (tmp_path / "wide.txt").write_bytes(text.encode())
    run = small.plan(f"data.path={tmp_path}/wide.txt")
    found = evaluate(build_model(run.cfg), run.corpus, 8, CPU, torch.float32)
    predicted = text[2700 + 1 :]  # the validation split but its first character
    assert len(predicted.encode()) > 1.5 * len(predicted)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * len(predicted) / len(predicted.encode()))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(stirred: tuple[nn.Module, Corpus], training: bool) -> None:
    model, corpus = stirred
    model.train(training)
    rng = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    evaluate(model, corpus, 8, CPU, torch.float32)
    assert all(module.training is training for module in model.modules())
    assert all(block.fusion.observer is None for block in model.blocks if hasattr(block, "fusion"))
    assert same_weights(before, model.state_dict()) and torch.equal(rng, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_that_fails_leaves_the_model_as_it_was(
    stirred: tuple[nn.Module, Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corpus = stirred
    model.train()
    monkeypatch.setattr(F, "cross_entropy", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, corpus, 8, CPU, torch.float32)
    assert model.training and model.blocks[0].fusion.observer is None


def test_evaluation_without_dropout(small: Setting) -> None:
    run = small.plan("model.dropout=0.5")
    model = build_model(run.cfg).train()
    losses = {evaluate(model, run.corpus, 8, CPU, torch.float32).loss for _ in range(2)}
    model.dropout.p = model.blocks[0].dropout.p = 0.0
    assert losses == {evaluate(model, run.corpus, 8, CPU, torch.float32).loss}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.pattern='P R P'", "fusion=gated", "fusion.gate_init=0.7"], [0.7, 0.7]),
        (["fusion=gated_channel", "fusion.gate_init=0.2"], [0.2]),
        (["fusion=weighted", "fusion.weight_init=0.6"], [0.6]),
        (["fusion=concat"], None),
        (["model.pattern=R"], None),
    ],
)
def test_gates_at_the_start_are_gate_init(small: Setting, overrides: list[str], expected: list[float] | None) -> None:
    run = small.plan(*overrides)
    found = evaluate(build_model(run.cfg), run.corpus, 8, CPU, torch.float32).gate_mean
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_mean_gates_are_those_of_the_text(stirred: tuple[nn.Module, Corpus]) -> None:
    model, corpus = stirred
    short = replace(corpus, val=corpus.val[:10])  # 9 predictions in a window of 32
    found = evaluate(model, short, 8, CPU, torch.float32).gate_mean
    expected = evaluate(model, replace(short, seq_len=9), 8, CPU, torch.float32).gate_mean
    assert found == pytest.approx(expected, rel=1e-5)
