"""metrics.jsonl as tables: which lines are read, by a fast parser or, where one line is bad, line by line."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from analysis.records.json_files import number, whole

LISTS = ("gate_mean",)  # what a logged row holds a list of numbers for
_MANY_BYTES = 200_000_000
_ENOUGH_ROWS = 250
_DIGITS = 12  # longest number of a step that is found without parsing, and one more


@dataclass(frozen=True)
class Read:
    """What stood in the files of several runs, one run after the other."""

    table: pa.Table
    counts: list[int]  # rows of each run
    unreadable: dict[Path, int]  # by run folder: lines that could not be read


def metrics_bytes(paths: Sequence[Path]) -> dict[Path, int]:
    """The sizes of the metrics.jsonl of run folders, of those that have one."""
    sizes = {}
    for path in paths:
        try:
            sizes[path] = (path / "metrics.jsonl").stat().st_size
        except OSError:
            continue
    return sizes


def thinning(paths: Sequence[Path]) -> int:
    """The ``train_every`` that keeps reading quick: 1 up to 200 MB of metrics, beyond that about 250 rows a run.

    A curve has fewer points on the page than that, and parsing takes longer than all the rest of a large report.
    """
    sizes = metrics_bytes(paths)
    if sum(sizes.values()) <= _MANY_BYTES:
        return 1
    lines = complete_lines(max(sizes, key=lambda path: sizes[path]) / "metrics.jsonl").count(b"\n")
    return max(1, lines // _ENOUGH_ROWS)


def read_files(paths: Sequence[Path], columns: Sequence[str], train_every: int) -> Read:
    """The rows of several run folders. One call of the parser costs as much as 300 rows."""
    contents = [_prepared(path, train_every) for path in paths]
    counts = [content.count(b"\n") for content in contents]
    table = _parse(b"".join(contents), columns)
    if table is not None and table.num_rows == sum(counts):
        return Read(table, counts, {})
    found = [_read_content(content, columns) for content in contents]
    unreadable = {path: bad for path, (_, bad) in zip(paths, found, strict=True) if bad}
    return Read(pa.concat_tables([own for own, _ in found]), [own.num_rows for own, _ in found], unreadable)


def complete_lines(path: Path) -> bytes:
    """A metrics.jsonl without a last line that is still being written; empty where there is nothing to read."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    # A last line that ends in a brace is there, only its line end is not.
    whole_lines = content + b"\n" if content.endswith(b"}") else content[: content.rfind(b"\n") + 1]
    return b"" if whole_lines.isspace() else whole_lines


def metrics_schema(columns: Sequence[str]) -> pa.Schema:
    types = {column: pa.list_(pa.float64()) if column in LISTS else pa.float64() for column in columns}
    return pa.schema([("kind", pa.string()), *types.items()])


def _prepared(path: Path, train_every: int) -> bytes:
    lines = complete_lines(path / "metrics.jsonl")
    return _every_nth(lines, train_every) if train_every > 1 and lines else lines


def _every_nth(lines: bytes, every: int) -> bytes:
    """The lines without most training rows, found without parsing them; all lines where they are not as expected."""
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1
    starts = np.concatenate([[0], ends[:-1]])
    found = _kinds_and_steps(lines, starts, ends)
    if found is None:
        return lines
    is_train, steps = found
    own = np.unique(steps[is_train])
    spacing = every * (int(np.diff(own).min()) if len(own) > 1 else 1)
    kept = ~is_train | (steps % spacing == 0) | (steps == own.max(initial=0))
    return b"".join([lines[a:b] for a, b in zip(starts[kept].tolist(), ends[kept].tolist(), strict=True)])


def _kinds_and_steps(lines: bytes, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Whether each line is a training row, and its step, by its first bytes; None unless every line looks like a row
    of a run: ``{"kind": "train", "step": 10, ...}``, all with spaces or all without."""
    space = b" " if lines.startswith(b'{"kind": ') else b""
    train, evaluation = (b'{"kind":%b"%b",%b"step":%b' % (space, kind, space, space) for kind in (b"train", b"eval"))
    text, width = np.frombuffer(lines, np.uint8), len(train) + _DIGITS
    if starts[-1] + width > len(text):
        return None
    one_object_each = np.count_nonzero(text == ord("{")) == len(starts) and (text[ends - 2] == ord("}")).all()
    heads = np.lib.stride_tricks.sliding_window_view(text, width)[starts]
    is_train, is_eval = ((heads[:, : len(x)] == np.frombuffer(x, np.uint8)).all(axis=1) for x in (train, evaluation))
    if not one_object_each or not (is_train | is_eval).all():
        return None
    behind = [heads[:, len(x) : len(x) + _DIGITS] for x in (train, evaluation)]
    text = np.where(is_train[:, None], *behind)
    digits = np.logical_and.accumulate((text >= ord("0")) & (text <= ord("9")), axis=1)
    if not digits[:, 0].all() or digits[:, -1].any():
        return None
    return is_train, np.where(digits, text, 0).view(f"S{_DIGITS}")[:, 0].astype(np.int64)


def _read_content(lines: bytes, columns: Sequence[str]) -> tuple[pa.Table, int]:
    table = _parse(lines, columns)
    if table is not None:
        return table, 0
    return _read_line_by_line(lines, columns)  # one bad line spoils the file for the parser


def _parse(lines: bytes, columns: Sequence[str]) -> pa.Table | None:
    """None where a line cannot be read."""
    schema = metrics_schema(columns)
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


def _read_line_by_line(content: bytes, columns: Sequence[str]) -> tuple[pa.Table, int]:
    found, bad = read_lines(content)
    rows = [{"kind": row["kind"]} | {c: _value(row.get(c), c in LISTS) for c in columns} for row in found]
    return pa.Table.from_pylist(rows, schema=metrics_schema(columns)), bad


def _value(value: Any, is_list: bool) -> Any:
    if is_list:
        return [_value(item, False) for item in value] if isinstance(value, list) else None
    value = number(value)
    return None if value != value else value
