"""Measures one task in this process."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from hybrid import build_model
from hybrid.bench.configure import configuration, settle
from hybrid.bench.document import cpu_name
from hybrid.bench.floor import necessary_bytes
from hybrid.bench.task import Row, Task
from hybrid.device import clock_of, gpu_id, serving_kernels
from hybrid.memory import process_peak, reset_process_peak
from hybrid.monitor import ask_smi, read_once
from hybrid.schema import Config
from hybrid.sizes import count_params
from hybrid.training.step import TABLE, PlainStep, StackStep, build_step

FEW = 3  # steps that tell how many fit into a repeat


def measure(task: Task, begun: float) -> Row:
    """The row of a task; ``begun`` is when its process was started, in seconds since the epoch."""
    if task.kind == "device":
        return {"group": task.group, "name": task.name, "status": "ok", **device_facts()}
    cfgs = [configuration([*task.overrides, f"seed_init={k}", f"seed_data={k}"]) for k in range(task.members)]
    corpus = settle(cfgs)
    trainer = cfgs[0].trainer
    device = torch.device(trainer.device)
    cuda = device.type == "cuda"
    start = time.time()
    caches = compiled_files() if cuda or trainer.compile else None
    begun += time.time() - start  # to look through them is the benchmark's time, not the start's
    if cuda:  # also where there is no limit: the row before, in the same process, may have had one
        whole = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if task.memory_limit is None else min(1.0, task.memory_limit / whole)
        torch.cuda.set_per_process_memory_fraction(share, device.index or 0)

    clock = clock_of(device)
    gc.collect()
    reset_process_peak()
    before = process_peak()
    models = [build_model(cfg).to(device) for cfg in cfgs]
    step = build_step(cfgs, models, corpus)
    row: Row = {"group": task.group, "name": task.name, "status": "ok", "unit": "ms a step"}
    row |= describe(cfgs[0], step, task.members)
    ready = time.time()
    step.run(1)
    clock()
    row["build_seconds"], row["first_step_seconds"] = ready - begun, time.time() - begun
    if cuda:  # what compiling took to try its kernels out is not the step's
        torch.cuda.reset_peak_memory_stats(device)
    done = 1
    while done < task.loss_steps:
        done += 1
        step.run(done)
        if done == 5:  # the CUDA graph is recorded
            clock()
            row["ready_seconds"] = time.time() - begun
    losses = step.losses()[0]
    tail = max(1, task.loss_steps // 10)
    row |= {"loss_steps": task.loss_steps, "loss": mean(losses[-tail:]), "losses": losses}
    if not all(map(math.isfinite, losses)):
        row |= {"status": "failed", "reason": "a loss is not finite"}
    gpu = gpu_id(device) if cuda else None
    row["gpu_before"] = read_once(gpu) if gpu else None

    def take(steps: int) -> float:
        nonlocal done
        start = clock()
        for _ in range(steps):
            done += 1
            step.run(done)
        seconds = clock() - start
        step.losses()  # outside of the clock: how often is the log's choice
        return seconds

    size = repeat_size(take(FEW) / FEW, task.seconds, isinstance(step, StackStep))
    times = [1000 * take(size) / size for _ in range(task.repeats)]
    row["gpu_after"] = read_once(gpu) if gpu else None
    row |= spread(times) | {"steps_per_repeat": size}
    row["tokens_per_second"] = 1000 * row["tokens_per_step"] / row["median"]
    if cuda:
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    else:
        row["peak_memory_bytes"] = max(0, process_peak() - before)  # above Python, torch and what ran before
        row["process_peak_bytes"] = process_peak()
    if caches is not None:
        new = compiled_files() - caches
        row["cache"] = "warm" if not new else "part" if caches else "cold"
    return row


def repeat_size(step_seconds: float, repeat_seconds: float, tables: bool) -> int:
    """Steps of one repeat. Of fast ones whole tables of batches, so that every repeat pays for sending as many."""
    size = max(FEW, math.ceil(repeat_seconds / step_seconds))
    return math.ceil(size / TABLE) * TABLE if tables and size > TABLE // 4 else size


def spread(times: list[float]) -> dict[str, Any]:
    """Median and quartiles of repeated measurements, and the measurements."""
    quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": statistics.median(times), "q1": quarters[0], "q3": quarters[2], "times": times}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def describe(cfg: Config, step: PlainStep | StackStep, members: int) -> dict[str, Any]:
    trainer = cfg.trainer
    options = ("device", "dtype", "compile", "cuda_graph", "batch_size", "grad_accum", "cpu_threads")
    return {
        "options": {key: getattr(trainer, key) for key in options} | {"seq_len": cfg.data.seq_len},
        "kernels": serving_kernels(cfg),
        "model": cfg.model.name,
        "step": type(step).__name__,
        "members": members,
        "params": count_params(cfg)["total"],
        "tokens_per_step": members * trainer.batch_size * trainer.grad_accum * cfg.data.seq_len,
        "necessary_bytes": necessary_bytes(cfg, members),
    }


def compiled_files() -> set[Path]:
    """The files in the caches of compiled kernels, without what Triton compiles to speak to the driver at all."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    roots = {Path(cache_dir()), triton}
    files = (path for root in roots if root.is_dir() for path in root.rglob("*") if path.is_file())
    return {path for path in files if not path.name.startswith("cuda_utils")}


def device_facts() -> dict[str, Any]:
    """What this machine computes on, and the bandwidth of copying on it."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    facts: dict[str, Any] = {"device": cpu_name(), "cuda": cuda, "copy_gb_per_s": copy_bandwidth(device) / 1e9}
    facts["bytecode"] = Path(importlib.util.cache_from_source(torch.__file__)).exists()
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        driver = ask_smi(gpu_id(device), ["driver_version"])
        facts |= {"device": properties.name, "gpu": gpu_id(device), "memory_bytes": properties.total_memory}
        facts |= {"driver": driver[0] if driver else None, "cuda_version": torch.version.cuda}
        facts["capability"] = f"{properties.major}.{properties.minor}"
    return facts


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of copying a large array, read and write counted: the median of 11."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 4 * 2 * source.numel() / statistics.median(times[1:])
