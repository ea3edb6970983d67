"""``python -m analysis.compare A B``: two folders, before and after a change, arm by arm and seed by seed.

An arm of B is compared with the arm of A of the same name over the seeds that both have: B minus A, so that what is
below zero got better. Each difference is a question of its own ("did this arm change?"); p is corrected for all.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.arguments import Parser, end
from analysis.comparison.compare import block_table
from analysis.files import write_text
from analysis.records.frames import runs_frame
from analysis.records.runs import METRICS, Records, read_records
from analysis.report import ReportError
from analysis.statistics.elementary import holm, paired_difference
from analysis.tables.table import (
    DASH,
    Cell,
    Table,
    escape_markdown,
    interval_cell,
    latex,
    markdown,
    number_cell,
    p_cell,
    signed_cell,
)
from analysis.words import METRIC_WORDS

ALPHA = 0.05  # of a change that is called one
# column, what to call it, whether losses cannot be compared where it differs
_SAME = (
    ("data_sha256", "data", True),
    ("tokenizer_sha256", "tokenizer", True),
    ("tokens", "training tokens", False),
    ("params_total", "parameters", False),
    ("code_version", "code version", False),
    ("device", "device", False),
    ("kernel_wkv6", "wkv6 kernel", False),
    ("kernel_ssd", "ssd kernel", False),
    ("versions", "package versions", False),
)


@dataclass(frozen=True)
class FolderComparison:
    """``differences`` has a row per arm of either folder; ``notes`` says what was not the same or could not be used."""

    before: Path
    after: Path
    metric: str
    differences: pd.DataFrame
    notes: list[str]


def compare_folders(before: Path, after: Path, metric: str = METRICS[0]) -> FolderComparison:
    """Compare all arms of two folders. Raises ReportError where a folder has no usable run."""
    records = [_usable(directory, metric) for directory in (before, after)]
    a, b = (runs_frame(found.runs) for found in records)
    blocks_a, blocks_b = block_table(a, metric), block_table(b, metric)
    arms = list(dict.fromkeys([*records[1].arms, *records[0].arms]))
    rows, notes = [], []
    for arm in arms:
        own_a, own_b = a[a["arm"] == arm], b[b["arm"] == arm]
        row = {"arm": arm, "runs_before": len(own_a), "runs_after": len(own_b)}
        row |= {"mean_before": own_a[metric].mean(), "mean_after": own_b[metric].mean()}
        differing, blocked = _differing(own_a, own_b)
        pairs = ([], [])
        if len(own_a) and len(own_b) and not blocked:
            shared = blocks_a.columns.intersection(blocks_b.columns)
            values = np.array([blocks_b.loc[arm, shared], blocks_a.loc[arm, shared]], dtype=float)
            pairs = tuple(values[:, np.isfinite(values).all(axis=0)])
        d = paired_difference(*pairs)
        row |= {"pairs": d.n, "difference": d.mean, "sd": d.sd, "low": d.low, "high": d.high, "p": d.p}
        rows.append(row | {"not_the_same": ", ".join(differing), "comparable": not blocked})
        if blocked:
            notes.append(f"{arm}: other {' and '.join(blocked)}, so losses cannot be compared")
        if len(own_a) and len(own_b) and not blocked and not d.n:
            notes.append(f"{arm}: no seed in both folders")
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"].tolist())
    frame["shown"] = frame["p_holm"] < ALPHA
    notes += _only_in(frame) + _overall(a, b)
    for directory, found in zip((before, after), records, strict=True):
        if found.left_out:
            notes.append(f"{directory}: {len(found.left_out)} runs left out (python -m analysis.report says which)")
    return FolderComparison(before, after, metric, frame, notes)


def _usable(directory: Path, metric: str) -> Records:
    if not directory.is_dir():
        raise ReportError(f"{directory} {'is a file, not a folder' if directory.exists() else 'does not exist'}")
    records = read_records(directory, metric)
    if not records.runs:
        raise ReportError(f"no usable run below {directory}", records.left_out)
    return records


def _differing(a: pd.DataFrame, b: pd.DataFrame) -> tuple[list[str], list[str]]:
    """What is not the same in the runs of an arm in both folders, and what of it makes losses incomparable."""
    if a.empty or b.empty:
        return [], []
    names = [(name, blocks) for column, name, blocks in _SAME if _values(a, column) != _values(b, column)]
    return [name for name, _ in names], [name for name, blocks in names if blocks]


def _values(runs: pd.DataFrame, column: str) -> set[object]:
    return {None if pd.isna(value) else value for value in runs[column]}


def _only_in(frame: pd.DataFrame) -> list[str]:
    notes = []
    for column, word in (("runs_after", "A"), ("runs_before", "B")):
        arms = frame.loc[frame[column] == 0, "arm"].tolist()
        if arms:
            notes.append(f"only in {word}: {', '.join(arms)}")
    return notes


def _overall(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """What changed between the folders, with both values where there is one of each."""
    notes = []
    for column, name, _ in _SAME:
        values = _values(a, column), _values(b, column)
        if values[0] == values[1]:
            continue
        words = [_word(next(iter(v))) if len(v) == 1 and column != "versions" else "several" for v in values]
        told = f"{words[0]} in A, {words[1]} in B" if "several" not in words else "see runs.csv of each report"
        notes.append(f"not the same {name}: {told}")
    return notes


def _word(value: object) -> str:
    if value is None:
        return "not recorded"
    return f"{value:,.0f}" if isinstance(value, float) else str(value)[:12]


def headline(found: FolderComparison) -> str:
    """The answer in one sentence."""
    frame = found.differences
    tested = frame[frame["p"].notna()]
    better = tested.loc[tested["shown"] & (tested["difference"] < 0), "arm"].tolist()
    worse = tested.loc[tested["shown"] & (tested["difference"] > 0), "arm"].tolist()
    words = METRIC_WORDS[found.metric]
    if not ((frame["runs_before"] > 0) & (frame["runs_after"] > 0)).any():
        return "Nothing to compare: no arm has the same name in both folders."
    if not frame["comparable"].any():
        return "Nothing can be compared: the folders were trained on other data or with another tokenizer."
    if tested.empty:
        paired = frame[frame["pairs"] > 0]
        if len(paired) and (paired["difference"] == 0).all():
            return f"Exactly the same {words} in all {int(paired['pairs'].sum())} pairs of runs."
        return "Nothing can be shown: no arm has two seeds in both folders whose differences vary."
    parts = [f"{', '.join(arms)} got {word}" for arms, word in ((better, "better"), (worse, "worse")) if arms]
    rest = len(tested) - len(better) - len(worse)
    if rest:
        others = " other" if parts else ""
        parts.append(f"no change shown in {rest}{others} arm{'s' if rest > 1 else ''}")
    text = "; ".join(parts)
    return f"{text[0].upper() if not better and not worse else text[0]}{text[1:]} ({words}, B minus A)."


def difference_table(found: FolderComparison) -> Table:
    """B minus A per arm, in words."""
    header = ["Arm", "Pairs", "A", "B", "B \N{MINUS SIGN} A", "95% interval", "p (Holm)", "Not the same"]
    rows = []
    for place, row in enumerate(found.differences.to_dict("records")):
        rows.append(
            [
                Cell(row["arm"], place),
                Cell(str(row["pairs"]), row["pairs"]),
                *(number_cell(row[f"mean_{when}"], 4) for when in ("before", "after")),
                signed_cell(row["difference"]),
                interval_cell(row["low"], row["high"]),
                p_cell(row["p_holm"]),
                Cell(row["not_the_same"] or DASH),
            ]
        )
    return Table(header, rows)


def write_comparison(found: FolderComparison, folder: Path) -> list[Path]:
    """Write differences.csv, .md and .tex below ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table = difference_table(found)
    notes = "".join(f"- {escape_markdown(note)}\n" for note in found.notes)
    text = f"**{escape_markdown(headline(found))}**\n\nA: `{found.before}`, B: `{found.after}`\n\n"
    text += f"{markdown(table)}\n{notes}"
    contents = {
        "differences.csv": found.differences.to_csv(index=False),
        "differences.md": text,
        "differences.tex": latex(table),
    }
    return [write_text(folder / name, content) for name, content in contents.items()]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 with a comparison, 2 without one."""
    parser = Parser(
        prog="python -m analysis.compare",
        description="Compare two folders of runs, before and after a change: arms by name, runs by seed, B minus A.",
    )
    parser.add_argument("before", metavar="A", type=Path, help="a folder with run folders at any depth")
    parser.add_argument("after", metavar="B", type=Path, help="another one, with arms of the same names")
    parser.add_argument("--metric", choices=METRICS, default=METRICS[0], help="the loss (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: B/report/compare-NAME_OF_A)")
    arguments = parser.parse_args(argv)
    try:
        found = compare_folders(arguments.before, arguments.after, arguments.metric)
        name = arguments.before.resolve().name
        written = write_comparison(found, arguments.out or arguments.after / "report" / f"compare-{name}")
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the comparison cannot be written: {error}", file=sys.stderr)
        return 2

    from rich.text import Text

    from analysis.page.terminal import console, print_files, print_table

    out = console()
    print_table(out, difference_table(found))
    out.print(Text(headline(found), style="bold"), soft_wrap=True)
    for note in found.notes:
        out.print(Text(f"  {note}", style="yellow"), soft_wrap=True)
    print_files(out, {path.name: path for path in written})
    return 0


if __name__ == "__main__":
    end(main)
