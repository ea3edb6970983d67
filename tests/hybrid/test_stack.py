"""Several models trained as one: each member is its own single run, in weights, gradients, records and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid import build_model
from hybrid.progress import RunProgress
from hybrid.records import RunFolder
from hybrid.training.loop import Interrupted, Trainer
from hybrid.training.member import Member
from hybrid.training.stack import SMALL_VOCABULARY, After, Branch, Stack, embed
from hybrid.training.step import StackStep, build_step
from tests.hybrid.trainers import model_of, stir
from tests.runs import Setting, rows, weights

pytestmark = pytest.mark.usefixtures("one_thread")

ARMS = [
    ("model.pattern=P R M P A", "fusion=gated"),
    ("model.pattern=P P", "fusion=cross_attention", "fusion.branch_norm=rms"),
    ("model.pattern=P", "model.branches=[rwkv,rwkv]", "fusion=gain", "init=fla"),
    ("model.pattern=P", "model.branches=[mamba,mamba]", "fusion=residual"),
    ("model.pattern=A A", "fusion=gain"),
]


def closeness(found: Tensor, expected: Tensor) -> float:
    return (found - expected).norm().item() / (expected.norm().item() + 1e-12)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: " ".join(arm))
def test_outputs_and_gradients_of_every_member(small: Setting, arm: tuple[str, ...], members: int) -> None:
    models = [model_of(small, *arm, f"seed_init={seed}") for seed in range(members)]
    for model in models:
        stir(model)
    alone = [copy.deepcopy(model) for model in models]
    stack = Stack(models, torch.float32, compiled=False)
    tokens, labels = torch.randint(0, 30, (2, members, 3, 20), generator=torch.Generator().manual_seed(1))
    logits = stack.forward(tokens)
    F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(members, -1).mean(1).sum().backward()
    for k, model in enumerate(alone):
        expected = model(tokens[k])
        assert closeness(logits[k], expected) < 1e-5
        F.cross_entropy(expected.flatten(0, 1), labels[k].flatten()).backward()
        named = dict(model.named_parameters())
        largest = max(p.grad.norm().item() for p in named.values() if p.grad is not None)
        for leaf in stack.leaves:
            for name, gradient in leaf.views(leaf.values.grad).items():
                wanted = named[name].grad if named[name].grad is not None else torch.zeros_like(named[name])
                assert (gradient[k] - wanted).norm().item() < 1e-4 * wanted.norm().item() + 1e-6 * largest, name


@pytest.mark.parametrize("members", [1, 2])
def test_matrices_in_lower_precision_lie_as_their_gradients_come(small: Setting, members: int) -> None:
    models = [model_of(small, "model.pattern=P R M P A", "fusion=gated", f"seed_init={k}") for k in range(members)]
    for model in models:
        stir(model)
    alone = [copy.deepcopy(model) for model in models]
    stack = Stack(models, torch.bfloat16, compiled=False)
    for model, before in zip(models, alone, strict=True):
        assert all(x.equal(before.state_dict()[name]) for name, x in model.state_dict().items())
    turned = [name for leaf in stack.leaves for name, turn in zip(leaf.names, leaf.turned, strict=True) if turn]
    assert len(turned) > 30
    copied = []
    values = stack.values

    def watched() -> dict[str, Tensor]:
        found = values()
        for name in turned:
            found[name].register_hook(lambda g, n=name: None if g.mT.is_contiguous() else copied.append(n))
        return found

    stack.values = watched
    tokens = torch.randint(0, 30, (members, 3, 20), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        logits = stack.forward(tokens)
        expected = [model(tokens[k]) for k, model in enumerate(alone)]
    logits.float().square().mean((1, 2, 3)).sum().backward()
    assert not copied
    found = {name: x for leaf in stack.leaves for name, x in leaf.views(leaf.values.grad).items()}
    for k, model in enumerate(alone):
        assert closeness(logits[k].float(), expected[k].float()) < 2e-2
        expected[k].float().square().mean().backward()
        for name in turned:
            assert closeness(found[name][k], model.get_parameter(name).grad) < 0.1, name


@pytest.mark.parametrize(
    "arm, dtype, wanted",
    [
        (
            ["model.pattern=P A R"], torch.bfloat16,
            {"rwkv": torch.float32, "mamba": torch.bfloat16, "attention": torch.bfloat16},
        ),
        (["model.pattern=M A"], torch.bfloat16, {"mamba": torch.bfloat16, "attention": torch.bfloat16}),
        (["model.pattern=P"], torch.float32, {"rwkv": torch.float32, "mamba": torch.float32}),
        (
            ["model.pattern=P", "model.branches=[mamba,mamba]"], torch.bfloat16,
            {"mamba_a": torch.float32, "mamba_b": torch.float32},
        ),
    ],
)  # fmt: skip
def test_inputs_of_linear_layers_alone_are_cast_where_they_come_from(
    small: Setting, arm: list[str], dtype: torch.dtype, wanted: dict[str, torch.dtype]
) -> None:
    """But for two such branches of a block, whose gradients would then be added in lower precision."""
    stack = Stack([model_of(small, *arm, "fusion=gain")], dtype, compiled=False)
    run, seen = stack.run, {}

    def watched(part: Branch | After, values: dict[str, Tensor], *inputs: Tensor) -> Any:
        if isinstance(part, Branch):
            assert seen.setdefault(part.name, inputs[0].dtype) == inputs[0].dtype
        return run(part, values, *inputs)

    stack.run = watched
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        stack.forward(torch.zeros(1, 2, 5, dtype=torch.int64))
    assert seen == wanted


@pytest.mark.parametrize("vocabulary", [SMALL_VOCABULARY, SMALL_VOCABULARY + 1])
def test_embeddings_are_looked_up(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, vocabulary, 6, generator=generator, requires_grad=True)
    tokens = torch.randint(0, vocabulary, (2, 3, 50), generator=generator)
    found = embed(tokens, weight)
    weights_of_sum = torch.randn(found.shape, generator=generator)
    (gradient,) = torch.autograd.grad((found * weights_of_sum).sum(), weight)
    expected = torch.zeros_like(weight)
    for member in range(2):
        assert torch.equal(found[member], weight[member][tokens[member]])
        expected[member].index_add_(0, tokens[member].flatten(), weights_of_sum[member].flatten(0, 1))
    torch.testing.assert_close(gradient, expected)


def test_models_see_what_becomes_of_their_stack(small: Setting) -> None:
    models = [model_of(small, f"seed_init={seed}") for seed in range(2)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    stack = Stack(models, torch.float32, compiled=False)
    for model, values in zip(models, before, strict=True):
        assert all(tensor.equal(values[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for leaf in stack.leaves:
            leaf.values[1] += 1
    assert all(tensor.equal(before[0][name]) for name, tensor in models[0].state_dict().items())
    assert all(tensor.equal(before[1][name] + 1) for name, tensor in models[1].state_dict().items())
    models[0].load_state_dict(before[1])
    assert all((leaf.values[0] + 1).equal(leaf.values[1]) for leaf in stack.leaves)


def test_norms_by_parameter(small: Setting) -> None:
    models = [model_of(small, f"seed_init={seed}") for seed in range(2)]
    stack = Stack(models, torch.float32, compiled=False)
    sizes = {name: 1.0 + i for i, name in enumerate(stack.names)}
    for leaf in stack.leaves:
        leaf.values.grad = torch.empty_like(leaf.values)
        for name, view in leaf.views(leaf.values.grad).items():
            for k in range(2):  # n numbers of a / sqrt(n) have the norm a
                view[k] = (1 + k) * sizes[name] / view[k].numel() ** 0.5
    for k in range(2):
        assert stack.norms(k).tolist() == pytest.approx([(1 + k) * size for size in sizes.values()], rel=1e-5)


def test_blocks_of_many_shapes_are_compiled_in_one_process(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep has more shapes of block than the 8 that the compiler allows by itself."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiler(function, backend="aot_eager", **options)
    )
    tokens = torch.zeros(2, 1, 4, dtype=torch.long)
    for width in range(1, 11):
        model = model_of(small, "model.pattern=A", f"model.ffn_hidden={width}")
        stir(model)
        expected = model(tokens[0])
        assert closeness(Stack([model], torch.float32, compiled=True).forward(tokens[:1])[0], expected) < 1e-5


# ---- whole runs


@pytest.fixture
def together(small: Setting) -> Callable[..., list[dict[str, Any]]]:
    """Train runs that differ by their seeds in one trainer, each in its own folder below ``where``."""

    def train(where: str, seeds: list[int], *overrides: str) -> tuple[list[RunFolder], list[dict[str, Any]]]:
        members = []
        for seed in seeds:
            run = small.plan(
                "display.progress=off", f"seed_init={seed}", f"seed_data={seed}", f"out={small.out}/{where}", *overrides
            )
            run.folder.create(run.cfg, run.corpus)
            progress = RunProgress("test", run.cfg.trainer.max_steps, run.cfg.display, run.folder.note)
            members.append(Member(run.cfg, run.corpus, run.folder, progress))
        return [member.folder for member in members], Trainer(*members).train()

    return train


def near(found: Any, expected: Any) -> None:
    """Equal but for the rounding of sums in another order."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            near(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            near(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-6)
    else:
        assert found == expected


