"""``python -m analysis.export DIR``: one tidy file of all runs and one of all logged steps, for notebooks.

``runs`` has a row per run with a record, usable or not:

- ``arm``, ``variant``, ``sweep``, ``seed_init``, ``seed_data``, ``run_id``, ``folder`` (relative to DIR)
- ``counts``: whether the run enters the means of a report; ``left_out``: why not
- ``study``, ``trial``: of a run that is a trial of a search
- the numbers and texts of summary.json with nested objects joined by dots (``params.total``, ``data.sha256``,
  ``environment.device``); lists have a column per place (``state_floats_per_layer.0``); losses in nats per token

``steps`` has a row per logged step of every run folder, finished or not:

- ``arm``, ``seed_init``, ``seed_data``, ``run_id``, ``folder`` as in ``runs``
- all fields of metrics.jsonl: ``kind`` (train or eval), ``step``, ``tokens``, ``loss``, ``val_loss`` and so on; lists
  have a column per place (``gate_mean.0`` is the first block's gate). A field that a row lacks is empty. A step that
  was logged again after a resume stands once, as logged last.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pa_parquet

from analysis.arguments import Parser, end
from analysis.records.json_files import load_object, whole
from analysis.records.metrics_files import complete_lines, read_lines
from analysis.records.runs import RUN_SCHEMA, LeftOut, Records, Run, read_records

FORMATS = ("parquet", "csv")
_ORDER = ("arm", "seed_init", "seed_data", "run_id", "folder")


def runs_table(records: Records) -> pd.DataFrame:
    """The rows of ``runs``: usable runs by arm and seeds, then trials, then what was left out."""
    found = [*records.runs, *records.trials, *(item for item in records.left_out if item.path)]
    rows = []
    for item in found:
        summary = item.summary if isinstance(item, Run) else load_object(item.path / "summary.json")  # type: ignore
        if isinstance(summary, str) or summary.get("schema") != RUN_SCHEMA:
            summary = {}
        trial = summary.get("trial") if isinstance(summary.get("trial"), dict) else {}
        row = _identity(item) | {"counts": isinstance(item, Run) and not item.trial}
        row |= {"left_out": None if isinstance(item, Run) else item.reason}
        row |= {"study": trial.get("study"), "trial": trial.get("number")}
        flat = _flat({key: value for key, value in summary.items() if key not in ("overrides", "trial")})
        overrides = summary.get("overrides")
        flat["overrides"] = " ".join(map(str, overrides)) if isinstance(overrides, list) else None
        rows.append(row | {key: value for key, value in flat.items() if key not in row})
    return _plain_columns(pd.DataFrame(rows))


def _identity(item: Run | LeftOut) -> dict[str, Any]:
    seeds = item.seeds if isinstance(item, Run) else (item.seed_init, item.seed_data)
    return {"arm": item.arm, "seed_init": seeds[0], "seed_data": seeds[1], "run_id": item.run_id, "folder": item.folder}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested objects and lists as one level, names joined by dots."""
    if isinstance(value, dict):
        inner: Any = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    else:
        return {key: value}
    return {k: v for name, part in inner for k, v in _flat(part, f"{key}.{name}" if key else str(name)).items()}


