"""``python -m hybrid.gates``: the table, what is made smaller for it, exit codes and mistakes."""

from __future__ import annotations

import json

import pytest

from hybrid.gates.__main__ import main
from hybrid.model import HybridLM
from tests.runs import Answer, Setting, strict_json

pytestmark = pytest.mark.usefixtures("one_thread")


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Answer:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out, err = capsys.readouterr()
    return Answer(int(stop.value.code or 0), out, err)


# The text is at least 64 tokens long on either side, and the trial has time for 12 steps only.
QUICK = ("--seconds", "0.1")


def test_command_prints_the_table(small: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, *QUICK, *small.with_())
    assert answer.err == "" and answer.code == 0, answer.out
    for word in ("G0", "kernels", "G1", "forward pass", "G2", "initial entropy", "G3 ", "first steps", "G3.5",
                 "state health", "G4", "component balance", "pass / warn / fail", "0.3-3 / 0.1-10 / else"):  # fmt: skip
        assert word in answer.out, word
    assert "trained for 12 of 12 steps at batch 4 x 32\n" in answer.out
    assert not small.out.exists()  # nothing is written


def test_command_shrinks_scales_and_says_so(small: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(
        capsys, *QUICK, "--json", *small.with_("data.seq_len=128", "trainer.batch_size=16", "trainer.grad_accum=3",
                                              "trainer.max_steps=4000", "schedule.warmup_steps=500"),
    )  # fmt: skip
    found = strict_json(answer.out)
    assert (found["steps"], found["of_steps"]) == (12, 1000)
    assert found["remarks"][0] == "trained for 12 of 1,000 steps at batch 8 x 64 instead of 48 x 128"
    assert found["remarks"][1] == "too few steps for G3 and G4, which are first read at step 50"
    assert any("warm-up: 6)" in remark for remark in found["remarks"])  # 500 * 12 / 1000
    assert found["gates"]["G3"]["verdict"] == found["gates"]["G4"]["verdict"] == "n/a"
    assert found["gates"]["G2"]["thresholds"] == "0.9-1.01 / 0.7-1.01 / else of ln V"


def test_command_takes_all_steps_where_there_is_time(small: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    options = small.with_("trainer.max_steps=50", "optim.lr=0.01", "gates.G4.every=50")
    found = strict_json(command(capsys, "--seconds", "300", "--json", *options).out)
    assert (found["steps"], found["of_steps"]) == (50, 50)
    assert found["gates"]["G3"]["loss_change"] < -0.5 and found["gates"]["G4"]["value"] is not None


def test_command_says_1_where_a_gate_fails(small: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    options = small.with_("gates.G2.normalised.passes=[0.1,0.2]", "gates.G2.normalised.warns=[0.1,0.2]")
    answer = command(capsys, *QUICK, "--json", *options)
    assert answer.code == 1 and strict_json(answer.out)["gates"]["G2"]["verdict"] == "fail"


def test_command_reports_a_missing_kernel_as_gate_0(small: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "--json", *small.with_("kernels.wkv6=fla"))
    found = json.loads(answer.out)
    assert answer.code == 1 and found["gates"]["G0"]["verdict"] == "fail" and found["steps"] == 0
    assert "kernels.wkv6: the fla kernels need a CUDA device" in found["gates"]["G0"]["reading"]
    assert {gate["verdict"] for name, gate in found["gates"].items() if name != "G0"} == {"n/a"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["modle=tiny"], "modle"),
        (["model=tinny"], "model=tinny: no such choice; did you mean tiny?"),
        (["model=3"], "model=3: no such choice"),
        (["trainer.max_steps=0"], "trainer.max_steps must be at least 1, got 0"),
        (["gates=off"], "gates.enabled=false leaves nothing to check"),
        (["sweep=smoke"], "sweep=smoke consists of several runs"),
        (["--seconds", "-1"], "a number above 0 is needed, got '-1'"),
        (["tiny"], "'tiny' is no key=value"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["data=text", "data.path=/nowhere"], "/nowhere"),
    ],
)
def test_command_answers_mistakes_in_a_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    answer = command(capsys, *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1 and words in answer.err


def test_a_forward_pass_that_raises_fails_gate_1(
    small: Setting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mismatch(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore")

    monkeypatch.setattr(HybridLM, "forward", mismatch)
    answer = command(capsys, "--json", *small.with_())
    found = json.loads(answer.out)["gates"]
    assert answer.code == 1 and found["G1"]["verdict"] == "fail" and found["G0"]["verdict"] == "pass"
    assert found["G1"]["reading"] == "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
