"""Which device, precision and kernels ``auto`` means on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hybrid.config import ConfigError
from hybrid.kernels import (
    BackendError,
    conv_backend,
    ddlerp_backend,
    mamba2_backend,
    norm_backend,
    resolve_backend,
    serving_backend,
    state_fits,
    values_fit,
)
from hybrid.schema import Config

FULL = 32768  # tokens of a micro-batch with which a GPU is busy
DEFAULT_THREADS = torch.get_num_threads()  # before any run of this process has set another number


def resolve_device(cfg: Config) -> None:
    """Replace ``auto`` in ``trainer.device``, ``trainer.dtype`` and ``kernels`` by what it is here.

    The record then says what was used, and the run's identity differs where that does. Raises ``ConfigError`` for a
    CUDA device or a kernel that is not there.
    """
    trainer = cfg.trainer
    if trainer.device == "auto":
        trainer.device = "cuda" if torch.cuda.is_available() else "cpu"
    if trainer.device.startswith("cuda"):
        index = int(trainer.device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ConfigError(
                f"trainer.device={trainer.device}: this machine has {found} CUDA devices; use cpu or auto"
            )
    if trainer.dtype == "auto":
        trainer.dtype = "bfloat16" if trainer.device.startswith("cuda") else "float32"
    cuda = trainer.device.startswith("cuda")
    if trainer.cuda_graph and not cuda:
        raise ConfigError(f"trainer.cuda_graph=true needs a CUDA device, not {trainer.device}")
    trainer.compile = cuda if trainer.compile is None else trainer.compile
    trainer.cuda_graph = cuda if trainer.cuda_graph is None else trainer.cuda_graph
    if trainer.seeds_together is None:  # a step of more tokens fills a GPU by itself
        tokens = trainer.batch_size * cfg.data.seq_len
        trainer.seeds_together = max(1, min(8, FULL // tokens)) if trainer.cuda_graph else 1
    if trainer.cpu_threads is None:
        trainer.cpu_threads = DEFAULT_THREADS
    for op in ("wkv6", "ssd"):
        try:
            backend = resolve_backend(op, getattr(cfg.kernels, op), trainer.device.partition(":")[0])
        except BackendError as error:
            raise ConfigError(f"kernels.{op}: {error}") from error
        setattr(cfg.kernels, op, backend)


def serving_kernels(cfg: Config) -> dict[str, str]:
    """What serves each operator of a configuration that ``resolve_device`` has seen, in training."""
    kernels, device_type, steps = cfg.kernels, cfg.trainer.device.partition(":")[0], cfg.data.seq_len
    d, rwkv, mamba = cfg.model.d_model, cfg.model.rwkv, cfg.model.mamba
    outputs = max(round(d * rwkv.expand_k), round(d * rwkv.expand_v), rwkv.decay_low_rank)
    dtype = getattr(torch, cfg.trainer.dtype)
    values = round(d * rwkv.expand_v) // rwkv.num_heads
    of_heads, width = (mamba.head_dim, mamba.state_size), mamba.expand * d // mamba.n_groups

    def recurrence(op: str, asked: str, fits: bool) -> str:
        # Kernels that cannot hold a head are an error where they are called, if they ever are.
        return serving_backend(op, asked, device_type, steps, fits) if fits or "+" in asked else asked

    return {
        "wkv6": recurrence("wkv6", kernels.wkv6, values_fit(values)),
        "ssd": recurrence("ssd", kernels.ssd, state_fits(*of_heads)),
        "conv": conv_backend(kernels.ssd, device_type, mamba.conv_kernel),
        "ddlerp": ddlerp_backend(kernels.wkv6, device_type, d, rwkv.shift_low_rank, outputs, dtype),
        "wkv6_norm": norm_backend("wkv6", kernels.wkv6, device_type, values),
        "ssd_norm": norm_backend("ssd", kernels.ssd, device_type, width),
        "mamba2": mamba2_backend(kernels.ssd, device_type, steps, mamba.conv_kernel, *of_heads, width),
    }


def gpu_id(device: torch.device) -> str:
    """The UUID by which NVML and nvidia-smi know a CUDA device."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that first waits for what the device has been given to do."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
