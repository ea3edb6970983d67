"""The profiler: regions of a made-up trace, computed by hand, and a real one on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid import profile
from hybrid.bench.regions import KERNELS, WHOLE, analyse, by_name


def span(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": args.pop("tid", 1), "args": args}


def shares(trace: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    return {r.name: (r.microseconds, r.launches) for r in analyse({"traceEvents": trace}).regions}


@pytest.mark.parametrize(
    ("kernel", "region"),
    [
        ("wkv6_forward_kernel", "rwkv recurrence"),
        ("wkv6_parts_kernel", "rwkv recurrence"),
        ("carry_kernel", "rwkv or ssd recurrence"),
        ("_conv_backward_kernel", "elementwise, reduction"),
        ("_ddlerp_linear_backward_kernel", "matmul"),
        ("_ddlerp_linear_mixed_kernel", "elementwise, reduction"),
        ("_gated_norm_backward_kernel", "elementwise, reduction"),
        ("chunk_rwkv6_bwd_kernel_dh", "rwkv recurrence"),
        ("ssd_backward_kernel", "ssd recurrence"),
        ("_chunk_scan_fwd_kernel", "ssd recurrence"),
        ("_forward_kernel", "rwkv or ssd recurrence"),
        ("triton_poi_fused__to_copy_embedding_mul_3", "elementwise, reduction"),
        ("triton_tem_fused_mm_1", "matmul"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matmul"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser, clipping"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("void at::native::cunn_SoftMaxForward", "embedding, loss"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "elementwise, reduction"),
        ("void at::native::reduce_kernel<512, 1>", "elementwise, reduction"),
        ("something_new", "other"),
    ],
)
def test_kernels_belong_to_regions_by_name(kernel: str, region: str) -> None:
    assert by_name(kernel, KERNELS) == region


def test_kernels_of_a_trace_with_gaps_and_overlap() -> None:
    trace = [
        span("user_annotation", WHOLE, 100, 100),
        span("cpu_op", "aten::mm", 100, 90),  # on the host: no time of the device
        span("kernel", "nvjet_gemm", 50, 10),  # before the steps
        span("kernel", "nvjet_gemm", 110, 20),
        span("kernel", "wkv6_forward_kernel", 120, 20, tid=2),  # overlaps by 10
        span("gpu_memcpy", "Memcpy HtoD", 160, 5),
        span("kernel", "wkv6_forward_kernel", 170, 10),
    ]
    found = analyse({"traceEvents": trace})
    assert (found.kind, found.wall) == ("kernels", 100)
    assert found.busy == 30 + 5 + 10  # 110 to 140, 160 to 165, 170 to 180
    assert found.gaps == 55
    assert shares(trace) == {"rwkv recurrence": (30, 2), "matmul": (20, 1), "copies": (5, 1)}


def test_operators_of_a_recurrence_and_of_its_backward_pass() -> None:
    trace = [
        span("user_annotation", WHOLE, 0, 1000),
        span("user_annotation", "rwkv recurrence", 10, 100),
        span("cpu_op", "aten::matmul", 20, 50, **{"Sequence number": 7}),
        span("cpu_op", "aten::bmm", 30, 30, **{"Sequence number": 7}),  # inside, so 20 are left of matmul
        span("cpu_op", "aten::mm", 200, 40, **{"Sequence number": 8}),
        span("cpu_op", "autograd::engine::evaluate_function: BmmBackward0", 300, 60, **{"Sequence number": 7}),
        span("cpu_op", "aten::bmm", 310, 45),
        span("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 400, 30, **{"Sequence number": 8}),
        span("cpu_op", "aten::mm", 405, 25),
        span("user_annotation", "Optimizer.step#AdamW.step", 500, 100),
        span("cpu_op", "aten::mul_", 510, 10),
        span("cpu_op", "aten::embedding", 700, 3, tid=2),
        span("cpu_op", "aten::mul", 1000, 9),  # after the steps
    ]
    assert shares(trace) == {
        "rwkv recurrence": (20 + 30 + 15 + 45, 4),
        "matmul": (40 + 25, 2),
        "optimiser, clipping": (10, 1),
        "embedding, loss": (3, 1),
        "other": (5, 1),  # of the engine around the second backward matmul
    }
    found = analyse({"traceEvents": trace})
    assert found.kind == "operators"
    assert found.gaps == pytest.approx(1000 - (110 + 65 + 10 + 3 + 5))


def test_a_trace_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no annotation"):
        analyse({"traceEvents": [span("cpu_op", "aten::mm", 0, 1)]})


def test_a_run_on_the_cpu(shared: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile.main([*shared, "trainer.cpu_threads=1", "--steps", "2", "--out", str(tmp_path / "p")])
    (table,) = [path for path in (tmp_path / "p").glob("*.json") if ".trace" not in path.name]
    record = json.loads(table.read_text())
    regions = {region["name"]: region for region in record["regions"]}
    assert record["schema"] == "groundthink.profile/1" and record["kind"] == "operators"
    wanted = {"rwkv recurrence", "ssd recurrence", "matmul", "elementwise, reduction", "optimiser, clipping"}
    assert wanted <= regions.keys()
    # One block, forward and backward: a matrix product has two in its backward pass, so there are many more than 10.
    assert all(regions[name]["launches"] > 10 for name in wanted)
    total = sum(region["ms"] for region in record["regions"])
    assert total == pytest.approx(record["busy_ms"])
    assert record["busy_ms"] + record["gaps_ms"] == pytest.approx(record["wall_ms"])
    (trace,) = (tmp_path / "p").glob("*.trace.json")
    assert json.loads(trace.read_text())["traceEvents"]
    shown = capsys.readouterr().out
    assert "rwkv recurrence" in shown and str(trace.name) in shown.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--steps", "many"], "--steps"),
        (["--members", "-1"], "--members must be at least 1"),
        (["nonsense"], "'nonsense' is no key=value"),
        (["model=tinny"], "did you mean tiny?"),
        (["trainer.batch_sise=3"], "trainer.batch_size"),
        (["trainer.device=cuda:7"], "cuda:7"),
        (["data=text", "data.path=/no/such/file"], "/no/such/file"),
        (["--wrong"], "--wrong"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        profile.main([*arguments, "--out", str(tmp_path / "p")])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert words in said.err


def test_the_recurrences_are_unmarked_afterwards() -> None:
    import hybrid.branches.mamba2
    import hybrid.branches.rwkv6
    from hybrid import kernels

    with pytest.raises(ZeroDivisionError), profile.marked():
        assert hybrid.branches.rwkv6.wkv6 is not kernels.wkv6
        raise ZeroDivisionError
    assert hybrid.branches.rwkv6.wkv6 is kernels.wkv6
    assert hybrid.branches.mamba2.ssd is kernels.ssd
