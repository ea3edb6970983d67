"""The monitor against a stand-in for NVML: only the hardware is made up."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from hybrid.monitor import READINGS, GpuMonitor, read_once

UUID = "GPU-12345678"


class FakeNvml(ModuleType):
    """A GPU that gets one percent busier and one watt hotter at every look, and does not tell its memory clock."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.looks = 0
        self.open = 0
        self.lost = False  # the GPU has fallen off the bus

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index != 0:
            raise self.NVMLError("Invalid Argument")
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        if self.lost:
            raise self.NVMLError("GPU is lost")
        self.looks += 1
        return SimpleNamespace(gpu=self.looks)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=2**30)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 40

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 100_000 + 1000 * self.looks  # milliwatts

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        if clock == self.NVML_CLOCK_MEM:
            raise self.NVMLError("Not Supported")
        return 1980


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def samples(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("gpu", [0, UUID])
def test_samples_and_summary(gpu: int | str, nvml: FakeNvml, tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    before = time.time()
    with GpuMonitor(paths, gpu, interval=0.005) as monitor:
        wait(lambda: nvml.looks >= 3)
    found = samples(paths[0])
    n = len(found)
    assert n >= 3
    assert paths[0].read_text() == paths[1].read_text()
    assert all(set(sample) == {"time", *READINGS} for sample in found)
    assert before - 1 <= found[0]["time"] <= found[-1]["time"] <= time.time() + 1
    assert [sample["utilisation_percent"] for sample in found] == list(range(1, n + 1))
    assert [sample["power_w"] for sample in found] == [100 + i for i in range(1, n + 1)]
    assert monitor.summary() == {
        "samples": n,
        "interval_seconds": 0.005,
        "utilisation_percent": {"mean": (n + 1) / 2, "max": n},  # 1, 2, ..., n
        "memory_bytes": {"mean": 2**30, "max": 2**30},
        "temperature_c": {"mean": 40, "max": 40},
        "power_w": {"mean": 100 + (n + 1) / 2, "max": 100 + n},
        "sm_clock_mhz": {"mean": 1980, "max": 1980},
        "memory_clock_mhz": None,
    }
    assert monitor.problem is None
    assert nvml.open == 0, "NVML is left as it was"


def test_the_thread_ends_with_the_run_and_the_shortest_run_has_a_sample(nvml: FakeNvml, tmp_path: Path) -> None:
    with GpuMonitor([tmp_path / "gpu.jsonl"], interval=1000) as monitor:
        thread = monitor._thread
        assert thread is not None and thread.daemon
    assert not thread.is_alive()
    assert len(samples(tmp_path / "gpu.jsonl")) == monitor.summary()["samples"] == 1


def test_a_resumed_run_counts_in_what_was_before_even_after_a_cut_line(nvml: FakeNvml, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    path.write_text('{"time": 1, "utilisation_percent": 91, "power_w": null}\n{"time": 2, "utilis\n')
    with GpuMonitor([path], interval=1000, resumed=True) as monitor:
        pass
    assert monitor.summary()["samples"] == 2
    assert monitor.summary()["utilisation_percent"] == {"mean": 46, "max": 91}  # 91 and 1
    assert monitor.summary()["power_w"] == {"mean": 101, "max": 101}
    assert len(path.read_text().splitlines()) == 3


def test_a_new_run_starts_its_file_anew(nvml: FakeNvml, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    path.write_text('{"time": 1, "utilisation_percent": 91}\n')
    with GpuMonitor([path], interval=1000) as monitor:
        pass
    assert monitor.summary()["samples"] == len(samples(path)) == 1


def test_without_the_library_there_is_nothing_and_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuMonitor([tmp_path / "gpu.jsonl"]) as monitor:
        pass
    assert monitor.summary() is None
    assert monitor.problem == "nvidia-ml-py is not installed"
    assert not (tmp_path / "gpu.jsonl").exists()


@pytest.mark.parametrize("gpu", [3, "GPU-other"])
def test_an_unknown_gpu_is_no_samples_and_the_reason(gpu: int | str, nvml: FakeNvml, tmp_path: Path) -> None:
    with GpuMonitor([tmp_path / "gpu.jsonl"], gpu) as monitor:
        pass
    assert monitor.summary() is None
    assert str(gpu) in monitor.problem
    assert nvml.open == 0


def test_a_gpu_that_is_lost_does_not_end_the_training(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.lost = True
    with GpuMonitor([tmp_path / "gpu.jsonl"], interval=1000) as monitor:
        pass
    assert monitor.summary()["utilisation_percent"] is None
    assert samples(tmp_path / "gpu.jsonl")[0]["utilisation_percent"] is None


def test_samples_that_cannot_be_written_are_still_counted_and_it_is_said(nvml: FakeNvml, tmp_path: Path) -> None:
    with GpuMonitor([tmp_path / "missing" / "gpu.jsonl"], interval=1000) as monitor:
        pass
    assert monitor.summary()["samples"] == 1
    assert "samples are not written" in monitor.summary()["problem"]


def test_one_look_goes_to_nvidia_smi_where_the_library_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho \"$@\" > $0.asked\necho '1980, 2619, 41, 123.50, [N/A], 512'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert read_once(UUID) == {
        "sm_clock_mhz": 1980, "memory_clock_mhz": 2619, "temperature_c": 41, "power_w": 123.5,
        "utilisation_percent": None, "memory_bytes": 512 * 2**20,
    }  # fmt: skip
    assert f"--id={UUID}" in (tmp_path / "nvidia-smi.asked").read_text()
    program.write_text("#!/bin/sh\nexit 9\n")
    assert read_once(UUID) is None


def test_importing_the_monitor_imports_no_torch() -> None:
    code = "import sys, hybrid.monitor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
