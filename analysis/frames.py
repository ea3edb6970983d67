"""Records as tidy data frames: ``runs_frame`` has a row per run, ``steps_frame`` a row per logged step."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from analysis.records import Run, number, whole

PARTS = ("total", "embedding", "rwkv", "mamba", "fusion", "ffn", "attention", "norm")
NUMBERS = (
    "steps",
    "tokens",
    "best_val_loss",
    "best_step",
    "final_val_loss",
    "final_train_loss",
    "val_bits_per_byte",
    "grad_ratio",
    "tokens_per_second",
    "peak_memory_bytes",
    "wall_seconds",
    "flops_per_token",
)
LISTS = ("gate_mean",)  # what a logged row holds a list of numbers for
CURVES = ("step", "tokens", "loss", "val_loss", "train_loss")  # what the figures of the report need


def runs_frame(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per run, numbers as float (NaN where the record has none), the index counting from 0."""
    return pd.DataFrame([_run_row(run) for run in runs])


def _run_row(run: Run) -> dict[str, Any]:
    summary = run.summary
    data, environment = _dict(summary, "data"), _dict(summary, "environment")
    params, kernels = _dict(summary, "params"), _dict(environment, "kernels")
    overrides, state = summary.get("overrides"), summary.get("state_floats_per_layer")
    return (
        {
            "arm": run.arm,
            "variant": summary["variant"],
            "seed_init": run.seeds[0],
            "seed_data": run.seeds[1],
            "status": summary["status"],
            "stop_reason": _text(summary.get("stop_reason")),
        }
        | {f"params_{part}": number(params.get(part)) for part in PARTS}
        | {"state_floats": sum(number(floats) for floats in state) if isinstance(state, list) else np.nan}
        | {key: number(summary.get(key)) for key in NUMBERS}
        | {
            "data": _text(data.get("name")),
            "data_sha256": _text(data.get("sha256")),
            "tokenizer": _text(data.get("tokenizer")),
            "tokenizer_sha256": _text(data.get("tokenizer_sha256")),
            "vocab_size": number(data.get("vocab_size")),
            "device": _text(environment.get("device")),
            "kernel_wkv6": _text(kernels.get("wkv6")),
            "kernel_ssd": _text(kernels.get("ssd")),
            "git_commit": _text(environment.get("git_commit")),
            "git_dirty": _text(environment.get("git_dirty")),
            "code_version": _text(environment.get("code_version")),
            "versions": _text(_dict(environment, "versions") or None),
            "overrides": " ".join(map(str, overrides)) if isinstance(overrides, list) else None,
            "run_id": run.run_id,
            "folder": run.folder,
        }
    )


def _dict(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True)


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
        self._known: dict[tuple[Path, tuple[str, ...]], tuple[object, pa.Table, int]] | None = {} if remember else None

    def read(self, paths: Sequence[Path], columns: Sequence[str] = CURVES, lists: Sequence[str] = ()) -> Logged:
        """The logged rows of run folders; ``columns`` are numbers and have to contain ``step``.

        A step that was logged twice (before and after a resume) counts once, as logged last.
        """
        tables, unreadable = [], {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # the parser releases the interpreter's lock
            read = pool.map(lambda path: self._read(path / "metrics.jsonl", (*columns, *lists)), paths)
            for i, (path, (table, bad_lines)) in enumerate(zip(paths, read, strict=True)):
                if bad_lines:
                    unreadable[path] = bad_lines
                if table.num_rows:
                    tables.append(table.append_column("run", pa.array(np.full(table.num_rows, i, dtype=np.int32))))
        if not tables:
            tables = [_schema((*columns, *lists)).append(pa.field("run", pa.int32())).empty_table()]
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

    def _read(self, path: Path, columns: tuple[str, ...]) -> tuple[pa.Table, int]:
        if self._known is None:
            return _read_metrics(path, columns)
        try:
            found = path.stat()
        except OSError:
            return _read_metrics(path, columns)
        state = (found.st_size, found.st_mtime_ns, found.st_ino)
        known = self._known.get((path, columns))
        if known is None or known[0] != state:
            known = self._known[path, columns] = (state, *_read_metrics(path, columns))
        return known[1:]


def steps_frame(paths: Sequence[Path], columns: Sequence[str] = CURVES) -> tuple[pd.DataFrame, dict[Path, int]]:
    """The rows of ``StepReader.read``, and how many lines of each run could not be read."""
    logged = StepReader().read(paths, columns)
    return logged.rows, logged.unreadable


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


def _read_metrics(path: Path, columns: Sequence[str]) -> tuple[pa.Table, int]:
    schema = _schema(columns)
    whole_lines = complete_lines(path)
    if not whole_lines:
        return schema.empty_table(), 0
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    reading = pa_json.ReadOptions(use_threads=False, block_size=max(len(whole_lines), 1024))
    try:
        return pa_json.read_json(io.BytesIO(whole_lines), read_options=reading, parse_options=options), 0
    except pa.ArrowInvalid:  # one bad line spoils the file for this parser; read what can be read
        return _read_lines(whole_lines, columns, schema)


def _read_lines(content: bytes, columns: Sequence[str], schema: pa.Schema) -> tuple[pa.Table, int]:
    rows, bad = [], 0
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            bad += bool(line.strip())
            continue
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or whole(row.get("step")) is None:
            bad += 1
            continue
        rows.append({"kind": row["kind"]} | {c: _value(row.get(c), c in LISTS) for c in columns})
    return pa.Table.from_pylist(rows, schema=schema), bad


def _value(value: Any, is_list: bool) -> Any:
    if is_list:
        return [_value(item, False) for item in value] if isinstance(value, list) else None
    value = number(value)
    return None if value != value else value
