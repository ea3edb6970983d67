"""Records as tidy data frames: ``runs_frame`` has a row per run, ``steps_frame`` a row per logged step."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
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


def steps_frame(paths: Sequence[Path], columns: Sequence[str] = CURVES) -> tuple[pd.DataFrame, dict[Path, int]]:
    """The logged rows of run folders: ``run`` (the place in ``paths``), ``kind`` (train or eval) and ``columns``.

    Numbers are float, NaN where a row has none. A step that was logged twice (before and after a resume) counts once,
    as logged last. Also returns, per run folder, how many lines could not be read; a torn last line is no error.
    """
    tables, unreadable = [], {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # the parser releases the lock of the interpreter
        read = pool.map(lambda path: _read_metrics(path / "metrics.jsonl", columns), paths)
        for i, (path, (table, bad_lines)) in enumerate(zip(paths, read, strict=True)):
            if bad_lines:
                unreadable[path] = bad_lines
            if table.num_rows:
                tables.append(table.append_column("run", pa.array(np.full(table.num_rows, i, dtype=np.int32))))
    if not tables:
        empty = {"kind": pd.Series(dtype=str)} | {c: pd.Series(dtype=float) for c in ["run", *columns]}
        return pd.DataFrame(empty), unreadable
    frame = pa.concat_tables(tables).combine_chunks().to_pandas(categories=["kind"], self_destruct=True)
    frame = frame[frame["step"].notna()] if frame["step"].isna().any() else frame
    repeated = frame.duplicated(["run", "kind", "step"], keep="last")
    frame = frame[~repeated] if repeated.any() else frame
    return frame.reset_index(drop=True), unreadable


def _read_metrics(path: Path, columns: Sequence[str]) -> tuple[pa.Table, int]:
    schema = pa.schema([("kind", pa.string()), *((column, pa.float64()) for column in columns)])
    try:
        content = path.read_bytes()
    except OSError:
        return schema.empty_table(), 0
    whole_lines = content[: content.rfind(b"\n") + 1]
    if content.endswith(b"}"):  # the last line is there, only its line end is not
        whole_lines = content + b"\n"
    if not whole_lines.strip():
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
        values = {column: number(row.get(column)) for column in columns}
        rows.append({"kind": row["kind"]} | {c: None if v != v else v for c, v in values.items()})
    return pa.Table.from_pylist(rows, schema=schema), bad
