"""The update of stacked leaves in a CUDA graph; what it computes is held to rounding in ``test_stacked_adamw.py``."""

from __future__ import annotations

import pytest
import torch

from hybrid import build_model
from hybrid.device import resolve_device
from hybrid.kernels.adamw import adamw_torch
from hybrid.schema import OptimConfig
from hybrid.training.stacked_adamw import StackedAdamW
from hybrid.training.step import StackStep
from tests.hybrid.stacked_update import check, problem
from tests.runs import Setting

pytestmark = pytest.mark.gpu
OPTIONS = (
    "trainer.device=cuda", "trainer.dtype=float32", "trainer.compile=false", "trainer.max_steps=20",
    "optim.weight_decay=0.5", "optim.grad_clip=0.3", "optim.mamba_lr_mult=2", "trainer.grad_accum=2",
)  # fmt: skip


@pytest.mark.parametrize("max_norm", [0.3, 0.0])
@pytest.mark.parametrize("members", [1, 3])
def test_a_recorded_update_is_pytorchs(members: int, max_norm: float) -> None:
    """20 steps, most of them replays of one graph, against PyTorch's own on every member alone."""
    cfg = OptimConfig(weight_decay=0.5, grad_clip=max_norm, eps=1e-3)
    given = problem(cfg, members, [1 << 20, 100_003, 4096, 300, 1], steps=20, device="cuda")
    leaves = given.leaves()
    optimizer = StackedAdamW(leaves, cfg, "triton")
    tables = [torch.stack([step[i] for step in given.gradients]) for i in range(len(leaves))]
    row = torch.zeros(1, dtype=torch.int64, device="cuda")

    def update() -> None:
        for leaf, table in zip(leaves, tables, strict=True):
            leaf.values.grad = table.index_select(0, row).squeeze(0)
        optimizer.step(given.lrs.index_select(0, row).squeeze(0))
        row.add_(1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles the kernels
            update()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        update()
    for _ in range(17):
        graph.replay()
    torch.cuda.synchronize()
    assert row.item() == 20
    check(given, leaves, optimizer)


def test_recorded_steps_are_those_of_the_torch_path(small: Setting) -> None:
    """20 steps of two members, one with a lower learning rate from the tenth on, which records no new graph."""
    losses, norms = [], []
    for graph in (True, False):
        runs = [
            small.plan(f"seed_init={seed}", f"seed_data={seed}", f"trainer.cuda_graph={graph}", *OPTIONS)
            for seed in range(2)
        ]
        for run in runs:
            resolve_device(run.cfg)
        models = [build_model(run.cfg).to("cuda") for run in runs]
        step = StackStep([run.cfg for run in runs], models, runs[0].corpus)
        assert step.optimizer.update is not adamw_torch
        if not graph:
            step.optimizer.update = adamw_torch
        for number in range(1, 21):
            recorded = step.graph
            if number == 10:
                step.scale_lr(1, 0.25)
            step.run(number)
            assert number < 10 or step.graph is recorded
        assert (step.graph is not None) == graph
        losses.append(step.losses())
        norms.append([step.norms_by_part(k)["grad_norm"] for k in range(2)])
    for ours, theirs in zip(*losses, strict=True):
        assert len(ours) == 20 and ours == pytest.approx(theirs, rel=5e-3)
    assert norms[0] == pytest.approx(norms[1], rel=5e-2)
