"""The logged steps of runs: metrics.jsonl as one table, whatever a run left in it."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from analysis.records.json_files import number, whole

_ROW = re.compile(rb'"kind": ?"(train|eval)", ?"step": ?(\d+)')
_BATCH = 16  # runs that are parsed together
_MANY_BYTES = 200_000_000
_ENOUGH_ROWS = 250
LISTS = ("gate_mean",)  # what a logged row holds a list of numbers for

_Batch = list[tuple[int, Path]]  # places of runs in what was asked for, and their folders


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
        self._known: dict[tuple[Path, tuple[str, ...], int], tuple[object, pa.Table, int]] | None
        self._known = {} if remember else None

    def read(
        self, paths: Sequence[Path], columns: Sequence[str], lists: Sequence[str] = (), train_every: int = 1
    ) -> Logged:
        """The logged rows of run folders; ``columns`` are numbers and have to contain ``step``.

        A step that was logged twice (before and after a resume) counts once, as logged last. With ``train_every`` = n
        only every n-th training row is read (the same steps in all runs that log alike); evaluations all are.
        """
        names, unreadable = (*columns, *lists), {}
        batch = 1 if self._known is not None else _BATCH
        batches = [list(enumerate(paths))[i : i + batch] for i in range(0, len(paths), batch)]
        tables = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # the parser releases the interpreter's lock
            for table, bad in pool.map(lambda some: self._read(some, names, train_every), batches):
                unreadable |= bad
                if table.num_rows:
                    tables.append(table)
        if not tables:
            tables = [_schema(names).append(pa.field("run", pa.int32())).empty_table()]
        table = pa.concat_tables(tables).combine_chunks()
        del tables
        keys = table.select(["run", "kind", "step"]).to_pandas(categories=["kind"])
        bad = keys["step"].isna() | keys.duplicated(keep="last")
        if bad.any():
            table, keys = table.filter(pa.array(~bad.to_numpy())), keys[~bad].reset_index(drop=True)
        exploded = {name: _explode(table.column(name), keys) for name in lists}
        others = [column for column in columns if column != "step"]
        rows = pd.concat([keys, table.select(others).to_pandas(self_destruct=True)], axis=1)
        return Logged(rows[["run", "kind", *columns]], exploded, unreadable)

    def _read(self, batch: _Batch, columns: tuple[str, ...], train_every: int) -> tuple[pa.Table, dict[Path, int]]:
        if self._known is None:
            return _read_batch(batch, columns, train_every)
        ((place, path),) = batch
        try:
            found = (path / "metrics.jsonl").stat()
        except OSError:
            return _read_batch(batch, columns, train_every)
        state, key = (found.st_size, found.st_mtime_ns, found.st_ino), (path, columns, train_every)
        known = self._known.get(key)
        if known is None or known[0] != state:
            known = self._known[key] = (state, *_read_metrics(path, columns, train_every))
        return _of_run(known[1], place), {path: known[2]} if known[2] else {}


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


def complete_lines(path: Path) -> bytes:
    """A metrics.jsonl without a last line that is still being written; empty where there is nothing to read."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    # A last line that ends in a brace is there, only its line end is not.
    whole_lines = content + b"\n" if content.endswith(b"}") else content[: content.rfind(b"\n") + 1]
    return whole_lines if whole_lines.strip() else b""


def _schema(columns: Sequence[str]) -> pa.Schema:
    types = {column: pa.list_(pa.float64()) if column in LISTS else pa.float64() for column in columns}
    return pa.schema([("kind", pa.string()), *types.items()])


