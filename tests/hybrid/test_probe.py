"""The look inside a model: recurrent states and their health, branch outputs, and that nothing of it stays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.branches.mamba2 import Mamba2
from hybrid.kernels import ssd, wkv6
from hybrid.model import HybridLM
from hybrid.probe import Probe, windows
from hybrid.states import LastSteps, readings, rolled, ssd_last_steps, wkv6_last_steps
from hybrid.training import member
from hybrid.training.loop import Trainer
from hybrid.training.member import Member
from tests.hybrid.configs import VOCAB, relative_error, stirred
from tests.hybrid.recurrences import ssd_reference, wkv6_reference
from tests.hybrid.trainers import CPU
from tests.runs import Killed, Setting, rows, same_weights, strict_json, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wkv6_inputs(T: int, B: int = 2, H: int = 3, K: int = 4, V: int = 5) -> dict[str, Tensor]:
    return {
        "r": random(B, T, H, K, seed=1), "k": random(B, T, H, K, seed=2), "v": random(B, T, H, V, seed=3),
        "w": -random(B, T, H, K, seed=4).exp(), "u": random(H, K, seed=5),
    }  # fmt: skip


def ssd_inputs(T: int, B: int = 2, H: int = 4, P: int = 3, N: int = 5, G: int = 2) -> dict[str, Tensor]:
    return {
        "x": random(B, T, H, P, seed=1), "dt": F.softplus(random(B, T, H, seed=2)), "A": -random(H, seed=3).exp(),
        "B": random(B, T, G, N, seed=4), "C": random(B, T, G, N, seed=5), "D": random(H, seed=6),
    }  # fmt: skip


# ---- the states are those of the recurrences


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 40, 70])
def test_wkv6_states_are_the_recurrences(steps: int) -> None:
    inputs = wkv6_inputs(steps)
    end = wkv6_last_steps(**inputs, last=8)
    pairs = min(8, steps)
    assert end.states.shape == (2, pairs + 1, 3, 4, 5) and end.steps == steps
    assert relative_error(end.states[:, -1], wkv6(**inputs)[1]) < 1e-6
    for back in range(pairs):  # every one of them, against the recurrence up to that token
        upto = {name: x[:, : steps - back].double() for name, x in inputs.items() if name != "u"}
        _, state = wkv6_reference(**upto, u=inputs["u"].double())
        assert relative_error(end.states[:, -1 - back], state) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 40, 70])
def test_ssd_states_are_the_recurrences(steps: int) -> None:
    inputs = ssd_inputs(steps)
    end = ssd_last_steps(**inputs, last=8)
    pairs = min(8, steps)
    assert end.states.shape == (2, pairs + 1, 4, 3, 5) and end.steps == steps
    assert relative_error(end.states[:, -1], ssd(**inputs)[1]) < 1e-6
    for back in range(pairs):
        upto = {name: inputs[name][:, : steps - back].double() for name in ("x", "dt", "B", "C")}
        _, state = ssd_reference(**upto, A=inputs["A"].double())
        assert relative_error(end.states[:, -1 - back], state) < 1e-5


# ---- readings on states made by hand


def ending(states: list[Tensor], updates: Tensor | None = None, steps: int = 100, decay: float = 0.5) -> LastSteps:
    """One sequence, one head: ``states`` [I,J] one after another."""
    stacked = torch.stack(states)[None, :, None]
    updates = torch.zeros_like(stacked[:, 1:]) if updates is None else updates
    log_decay = torch.full((1, len(states) - 1, 1, 1, 1), math.log(decay))
    return LastSteps(stacked, updates, log_decay, steps)


def test_cosine_of_successive_states() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert readings(ending([east, north]))["cosine"]["worst"] == 0
    assert readings(ending([east, 3 * east]))["cosine"]["worst"] == 1
    assert readings(ending([east, east + north / 2]))["cosine"]["worst"].item() == pytest.approx(2**-0.5)
    # 1 (east, east) and 0 (east, north) and -1 (north, -north): the middle one.
    assert readings(ending([east, east, north, -north]))["cosine"]["median"] == 0
    # The zero state before the first token makes no pair: of two steps one pair is left, of one step none.
    zero = torch.zeros(1, 2)
    assert readings(ending([zero, east, east], steps=2))["cosine"]["worst"] == 1
    assert readings(ending([zero, east], steps=1))["cosine"]["worst"].isnan()
    assert readings(ending([zero, zero]))["cosine"]["worst"] == 1  # nothing, and nothing again


def test_singular_values() -> None:
    values = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    rotation, _ = torch.linalg.qr(random(6, 6))
    other, _ = torch.linalg.qr(random(9, 9, seed=1))
    found = readings(ending([torch.zeros(6, 9), rotation @ values.diag() @ other[:6]]))
    assert found["top5_share"]["worst"].item() == pytest.approx(20 / 21, rel=1e-5)  # (6+5+4+3+2) / (... + 1)
    shares = values / 21
    assert found["effective_rank"]["worst"].item() == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)
    for size in (3, 10):  # n equal directions are n; five of ten are a half
        even = readings(ending([torch.zeros(size, size), 1e-4 * torch.eye(size)]))
        assert even["effective_rank"]["median"].item() == pytest.approx(size, rel=1e-5)
        assert even["top5_share"]["median"].item() == pytest.approx(min(1, 5 / size), rel=1e-5)
    empty = readings(ending([torch.zeros(6, 6)] * 2))
    assert (empty["top5_share"]["worst"], empty["effective_rank"]["worst"]) == (1, 0)


def test_saturated_is_the_share_beyond_five() -> None:
    final = torch.tensor([[5.0, -5.1, 6.0, 0.0, -4.9, 1e9, 0.0, 0.0]])
    assert readings(ending([final * 10, final]))["saturated"]["worst"].item() == pytest.approx(3 / 8)


def test_worst_is_the_worst_heads_own_median() -> None:
    """Two sequences, two heads, final states of one value: the heads' saturation is 0, 0 and 1, 1."""
    values = torch.tensor([[0.0, 9.0], [1.0, 9.0]])
    states = values[:, None, :, None, None].expand(2, 3, 2, 1, 1).clone()
    found = readings(LastSteps(states, torch.zeros(2, 2, 2, 1, 1), torch.zeros(2, 2, 2, 1, 1), 50))
    assert found["saturated"] == {"median": 0.5, "worst": 1.0}
    states[1, :, 0] *= -1  # turning once in four pairs is not what the head does in the middle
    states[1, 1, 0] *= -1
    assert found["cosine"]["worst"] == 1 and found["novelty"] == {"median": 0, "worst": 0}