OPTIONS = ("optim.weight_decay=0.5", "optim.grad_clip=0.3", "optim.mamba_lr_mult=2", "trainer.grad_accum=2")


def test_every_member_is_its_single_run(small: Setting, together: Callable[..., Any]) -> None:
    """Losses, norms, learning rates and weights of three runs at once against one after another."""
    folders, outcomes = together("all", [0, 1, 2], *OPTIONS)
    for seed, folder, outcome in zip((0, 1, 2), folders, outcomes, strict=True):
        alone, summary = small.run(f"seed_init={seed}", f"seed_data={seed}", f"out={small.out}/alone", *OPTIONS)
        near(rows(folder), rows(alone))
        for key in ("status", "steps", "tokens", "best_val_loss", "best_step", "final_val_loss", "final_train_loss"):
            near(outcome[key], summary[key])
        ours, theirs = weights(folder), weights(alone)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() < 1e-3 * tensor.norm() + 1e-6, name


def test_an_interrupted_group_goes_on_bit_by_bit(
    small: Setting, together: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = together("whole", [0, 1], *OPTIONS)
    original = StackStep.run

    def interrupt(self: StackStep, step: int) -> None:
        original(self, step)
        if step == 8:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(StackStep, "run", interrupt)
        with pytest.raises(Interrupted):
            together("parts", [0, 1], *OPTIONS)
    parts, _ = together("parts", [0, 1], *OPTIONS)  # from the checkpoints of step 6
    for one, other in zip(whole, parts, strict=True):
        assert rows(one) == rows(other)
        assert all(tensor.equal(weights(other)[name]) for name, tensor in weights(one).items())


def test_a_member_that_ends_early_leaves_the_others_alone(
    small: Setting, together: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = together("whole", [0, 1])
    original = StackStep.update

    def spoil(self: StackStep, inputs: Tensor, targets: Tensor) -> Tensor:
        losses = original(self, inputs, targets)
        if self.last == 3:  # in the fourth step
            losses[0] = float("nan")
        return losses

    monkeypatch.setattr(StackStep, "update", spoil)
    (bad, good), (lost, fine) = together("spoilt", [0, 1])
    assert (lost["status"], lost["stop_reason"]) == ("diverged", "training loss not finite at step 4")
    assert fine["status"] == "completed" and rows(good) == rows(whole[1])
    assert max(row["step"] for row in rows(bad)) == 6 and not (bad.checkpoints / "final.safetensors").exists()


def test_the_learning_rate_of_one_member_alone_is_lowered(small: Setting) -> None:
    runs = [small.plan(f"seed_init={seed}", f"seed_data={seed}", "schedule=linear") for seed in range(2)]

    def trained(*seeds: int) -> list[dict[str, Tensor]]:
        models = [build_model(runs[seed].cfg) for seed in seeds]
        step = build_step([runs[seed].cfg for seed in seeds], models, runs[0].corpus)
        for number in range(1, 9):
            if number == 5 and 1 in seeds:
                step.scale_lr(seeds.index(1), 0.25)
            step.run(number)
        return [model.state_dict() for model in models]

    for alone, member in zip([*trained(0), *trained(1)], trained(0, 1), strict=True):
        for name, weight in alone.items():
            assert closeness(member[name], weight) < 1e-4, name


# ---- on a GPU: compiled blocks and one graph a step


CUDA = ("trainer.device=cuda", "trainer.eval_every=4", "trainer.log_every=1")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("arm", ARMS[:2], ids=lambda arm: " ".join(arm))
def test_graph_and_compiler_change_nothing_but_rounding(
    small: Setting, arm: tuple[str, ...], dtype: str, tolerance: float
) -> None:
    common = (*CUDA, *OPTIONS, *arm, f"trainer.dtype={dtype}")
    plain, _ = small.run(*common, "trainer.compile=false", "trainer.cuda_graph=false", f"out={small.out}/plain")
    fast, summary = small.run(*common, f"out={small.out}/fast")
    assert summary["environment"]["compile"] and summary["environment"]["cuda_graph"]
    for ours, theirs in zip(rows(fast), rows(plain), strict=True):
        for key in ("loss", "train_loss", "val_loss", "lr_mamba"):
            if theirs.get(key) is not None:
                assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (theirs["step"], key)
        if "grad_norm" in theirs:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ARMS[:2], ids=lambda arm: " ".join(arm))
def test_members_on_a_gpu_are_their_single_runs(
    small: Setting, together: Callable[..., Any], arm: tuple[str, ...]
) -> None:
    options = (*CUDA, "trainer.dtype=float32", *arm)
    folders, _ = together("all", [0, 1, 2], *options)
    for seed, folder in enumerate(folders):
        alone, _ = small.run(f"seed_init={seed}", f"seed_data={seed}", f"out={small.out}/alone", *options)
        for ours, theirs in zip(rows(folder), rows(alone), strict=True):
            for key in ("loss", "val_loss"):
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=5e-3), (seed, theirs["step"], key)


@pytest.mark.gpu
def test_an_interrupted_graph_goes_on(
    small: Setting, together: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        *CUDA,
        "trainer.dtype=float32",
        "model.dropout=0.1",
        "trainer.max_steps=20",
        "trainer.checkpoint_every=8",
    )
    (whole,), _ = together("whole", [0], *options)
    original = StackStep.run

    def interrupt(self: StackStep, step: int) -> None:
        original(self, step)
        if step == 11:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(StackStep, "run", interrupt)
        with pytest.raises(Interrupted):
            together("parts", [0], *options)
    (parts,), _ = together("parts", [0], *options)
    for ours, theirs in zip(rows(parts), rows(whole), strict=True):
        for key in ("loss", "val_loss"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=2e-2), (theirs["step"], key)