def thinning(paths: Sequence[Path]) -> int:
    """The ``train_every`` that keeps reading quick: 1 up to 200 MB of metrics, beyond that about 250 rows a run.

    A curve has fewer points on the page than that, and parsing takes longer than all the rest of a large report.
    """
    sizes = {path: (path / "metrics.jsonl").stat().st_size for path in paths if (path / "metrics.jsonl").exists()}
    if sum(sizes.values()) <= _MANY_BYTES:
        return 1
    lines = complete_lines(max(sizes, key=lambda path: sizes[path]) / "metrics.jsonl").count(b"\n")
    return max(1, lines // _ENOUGH_ROWS)


def _every_nth(lines: bytes, every: int) -> bytes:
    """The lines without most training rows, found without parsing them; all lines where they are not as expected."""
    listed, found = lines.splitlines(keepends=True), _ROW.findall(lines)
    if len(listed) != len(found):
        return lines
    steps = [int(step) for _, step in found]
    own = sorted({step for (kind, _), step in zip(found, steps, strict=True) if kind == b"train"})
    spacing = min((b - a for a, b in itertools.pairwise(own)), default=1) * every
    last = own[-1] if own else 0
    kept = zip(listed, found, steps, strict=True)
    return b"".join([x for x, (kind, _), step in kept if step % spacing == 0 or kind == b"eval" or step == last])


def _prepared(path: Path, train_every: int) -> bytes:
    lines = complete_lines(path / "metrics.jsonl")
    return _every_nth(lines, train_every) if train_every > 1 else lines


def _read_batch(batch: _Batch, columns: Sequence[str], train_every: int) -> tuple[pa.Table, dict[Path, int]]:
    """The rows of several runs, with a column ``run``. One call of the parser costs as much as 300 rows."""
    contents = [_prepared(path, train_every) for _, path in batch]
    counts = [content.count(b"\n") for content in contents]
    table = _parse(b"".join(contents), columns)
    if table is not None and table.num_rows == sum(counts):
        places = np.repeat(np.array([place for place, _ in batch], dtype=np.int32), counts)
        return table.append_column("run", pa.array(places)), {}
    tables, unreadable = [], {}
    for (place, path), content in zip(batch, contents, strict=True):
        table, bad = _read_content(content, columns)
        tables.append(_of_run(table, place))
        if bad:
            unreadable[path] = bad
    return pa.concat_tables(tables), unreadable


def _of_run(table: pa.Table, place: int) -> pa.Table:
    return table.append_column("run", pa.array(np.full(table.num_rows, place, dtype=np.int32)))


def _read_metrics(path: Path, columns: Sequence[str], train_every: int) -> tuple[pa.Table, int]:
    return _read_content(_prepared(path, train_every), columns)


def _read_content(lines: bytes, columns: Sequence[str]) -> tuple[pa.Table, int]:
    table = _parse(lines, columns)
    if table is not None:
        return table, 0
    return _read_lines(lines, columns, _schema(columns))  # one bad line spoils the file for the parser


def _parse(lines: bytes, columns: Sequence[str]) -> pa.Table | None:
    """None where a line cannot be read."""
    schema = _schema(columns)
    if not lines:
        return schema.empty_table()
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    reading = pa_json.ReadOptions(use_threads=False, block_size=max(len(lines), 1024))
    try:
        return pa_json.read_json(io.BytesIO(lines), read_options=reading, parse_options=options)
    except pa.ArrowInvalid:
        return None


def read_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The rows of a metrics.jsonl line by line, and how many lines are none: slow, and stopped by nothing."""
    rows, bad = [], 0
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            bad += bool(line.strip())
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str) and whole(row.get("step")) is not None:
            rows.append(row)
        else:
            bad += 1
    return rows, bad


def _read_lines(content: bytes, columns: Sequence[str], schema: pa.Schema) -> tuple[pa.Table, int]:
    found, bad = read_lines(content)
    rows = [{"kind": row["kind"]} | {c: _value(row.get(c), c in LISTS) for c in columns} for row in found]
    return pa.Table.from_pylist(rows, schema=schema), bad


def _value(value: Any, is_list: bool) -> Any:
    if is_list:
        return [_value(item, False) for item in value] if isinstance(value, list) else None
    value = number(value)
    return None if value != value else value