def _plain_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns that a file format with types can hold: numbers where all are numbers, else text.

    A list that some rows lack is empty in its places; it needs no column of its own.
    """
    parents = {column.rpartition(".")[0] for column in frame.columns if "." in column}
    frame = frame.drop(columns=[c for c in frame.columns if c in parents and frame[c].isna().all()])
    for column in frame.columns:
        values = frame[column]
        if values.dtype != object:
            continue
        kinds = {type(value) for value in values if value is not None and value == value}
        if kinds <= {bool}:
            frame[column] = values.astype("boolean")
        elif kinds <= {int}:
            small = all(abs(v) < 2**63 for v in values if isinstance(v, int))
            frame[column] = values.astype("Int64" if small else float)
        elif kinds <= {int, float}:
            frame[column] = values.astype(float)
        else:
            texts = (v if v is None or isinstance(v, str) else None if v != v else json.dumps(v) for v in values)
            frame[column] = list(texts)
    return frame


def steps_table(records: Records) -> tuple[pa.Table, list[str]]:
    """The rows of ``steps``, run after run; and a remark for every file with lines that could not be read."""
    tables, remarks = [], []
    for item in [*records.runs, *records.trials, *records.left_out]:
        if item.path is None:
            continue
        table, bad = _read_steps(item.path / "metrics.jsonl")
        if bad:
            remarks.append(f"{item.folder}/metrics.jsonl: {bad} unreadable lines skipped")
        if table.num_rows:
            for place, (name, value) in enumerate(_identity(item).items()):
                kind = pa.int64() if name.startswith("seed") else pa.string()
                table = table.add_column(place, name, pa.repeat(pa.scalar(value, kind), table.num_rows))
            tables.append(table)
    if not tables:
        return pa.table({name: pa.array([], pa.string()) for name in (*_ORDER, "kind", "step")}), remarks
    kinds: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for column in table.schema:
            kinds.setdefault(column.name, set()).add(column.type)
    mixed = {name for name, types in kinds.items() if len(types - {pa.null()}) > 1 and not all(map(_is_number, types))}
    tables = [_as_text(table, mixed) for table in tables] if mixed else tables
    return pa.concat_tables(tables, promote_options="permissive"), remarks


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)


def _as_text(table: pa.Table, columns: set[str]) -> pa.Table:
    """A column that holds numbers in one run and texts in another becomes text."""
    for place, name in enumerate(table.column_names):
        if name in columns:
            table = table.set_column(place, name, table.column(name).cast(pa.string()))
    return table


def _read_steps(path: Path) -> tuple[pa.Table, int]:
    """All fields of a metrics.jsonl, lists with a column per place; and how many lines could not be read."""
    lines = complete_lines(path)
    if not lines:
        return pa.table({}), 0
    reading = pa_json.ReadOptions(use_threads=False, block_size=max(len(lines), 1024))
    bad = 0
    try:
        table = pa_json.read_json(io.BytesIO(lines), read_options=reading)
        nested = any(pa.types.is_struct(column.type) for column in table.schema)
        usable = {"kind", "step"} <= set(table.column_names) and pa.types.is_integer(table.schema.field("step").type)
    except pa.ArrowInvalid:  # one bad line, or a field of two types, spoils the file for this parser
        nested = usable = False
    if nested or not usable:
        table, bad = _read_line_by_line(lines)
    if not table.num_rows:
        return table, bad
    keys = table.select(["kind", "step"]).to_pandas()
    repeated = keys.duplicated(keep="last")
    if repeated.any():
        table = table.filter(pa.array(~repeated.to_numpy()))
    return _explode(table), bad


def _read_line_by_line(lines: bytes) -> tuple[pa.Table, int]:
    found, bad = read_lines(lines)
    rows = [_flat(row) | {"step": whole(row["step"])} for row in found]
    return pa.Table.from_pandas(_plain_columns(pd.DataFrame(rows)), preserve_index=False), bad


def _explode(table: pa.Table) -> pa.Table:
    """A list column becomes a column per place; rows with shorter lists are empty there."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if not pa.types.is_list(column.type):
            columns[name] = column
            continue
        longest = pc.max(pc.list_value_length(column)).as_py() or 0
        for place in range(longest):
            columns[f"{name}.{place}"] = _at(column, place)
    return pa.table(columns)


def _at(lists: Any, place: int) -> Any:
    long_enough = pc.fill_null(pc.greater(pc.list_value_length(lists), place), False)
    shown = pc.if_else(long_enough, lists, pa.scalar([None] * (place + 1), lists.type))
    return pc.list_element(shown, place)


def export(directory: Path, out: Path, file_format: str = "parquet") -> tuple[dict[str, Path], list[str]]:
    """Write ``runs`` and ``steps`` below ``out``. Returns their paths and remarks about what could not be read.

    Raises FileNotFoundError if ``directory`` has no run folders, OSError if ``out`` cannot be written.
    """
    records = read_records(directory)
    if not any(item.path for item in (*records.runs, *records.trials, *records.left_out)):
        raise FileNotFoundError(f"no run folders below {directory}")
    steps, remarks = steps_table(records)
    tables = {"runs": pa.Table.from_pandas(runs_table(records), preserve_index=False), "steps": steps}
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, table in tables.items():
        path = out / f"{name}.{file_format}"
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        if file_format == "parquet":
            pa_parquet.write_table(table, partial, compression="zstd")
        else:
            pa_csv.write_csv(table, partial)
        partial.replace(path)
        written[name] = path
    return written, records.notes + remarks


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 with both files, 2 without."""
    parser = Parser(
        prog="python -m analysis.export",
        description="Write all runs and all logged steps below DIR as two tidy tables.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a folder with run folders at any depth")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write (default: DIR/export)")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.directory.is_dir():
            raise FileNotFoundError(f"{arguments.directory} is not a folder")
        written, remarks = export(
            arguments.directory, arguments.out or arguments.directory / "export", arguments.format
        )
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    for path in written.values():
        print(path)
    return 0


if __name__ == "__main__":
    end(main)
