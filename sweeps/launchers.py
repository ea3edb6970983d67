"""The launchers of a sweep's jobs: processes on this machine, SLURM through submitit, a Ray cluster.

Each is a Hydra launcher with a file in ``conf/hydra/launcher``. Other jobs go on where one fails, and a stop asked for
reaches all of them. Hydra's own ``basic`` runs one job after another in this process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hybrid.config import ConfigError
from sweeps.child import Errand, OnCluster
from sweeps.slots import cores, make_slots, visible_gpus
from sweeps.stopping import StopRequest


class ParallelLauncher(Launcher):
    """What the launchers below share: where their files go, and what their jobs need to know.

    ``home`` is the sweep's folder and has to be set before ``launch``; ``restarts`` says how often a job whose process
    was killed is started again at once.
    """

    home = Path("outputs")
    restarts = 0

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def at_most(self, batch: Sequence[Sequence[str]]) -> int:
        """How many jobs like these run at the same time, were there enough of them."""
        return len(batch)

    @contextlib.contextmanager
    def errand(self) -> Iterator[tuple[Errand, Path]]:
        """What the jobs share, and a folder for what their processes print; an empty one is removed again."""
        setup_globals()
        folder = (self.home / "launcher" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}").absolute()
        folder.mkdir(parents=True)
        stop = folder / "stop"
        try:
            yield Errand(self.hydra_context, self.config, self.task_function, stop), folder
        finally:
            stop.unlink(missing_ok=True)
            for path in folder.glob("*"):
                if path.is_file() and path.stat().st_size == 0:
                    path.unlink()
            for empty in (folder, folder.parent):
                with contextlib.suppress(OSError):
                    empty.rmdir()

    def quiet(self, batch: Sequence[Sequence[str]]) -> list[list[str]]:
        """The batch with nothing printed by its jobs; their messages are in the runs' logs."""
        return [[*overrides, "display.progress=off"] for overrides in batch]

    def devices(self, batch: Sequence[Sequence[str]]) -> set[str]:
        """The values of ``trainer.device`` in the batch."""
        key = "trainer.device="
        default = str(OmegaConf.select(self.config, "trainer.device") or "auto")
        given = [[line.lstrip("+").removeprefix(key) for line in o if line.lstrip("+").startswith(key)] for o in batch]
        return {lines[-1] if lines else default for lines in given}


class JoblibLauncher(ParallelLauncher):
    """Several jobs at once in processes of this machine, on joblib's process pools."""

    def __init__(self, n_jobs: int | None = None, per_gpu: int = 1) -> None:
        self.n_jobs, self.per_gpu = n_jobs, per_gpu

    def setup(self, **context: Any) -> None:
        super().setup(**context)
        for key in ("n_jobs", "per_gpu"):
            value = getattr(self, key)
            if (value is None and key == "per_gpu") or (value is not None and (type(value) is not int or value < 1)):
                raise ConfigError(f"hydra.launcher.{key} must be a whole number from 1, got {value}")

    def at_most(self, batch: Sequence[Sequence[str]]) -> int:
        return len(self.slots(batch, many=True))

    def slots(self, batch: Sequence[Sequence[str]], many: bool = False) -> list[dict[str, str]]:
        """The environment variables of each process for this batch, or for ``many`` jobs like it. ``ConfigError``."""
        devices = self.devices(batch)
        gpus = visible_gpus(dict(os.environ)) if devices != {"cpu"} else []
        numbered = sorted(device for device in devices if ":" in device)
        if numbered:
            raise ConfigError(f"trainer.device={numbered[0]}: hydra/launcher=joblib gives out the GPUs; use cuda")
        return make_slots(self.n_jobs, self.per_gpu, gpus, cores(), 10**6 if many else len(batch), dict(os.environ))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from sweeps.pool import Pool  # imports joblib

        batch = self.quiet(job_overrides)
        with self.errand() as (errand, folder):
            return Pool(self.slots(batch), errand, folder).run(batch, initial_job_idx, self.restarts)


