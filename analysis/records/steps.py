"""The logged steps of runs, whatever a run left in its metrics.jsonl, read beside what the report does meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from analysis.records.metrics_files import Read, metrics_bytes, metrics_schema, read_files

_BATCH = 16  # runs that are parsed together
_BYTES_FOR_PROCESSES = 50_000_000  # smaller records are read before processes would have started
_RUN = pa.field("run", pa.int32())

_Part = Callable[[], Read]  # waits for what was read of some runs


@dataclass(frozen=True)
class Logged:
    """What runs logged. ``run`` is everywhere the place of a run in what was asked for.

    ``rows`` has a row per logged step: run, kind (train or eval) and the columns asked for, NaN where a row has none.
    ``lists`` has, by column, a row per number of a list: run, kind, step, place (in the list, from 0), value.
    ``unreadable`` counts the lines that could not be read; a torn last line is no error.
    """

    rows: pd.DataFrame
    lists: dict[str, pd.DataFrame]
    unreadable: dict[Path, int]


class StepReader:
    """Reads the logged steps of runs; with ``remember``, a file that has not changed is read once only."""

    def __init__(self, remember: bool = False) -> None:
        self._known: dict[tuple[Path, tuple[str, ...], int], tuple[object, Read]] | None = {} if remember else None

    def read(
        self, paths: Sequence[Path], columns: Sequence[str], lists: Sequence[str] = (), train_every: int = 1
    ) -> Logged:
        """The logged rows of run folders; ``columns`` are numbers and have to contain ``step``.

        A step that was logged twice (before and after a resume) counts once, as logged last. With ``train_every`` = n
        only every n-th training row is read (the same steps in all runs that log alike); evaluations all are.
        """
        return self.start(paths, columns, lists, train_every).result()

    def start(
        self, paths: Sequence[Path], columns: Sequence[str], lists: Sequence[str] = (), train_every: int = 1
    ) -> Reading:
        """Begin ``read`` in the background; the ``result`` of what is returned is what ``read`` returns."""
        names, pool = (*columns, *lists), _pool(paths)
        size = 1 if self._known is not None else _BATCH
        batches = [(first, paths[first : first + size]) for first in range(0, len(paths), size)]
        parts = [(first, self._begin(pool, batch, names, train_every)) for first, batch in batches]
        pool.shutdown(wait=False)  # it ends when everything is read
        return Reading(parts, columns, lists)

    def _begin(self, pool: Executor, batch: Sequence[Path], names: tuple[str, ...], train_every: int) -> _Part:
        state = None if self._known is None else _state(batch[0])
        if self._known is None or state is None:
            return _submit(pool, batch, names, train_every)
        memory, key = self._known, (batch[0], names, train_every)
        known = memory.get(key)
        if known is not None and known[0] == state:
            return lambda: known[1]
        part = _submit(pool, batch, names, train_every)

        def remembered() -> Read:
            memory[key] = (state, part())
            return memory[key][1]

        return remembered


class Reading:
    """Logged steps on their way: ``result`` waits for them and can be had once."""

    def __init__(self, parts: Sequence[tuple[int, _Part]], columns: Sequence[str], lists: Sequence[str]) -> None:
        """``parts`` are pairs of the place of a part's first run and what waits for the part."""
        self._parts, self._columns, self._lists = deque(parts), columns, lists

    def result(self) -> Logged:
        """As of ``StepReader.read``."""
        tables, unreadable = [metrics_schema((*self._columns, *self._lists)).append(_RUN).empty_table()], {}
        while self._parts:
            first, part = self._parts.popleft()
            read = part()
            runs = np.repeat(np.arange(first, first + len(read.counts), dtype=np.int32), read.counts)
            tables.append(read.table.append_column(_RUN, pa.array(runs)))
            unreadable |= read.unreadable
        table = pa.concat_tables(tables).combine_chunks()
        del tables
        keys = table.select(["run", "kind", "step"]).to_pandas(categories=["kind"])
        bad = keys["step"].isna() | keys.duplicated(keep="last")
        if bad.any():
            table, keys = table.filter(pa.array(~bad.to_numpy())), keys[~bad].reset_index(drop=True)
        exploded = {name: _explode(table.column(name), keys) for name in self._lists}
        others = [column for column in self._columns if column != "step"]
        rows = pd.concat([keys, table.select(others).to_pandas(self_destruct=True)], axis=1)
        return Logged(rows[["run", "kind", *self._columns]], exploded, unreadable)


def _pool(paths: Sequence[Path]) -> Executor:
    """Processes where there is much to read, else threads: the parser releases the interpreter's lock, the rest of
    the work does not. Forked processes have all modules already; where forking is not safe, threads have to do."""
    workers = min(8, os.cpu_count() or 1)
    if sys.platform == "linux" and sum(metrics_bytes(paths).values()) > _BYTES_FOR_PROCESSES:
        quiet = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by this process alone
        return ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), signal.signal, quiet)
    return ThreadPoolExecutor(workers)


def _submit(pool: Executor, batch: Sequence[Path], names: tuple[str, ...], train_every: int) -> _Part:
    """Begin to read; what a process was killed over, e.g. for its memory, is read here when it is asked for."""
    here = partial(read_files, batch, names, train_every)
    try:
        future = pool.submit(here)
    except BrokenProcessPool:
        return here

    def part() -> Read:
        try:
            return future.result()
        except BrokenProcessPool:
            return here()

    return part


def _state(path: Path) -> object:
    """What changes when a run's metrics.jsonl is written to; None if there is none."""
    try:
        found = (path / "metrics.jsonl").stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _explode(column: pa.ChunkedArray, keys: pd.DataFrame) -> pd.DataFrame:
    """A row per number of the lists in ``column``; ``keys`` has the run, kind and step of every list."""
    lists = column.combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    parents = pc.list_parent_indices(lists).to_numpy()
    values = pc.list_flatten(lists).to_numpy(zero_copy_only=False)
    lengths = np.bincount(parents, minlength=len(keys)) if len(parents) else np.zeros(len(keys), dtype=int)
    starts = np.cumsum(lengths) - lengths
    frame = keys.iloc[parents].reset_index(drop=True)
    frame["place"] = np.arange(len(parents)) - starts[parents]
    frame["value"] = values.astype(float)
    return frame
