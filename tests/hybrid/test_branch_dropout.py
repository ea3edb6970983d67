"""Branch dropout: how often, never both, in training only, and that nothing of a dropped branch is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid.model import Block, HybridLM, drop_branches
from hybrid.training.optimizer import group_of
from hybrid.training.stack import Stack
from tests.hybrid.configs import stirred, tokens
from tests.runs import Setting, results, rows

pytestmark = pytest.mark.usefixtures("one_thread")


def dropped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of every sequence, whether the first and the second output is zero."""
    return tuple((x == 0).flatten(1).all(dim=1) for x in (a, b))


# 4 standard deviations of a share over 20,000 draws are at most 0.0142.
@pytest.mark.parametrize("shares", [(0.3, 0.0), (0.0, 0.3), (0.2, 0.5), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.1, 0.9)])
def test_rates_and_exclusivity(shares: tuple[float, float]) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 20_000, 3, 2) + 1
    x, y = drop_branches(a, b, shares)
    first, second = dropped(x, y)
    assert not (first & second).any()
    for found, share in ((first, shares[0]), (second, shares[1])):
        assert found.float().mean().item() == pytest.approx(share, abs=0.0142 if 0 < share < 1 else 0)
    assert torch.equal(x[~first], a[~first]) and torch.equal(y[~second], b[~second])  # whole sequences, not scaled


class Watched:
    """A model whose blocks' fusions show what they are given."""

    def __init__(self, *overrides: str) -> None:
        self.model: HybridLM = stirred(*overrides)
        self.seen: list[tuple[Tensor, Tensor]] = []
        for block in self.model.blocks:
            if len(block.branches) == 2:
                block.fusion.register_forward_pre_hook(lambda _, given: self.seen.append(dropped(*given[:2])))

    def __call__(self, batch: int = 400) -> list[tuple[Tensor, Tensor]]:
        self.seen.clear()
        with torch.no_grad():
            self.model(tokens(batch, 4))
        return self.seen


def test_every_block_draws_for_itself_and_anew() -> None:
    watched = Watched("model.pattern=P R P", "model.branch_dropout=[0.4,0.3]")
    watched.model.train()
    torch.manual_seed(0)
    first, second = (torch.stack(found) for found in watched())  # the two P blocks, [2, sequences]
    for found in (first, second):
        assert found.float().mean(dim=1).tolist() == pytest.approx([0.4, 0.3], abs=0.1)
        assert not found.all(dim=0).any()
    same = (first[0] == second[0]).float().mean().item()
    assert same == pytest.approx(0.4**2 + 0.6**2, abs=0.1)  # as of independent draws
    torch.manual_seed(0)
    assert torch.equal(torch.stack(watched()[0]), first)
    assert not torch.equal(torch.stack(watched()[0]), first)


@pytest.mark.parametrize("fusion", ["gated", "gain", "concat", "residual", "cross_attention"])
def test_evaluation_knows_nothing_of_it(fusion: str) -> None:
    options = ("model.pattern=P*2", f"fusion={fusion}")
    model, plain = stirred(*options, "model.branch_dropout=[0.5,0.5]"), stirred(*options)
    text = tokens(3, 12)
    with torch.no_grad():
        assert torch.equal(model(text), plain(text))
        state = model.initial_state(3)
        assert torch.equal(model(text, state)[0], plain(text, plain.initial_state(3))[0])
        model.train()
        assert not torch.equal(model(text), plain(text))


def test_without_it_no_number_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = (stirred("model.pattern=P", f"model.branch_dropout={shares}") for shares in ("[0,0]", "[0.0,0.0]"))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: pytest.fail("a draw"))
    before = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model.train()(tokens(2, 8)), plain(tokens(2, 8)))
    assert torch.equal(torch.get_rng_state(), before)


# ---- gradients


def gradients(block: Block, x: Tensor) -> dict[str, float]:
    """Largest gradient of each part of the block."""
    block.zero_grad()
    block(x)[0].square().sum().backward()
    found: dict[str, float] = {}
    for name, parameter in block.named_parameters():
        part = group_of(f"blocks.0.{name}")
        size = 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
        found[part] = max(found.get(part, 0.0), size)
    return found


