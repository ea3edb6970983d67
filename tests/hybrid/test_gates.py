"""The gates on rows made by hand, at and around every threshold, and on models with something wrong."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hybrid import build_model
from hybrid.gates.training import fall_of
from hybrid.gates.watching import ALL, GateWatcher
from hybrid.model import HybridLM
from hybrid.probe import Probe
from tests.hybrid.configs import config, stirred
from tests.hybrid.configs import small as small_config
from tests.hybrid.gate_rows import ENVIRONMENT, branch, fill, probe_row, told, verdict
from tests.hybrid.trainers import CPU

pytestmark = pytest.mark.usefixtures("one_thread")


def train_rows(
    losses: list[float], norms: list[float] | float = 1.0, ratio: float = 1.0, every: int = 10
) -> list[dict]:
    norms = norms if isinstance(norms, list) else [norms] * len(losses)
    return [
        {"kind": "train", "step": every * (i + 1), "loss": loss, "grad_norm": norm, "grad_ratio": ratio}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]


FALLING = [4.5 - 0.02 * i for i in range(20)]


def served(device: str = "cpu", **kernels: str | None) -> dict[str, Any]:
    return {"device": device, "kernels": ENVIRONMENT["kernels"] | kernels}


# A new gate gets its rows here: (gate, rows, verdict, overrides).
CASES: list[tuple[str, list[dict[str, Any]], str, tuple[str, ...]]] = [
    ("G1", [probe_row()], "pass", ()),
    ("G1", [probe_row(finite=False, entropy=None, entropy_normalised=None)], "fail", ()),
    ("G1", [probe_row(shape_ok=False)], "fail", ()),
    ("G1", [probe_row(step=100, finite=False)], "n/a", ()),  # at the start only
    *(("G2", [probe_row(entropy=value)], found, ("gates.G2.reading=specified",)) for value, found in (
        (2.0, "pass"), (5.0, "pass"), (3.5, "pass"), (1.99, "warn"), (5.01, "warn"), (1.0, "warn"), (8.0, "warn"),
        (0.99, "fail"), (8.01, "fail"), (None, "fail"),
    )),
    *(("G2", [probe_row(entropy_normalised=value)], found, ()) for value, found in (
        (0.9, "pass"), (1.01, "pass"), (0.89, "warn"), (0.7, "warn"), (0.69, "fail"), (1.02, "fail"),
    )),
    ("G2", [probe_row(entropy=None, entropy_normalised=None)], "fail", ()),
    ("G2", [probe_row(entropy=0.0, entropy_normalised=None)], "n/a", ()),  # one symbol: nothing to be unsure of
    ("G2", [probe_row(), probe_row(step=10, entropy_normalised=0.3)], "pass", ()),  # at step 0 only
    *(("G3", train_rows(FALLING, norm), found, ()) for norm, found in (
        (0.5, "pass"), (1.5, "pass"), (0.49, "warn"), (1.51, "warn"), (3.0, "warn"), (4.0, "warn"), (5.0, "warn"),
        (5.01, "fail"),
    )),
    ("G3", train_rows(FALLING, [1.0] * 11 + [900.0] * 9), "pass", ()),  # the median
    ("G3", train_rows(FALLING[::-1]), "fail", ()),
    ("G3", train_rows([4.5] * 20), "warn", ()),
    ("G3", train_rows(FALLING[:5]), "n/a", ()),
    ("G3", train_rows(FALLING[:6]), "pass", ()),
    ("G3", train_rows([*FALLING, math.nan]), "fail", ()),
    ("G3", train_rows([*FALLING, None]), "fail", ()),  # as a record has it
    ("G3", train_rows([*FALLING, *[9.0] * 200], every=50), "pass", ()),  # after step 1,000 it no longer looks
    *(("G3.5", [probe_row(mamba=branch(novelty=value))], found, ()) for value, found in (
        # calibrated cosine sqrt(1 - novelty^2): 0.9499, 0.9501, 0.98995, 0.99010
        (0.3126, "pass"), (0.3119, "warn"), (0.1415, "warn"), (0.1403, "fail"), (0.0, "fail"), (7.0, "pass"),
    )),
    *(("G3.5", [probe_row(rwkv=branch(cosine=value))], found, ("gates.G3_5.reading=specified",)) for value, found in (
        (-0.9, "pass"), (0.949, "pass"), (0.95, "warn"), (0.99, "warn"), (0.991, "fail"), (1.0, "fail"),
    )),
    *(("G3.5", [probe_row(rwkv=branch(top5_share=value))], found, ()) for value, found in (
        (0.501, "pass"), (0.5, "warn"), (0.3, "warn"), (0.299, "fail"), (1.0, "pass"),
    )),
    *(("G3.5", [probe_row(mamba=branch(saturated=value))], found, ()) for value, found in (
        (0.099, "pass"), (0.1, "warn"), (0.3, "warn"), (0.301, "fail"), (1.0, "fail"),
    )),
    # RWKV-6 normalises what it reads from its state.
    ("G3.5", [probe_row(rwkv=branch(saturated=0.9))], "warn", ()),
    ("G3.5", [probe_row(rwkv=branch(saturated=0.9))], "fail", ("gates.G3_5.reading=specified",)),
    *(("G3.5", [probe_row(closed=value)], found, ()) for value, found in (
        (0.09, "pass"), (0.1, "warn"), (0.31, "fail"),
    )),
    ("G3.5", [probe_row(finite=False)], "fail", ()),
    # Slow decay: frozen by the specification, renewed by the calibrated reading.
    ("G3.5", [probe_row(mamba=branch(cosine=0.9999))], "pass", ()),
    ("G3.5", [probe_row(mamba=branch(cosine=0.9999))], "fail", ("gates.G3_5.reading=specified",)),
    # A branch without variance: by design at the start, dead after the warm-up or once it was alive.
    ("G3.5", [probe_row(rwkv=branch(variance=0.0))], "pass", ()),
    ("G3.5", [probe_row(100, rwkv=branch(variance=0.0))], "pass", ("schedule.warmup_steps=5",)),
    ("G3.5", [probe_row(101, rwkv=branch(variance=0.0))], "fail", ("schedule.warmup_steps=5",)),
    ("G3.5", [probe_row(300, rwkv=branch(variance=0.0))], "pass", ("schedule.warmup_steps=300",)),
    ("G3.5", [probe_row(301, rwkv=branch(variance=0.0))], "fail", ("schedule.warmup_steps=300",)),
    ("G3.5", [probe_row(), probe_row(3, rwkv=branch(variance=9e-7))], "fail", ("schedule.warmup_steps=5",)),
    ("G3.5", [probe_row(600, rwkv=branch(variance=1e-6))], "pass", ()),
    *(("G4", train_rows(FALLING, ratio=value), found, ()) for value, found in (
        (0.3, "pass"), (3.0, "pass"), (0.29, "warn"), (0.1, "warn"), (3.1, "warn"), (10.0, "warn"), (0.099, "fail"),
        (10.1, "fail"), (math.nan, "fail"),
    )),
    ("G4", train_rows(FALLING[:9], ratio=0.01), "n/a", ()),  # before step 100
    ("G4", [*train_rows(FALLING[:8], ratio=0.01), *train_rows(FALLING)[8:15]], "warn", ()),  # 0.208 at step 100 ...
    ("G4", [*train_rows(FALLING[:8], ratio=9.0), *train_rows(FALLING)[8:]], "pass", ()),  # ... and 1 at step 200
    # A branch that is waking up: a warning in the first 100 steps and in the warm-up, a failure after them.
    ("G4", train_rows(FALLING[:10], ratio=0.01), "warn", ()),
    ("G4", train_rows(FALLING, ratio=0.01), "fail", ()),
    ("G4", train_rows(FALLING, ratio=0.01), "warn", ("schedule.warmup_steps=200",)),
    ("G4", train_rows(FALLING, ratio=0.01), "fail", ("schedule.warmup_steps=199",)),  # one logged step, at 200
    # Of the steps after the warm-up alone: 0.2 over five of them, where ten would have 0.1005.
    ("G4", [*train_rows(FALLING, ratio=0.001)[:15], *train_rows(FALLING, ratio=0.2)[15:]], "warn",
     ("schedule.warmup_steps=150", "gates.G4.grad_ratio.warns=[0.15,10]")),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{CASES[i][2]}-{i}")
def test_verdicts(case: int) -> None:
    gate, rows, expected, overrides = CASES[case]
    found = told(rows, *overrides).summary()["gates"][gate]
    assert found["verdict"] == expected, found
    assert isinstance(found["reading"], str) and "\n" not in found["reading"]


def test_every_gate_has_all_its_cases() -> None:
    for gate in ALL:
        expected = {"pass", "fail"} | ({"warn"} if gate.name != "G1" else set())
        if gate.name != "G0":  # below
            assert expected <= {found for name, _, found, _ in CASES if name == gate.name}, gate.name


@pytest.mark.parametrize(
    ("environment", "overrides", "expected"),
    [
        (served(), (), "pass"),
        (served("NVIDIA H100", wkv6="triton+fla", ssd="triton", conv="triton"), (), "pass"),
        (served("NVIDIA H100", wkv6="triton+fla", ssd="triton", conv="torch"), (), "warn"),
        (served("NVIDIA H100", wkv6="triton", ssd="torch"), (), "warn"),
        (served("NVIDIA H100", wkv6="triton", ssd="torch"), ("model=rwkv6",), "pass"),  # which has no ssd
        (served(wkv6=None), (), "fail"),
        (served(ssd="auto"), (), "fail"),
        (served("NVIDIA H100", wkv6="fla", conv="triton", ssd="triton"), ("kernels.wkv6=triton+fla",), "pass"),
        (served("NVIDIA H100"), ("kernels.wkv6=triton+fla",), "fail"),
        (served("NVIDIA H100"), ("kernels.wkv6=triton",), "fail"),  # another serves than was asked for
        (served("NVIDIA H100", wkv6=None), ("model=mamba2",), "warn"),
        (served(), ("model=transformer",), "n/a"),
    ],
)
def test_kernels(environment: dict[str, Any], overrides: tuple[str, ...], expected: str) -> None:
    assert verdict("G0", [], *overrides, environment=environment) == expected


@pytest.mark.parametrize(
    ("model", "gates"),
    [("model=rwkv6", {"G4"}), ("model=mamba_mamba", {"G4"}), ("model=transformer", {"G0", "G3.5", "G4"}),
     ("model=sequential_balanced", set()), ("model=hybrid_5m", set())],
)  # fmt: skip
def test_what_does_not_apply_is_no_pass(model: str, gates: set[str]) -> None:
    training = train_rows(FALLING)
    for row in training if "G4" in gates else ():
        del row["grad_ratio"]  # such a model's rows have none
    found = told([probe_row(), *training], model).summary()["gates"]
    assert {name for name, record in found.items() if record["verdict"] == "n/a"} == gates
    assert all(found[name]["worst"] == "n/a" for name in gates)


# ---- thresholds that mean something


def probed(model: HybridLM, vocab: int, tokens: int = 600, seq_len: int = 64) -> dict[str, Any]:
    val = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint16)
    return Probe(model, SimpleNamespace(val=val, seq_len=seq_len), CPU, torch.float32)(0)


def test_specified_entropy_cannot_pass_with_ten_thousand_symbols_and_the_normalised_does() -> None:
    row = probed(build_model(small_config("model.vocab_size=10000")), 10_000)
    assert row["entropy"] == pytest.approx(math.log(10_000), abs=0.05)  # 9.21, and no distribution has more
    found = told([row]).summary()["gates"]["G2"]
    assert (found["verdict"], found["specified"]["verdict"]) == ("pass", "fail")
    assert verdict("G2", [row], "gates.G2.reading=specified") == "fail"
    few = probed(build_model(small_config("model.vocab_size=97")), 97)
    assert verdict("G2", [few], "gates.G2.reading=specified") == verdict("G2", [few]) == "pass"


@pytest.mark.parametrize("init", ["official", "fla"])
def test_fresh_models_states_pass_calibrated_and_fail_as_specified(init: str) -> None:
    row = probed(build_model(config("model=hybrid_5m", "blocks=p4", "model.vocab_size=80", f"init={init}")), 80)
    found = told([row]).summary()["gates"]["G3.5"]
    assert found["verdict"] == "pass", found["reading"]
    assert found["specified"]["verdict"] == "fail" and found["cosine"] > 0.99 and found["novelty"] > 0.65


def test_specified_reading_beside_the_calibrated_one_is_of_the_specifications_three() -> None:
    for row, expected in (
        (probe_row(5, closed=0.9, rwkv=branch(variance=0.0)), "pass"),
        (probe_row(5, rwkv=branch(saturated=0.5)), "fail"),
        (probe_row(5, rwkv=branch(cosine=0.96)), "warn"),
        (probe_row(5, mamba=branch(top5_share=0.1)), "fail"),
    ):
        assert told([row]).summary()["gates"]["G3.5"]["specified"]["verdict"] == expected


def test_balance_in_the_warm_up_is_information_and_its_worst_is_kept() -> None:
    """Ratios as in a healthy run: 0.05 at step 100, 0.2 from 200 on."""
    rows = [*train_rows(FALLING, ratio=0.05)[:10], *train_rows(FALLING * 2, ratio=0.2)[10:]]
    watcher = GateWatcher(config("schedule.warmup_steps=100", "gates.on_fail.G4=stop"))
    watcher.begin(ENVIRONMENT)
    actions, said = [], []
    for row in rows:
        actions.append(watcher.see(row))
        said += [line for line in watcher.news() if "G4" in line]
        if row["step"] == 100:
            found = watcher.summary()["gates"]["G4"]
            assert found["verdict"] == found["worst"] == "warn"
            assert found["reading"] == (
                "RWKV/Mamba 0.050 over 10 logged steps to 100; warm-up: warns at most until step 100"
            )
    assert actions == [None] * len(rows) and said == []
    found = watcher.summary()["gates"]["G4"]
    assert (found["verdict"], found["worst"], found["worst_step"]) == ("warn", "warn", 100)
    assert found["reading"] == "RWKV/Mamba 0.200 over 10 logged steps to 400"
    assert found["specified"] == {
        "verdict": "warn", "value": pytest.approx(0.2), "worst": "fail", "worst_step": 100,
    }  # fmt: skip


def test_trend_is_not_flipped_by_noise() -> None:
    generator = np.random.default_rng(0)
    noise = lambda scale: scale * generator.standard_normal(100)  # noqa: E731
    flat = [verdict("G3", train_rows(list(3 + noise(0.1)))) for _ in range(100)]
    assert flat.count("warn") >= 97  # neither falling nor rising, but for a chance of 3 in 1,000 each way
    slope = np.linspace(0, 0.3, 100)  # 0.2 nats from the first third to the last, with a noise of 0.1 each
    assert {verdict("G3", train_rows(list(3 - slope + noise(0.1)))) for _ in range(20)} == {"pass"}
    assert {verdict("G3", train_rows(list(3 + slope + noise(0.1)))) for _ in range(20)} == {"fail"}
    spikes = 4 - np.linspace(0, 1, 100)
    spikes[[3, 50, 97, 98]] += 30
    assert verdict("G3", train_rows(list(spikes))) == "pass"


def test_fall_and_its_error_by_hand() -> None:
    fall, error = fall_of([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])  # thirds 9, 8 and 5, 4: 8.5 - 4.5
    assert (fall, error) == (4.0, 0.0)  # a steady fall has no noise
    _, error = fall_of([1.0, -1.0] * 3)  # every second difference is 2; thirds of two
    assert error == pytest.approx(2 / (0.6745 * 1.5**0.5) * (math.pi / 2) ** 0.5)


def test_first_steps_say_how_far_they_are() -> None:
    watcher = told(train_rows(FALLING[:6]), "schedule.warmup_steps=2000")
    found = watcher.summary()["gates"]["G3"]
    assert "60 of 1,000 steps; warm-up until step 2,000" in found["reading"] and not found["final"]
    for overrides, expected in (((), False), (("gates.G3.steps=200",), True), (("trainer.max_steps=200",), True),
                                (("gates.G3.steps=205",), True), (("gates.G3.steps=210",), False)):  # fmt: skip
        assert told(train_rows(FALLING), *overrides).summary()["gates"]["G3"]["final"] is expected, overrides


# ---- models with something wrong are caught


@torch.no_grad()
def large_state(model: HybridLM) -> None:
    branch = model.blocks[1].mamba
    branch.in_proj.weight.mul_(30)


def freeze_rwkv(model: HybridLM) -> None:
    fill(model.blocks[1].rwkv.k_proj.linear.weight, 0.0)
    fill(model.blocks[1].rwkv.w_proj.linear.lora[2].bias, -40.0)  # decay exp(-exp(-40)) = 1


def freeze_one_mamba_head(model: HybridLM) -> None:
    with torch.no_grad():
        model.blocks[0].mamba.dt_bias[2] = -30.0  # dt = 1e-13


def shut_gate(model: HybridLM) -> None:
    fill(model.blocks[0].fusion.gate.bias, 20.0)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (freeze_rwkv, "calibrated cosine 1.000 (layer 2 rwkv)"),
        (freeze_one_mamba_head, "calibrated cosine 1.000 (layer 1 mamba)"),
        (lambda model: fill(model.blocks[1].rwkv.o_proj.weight, 0.0), "dead: layer 2 rwkv"),
        (lambda model: fill(model.blocks[0].mamba.out_proj.weight, 0.0), "dead: layer 1 mamba"),
        (shut_gate, "closed gates 100% (layer 1)"),
        (large_state, "(layer 2 mamba)"),
    ],
)
def test_damage_is_caught(damage: Any, words: str) -> None:
    model = stirred("fusion=gated")
    healthy = probed(model, 23)
    watcher = told([healthy], "fusion=gated")
    before = watcher.summary()["gates"]["G3.5"]
    assert before["verdict"] in ("pass", "warn"), before["reading"]
    damage(model)
    watcher.see(probed(model, 23) | {"step": 10})
    after = watcher.summary()["gates"]["G3.5"]
    assert after["verdict"] == "fail" and words in after["reading"], after["reading"]
