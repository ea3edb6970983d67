"""How far one step of the optimiser moves each part of a trained model, relative to its weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hybrid.data import Corpus
from hybrid.model import HybridLM, copied
from hybrid.schema import Config
from hybrid.training.optimizer import GradientNorms, build_optimizer, group_of, set_lr

BATCHES = 20  # AdamW's second moments remember about 1 / (1 - 0.95) batches


def measure_updates(
    model: HybridLM, cfg: Config, corpus: Corpus, device: torch.device, tokens: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """|update| / |weights| of each learning-rate group for one AdamW step at the run's peak learning rates.

    A checkpoint has no optimiser state, so the moments are built up anew: the run's own optimiser sees batches that
    its training did not reach, with a learning rate of 0 that leaves the weights as they are, and only the last step
    counts. Clipping, weight decay and dropout are the run's. At most about ``tokens`` tokens are used: fewer batches
    than ``BATCHES``, and smaller ones, where the run's are large. The second dictionary says what it came to.
    """
    rows = cfg.trainer.batch_size * cfg.trainer.grad_accum
    batches = max(4, min(BATCHES, tokens // (rows * corpus.seq_len)))
    rows = min(rows, max(2, tokens // (batches * corpus.seq_len)))
    model = copied(model).train()
    optimizer, gradients = build_optimizer(model, cfg.optim), GradientNorms(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(cfg.seed_init)  # of dropout
        for number in range(batches):
            batch = corpus.train_batch(cfg.seed_data, cfg.trainer.max_steps + number, rows)
            inputs, targets = (torch.from_numpy(x).to(device) for x in batch)
            size = cfg.trainer.batch_size
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten(), reduction="sum")
                (loss / targets.numel()).backward()
            gradients.clip(cfg.optim.grad_clip)
            set_lr(optimizer, float(number == batches - 1))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    squares: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        pair = squares.setdefault(group_of(name), [0.0, 0.0])
        pair[0] += (parameter.detach() - before[name]).double().square().sum().item()
        pair[1] += before[name].double().square().sum().item()
    ratios = {group: (moved / weights) ** 0.5 for group, (moved, weights) in squares.items() if weights}
    return ratios, {"batches": batches, "tokens_per_batch": rows * corpus.seq_len}
