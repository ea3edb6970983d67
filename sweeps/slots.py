"""How a machine is divided between the processes of a sweep. Pure functions of what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def make_slots(
    n_jobs: int | None, per_gpu: int, gpus: list[str], cores: int, jobs: int, environment: dict[str, str]
) -> list[dict[str, str]]:
    """The environment variables of each process: its GPU, where there are any, and its share of the cores.

    ``n_jobs`` is the number of processes; where it is None, ``per_gpu`` for every GPU, without GPUs one per core.
    There are never more than ``jobs``. Processes take the GPUs in turn, so those that share one are spread evenly.
    A thread count that the person has set (in ``environment``) is an upper bound.
    """
    wanted = n_jobs or (len(gpus) * per_gpu if gpus else cores)
    count = max(1, min(wanted, jobs))
    slots = []
    for i in range(count):
        threads = max(1, cores // count + (i < cores % count))
        slot = {}
        for name in THREAD_VARIABLES:
            given = environment.get(name, "").split(",")[0]
            slot[name] = str(min(threads, int(given)) if given.isdigit() and int(given) else threads)
        if gpus:
            slot["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
        slots.append(slot)
    return slots


def visible_gpus(environment: dict[str, str]) -> list[str]:
    """The CUDA devices that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    import torch

    count = torch.cuda.device_count()
    if given is None:
        return [str(i) for i in range(count)]
    return [name.strip() for name in given.split(",") if name.strip()][:count]


def cores() -> int:
    """Cores that this process may use: the machine's, less what affinity or a container's quota leaves out."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, quota(Path("/sys/fs/cgroup/cpu.max")) or allowed))


def quota(file: Path) -> int | None:
    """Whole cores in a control group's ``cpu.max`` (``200000 100000`` is two), None where it sets no limit."""
    try:
        limit, period = file.read_text().split()
        return max(1, round(int(limit) / int(period)))
    except (OSError, ValueError):  # no such file, or "max 100000"
        return None
