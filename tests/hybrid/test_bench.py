"""The benchmark suite: arguments, records, comparison, and tiny measurements on the CPU. Nothing here judges a time."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.bench import document, floor, gpu, matrix, memory, process
from hybrid.bench.__main__ import main, quoted
from hybrid.bench.configure import configuration
from hybrid.bench.task import Runner, Task
from hybrid.sizes import count_params
from tests.hybrid.configs import config
from tests.runs import ROOT, SMALL, strict_json

TINY = [o for o in SMALL if not o.startswith(("data=", "trainer.", "optim.", "schedule.", "data.seq_len"))]


def row(name: str, times: list[float], **more: Any) -> dict[str, Any]:
    low, middle, high = sorted(times)
    return {"group": "g", "name": name, "status": "ok", "unit": "ms", "median": middle, "q1": low, "q3": high} | more


def record(*rows: dict[str, Any], device: str = "cpu", command: str = "matrix") -> dict[str, Any]:
    return {"schema": document.SCHEMA, "command": command, "device": {"device": device}, "rows": list(rows)}


def verdicts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["verdict"] for entry in document.compare(old, new)}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_compare_finds_a_regression_and_not_noise() -> None:
    old = record(
        row("slower", [99, 100, 101]), row("noise", [95, 100, 105]), row("faster", [99, 100, 101]),
        row("steady", [100, 100, 100]), row("gone", [99, 100, 101]), row("not asked", [1, 1, 1]),
        {"group": "g", "name": "never", "status": "failed", "reason": "x"},
    )  # fmt: skip
    new = record(
        row("slower", [104, 105, 106]),  # 5 more; spreads 2 + 2
        row("noise", [105, 110, 115]),  # 10 more; spreads 10 + 10
        row("faster", [89, 90, 91]),
        row("steady", [100.9, 100.9, 100.9]),  # beyond the spreads, but below 1%
        {"group": "g", "name": "gone", "status": "failed", "reason": "out of memory"},
        row("never", [1, 1, 1]), row("new", [1, 1, 1]),
    )  # fmt: skip
    assert verdicts(old, new) == {
        "slower": "slower", "noise": "same", "faster": "faster", "steady": "same", "gone": "gone",
    }  # fmt: skip
    bad = [entry["name"] for entry in document.regressions(document.compare(old, new))]
    assert bad == ["slower", "gone"]
    assert document.regressions(document.compare(old, old)) == []


def test_rows_of_another_group_are_not_compared() -> None:
    assert document.compare(record(row("a", [1, 1, 1])), record(row("a", [9, 9, 9], group="h"))) == []


@pytest.mark.parametrize(("change", "code"), [(1.0, 0), (1.2, 1), (0.8, 0)])
def test_comparing_two_files(change: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(record(row("a", [9.9, 10, 10.1]))))
    new.write_text(json.dumps(record(row("a", [9.9 * change, 10 * change, 10.1 * change]))))
    assert run("compare", str(old), str(new)) == code
    assert {1.0: "same", 1.2: "slower", 0.8: "faster"}[change] in capsys.readouterr().out


BAD = {
    "no command": ([], "command"),
    "unknown command": (["gpus"], "gpus"),
    "unknown option": (["cpu", "--speed"], "--speed"),
    "shape": (["gpu", "--shapes", "64x64,64"], "BATCHxLENGTH"),
    "zero": (["gpu", "--shapes", "0x64"], "BATCHxLENGTH"),
    "rows": (["gpu", "--rows", "eager,lazy"], "'lazy' is none of"),
    "steps": (["matrix", "--steps", "0"], "at least 1"),
    "budget": (["memory", "--budget-gb", "nan"], "above 0"),
    "model": (["memory", "--models", "gpt"], "'gpt' is none of"),
    "override": (["matrix", "fast"], "no key=value"),
    "choice": (["matrix", "model=tinny"], "did you mean tiny?"),
    "key": (["matrix", "trainer.batch_sise=3"], "trainer.batch_size"),
    "value": (["matrix", "optim.lr=-1"], "optim.lr"),
    "null for a choice": (["matrix", "fusion=null"], "fusion=null: no such choice"),
    "value that the rows cannot have": (["matrix", "schedule.min_lr=1e-5"], "no effect with schedule=constant"),
    "key of the rows": (["matrix", "trainer.batch_size=4"], "trainer.batch_size is set by hybrid.bench matrix itself"),
    "key of an option": (["gpu", "++data.seq_len=4"], "(see --shapes)"),
    "seed": (["memory", "seed_init=4"], "seed_init is set"),
    "steps of the loop": (["cpu", "--quick", "schedule.warmup_steps=15"], "must be below trainer.max_steps=12"),
    "data": (["matrix", "--data", "/no/such/text"], "/no/such/text"),
    "old record": (["matrix", "--compare", "/no/such/record"], "/no/such/record"),
    "cold": (["matrix", "--cold", "--in-process"], "--in-process"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = BAD[case]
    out = ["--out", str(tmp_path / "out")] if len(arguments) > 1 else []
    assert run(*arguments, *out) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert words in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read"),
        ("[]", "no benchmark record"),
        (json.dumps({"schema": "groundthink.run/1", "rows": []}), "no benchmark record"),
        (json.dumps({"schema": document.SCHEMA, "rows": [{"group": "g"}]}), "no benchmark record"),
        (json.dumps(record() | {"device": None}), "no benchmark record"),
        (json.dumps(record() | {"command": None}), "no benchmark record"),
        (json.dumps(record(row("a", [1, 2, 3], q3=None))), "no benchmark record"),
        (json.dumps(record(row("a", [1, 2, 3], median="2"))), "no benchmark record"),
        (json.dumps(record(command="gpu")), "of the command gpu, not matrix"),
    ],
)
def test_what_is_no_record_is_not_compared(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text(text)
    assert run("matrix", "--compare", str(tmp_path / "old.json"), "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err


def test_any_path_can_be_the_text(tmp_path: Path) -> None:
    for name in ("it's", 'a "b"', "${c}", "d\\", "e=[1, 2]", "\\'"):
        path = tmp_path / name / "text.txt"
        path.parent.mkdir()
        path.write_text("to be or not to be " * 200)
        cfg = configuration(["model=tiny", "data=text", f"data.path={quoted(path)}", "data.seq_len=8"])
        assert cfg.data.path == str(path)


def test_records_of_two_devices_do_not_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(record(device="NVIDIA H100")))
    new.write_text(json.dumps(record()))
    assert run("compare", str(old), str(new)) == 2
    assert "NVIDIA H100" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom hybrid.bench.__main__ import main\n"
        "try: main(['gpu', '--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'hydra', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--shapes" in done.stdout


def test_a_matrix_on_the_cpu(shared: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = next(o for o in shared if o.startswith("data.path=")).partition("=")[2]
    cache = next(o for o in shared if o.startswith("data.cache_dir="))
    arguments = ["matrix", "--quick", "--steps", "10", "--in-process", "--data", text, "--out", str(tmp_path), cache]
    assert run(*arguments, *TINY) == 0
    (path,) = tmp_path.glob("matrix-*.json")
    found = strict_json(path.read_text())
    assert found["schema"] == "groundthink.bench/1" and found["command"] == "matrix"
    assert {"device", "cpu", "versions", "code", "targets", "notes", "arguments", "started", "seconds"} <= found.keys()
    assert found["versions"]["torch"] and found["device"]["copy_gb_per_s"] > 0
    assert found["device"]["bytecode"] == Path(importlib.util.cache_from_source(torch.__file__)).exists()
    rows = {one["name"]: one for one in found["rows"]}
    measured = {"baseline", "batch 16", "bfloat16"}
    assert {name for name, one in rows.items() if one["status"] == "ok"} == measured
    assert rows["graph"]["reason"] == rows["compile"]["reason"] == rows["all"]["reason"] == "CUDA only"
    for name in measured:
        one = rows[name]
        assert one["q1"] <= one["median"] <= one["q3"] and len(one["times"]) == 5
        assert one["tokens_per_second"] == pytest.approx(1000 * one["tokens_per_step"] / one["median"])
        assert one["factor"] == pytest.approx(one["tokens_per_second"] / rows["baseline"]["tokens_per_second"])
        assert len(one["losses"]) == 10 and one["loss"] == one["losses"][-1]  # a tenth of 10 steps
        assert one["deviation"] == pytest.approx(one["loss"] - rows["baseline"]["loss"])
    assert rows["batch 16"]["tokens_per_step"] == 2 * rows["baseline"]["tokens_per_step"] == 2 * 8 * 64
    # The same batches and weights in another precision: other losses, by little.
    assert 0 < abs(rows["bfloat16"]["losses"][0] - rows["baseline"]["losses"][0]) < 0.05
    assert next(tmp_path.glob("matrix-*.png")).read_bytes().startswith(b"\x89PNG")
    assert "baseline" in capsys.readouterr().out


def test_a_row_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Runner(isolated=False)(Task("g", "broken", ["model=tiny", "trainer.device=cuda:99"]))
    assert measured["status"] == "failed" and "cuda:99" in measured["reason"]
    kept = document.Document("gpu", {}, {"device": "cpu"}, tmp_path)
    kept.add(measured)
    kept.add(row("fine", [1, 2, 3]))
    assert [one["status"] for one in document.read(kept.path, "gpu")["rows"]] == ["failed", "ok"]


def test_a_record_never_takes_another_ones_place(tmp_path: Path) -> None:
    paths = [document.Document("cpu", {}, {"device": "cpu"}, tmp_path).path for _ in range(3)]
    assert len(set(paths)) == 3 and all(path.exists() for path in paths)


def test_a_row_in_its_own_process() -> None:
    runner = Runner(isolated=True)
    overrides = ["model=tiny", "data=text", f"data.path={__file__}", "data.seq_len=8", "trainer.device=cpu"]
    measured = runner(Task("g", "one", overrides, loss_steps=2, repeats=1, seconds=0.01))
    assert (measured["status"], measured["group"], measured["name"]) == ("ok", "g", "one"), measured
    assert 0 < measured["build_seconds"] < measured["first_step_seconds"]
    failed = runner(Task("g", "two", ["model=tiny", "data=text", "data.path=/nowhere"]))
    assert failed["status"] == "failed" and "/nowhere" in failed["reason"]


@pytest.mark.parametrize(
    ("overrides", "device"),
    [([], "cpu"), (["trainer.device=auto"], "cpu"), (["trainer.device=cpu", "trainer.device=cuda:1"], "cuda:1")],
)
def test_the_device_of_a_row(overrides: list[str], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert process.device_of(["model=tiny", *overrides]) == device


def test_a_row_that_hangs_in_its_own_process_is_one_failed_row() -> None:
    hung = Runner(isolated=True, timeout=0.05)(Task("g", "slow", []))
    assert hung["status"] == "failed" and "not done within 0.05 s" in hung["reason"]


def test_a_start_without_bytecode_is_named() -> None:
    assert "bytecode" in gpu.of_first_steps({"bytecode": False})
    assert "bytecode" not in gpu.of_first_steps({"bytecode": True})
    assert "bytecode" not in gpu.of_first_steps({})  # an older record


def test_relations_of_one_shape() -> None:
    def measured(name: str, ms: float, speed: float, loss: float, size: float = 1e9) -> dict[str, Any]:
        more = {"tokens_per_second": speed, "loss": loss, "necessary_bytes": size}
        return row(name, [ms, ms, ms], **more)

    rows = [
        measured(gpu.EAGER, 100, 1000, 3.0), measured(gpu.AUTO, 4, 25_000, 3.06), measured(gpu.SEEDS, 10, 80_000, 3.04),
        measured(gpu.CONTROL, 2, 50_000, 2.0), {"group": "g", "name": gpu.GRAPH, "status": "failed", "reason": "x"},
    ]  # fmt: skip
    gpu.relate(rows, bandwidth=2000.0)  # GB/s, so that 1 GB takes 0.5 ms
    eager, auto, seeds, control, failed = rows
    assert [one["factor_floor"] for one in rows[:4]] == [200, 8, 20, 4]
    assert (auto["factor_eager"], seeds["factor_eager"], auto["factor_transformer"]) == (25, 80, 0.5)
    assert seeds["cost_in_runs"] == 2.5
    assert (auto["deviates"], seeds["deviates"], eager["deviates"]) == (True, False, False)
    assert auto["deviation"] == pytest.approx(0.06)
    assert "factor_eager" not in control and "factor_floor" not in failed


def test_deviations_in_the_matrix() -> None:
    def measured(name: str, loss: float, tokens: int) -> dict[str, Any]:
        return row(name, [1, 1, 1], group=matrix.GROUP, loss=loss, tokens_per_step=tokens, tokens_per_second=tokens)

    rows = [measured("baseline", 2.0, 512), measured("batch 64", 1.5, 4096), measured("batch 16", 2.1, 1024)]
    rows += [measured("bfloat16", 1.94, 512), measured("compile", 2.04, 512)]
    matrix.relate(rows)
    assert [one["deviates"] for one in rows] == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("need", "parts", "fits"),
    [(5e9, 1, True), (11e9, 2, True), (40e9, 8, True), (1e12, 32, False)],
)
def test_the_fewest_micro_batches_within_a_budget(need: float, parts: int, fits: bool) -> None:
    """Memory that halves with every cut, on a device of 80 GB."""
    tried = []

    def attempt(cut: int, limit: int | None) -> dict[str, Any]:
        tried.append((cut, limit))
        bytes_ = need / cut
        if bytes_ > (limit or 80e9):
            return {"group": "g", "name": "m", "status": "failed", "reason": "OutOfMemoryError: CUDA out of memory"}
        return row("m", [1, 2, 3], peak_memory_bytes=bytes_) | {"times": [1, 2, 3]}

    found = memory.fit(attempt, 32, 6 * 10**9)
    assert (found["grad_accum"], found["fits"]) == (parts, fits)
    assert found["whole_bytes"] == (need if need <= 80e9 else None)
    assert found["status"] == ("ok" if fits else "failed")
    if fits:
        assert found["median"] == pytest.approx(need / parts / 2**30)
    assert all(limit == 6 * 10**9 for cut, limit in tried if cut > 1)


def test_another_error_is_not_answered_with_smaller_micro_batches() -> None:
    def attempt(cut: int, limit: int | None) -> dict[str, Any]:
        assert cut == 1
        return {"group": "g", "name": "m", "status": "failed", "reason": "RuntimeError: no kernel image"}

    assert memory.fit(attempt, 32, 6 * 10**9)["fits"] is False


def test_the_floor_of_a_transformer_counted_by_hand() -> None:
    """One block of width 16, FFN 64, 10 tokens ids, batch 2 x 3: numbers a token, all float32.

    Embedding and last norm 2 x 16, logits 10; block: q, k, v, attended, output 5 x 16, two norms and two sums 4 x 16,
    FFN before and after its GELU 2 x 64. Together 314, written and read.
    """
    cfg = config("model=transformer", "model.pattern=A", "model.d_model=16", "model.vocab_size=10", "data.seq_len=3",
                 "trainer.batch_size=2", "trainer.grad_accum=1", "trainer.dtype=float32")  # fmt: skip
    numbers = 2 * 16 + 10 + 5 * 16 + 4 * 16 + 2 * 64
    parameters = count_params(cfg)["total"]
    assert parameters == 10 * 16 + 4 * 16 * 16 + 2 * 16 * 64 + 3 * 16
    expected = 2 * (2 * 3) * numbers * 4 + parameters * (28 + 4 + 8)
    assert floor.necessary_bytes(cfg) == expected
    assert floor.necessary_bytes(cfg, members=8) == 8 * expected
    half = copy.deepcopy(cfg)
    half.trainer.dtype = "bfloat16"
    assert floor.necessary_bytes(half) == 2 * (2 * 3) * numbers * 2 + parameters * (28 + 4 + 6)


def test_the_floor_of_the_main_model_is_the_stated_size() -> None:
    cfg = config("model=hybrid_5m", "model.vocab_size=97", "data.seq_len=64", "trainer.batch_size=64",
                 "trainer.grad_accum=1", "trainer.dtype=bfloat16")  # fmt: skip
    assert 0.6e9 < floor.necessary_bytes(cfg) < 0.85e9
