"""Windows, loss by position, gate maps, outputs and updates, on cases that can be computed by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybrid import build_model
from hybrid.data import IGNORE, CharTokenizer
from hybrid.data.vocabulary import BPETokenizer
from hybrid.diagnostics.gates import CLASSES, GateMaps, character_class, mean_gates, token_classes
from hybrid.diagnostics.observe import observe
from hybrid.diagnostics.outputs import contributions
from hybrid.diagnostics.updates import measure_updates
from hybrid.diagnostics.windows import Windows, bin_starts, validation_windows
from hybrid.run import check_data
from hybrid.training.evaluation import evaluate
from tests.hybrid.configs import VOCAB, stirred
from tests.hybrid.test_diagnose_necessity import loss, windows_of
from tests.hybrid.trainers import stir

CPU = torch.device("cpu")
NO_CLASSES = torch.zeros(VOCAB, dtype=torch.int64)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_windows_cover_the_split_once_and_no_batch_is_a_single_row(small):
    cfg = small.config()
    corpus = check_data(cfg)
    windows = validation_windows(corpus, 4, CPU)
    assert windows.predicted == len(corpus.val) - 1
    real = windows.targets != IGNORE
    assert np.array_equal(windows.tokens[real].numpy(), corpus.val[:-1])
    assert np.array_equal(windows.targets[real].numpy(), corpus.val[1:])
    gap = ~real[-1]
    assert gap.any(), "the last window should have a gap"
    assert torch.equal(windows.tokens[-1][gap], windows.tokens[0][gap])
    for number in range(2, 12):
        some = Windows(windows.tokens[:number], windows.targets[:number], 4, CPU)
        rows = [len(tokens) for tokens, _ in some.batches()]
        assert sum(rows) == number
        assert min(rows) >= 2 and max(rows) <= 5
        assert torch.equal(torch.cat([tokens for tokens, _ in some.batches()]), some.tokens)


def test_windows_are_spread_over_all_of_the_text():
    tokens = torch.arange(10)[:, None].expand(10, 8)
    windows = Windows(tokens, tokens, 4, CPU)
    assert windows.spread(40).tokens[:, 0].tolist() == [0, 2, 4, 6, 8]
    assert windows.spread(33).tokens[:, 0].tolist() == [0, 2, 4, 6, 8]
    assert len(windows.spread(1)) == 2
    assert len(windows.spread(10**6)) == 10


@pytest.mark.parametrize("length", [12, 100])
def test_loss_by_position_sums_to_the_loss(length):
    model, windows = stirred("model.pattern=P*2", "fusion=gated"), windows_of(5, length)
    seen = observe(model, windows, NO_CLASSES)
    assert seen.loss == pytest.approx(loss(model, windows), rel=1e-5)
    by_position = seen.describe_positions()
    assert by_position["positions"] == bin_starts(length)
    assert len(by_position["loss"]) == min(64, length)
    assert sum(by_position["tokens"]) == windows.predicted
    total = sum(x * n for x, n in zip(by_position["loss"], by_position["tokens"], strict=True))
    assert total / windows.predicted == pytest.approx(seen.loss)
    with torch.no_grad():  # the first bin, by hand
        first = F.cross_entropy(model(windows.tokens)[:, 0], windows.targets[:, 0]).item()
    assert by_position["loss"][0] == pytest.approx(first, rel=1e-4)


def test_the_loss_is_the_one_that_training_validates_with(small):
    cfg = small.config()
    corpus = check_data(cfg)
    model = build_model(cfg).eval()
    stir(model)
    seen = observe(model, validation_windows(corpus, 8, CPU), torch.zeros(corpus.vocab_size, dtype=torch.int64))
    known = evaluate(model, corpus, 8, CPU, torch.float32)
    assert seen.loss == pytest.approx(known.loss, rel=1e-6)
    assert [maps.mean for maps in seen.gates.values()] == pytest.approx(known.gate_mean, rel=1e-5)


@pytest.mark.parametrize("fusion", ["gated", "gated_channel"])
def test_saturated_gates_are_reported_saturated(fusion):
    model, windows = stirred("model.pattern=P*3", f"fusion={fusion}"), windows_of(5)
    for block, gate in zip(model.blocks, (0.999, 0.001, 0.6), strict=True):
        block.fusion.gate.weight.data.zero_()
        block.fusion.gate.bias.data.fill_(logit(gate))
    maps = [found.describe() for found in observe(model, windows, NO_CLASSES).gates.values()]
    assert [m["saturated_high"] for m in maps] == [1, 0, 0]
    assert [m["saturated_low"] for m in maps] == [0, 1, 0]
    assert [m["mean"] for m in maps] == pytest.approx([0.999, 0.001, 0.6], rel=1e-4)
    assert [m["std"] for m in maps] == pytest.approx([0, 0, 0], abs=1e-4)
    assert maps[2]["by_position"] == pytest.approx([0.6] * 12, rel=1e-5)
    assert list(mean_gates(model, windows).values()) == pytest.approx([0.999, 0.001, 0.6], rel=1e-4)


def test_a_channel_gate_that_is_half_open_is_half_saturated():
    model, windows = stirred("model.pattern=P", "fusion=gated_channel"), windows_of(3)
    fusion = model.blocks[0].fusion
    fusion.gate.weight.data.zero_()
    fusion.gate.bias.data[:4] = logit(0.01)
    fusion.gate.bias.data[4:] = logit(0.5)
    found = observe(model, windows, NO_CLASSES).gates[0].describe()
    assert found["saturated_low"] == 0.25
    assert found["mean"] == pytest.approx((0.01 + 3 * 0.5) / 4, rel=1e-4)
    assert found["std"] == pytest.approx(math.sqrt(3) / 4 * 0.49, rel=1e-3)  # two values, 1:3, 0.49 apart
    assert fusion.observer is None


def test_maps_by_position_and_by_class():
    maps = GateMaps(3, CPU)
    gates = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]]).unsqueeze(-1)
    classes = torch.tensor([[0, 1, 2], [0, 0, 2]])
    maps.add(gates, classes, torch.tensor([[True, True, True], [True, True, False]]))
    found = maps.describe()
    assert found["by_position"] == pytest.approx([0.3, 0.4, 0.3])
    assert found["by_class"]["letter"] == pytest.approx((0.1 + 0.5 + 0.6) / 3)
    assert found["by_class"]["capital"] == pytest.approx(0.2)
    assert found["by_class"]["digit"] == pytest.approx(0.3)
    assert [found["by_class"][name] for name in CLASSES[3:]] == [None] * 4
    assert found["mean"] == pytest.approx(0.34)


@torch.no_grad()
def test_gates_are_classed_by_the_token_that_is_read():
    model, windows = stirred("model.pattern=P", "fusion=gated"), windows_of(5)
    classes = torch.arange(VOCAB) % len(CLASSES)
    found = observe(model, windows, classes).gates[0].describe()["by_class"]
    seen: list = []
    model.blocks[0].fusion.observer = seen.append
    model(windows.tokens)
    for i, name in enumerate(CLASSES):
        chosen = (windows.tokens % len(CLASSES) == i) & (windows.targets != IGNORE)
        assert found[name] == pytest.approx(seen[0][chosen].mean().item(), rel=1e-5)


def test_one_weight_for_all_is_a_gate_without_spread():
    model, windows = stirred("model.pattern=P", "fusion=weighted"), windows_of(3)
    weight = model.blocks[0].fusion.weight.item()
    found = observe(model, windows, NO_CLASSES).gates[0].describe()
    assert (found["mean"], found["std"]) == pytest.approx((weight, 0.0), abs=1e-6)


def test_fusions_without_a_gate_have_no_map():
    model = stirred("model.pattern=P", "fusion=concat")
    assert observe(model, windows_of(2), NO_CLASSES).gates == {}
    assert mean_gates(model, windows_of(2)) == {}


def test_classes_of_tokens():
    tokenizer = CharTokenizer("\n !aéAÉ7$", unknown=True)
    names = [CLASSES[i] for i in token_classes(tokenizer, 12).tolist()]
    expected = ["newline", "space", "punctuation", "letter", "letter", "capital", "capital", "digit", "punctuation"]
    assert names == [*expected, "other", "other", "other"]  # the unknown character, and two ids of nobody
    assert character_class("\t") == "space"
    bpe = BPETokenizer.train("the cat and the hat and the cat " * 20, 264)
    by_text = {bpe.decode([i]): CLASSES[c] for i, c in enumerate(token_classes(bpe, bpe.vocab_size).tolist())}
    merged = [text for text in by_text if len(text) > 1]
    assert any(text.startswith(" ") for text in merged)
    for text in merged:
        assert by_text[text] == ("space" if text[0] == " " else "letter")


@torch.no_grad()
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_sizes_and_shares_of_outputs(norm):
    model, windows = stirred("model.pattern=P", "fusion=gain", f"fusion.branch_norm={norm}"), windows_of(3)
    fusion = model.blocks[0].fusion
    fusion.rwkv_gain.fill_(2.0)
    fusion.mamba_gain.fill_(-0.5)
    kept = {}
    for name in ("rwkv", "mamba"):
        getattr(model.blocks[0], name).register_forward_hook(lambda _, __, out, n=name: kept.__setitem__(n, out[0]))
    found = observe(model, windows, NO_CLASSES).outputs[0]
    described = found.describe()
    model(windows.tokens)
    real = windows.targets != IGNORE
    outs = {name: out[real] for name, out in kept.items()}
    for name, gain in (("rwkv", 2.0), ("mamba", 0.5)):
        rms = outs[name].square().mean().sqrt().item()
        normed = 1.0 if norm == "rms" else rms
        assert described["rms"][name] == pytest.approx(rms, rel=1e-5)
        assert described["rms_normed"][name] == pytest.approx(normed, rel=2e-3)  # eps
        assert described["share"][name] == pytest.approx(gain * normed, rel=2e-3)
        assert torch.allclose(found.means[0, name].float(), outs[name].mean(dim=0), atol=1e-5)
    assert described["cosine"] == pytest.approx(F.cosine_similarity(*outs.values(), dim=-1).mean().item(), abs=1e-5)


@torch.no_grad()
def test_an_output_of_zero_has_no_direction():
    model, windows = stirred("model.pattern=P", "fusion=gain"), windows_of(3)
    assert observe(model, windows, NO_CLASSES).outputs[0].describe()["cosine"] is not None
    model.blocks[0].rwkv.o_proj.weight.zero_()
    assert observe(model, windows, NO_CLASSES).outputs[0].describe()["cosine"] is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["gain", "weighted", "gated", "gated_channel", "concat", "residual"])
def test_contributions_add_up_to_the_fused_output(name):
    fusion = stirred("model.pattern=P", f"fusion={name}").blocks[0].fusion
    a, b = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    gates: list = []
    fusion.observer = gates.append
    fused = fusion(a, b)[0]
    fusion.observer = None
    first, second = contributions(fusion, a, b, gates[0] if gates else None)
    assert torch.allclose(first + second, fused, atol=1e-5)
    other = contributions(fusion, a, 2 * b, gates[0]) if gates else contributions(fusion, a, 2 * b, None)
    assert other is None or torch.allclose(other[0], first, atol=1e-6)  # of the first branch alone


def test_attention_between_the_branches_has_no_shares():
    model = stirred("model.pattern='P R'", "fusion=cross_attention")
    parallel, alone = (found.describe() for found in observe(model, windows_of(3), NO_CLASSES).outputs)
    assert parallel["share"] is None
    assert alone["share"] == alone["rms"]
    assert alone["cosine"] is None


def test_an_update_is_one_step_of_adamw_at_the_peak(small):
    """Against the formulas of AdamW (Loshchilov and Hutter 2019), from the gradients of the same four batches."""
    cfg = small.config("optim.grad_clip=0", "optim.mamba_lr_mult=0.5", "optim.weight_decay=5")
    corpus = check_data(cfg)
    model = build_model(cfg).eval()
    stir(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ratios, basis = measure_updates(model, cfg, corpus, CPU, tokens=4 * 4 * 32)
    assert basis == {"batches": 4, "tokens_per_batch": 128}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for number in range(4):
        inputs, targets = (torch.from_numpy(x) for x in corpus.train_batch(0, cfg.trainer.max_steps + number, 4))
        model.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        for name, p in model.named_parameters():
            first[name] = 0.9 * first[name] + 0.1 * p.grad
            second[name] = 0.95 * second[name] + 0.05 * p.grad**2
    for group, mark, lr in (("rwkv", ".rwkv.", 0.003), ("mamba", ".mamba.", 0.0015), ("fusion", ".fusion.", 0.003)):
        moved = weights = 0.0
        for name, p in model.named_parameters():
            if mark in name:
                step = (first[name] / (1 - 0.9**4)) / ((second[name] / (1 - 0.95**4)).sqrt() + 1e-8)
                decay = 5.0 if p.ndim == 2 and not getattr(p, "_no_weight_decay", False) else 0.0
                moved += (lr * (step + decay * p.detach())).square().sum().item()
                weights += p.detach().square().sum().item()
        assert ratios[group] == pytest.approx(math.sqrt(moved / weights), rel=1e-3)
    assert set(ratios) == {"rwkv", "mamba", "fusion", "other"}


def test_updates_follow_the_learning_rate_and_the_budget(small):
    cfg = small.config()
    corpus = check_data(cfg)
    model = build_model(cfg).eval()
    stir(model)
    base, _ = measure_updates(model, cfg, corpus, CPU, tokens=0)
    cfg.optim = dataclasses.replace(cfg.optim, lr=2 * cfg.optim.lr)
    twice, basis = measure_updates(model, cfg, corpus, CPU, tokens=0)
    assert twice == pytest.approx({group: 2 * value for group, value in base.items()}, rel=1e-3)
    assert basis == {"batches": 4, "tokens_per_batch": 64}
    assert measure_updates(model, cfg, corpus, CPU, tokens=10**6)[1] == {"batches": 20, "tokens_per_batch": 128}
