"""Influence of a replaced token, half-lives, and the branch that remembers in a model trained to remember."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hybrid import build_model
from hybrid.data import IGNORE, DataError
from hybrid.diagnostics.memory import Changes, draw_changes, lags_of, measure_half_lives, measure_influence
from hybrid.diagnostics.necessity import measure_necessity
from hybrid.diagnostics.substitutes import Fixed, substituted
from hybrid.diagnostics.windows import Windows
from hybrid.model import HybridLM
from hybrid.observed import recorded
from tests.hybrid.configs import VOCAB, small, stirred
from tests.hybrid.test_diagnose_necessity import windows_of

CPU = torch.device("cpu")


def influence(model: HybridLM, windows: Windows, number: int = 6) -> dict[str, list]:
    return measure_influence(model, draw_changes(windows, number), 4, CPU)[0]


def test_lags_are_powers_of_two_below_the_context():
    assert lags_of(64) == [1, 2, 4, 8, 16, 32]
    assert lags_of(65) == [1, 2, 4, 8, 16, 32, 64]
    assert lags_of(2) == [1]
    assert lags_of(1) == []


def test_changes_are_changes_and_leave_room_for_every_lag():
    windows = windows_of(5, length=24)
    changes = draw_changes(windows, 40)
    before = changes.tokens.gather(1, changes.positions[:, None]).squeeze(1)
    assert (changes.replacements != before).all()
    assert set(changes.replacements.tolist()) <= set(windows.tokens.flatten().tolist())
    assert changes.positions.max() == 24 - 16 - 1
    assert changes.positions.min() == 0
    assert torch.equal(draw_changes(windows, 40).replacements, changes.replacements)


def test_a_text_of_one_token_cannot_be_changed():
    same = torch.zeros(4, 8, dtype=torch.int64)
    with pytest.raises(DataError, match="one token only"):
        draw_changes(Windows(same, same, 4, CPU), 4)


@torch.no_grad()
def test_full_influence_is_the_divergence_of_the_two_predictions():
    model, windows = stirred("model.pattern=P*2", "fusion=gated"), windows_of(3, length=9)
    changes = Changes(windows.tokens[:1], torch.tensor([2]), (windows.tokens[:1, 2] + 1) % VOCAB)
    changed = changes.tokens.clone()
    changed[0, 2] = changes.replacements[0]
    p, q = (model(x)[0].double().softmax(-1) for x in (changes.tokens, changed))
    expected = [(p[2 + k] * (p[2 + k] / q[2 + k]).log()).sum().item() for k in (1, 2, 4)]
    twice = Changes(changes.tokens[[0, 0], :8], changes.positions[[0, 0]], changes.replacements[[0, 0]])
    curves, errors = measure_influence(model, twice, 4, CPU)
    assert errors["full"] == pytest.approx([0, 0, 0], abs=1e-12)
    assert curves["full"] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_branch_alone_is_the_model_whose_other_branch_is_pinned_by_hand():
    model, windows = stirred("model.pattern=P*2", "fusion=gated"), windows_of(2, length=8)
    text = windows.tokens[:1]
    changed = text.clone()
    changed[0, 3] = (text[0, 3] + 1) % VOCAB
    with recorded(model) as recording:
        before = model(text)[0].double().log_softmax(-1)
    for i, block in enumerate(model.blocks):

        def pin(_, __, result, reference=recording.outputs[i, "mamba"]):
            return torch.cat((result[0][:, :4], reference[:, 4:]), dim=1), None

        block.mamba.register_forward_hook(pin)
    after = model(changed)[0].double().log_softmax(-1)
    for block in model.blocks:
        block.mamba._forward_hooks.clear()
    expected = [F.kl_div(after[3 + k], before[3 + k], log_target=True, reduction="sum").item() for k in (1, 2, 4)]
    twice = Changes(text.repeat(2, 1), torch.tensor([3, 3]), changed[:, 3].repeat(2))
    curves, _ = measure_influence(model, twice, 4, CPU)
    assert curves["rwkv"] == pytest.approx(expected, rel=1e-4)
    assert curves["rwkv"] != pytest.approx(curves["full"], rel=0.01)


def test_nothing_goes_through_a_dead_or_a_constant_branch():
    windows = windows_of(4, length=16)
    model = stirred("model.pattern=P*2", "fusion=gated")
    for block in model.blocks:
        block.rwkv.o_proj.weight.data.zero_()
    curves = influence(model, windows)
    assert set(curves) == {"lags", "full", "rwkv", "mamba"}
    assert max(curves["rwkv"]) == 0
    assert curves["mamba"] == curves["full"]
    assert min(curves["mamba"][:3]) > 1e-4
    model = stirred("model.pattern=P*2", "fusion=gated")
    constant = Fixed(torch.linspace(-1, 1, 16).expand(4, 16, 16))
    with substituted(model, {(layer, "mamba"): constant for layer in (0, 1)}):
        curves = influence(model, windows, 4)
    assert max(curves["mamba"]) == 0
    assert curves["rwkv"] == curves["full"]


def test_cross_attention_carries_by_itself():
    model, windows = stirred("model.pattern=P", "fusion=cross_attention"), windows_of(4, length=16)
    curves = influence(model, windows)
    assert min(curves["fusion"][:3]) > 1e-6
    for block in model.blocks:
        block.fusion.out.weight.data.zero_()
    curves = influence(model, windows)
    assert max(curves["fusion"]) == 0
    assert curves["rwkv"][0] > 1e-6


def test_errors_are_over_the_changes():
    model, windows = stirred("model.pattern=M", "fusion=gain"), windows_of(4, length=8)
    changes = draw_changes(windows, 5)
    curves, errors = measure_influence(model, changes, 2, CPU)
    alone = [
        measure_influence(model, Changes(*(x[[i, i]] for x in vars(changes).values())), 2, CPU)[0]["full"][0]
        for i in range(5)
    ]
    assert curves["mamba"] == curves["full"]
    assert curves["full"][0] == pytest.approx(sum(alone) / 5)
    assert errors["full"][0] == pytest.approx(torch.tensor(alone).std().item() / math.sqrt(5), rel=1e-4)


@pytest.mark.filterwarnings("error")
def test_a_context_of_one_token_has_no_lags():
    model, windows = stirred("model.pattern=P"), windows_of(4, length=1)
    curves, errors = measure_influence(model, draw_changes(windows, 5), 2, CPU)
    assert curves == errors == {"lags": [], "full": [], "rwkv": [], "mamba": []}


def fix_rwkv_decay(model: HybridLM, half_life: float) -> None:
    """w = -exp(bias), whatever comes in."""
    for block in model.blocks:
        decay = block.rwkv.w_proj.linear.lora
        for parameter, value in ((decay[2].weight, 0.0), (decay[2].bias, math.log(math.log(2) / half_life))):
            parameter.data.fill_(value)
            parameter.requires_grad_(False)


def test_half_lives_of_known_decays():
    model, windows = stirred("model.pattern=P*2", "fusion=gated"), windows_of(4)
    fix_rwkv_decay(model, 10.0)
    for block in model.blocks:
        mamba = block.mamba
        mamba.in_proj.weight.data[-mamba.num_heads :] = 0
        mamba.dt_bias.data.fill_(math.log(math.expm1(0.1)))  # dt = 0.1
        mamba.A_log.data.fill_(math.log(math.log(2) / (0.1 * 5)))
        mamba.A_log.data[1] = -math.inf  # A = 0: nothing is forgotten
    lives = measure_half_lives(model, windows)
    heads = {"rwkv": model.blocks[0].rwkv.num_heads, "mamba": model.blocks[0].mamba.num_heads}
    for branch, known in (("rwkv", 10.0), ("mamba", 5.0)):
        for layer in (0, 1):
            own = [e for e in lives if (e["layer"], e["branch"]) == (layer, branch)]
            assert [e["head"] for e in own] == list(range(heads[branch]))
            for e in own:
                expected = math.inf if branch == "mamba" and e["head"] == 1 else known
                assert [e["p10"], e["p50"], e["p90"]] == pytest.approx([expected] * 3, rel=1e-4)
    assert all(branch.observer is None for block in model.blocks for branch in (block.rwkv, block.mamba))


def test_half_lives_are_of_their_own_head_and_channel():
    model, windows = stirred("model.pattern=R", "fusion=gain"), windows_of(4)
    fix_rwkv_decay(model, 10.0)
    rwkv = model.blocks[0].rwkv
    channels = rwkv.head_k_dim  # 2 in each of 4 heads: half of them last 10 tokens, half of them 40
    rwkv.w_proj.linear.lora[2].bias.data[channels : 2 * channels : 2] -= math.log(4)
    by_head = {e["head"]: (e["p10"], e["p50"], e["p90"]) for e in measure_half_lives(model, windows)}
    assert by_head[0] == pytest.approx((10, 10, 10), rel=1e-4)
    assert by_head[1] == pytest.approx((10, 10, 40), rel=1e-4)


KEYS, FILLERS, QUERY = 4, 4, 8


def recall(count: int, seed: int) -> Windows:
    """A key, seven fillers, the question which key it was: eight tokens back, with nothing in between that tells."""
    random = torch.Generator().manual_seed(seed)
    key = torch.randint(KEYS, (count, 1), generator=random)
    fillers = torch.randint(KEYS, KEYS + FILLERS, (count, 7), generator=random)
    text = torch.cat((key, fillers, torch.full((count, 1), QUERY)), dim=1)
    targets = torch.full_like(text, IGNORE)
    targets[:, -1] = key[:, 0]
    return Windows(text, targets, 64, CPU)


def forget_at_once(model: HybridLM, branch: str) -> None:
    """Take a branch's recurrence away for good; what is left reaches back three positions at most.

    RWKV-6: the state holds the last step and its token shift the one before. Mamba-2: the convolution's three.
    """
    if branch == "rwkv":
        fix_rwkv_decay(model, 0.004)
    else:
        for block in model.blocks:
            block.mamba.A_log.data.fill_(20.0)
            block.mamba.A_log.requires_grad_(False)


@pytest.mark.parametrize(("forgetful", "remembering"), [("rwkv", "mamba"), ("mamba", "rwkv")])
@pytest.mark.parametrize("fusion", ["gated", "gain"])
def test_the_branch_that_solves_the_task_is_named(forgetful, remembering, fusion):
    model = build_model(small("model.pattern=P", f"fusion={fusion}"))
    forget_at_once(model, forgetful)
    model.embedding.weight.data *= 20  # learns it in a quarter of the steps
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    for step in range(300):
        batch = recall(32, seed=1000 + step)
        loss = F.cross_entropy(model(batch.tokens)[:, -1], batch.targets[:, -1])
        if loss < 0.005:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert loss < 0.05, "the task is not solved, so there is nothing to find"
    windows = recall(256, seed=0)
    with torch.no_grad(), recorded(model) as recording:
        model(windows.tokens)
    means = {place: out.flatten(0, 1).mean(dim=0) for place, out in recording.outputs.items()}

    needs = {(e["branch"], e["intervention"]): e for e in measure_necessity(model, windows, means) if e["layer"] == 0}
    for intervention in ("zero", "shuffle"):
        needed, other = needs[remembering, intervention], needs[forgetful, intervention]
        assert needed["loss_increase"] > 1.0  # guessing costs ln 4 = 1.39
        assert needed["loss_increase"] > 10 * needed["standard_error"]
        assert needed["loss_increase"] > 3 * other["loss_increase"]
    # A wrong text in the forgetful branch misleads nobody.
    assert abs(needs[forgetful, "shuffle"]["loss_increase"]) < 0.1

    curves = influence(model, windows, 64)
    assert curves["lags"][-1] == 8
    assert curves[remembering][-1] > 1.0
    assert curves[forgetful][-1] < 1e-12
    lives = {b: [e["p90"] for e in measure_half_lives(model, windows) if e["branch"] == b] for b in ("rwkv", "mamba")}
    assert max(lives[forgetful]) < 0.2
    assert max(lives[remembering]) > 2


def test_recall_has_no_short_cut():
    windows = recall(2000, seed=0)
    assert windows.predicted == 2000
    for position in range(1, 8):
        key, filler = windows.tokens[:, 0], windows.tokens[:, position]
        together = torch.zeros(KEYS, FILLERS).index_put_((key, filler - KEYS), torch.ones(2000), accumulate=True)
        assert (together / 2000 - 1 / 16).abs().max() < 0.02