class SubmititLauncher(ParallelLauncher):
    """A job of the cluster for every job, through submitit."""

    cluster = ""
    # What submitit knows on every cluster; all other keys are the cluster's own (``slurm_partition``).
    SHARED = ("timeout_min", "mem_gb", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "name",
              "stderr_to_stdout")  # fmt: skip

    def __init__(self, max_num_timeout: int = 3, at_once: int | None = None, **params: Any) -> None:
        self.max_num_timeout, self.at_once, self.params = max_num_timeout, at_once, params

    def at_most(self, batch: Sequence[Sequence[str]]) -> int:
        return self.at_once or int(self.params.get("array_parallelism") or len(batch))

    def executor(self, folder: Path) -> Any:
        """Raises ``ConfigError`` where submitit or the cluster is not there, or does not know a key."""
        submitit = need("submitit")
        plain = {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in self.params.items()}
        named = {key if key in self.SHARED else f"{self.cluster}_{key}": v for key, v in plain.items() if v is not None}
        options = {f"{self.cluster}_max_num_timeout": self.max_num_timeout}
        try:
            executor = submitit.AutoExecutor(folder / "%j", cluster=self.cluster, **options)
            executor.update_parameters(**named)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ConfigError(f"hydra/launcher=submitit_{self.cluster}: {str(error).splitlines()[0]}") from error
        return executor

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        batch = self.quiet(job_overrides)
        with self.errand() as (errand, folder):
            executor, function = self.executor(folder), OnCluster(errand)
            numbers = list(range(initial_job_idx, initial_job_idx + len(batch)))
            at_once = self.at_once or len(batch)
            returns: list[JobReturn | None] = [None] * len(batch)
            jobs: dict[int, Any] = {}
            with StopRequest(errand.stop) as request:
                if at_once >= len(batch):
                    jobs = dict(enumerate(executor.map_array(function, numbers, batch)))  # one array, not many jobs
                while None in returns and not (request.asked and not jobs):
                    for i in range(len(batch)):
                        if returns[i] is None and i not in jobs and len(jobs) < at_once and not request.asked:
                            jobs[i] = executor.submit(function, numbers[i], batch[i])
                    for i, job in list(jobs.items()):
                        if job.done():
                            returns[i] = outcome(job.result, batch[i])
                            del jobs[i]
                    if request.asked and self.cluster != "local":  # sends SIGTERM; local jobs see the file
                        self.cancel(jobs)
                    if request.kill:
                        break
                    time.sleep(0.2 if self.cluster == "local" else 2)
            if request.asked:
                raise KeyboardInterrupt("stopped; the runs have written checkpoints")
            if all(ret.status == JobStatus.COMPLETED for ret in returns if ret is not None):
                shutil.rmtree(folder)  # the cluster's logs, which tell nothing that the runs' own do not
            return [ret for ret in returns if ret is not None]

    def cancel(self, jobs: dict[int, Any]) -> None:
        for job in jobs.values():
            job.cancel(check=False)
        jobs.clear()


class SlurmLauncher(SubmititLauncher):
    cluster = "slurm"


class LocalLauncher(SubmititLauncher):
    """Submitit's way with processes of this machine, to try what goes to a cluster."""

    cluster = "local"


class RayLauncher(ParallelLauncher):
    """Jobs as tasks of a Ray cluster, or of one that is started here."""

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self.init, self.remote = init, remote

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        ray = need("ray")
        batch = self.quiet(job_overrides)
        options = OmegaConf.to_container(self.remote, resolve=True)
        if options.get("num_gpus") is None:
            options["num_gpus"] = int(self.devices(batch) != {"cpu"} and bool(visible_gpus(dict(os.environ))))
        ours = not ray.is_initialized()
        if ours:
            given = OmegaConf.to_container(self.init, resolve=True)
            ray.init(**{key: value for key, value in given.items() if value is not None})
        try:
            with self.errand() as (errand, _):
                run = ray.remote(**options)(run_errand)
                shared = ray.put(errand)
                refs = [run.remote(shared, initial_job_idx + i, overrides) for i, overrides in enumerate(batch)]
                with StopRequest(errand.stop) as request:
                    left = refs
                    while left and not request.kill:
                        _, left = ray.wait(left, num_returns=len(left), timeout=0.5)
                if request.asked:
                    raise KeyboardInterrupt("stopped; the runs have written checkpoints")
                return [outcome(lambda ref=ref: ray.get(ref), o) for ref, o in zip(refs, batch, strict=True)]
        finally:
            if ours:
                ray.shutdown()


def run_errand(errand: Errand, index: int, overrides: list[str]) -> JobReturn:
    return errand(index, overrides)


def outcome(result: Callable[[], JobReturn], overrides: Sequence[str]) -> JobReturn:
    """What a job of a cluster returned; where it was lost, why."""
    try:
        return result()
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        lost = RuntimeError(f"lost by the cluster: {type(error).__name__}: {said[0]}")
        return JobReturn(list(overrides), status=JobStatus.FAILED, _return_value=lost)


def need(package: str) -> ModuleType:
    """The package of a launcher that is an extra. Raises ``ConfigError``."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"this launcher needs {package}: pip install -e '.[cluster]'") from error
