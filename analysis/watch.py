"""``--watch``: report again whenever records change, until every planned run has a record or Ctrl-C."""

from __future__ import annotations

import os
import time
from pathlib import Path

from analysis.records.runs import Records
from analysis.report import ReportError, write_report

_WATCHED = ("summary.json", "metrics.jsonl", "sweep.json", "config.yaml", "diagnosis.json")


def watch(directory: Path, baseline: str | None, metric: str, every: float) -> int:
    """Write the report, then again after every change; returns the exit code.

    The page loads itself again as long as the sweep is unfinished. Raises ReportError if ``directory`` is no folder or
    the arguments are wrong; a folder without a usable run yet is waited for.
    """
    from analysis.page.terminal import console, print_paths, print_watched
    from analysis.records.steps import StepReader

    if not directory.is_dir():
        write_report(directory, baseline, metric)  # raises the error that says so
    out, reader, seen, waiting = console(), StepReader(remember=True), None, ""
    try:
        while True:
            found = _state(directory)
            if found != seen:
                seen = found
                try:
                    paths = write_report(directory, baseline, metric, reader, refresh=every)
                except ReportError as error:
                    if baseline is not None and "no usable run of an arm" not in str(error) and "no arm" in str(error):
                        raise
                    if str(error) != waiting:
                        waiting = str(error)
                        out.print(f"waiting: {error}", soft_wrap=True, markup=False)
                else:
                    if finished(paths.report.records):
                        paths = write_report(directory, baseline, metric, reader)  # a page that stands still
                        print_paths(out, paths)
                        return 0
                    print_watched(out, paths, every)
            time.sleep(every)
    except KeyboardInterrupt:
        out.print("\nstopped watching; the report of what is there so far stands", highlight=False)
        return 0


def finished(records: Records) -> bool:
    """Whether all that sweeps and searches here planned has a record; never without a plan."""
    open_runs = [item for item in records.left_out if item.kind in ("missing", "unfinished")]
    planned = bool(records.plans or records.searches)
    return planned and not open_runs and all(search.finished for search in records.searches)


def _state(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file that a report depends on; the report's own folder holds none of them."""
    state = {}
    for root, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "checkpoints"]
        for name in files:
            if name in _WATCHED or (name.startswith("search") and name.endswith(".json")):
                path = os.path.join(root, name)
                try:
                    found = os.stat(path)
                except OSError:
                    continue
                state[path] = (found.st_size, found.st_mtime_ns)
    return state