def test_worst_is_the_largest_or_the_smallest_as_it_fails() -> None:
    """A head of ten equal directions, and one of a single direction."""
    one = torch.zeros(10, 10)
    one[0, 0] = 1
    states = torch.stack([torch.eye(10), one]).expand(1, 2, 2, 10, 10)
    found = readings(LastSteps(states, torch.zeros(1, 1, 2, 10, 10), torch.zeros(1, 1, 2, 1, 1), 50))
    assert found["top5_share"]["worst"].item() == pytest.approx(0.5)
    assert found["effective_rank"]["worst"].item() == pytest.approx(1)
    assert found["effective_rank"]["median"].item() == pytest.approx(5.5)


def run_head(decay: float, updates: Tensor) -> dict[str, dict[str, Tensor]]:
    """Readings of a head [I,J] of this decay after all ``updates`` [T,I,J] but the last 8 and then these."""
    log_decay = torch.full((1, len(updates), 1, 1, 1), math.log(decay))
    states, _, _ = rolled(torch.zeros(1, 1, *updates.shape[1:]), updates[None, :, None], log_decay)
    return readings(LastSteps(states[:, -9:], updates[None, -8:, None], log_decay[:, -8:], len(updates)))


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.9975, 0.999999, 1.0])
@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_novelty_of_a_head_that_is_written_is_about_one_or_more_at_any_decay(decay: float, shared: float) -> None:
    """Independent updates, and updates that have half their energy in one direction as Mamba-2's do."""
    found = run_head(decay, random(256, 8, 16) + shared)
    assert found["novelty"]["worst"] > 0.65
    if decay > 0.99:  # what the specification calls frozen
        assert found["cosine"]["worst"] > 0.99


@pytest.mark.parametrize("decay", [0.9975, 0.999999, 1.0])
def test_novelty_of_a_frozen_head_is_nothing(decay: float) -> None:
    updates = random(256, 8, 16)
    updates[200:] = 0  # written once, and never again
    assert run_head(decay, updates)["novelty"]["worst"] == 0
    assert run_head(decay, random(1, 8, 16).expand(256, 8, 16))["novelty"]["worst"] < 1e-4  # always the same
    assert run_head(decay, 1e-9 * random(256, 8, 16))["novelty"]["worst"] == 0  # a step size of next to nothing
    assert run_head(decay, torch.zeros(256, 8, 16))["novelty"]["worst"] == 0


def test_novelty_by_hand() -> None:
    """One value, decay 1/2, 3 steps: memory (1 - 1/8) / (1/2) = 7/4; updates 0 and 2 deviate by sqrt(2); state 7."""
    one = torch.ones(1, 1)
    found = readings(ending([3 * one, one, 7 * one], torch.tensor([0.0, 2.0]).view(1, 2, 1, 1, 1), steps=3))
    assert found["novelty"]["worst"].item() == pytest.approx(2**0.5 * 7 / 4 / 7)


