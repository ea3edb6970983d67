"""``python -m analysis.publish DIR TARGET``: the records of a sweep, small and without what only its machine knows.

Copies of every finished run ``config.yaml``, ``metrics.jsonl``, ``summary.json`` and, where there is one,
``diagnosis.json``; of the first seed of every arm, of a search of the first trial, also ``probe.jsonl`` and
``gpu.jsonl`` (``--probes all|none``); of the sweep ``sweep.json``, and of a search ``search.json`` and ``best.yaml``
(or ``search-ARM.json``, ``best-ARM.yaml``).
Never weights, checkpoints and logs, nor ``study.journal``: what a search found stands in ``search.json``.

Paths (``out``, ``data.path``, ``data.cache_dir``), the storage and the workers of a search, and keys that say how runs
were started or shown (``display``, ``hydra``) are taken out, or get their defaults; other absolute paths become
``<path>``, logins in URLs ``<login>``, and of the platform only system and machine stay. No number of a result is
touched. ``analysis.report TARGET`` makes the report.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from analysis.arguments import Parser, end
from analysis.cleaning import clean, clean_text, without_local_keys
from analysis.files import write_text
from analysis.records.json_files import load_object, whole

LOGGED = "metrics.jsonl"  # copied as it is, as the long records are
LONG = ("probe.jsonl", "gpu.jsonl")
OF_THE_SWEEP = re.compile(r"sweep\.json|search(-.+)?\.json|best(-.+)?\.yaml")


class PublishError(Exception):
    """A record that cannot be used; the message is one line that names its file."""


@dataclass(frozen=True)
class FinishedRun:
    """What is known of a run before anything is written."""

    folder: Path
    arm: str  # of a trial of a search, the study
    seed: int  # of a trial its number
    texts: dict[str, str]  # the cleaned records by the names of their files
    copied: list[str]  # names of files that are copied as they are


def publish(directory: Path, target: Path, probes: str = "first") -> list[str]:
    """Copy the records; what a person has to know of it, in lines. Everything is read before anything is written.

    ``probes``: of which seeds the long records are kept, "first", "all" or "none". Raises FileNotFoundError where
    there is nothing to copy, PublishError where a record cannot be used, and OSError.
    """
    inside, outside = target.resolve(), directory.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise OSError(f"{target} and {directory} must not lie in each other")
    folders = sorted({file.parent for name in ("config.yaml", "summary.json") for file in directory.glob(f"*/{name}")})
    runs = [read_run(folder) for folder in folders if (folder / "summary.json").exists()]
    if not runs:
        raise FileNotFoundError(f"no finished runs in {directory}")
    plans = {path.name: cleaned(path) for path in sorted(directory.iterdir()) if OF_THE_SWEEP.fullmatch(path.name)}
    for place in (target, *(target / run.folder.name for run in runs)):
        if place.exists() and not place.is_dir():
            raise PublishError(f"{place} is no folder")

    first: dict[str, int] = {}
    for run in runs:
        first[run.arm] = min(first.get(run.arm, run.seed), run.seed)
    removed = 0
    for run in runs:
        keep = probes == "all" or (probes == "first" and run.seed == first[run.arm])
        removed += write_run(run, target / run.folder.name, keep)
    for name, text in plans.items():
        write_text(target / name, text)

    unfinished = len(folders) - len(runs)
    rest = f"; {unfinished} unfinished runs left out" if unfinished else ""
    names = {run.folder.name for run in runs} | set(plans)
    others = [path.name for path in sorted(target.iterdir()) if path.name not in names and is_record(path)]
    bare = [run.folder.name for run in runs if LOGGED not in run.copied]
    return [
        f"{len(runs)} runs to {target}{rest}",
        *([f"removed {removed} files of probes that are not kept"] if removed else []),
        *([f"without {LOGGED}: {', '.join(bare)}"] if bare else []),
        *([f"left in {target}, not finished in {directory}: {', '.join(others)}"] if others else []),
    ]


def read_run(folder: Path) -> FinishedRun:
    """A run's records, cleaned. Raises PublishError and OSError."""
    names = ("config.yaml", "summary.json", *(["diagnosis.json"] if (folder / "diagnosis.json").exists() else []))
    texts = {name: cleaned(folder / name) for name in names}
    summary = json.loads(texts["summary.json"])
    arm, seed = summary.get("variant"), whole(summary.get("seed_init"))
    if not isinstance(arm, str) or not arm:
        raise PublishError(f"{folder / 'summary.json'}: variant is not the name of an arm")
    if seed is None:
        raise PublishError(f"{folder / 'summary.json'}: seed_init is not a whole number")
    if isinstance(trial := summary.get("trial"), dict):
        arm, seed = f"search {trial.get('study')}", whole(trial.get("number")) or 0
    copied = [name for name in (LOGGED, *LONG) if (folder / name).exists()]
    for name in copied:
        (folder / name).open("rb").close()
    return FinishedRun(folder, arm, seed, texts, copied)


def cleaned(path: Path) -> str:
    """The text of a JSON or YAML file without what is not to be published. Raises PublishError and OSError."""
    if path.suffix == ".json":
        record = load_object(path)
        if isinstance(record, str):
            raise PublishError(f"{path.parent}: {record}")
        return json.dumps(clean(record), indent=1) + "\n"
    text = path.read_bytes()
    try:
        config: Any = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        config = without_local_keys(clean(config))
        about = [line for line in text.decode().splitlines(keepends=True) if line.startswith("#")]
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise PublishError(f"{path} cannot be used: {' '.join(str(error).split())[:200]}") from error
    return "".join(map(clean_text, about)) + yaml.safe_dump(config, sort_keys=False)


def write_run(run: FinishedRun, copy: Path, keep: bool) -> int:
    """Write a run's records; without ``keep`` its long ones are removed where they are. How many files that were."""
    copy.mkdir(parents=True, exist_ok=True)
    for name, text in run.texts.items():
        write_text(copy / name, text)
    for name in run.copied:
        if keep or name not in LONG:
            shutil.copyfile(run.folder / name, copy / name)
    old = [copy / name for name in LONG if not keep and (copy / name).exists()]
    for path in old:
        path.unlink()
    return len(old)


def is_record(path: Path) -> bool:
    return OF_THE_SWEEP.fullmatch(path.name) is not None or (path / "config.yaml").exists()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 where nothing could be copied."""
    parser = Parser(
        prog="python -m analysis.publish",
        description="Copy the records of a sweep, without weights and without the paths of its machine.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the sweep's folder")
    parser.add_argument("target", metavar="TARGET", type=Path, help="where the copy goes, e.g. results/NAME")
    parser.add_argument(
        "--probes", choices=("first", "all", "none"), default="first",
        help="seeds of each arm whose probe.jsonl and gpu.jsonl are kept (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        lines = publish(arguments.directory, arguments.target, arguments.probes)
    except (OSError, PublishError) as error:
        known = isinstance(error, OSError) and error.filename and error.strerror
        print(f"error: {error.filename}: {error.strerror}" if known else f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    end(main)
