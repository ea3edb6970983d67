"""What the GPU does while it works: utilisation, memory, temperature and power, through NVML. Imports no torch.

``nvidia-ml-py`` (module ``pynvml``) is optional: without it, or without an NVIDIA GPU, there are no samples and the
reason is in ``GpuMonitor.problem``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import subprocess
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

# Of one sample, with units. Memory is what all processes hold on the GPU, not this one's share.
READINGS = ("utilisation_percent", "memory_bytes", "temperature_c", "power_w", "sm_clock_mhz", "memory_clock_mhz")
SMI = {"sm_clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem", "temperature_c": "temperature.gpu",
       "power_w": "power.draw", "utilisation_percent": "utilization.gpu", "memory_bytes": "memory.used"}  # fmt: skip


class NoReading(RuntimeError):
    """The GPU cannot be asked; the message is one line."""


class Nvml:
    """One GPU through NVML. ``gpu`` is its index or its UUID (``GPU-...``), which holds whatever CUDA renumbers.

    Raises ``NoReading`` where the library, the driver or the GPU is not there.
    """

    def __init__(self, gpu: int | str = 0) -> None:
        try:
            self.library: ModuleType = importlib.import_module("pynvml")
        except ImportError as error:
            raise NoReading("nvidia-ml-py is not installed") from error
        nvml = self.library
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise NoReading(f"NVML does not start: {error}") from error
        try:
            by_uuid = isinstance(gpu, str)
            self.handle = nvml.nvmlDeviceGetHandleByUUID(gpu) if by_uuid else nvml.nvmlDeviceGetHandleByIndex(gpu)
        except nvml.NVMLError as error:
            self.close()
            raise NoReading(f"NVML does not know GPU {gpu}: {error}") from error

    def read(self) -> dict[str, float | None]:
        """``READINGS`` now; None for one that this GPU does not give."""
        nvml, handle = self.library, self.handle
        ask = {
            "utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        }
        found: dict[str, float | None] = dict.fromkeys(READINGS)
        for name in READINGS:
            with contextlib.suppress(nvml.NVMLError):
                found[name] = ask[name]()
        return found

    def close(self) -> None:
        with contextlib.suppress(self.library.NVMLError):
            self.library.nvmlShutdown()


class GpuMonitor:
    """Samples a GPU once every ``interval`` seconds in a thread, as a context manager around the training.

    Every sample is a line in each of ``paths`` (a ``gpu.jsonl`` in every run folder): ``time`` (seconds since the
    epoch) and ``READINGS``. ``resumed`` keeps what the files hold and counts it in; otherwise they start anew. Without
    a GPU that can be asked no file is made. Nothing here raises: what went wrong is in ``problem``.
    """

    def __init__(
        self, paths: list[Path], gpu: int | str = 0, interval: float = 1.0, resumed: bool = False
    ) -> None:  # fmt: skip
        self.paths, self.gpu, self.interval, self.resumed = paths, gpu, interval, resumed
        self.problem: str | None = None
        self._nvml: Nvml | None = None
        self._files: list[TextIO] = []
        self._count = 0
        self._seen = dict.fromkeys(READINGS, (0, 0.0, -math.inf))  # number, sum, largest
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GpuMonitor:
        try:
            self._nvml = Nvml(self.gpu)
        except NoReading as error:
            self.problem = str(error)
            return self
        try:
            if self.resumed:
                self._remember()
            self._files = [path.open("a" if self.resumed else "w", encoding="utf-8") for path in self.paths]
        except OSError as error:
            self.problem = f"samples are not written: {error}"
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._close_files()
        if self._nvml is not None:
            self._nvml.close()

    def summary(self) -> dict[str, Any] | None:
        """Number of samples, seconds between them, mean and largest value of each reading; None without samples."""
        if not self._count:
            return None
        found: dict[str, Any] = {"samples": self._count, "interval_seconds": self.interval}
        for name, (number, total, largest) in self._seen.items():
            found[name] = {"mean": total / number, "max": largest} if number else None
        if self.problem:
            found["problem"] = self.problem
        return found

    def _run(self) -> None:
        while True:  # a sample at once, so that the shortest run has one
            sample = {"time": round(time.time(), 3), **self._nvml.read()}
            self._count_in(sample)
            self._write(json.dumps(sample) + "\n")
            if self._stop.wait(self.interval):
                return

    def _count_in(self, sample: dict[str, Any]) -> None:
        for name in READINGS:
            value = sample.get(name)
            if value is not None:
                number, total, largest = self._seen[name]
                self._seen[name] = (number + 1, total + value, max(largest, value))
        self._count += 1

    def _write(self, line: str) -> None:
        try:
            for file in self._files:
                file.write(line)
                file.flush()  # for whoever watches the run, and in case the process dies
        except OSError as error:  # a full disk must not end the training
            self.problem = f"samples are no longer written: {error}"
            self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        self._files = []

    def _remember(self) -> None:
        """Count in the samples from before an interruption, which may have cut the last line."""
        if self.paths and self.paths[0].exists():
            for line in self.paths[0].read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    sample = json.loads(line)
                    if isinstance(sample, dict):
                        self._count_in(sample)


def read_once(gpu: int | str = 0) -> dict[str, float | None] | None:
    """``READINGS`` of a GPU now, by NVML or else by nvidia-smi; None where neither answers."""
    try:
        nvml = Nvml(gpu)
    except NoReading:
        return read_smi(gpu)
    try:
        return nvml.read()
    finally:
        nvml.close()


def read_smi(gpu: int | str = 0) -> dict[str, float | None] | None:
    """The same by nvidia-smi: a process each time, so nothing for every second."""
    answer = ask_smi(gpu, list(SMI.values()))
    if answer is None:
        return None
    found: dict[str, float | None] = dict.fromkeys(READINGS)
    for name, text in zip(SMI, answer, strict=True):
        with contextlib.suppress(ValueError):  # "[N/A]"
            found[name] = float(text) * (2**20 if name == "memory_bytes" else 1)
    return found


def ask_smi(gpu: int | str, fields: list[str]) -> list[str] | None:
    """What ``nvidia-smi --query-gpu`` answers for one GPU, in the order of ``fields``; None where it does not."""
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    answer = [text.strip() for text in done.stdout.strip().split(",")]
    return answer if len(answer) == len(fields) else None