@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("fusion", ["gated", "gain", "concat", "residual", "cross_attention", "weighted"])
def test_a_dropped_branch_gets_no_gradient(fusion: str, norm: str) -> None:
    for shares, without, other in (("[1,0]", "rwkv", "mamba"), ("[0,1]", "mamba", "rwkv")):
        options = ("model.pattern=P", f"fusion={fusion}", f"fusion.branch_norm={norm}")
        block = stirred(*options, f"model.branch_dropout={shares}").blocks[0].train()
        x = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(1))
        found = gradients(block, x)
        assert found[without] == 0 and found[other] > 1e-4, (shares, found)
        assert all(value < 1e4 for value in found.values())
        whole = gradients(block.eval(), x)
        assert whole[without] > 1e-4


def test_the_gradient_is_that_of_the_sequences_that_kept_the_branch() -> None:
    """Of a batch of which some sequences lost RWKV-6: what the others alone give."""
    block = stirred("model.pattern=P", "fusion=gain", "model.branch_dropout=[0.5,0]").blocks[0].train()
    plain = stirred("model.pattern=P", "fusion=gain").blocks[0]
    plain.load_state_dict(block.state_dict())
    x = torch.randn(8, 10, 16, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    block.fusion.register_forward_pre_hook(lambda _, given: seen.append(dropped(*given[:2])[0]))
    torch.manual_seed(3)
    block(x)[0].square().sum().backward()
    kept = ~seen[0]
    assert 0 < kept.sum() < 8
    plain(x[kept])[0].square().sum().backward()
    others = dict(plain.named_parameters())
    for name, parameter in block.named_parameters():
        if group_of(f"blocks.0.{name}") == "rwkv":
            wanted = others[name].grad
            assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, name


# ---- several models at once, the compiler


def compiled_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler: Callable = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiler(function, backend="aot_eager", **options)
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_members_of_a_stack_draw_independently(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members with equal weights and batches: what they give differs only by what they dropped.

    A branch that is left out of one member's sequence leaves one of three outputs: whole, without the first, without
    the second.
    """
    compiled_on_the_cpu(monkeypatch)
    batch, members = 120, 3
    models = [stirred("model.pattern=P", "model.branch_dropout=[0.4,0.3]").train() for _ in range(members)]
    plain = stirred("model.pattern=P")
    text = tokens(1, 6).expand(batch, -1)
    with torch.no_grad():
        kinds = [plain(text[:1])[0]]
        for shares in ((1.0, 0.0), (0.0, 1.0)):
            plain.blocks[0].branch_dropout = shares
            kinds.append(plain.train()(text[:1])[0])
        torch.manual_seed(0)
        stack = Stack(models, torch.float32, compiled=compiled)
        logits = stack.forward(text.expand(members, -1, -1))  # [members, batch, T, V]
    errors = torch.stack([(logits - kind).flatten(2).norm(dim=2) for kind in kinds])  # [kinds, members, batch]
    assert errors.min(dim=0).values.max() < 1e-4 * kinds[0].norm()
    kind = errors.argmin(dim=0)
    for member in kind:
        shares = [(member == k).float().mean().item() for k in range(3)]
        assert shares == pytest.approx([0.3, 0.4, 0.3], abs=0.17)  # 4 standard deviations over 120
    # Independent draws agree in 0.3^2 + 0.4^2 + 0.3^2 = 34% of the sequences.
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (kind[one] == kind[other]).float().mean().item() == pytest.approx(0.34, abs=0.18)


def test_the_whole_model_compiles_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_on_the_cpu(monkeypatch)
    model = stirred("model.pattern=P", "model.branch_dropout=[0,1]").train()
    fast = torch.compile(model, fullgraph=True)
    text = tokens(2, 8)
    with torch.no_grad():
        assert torch.allclose(fast(text), model(text), rtol=1e-4, atol=1e-5)


# ---- whole runs


def test_runs_with_it(small: Setting) -> None:
    """It changes the training and the identity, and repeats with the seed."""
    short = ("trainer.max_steps=6", "trainer.eval_every=3")
    folder, summary = small.run(*short, "model.branch_dropout=[0.3,0.2]")
    again, repeated = small.run(*short, "model.branch_dropout=[0.3,0.2]", f"out={small.out}/again")
    plain, without = small.run(*short)
    assert rows(folder) == rows(again) and results(summary) == results(repeated)
    assert summary["run_id"] != without["run_id"] and summary["params"] == without["params"]
    assert rows(folder)[0] == rows(plain)[0] and rows(folder)[-1]["val_loss"] != rows(plain)[-1]["val_loss"]
    assert small.run(*short, "model.branch_dropout=[0,0]")[1] == without