# ---- the probe of a model


def corpus_of(tokens: int, seq_len: int, seed: int = 0) -> Any:
    """What the probe asks of a corpus."""
    val = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed)).numpy().astype(np.uint16)
    return SimpleNamespace(val=val, seq_len=seq_len)


def probed(model: HybridLM, corpus: Any = None, step: int = 0) -> dict[str, Any]:
    return Probe(model, corpus or corpus_of(500, 20), CPU, torch.float32)(step)


@pytest.mark.parametrize(
    ("tokens", "seq_len", "shape"),
    [(100_000, 1024, (8, 256)), (100_000, 20, (8, 20)), (70, 20, (3, 20)), (12, 20, (1, 12)), (2, 20, (1, 2))],
)
def test_windows(tokens: int, seq_len: int, shape: tuple[int, int]) -> None:
    found = windows(SimpleNamespace(val=np.arange(tokens), seq_len=seq_len))
    assert found.shape == shape and found.dtype == np.int64
    assert found[0, 0] == 0 and found[-1, -1] == tokens - 1  # spread from one end to the other
    assert (np.diff(found, axis=1) == 1).all() and (np.diff(found[:, 0]) >= shape[1]).all()


def test_row_of_a_model() -> None:
    model = stirred("model.pattern='P R M A'", "fusion.gate_init=0.3")
    corpus = corpus_of(500, 20)
    row = probed(model, corpus, step=7)
    strict_json(json.dumps(row, allow_nan=False))
    assert (row["kind"], row["step"], row["finite"], row["shape_ok"]) == ("probe", 7, True, True)
    outputs: dict[str, Tensor] = {}
    for name in ("rwkv", "mamba"):
        getattr(model.blocks[0], name).register_forward_hook(
            lambda _, __, out, name=name: outputs.update({name: out[0]})
        )
    with torch.no_grad():
        logits = model(torch.from_numpy(windows(corpus)))
    expected = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert row["entropy"] == pytest.approx(expected, rel=1e-5)
    assert row["entropy_normalised"] == pytest.approx(expected / math.log(VOCAB), rel=1e-5)
    assert [list(layer["branches"]) for layer in row["layers"]] == [
        ["rwkv", "mamba"],
        ["rwkv"],
        ["mamba"],
        ["attention"],
    ]
    first = row["layers"][0]
    for name, out in outputs.items():
        assert first["branches"][name]["rms"] == pytest.approx(out.square().mean().sqrt().item(), rel=1e-5)
        assert first["branches"][name]["variance"] == pytest.approx(out.flatten(0, 1).var(0).mean().item(), rel=1e-5)
    cosine = F.cosine_similarity(outputs["rwkv"], outputs["mamba"], dim=-1).mean().item()
    assert first["cosine"] == pytest.approx(cosine, abs=1e-5) and first["gate"]["closed"] == 0
    assert [layer["cosine"] is None for layer in row["layers"]] == [False, True, True, True]
    for name in ("cosine", "novelty", "top5_share", "effective_rank", "saturated"):
        for layer, branch in ((0, "rwkv"), (0, "mamba"), (1, "rwkv"), (2, "mamba")):
            assert row["layers"][layer]["branches"][branch][name].keys() == {"median", "worst"}, name
        assert row["layers"][3]["branches"]["attention"][name] is None


def test_twins_and_text_of_one_token_have_rows() -> None:
    row = probed(stirred("model.branches=[mamba,mamba]"))
    assert list(row["layers"][1]["branches"]) == ["mamba_a", "mamba_b"] and row["finite"]
    short = probed(stirred(), corpus_of(30, 1))["layers"][0]["branches"]["rwkv"]
    assert short["cosine"] == {"median": None, "worst": None} and short["top5_share"]["worst"] > 0


def test_a_model_that_breaks_has_a_row() -> None:
    model = stirred()
    with torch.no_grad():
        model.blocks[0].mamba.out_proj.weight[3] = math.nan
    row = probed(model)
    assert row["finite"] is False and row["entropy"] is None and row["entropy_normalised"] is None
    strict_json(json.dumps(row, allow_nan=False))
    assert row["layers"][0]["branches"]["rwkv"]["novelty"]["worst"] is not None  # before the damage
    assert row["layers"][1]["branches"]["rwkv"]["top5_share"]["worst"] is None


