"""One long-lived process per slot, each with its share of the machine; a process that dies takes only its job along."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.backend.resource_tracker import ensure_running
from joblib.externals.loky.process_executor import BrokenProcessPool

from sweeps.child import Errand, ProcessDied, begin
from sweeps.stopping import StopRequest, deferred

POLL_SECONDS = 0.2  # how soon a second Ctrl-C acts


class Worker:
    """A process with its own environment variables, started with its first job and anew if it died.

    A pool of one process each: where a process of a larger pool dies, joblib's loky kills all the others with it.
    """

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.environment, self.log = environment, log
        self.executor: ProcessPoolExecutor | None = None

    def submit(self, errand: Errand, index: int, overrides: Sequence[str]) -> Future[JobReturn]:
        ensure_running()  # starts a process of its own, and lifts the mask below
        with deferred():
            try:
                return self._executor().submit(errand, index, overrides, os.getpid())
            except BrokenProcessPool:  # the process died while it had nothing to do
                self.close()
                return self._executor().submit(errand, index, overrides, os.getpid())

    def _executor(self) -> ProcessPoolExecutor:
        if self.executor is None:
            arguments = (os.getpid(), str(self.log))
            self.executor = ProcessPoolExecutor(1, env=self.environment, initializer=begin, initargs=arguments)
        return self.executor

    def close(self, kill: bool = False) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=True, kill_workers=kill)
            self.executor = None


class Pool:
    """Runs the jobs of one launch, each in one of the processes that ``slots`` gives their environment variables."""

    def __init__(self, slots: Sequence[dict[str, str]], errand: Errand, logs: Path) -> None:
        self.errand = errand
        self.workers = [Worker(slot, logs / f"process-{i}.txt") for i, slot in enumerate(slots)]
        self.request = StopRequest(errand.stop)

    def run(self, batch: Sequence[Sequence[str]], first: int, restarts: int = 0) -> list[JobReturn]:
        """One ``JobReturn`` per list of overrides, in order; Hydra numbers the jobs from ``first``.

        A job whose process dies is started again at once, at most ``restarts`` times. Without restarts it waits until
        the others have ended and goes on alone, so that a run that needs too much memory is told from one that was
        only beside it. What dies then as well returns ``ProcessDied``. Ctrl-C and SIGTERM ask the jobs to stop and
        raise ``KeyboardInterrupt`` once they have; a second Ctrl-C kills them.
        """
        self.batch, self.first = batch, first
        self.returns: dict[int, JobReturn] = {}
        stopped = False
        try:
            with self.request:
                died = self._some(list(range(len(batch))), self.workers, restarts)
                for job in died:
                    if (restarts or self._some([job], self.workers[:1], 0)) and not self.request.asked:
                        self._failed(job, ProcessDied())
                stopped = self.request.asked
        finally:
            for worker in self.workers:
                worker.close(kill=self.request.kill)
        if stopped:
            raise KeyboardInterrupt("stopped; the runs have written checkpoints")
        return [self.returns[i] for i in range(len(batch))]

    def _some(self, jobs: list[int], workers: list[Worker], restarts: int) -> list[int]:
        """Run these jobs and note what they return; the jobs whose processes died more than ``restarts`` times."""
        waiting, idle, died = deque(jobs), deque(workers), []
        deaths: Counter[int] = Counter()
        running: dict[Future[JobReturn], tuple[int, Worker]] = {}
        while running or (waiting and not self.request.asked):
            while waiting and idle and not self.request.asked:
                job, worker = waiting.popleft(), idle.popleft()
                running[worker.submit(self.errand, self.first + job, self.batch[job])] = job, worker
            ended, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            if self.request.kill:
                raise KeyboardInterrupt("killed; the same command goes on from the checkpoints before")
            for future in ended:
                job, worker = running.pop(future)
                idle.append(worker)
                try:
                    self.returns[job] = future.result()
                except BrokenProcessPool:
                    worker.close()
                    deaths[job] += 1
                    if deaths[job] <= restarts:
                        waiting.appendleft(job)
                    else:
                        died.append(job)
                except Exception as error:  # what was sent or came back cannot be read
                    self._failed(job, error)
        return died

    def _failed(self, job: int, error: Exception) -> None:
        self.returns[job] = JobReturn(list(self.batch[job]), status=JobStatus.FAILED, _return_value=error)