def test_a_wrong_shape_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stirred("fusion=gain", "model.pattern=P M")
    whole = Mamba2.forward
    monkeypatch.setattr(Mamba2, "forward", lambda *a: tuple(x if x is None else x[..., :1] for x in whole(*a)))
    assert probed(model)["shape_ok"] is False  # broadcast, it goes unnoticed otherwise
    monkeypatch.undo()
    assert probed(model)["shape_ok"] is True
    monkeypatch.setattr(HybridLM, "forward", lambda self, tokens, whole=HybridLM.forward: whole(self, tokens)[:, :-1])
    assert probed(model)["shape_ok"] is False


# ---- nothing of it stays


@pytest.mark.parametrize("training", [True, False])
def test_model_and_generators_are_as_before(training: bool) -> None:
    model = stirred("model.dropout=0.5").train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert probed(model) == probed(model)  # dropout is off
    assert torch.get_rng_state().equal(generator) and model.training == training
    assert all(module.training == training for module in model.modules())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(getattr(module, "observer", None) is None for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


DROPOUT = ("model.dropout=0.1", "trainer.eval_every=3", "trainer.log_every=1")


def test_training_is_the_same_bits_with_and_without(
    small: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, summary = small.run(*DROPOUT)
    monkeypatch.setattr(member, "build_watchers", lambda _: [])
    other, without = small.run(*DROPOUT, f"out={tmp_path}/off")
    assert rows(folder) == rows(other) and same_weights(weights(folder), weights(other))
    assert folder.probes.exists() and not other.probes.exists()
    assert summary["gates"].keys() == {"G0", "G1", "G2", "G3", "G3.5", "G4"} and without["gates"] == {}
    assert [row["step"] for row in map(strict_json, folder.probes.read_text().splitlines())] == [0, 3, 6, 9, 12]
    assert all(row["kind"] != "probe" for row in rows(folder))
    third, off = small.run(*DROPOUT, "gates=off", f"out={tmp_path}/third")
    assert rows(third) == rows(folder) and off["gates"] == {}


def test_runs_that_train_together_are_probed_each_for_itself(
    small: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def together(*more: str) -> list[Member]:
        members = []
        for seed in range(2):
            run = small.plan("display.progress=off", f"seed_init={seed}", f"seed_data={seed}", *more)
            run.folder.create(run.cfg, run.corpus)
            members.append(Member(run.cfg, run.corpus, run.folder, SimpleProgress()))
        Trainer(*members).train()
        return members

    found = together()
    monkeypatch.setattr(member, "build_watchers", lambda _: [])
    without = together(f"out={tmp_path}/off")
    for one, other in zip(found, without, strict=True):
        assert rows(one.folder) == rows(other.folder)
        last = strict_json(one.folder.probes.read_text().splitlines()[-1])
        assert last == one.probe(12)  # of this member's own weights as they are now
    assert found[0].probe(12) != found[1].probe(12)


class SimpleProgress:
    """Shows nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def test_killed_and_resumed_the_rows_and_verdicts_are_the_same(
    small: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*DROPOUT, "trainer.checkpoint_every=5", "gates.G4.every=2", "gates.G4.grad_ratio.passes=[0.5,0.6]")
    original = Trainer._update

    def die(self: Trainer, step: int) -> None:
        if step == 8:  # after the probe of step 6, which the checkpoint of step 5 does not know
            raise Killed
        original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", die)
        with pytest.raises(Killed):
            small.run(*options)
    folder, summary = small.run(*options)
    assert "resumes after step 5" in folder.log.read_text()
    other, undisturbed = small.run(*options, f"out={tmp_path}/other")
    assert folder.probes.read_text() == other.probes.read_text()
    assert summary["gates"] == undisturbed["gates"] and summary["gates"]["G3"]["steps"] == 12
    assert rows(folder) == rows(other)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_beside_a_recorded_step_on_a_gpu(small: Setting, tmp_path: Path, compiled: str) -> None:
    """The same losses with and without, but for the order of sums in kernels, and readings at every evaluation."""
    options = ("trainer.device=cuda", "trainer.cuda_graph=true", f"trainer.compile={compiled}", "trainer.eval_every=4",
               "trainer.log_every=1")  # fmt: skip
    folder, summary = small.run(*options)
    other, _ = small.run(*options, "gates=off", f"out={tmp_path}/off")
    for one, two in zip(rows(folder), rows(other), strict=True):
        for name in ("loss", "val_loss"):
            assert one.get(name) == pytest.approx(two.get(name), rel=1e-3), (name, one["step"])
    found = [strict_json(line) for line in folder.probes.read_text().splitlines()]
    assert [row["step"] for row in found] == [0, 4, 8, 12] and all(row["finite"] for row in found)
    assert len({row["entropy"] for row in found}) == 4  # it sees the weights that the graph has changed
    assert summary["gates"]["G0"]["verdict"] in ("pass", "warn") and summary["gates"]["G1"]["verdict"] == "pass"
