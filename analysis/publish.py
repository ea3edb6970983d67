"""``python -m analysis.publish DIR TARGET``: the records of a sweep, small and without what only its machine knows.

Copies of every finished run ``config.yaml``, ``metrics.jsonl``, ``summary.json`` and, where there is one,
``diagnosis.json``; of the first seed of every arm also ``probe.jsonl`` and ``gpu.jsonl`` (``--probes all|none``). Never
weights, checkpoints and logs. Paths (``out``, ``data.path``, ``data.cache_dir``) and keys that say how runs were
started or shown (``display``, ``hydra``) are taken out; no number is touched. ``analysis.report TARGET`` makes the
report.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from analysis.records.json_files import load_object

RECORDS = ("metrics.jsonl", "diagnosis.json")  # beside config.yaml and summary.json
PROBES = ("probe.jsonl", "gpu.jsonl")
LOCAL = (
    "out",
    "data.path",
    "data.cache_dir",
    "display",
    "hydra",
)  # keys, and all that begin with one and a dot or slash


def publish(directory: Path, target: Path, probes: str = "first") -> tuple[int, int]:
    """Copy the records; how many runs were copied, and how many have no summary yet.

    ``probes``: of which seeds the long records are kept, "first", "all" or "none". Raises FileNotFoundError where
    there is nothing to copy, and OSError.
    """
    inside, outside = target.resolve(), directory.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise OSError(f"{target} and {directory} must not lie in each other")
    folders = sorted(path.parent for path in directory.glob("*/config.yaml"))
    finished: list[tuple[Path, dict[str, Any]]] = []
    for folder in folders:
        summary = load_object(folder / "summary.json")
        if not isinstance(summary, str):
            finished.append((folder, summary))
    if not finished:
        raise FileNotFoundError(f"no finished runs in {directory}")
    first: dict[str, int] = {}
    for _, summary in finished:
        arm, seed = str(summary.get("variant")), summary.get("seed_init", 0)
        first[arm] = min(first.get(arm, seed), seed)
    for folder, summary in finished:
        copy = target / folder.name
        copy.mkdir(parents=True, exist_ok=True)
        keep = probes == "all" or (probes == "first" and summary.get("seed_init", 0) == first[str(summary["variant"])])
        for name in (*RECORDS, *(PROBES if keep else ())):
            if (folder / name).exists():
                shutil.copyfile(folder / name, copy / name)
        (copy / "summary.json").write_text(json.dumps(without_paths(summary), indent=1) + "\n")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (copy / "config.yaml").write_text(yaml.safe_dump(plain_config(config), sort_keys=False))
    for name in ("sweep.json", "search.json"):
        plan = load_object(directory / name)
        if not isinstance(plan, str):
            (target / name).write_text(json.dumps(without_paths(plan), indent=1) + "\n")
    return len(finished), len(folders) - len(finished)


def without_paths(value: Any) -> Any:
    """A record in which no list of overrides (at any depth) sets a key of ``LOCAL``."""
    if isinstance(value, dict):
        return {
            key: [line for line in inner if not local(line)] if key == "overrides" else without_paths(inner)
            for key, inner in value.items()
        }
    return [without_paths(inner) for inner in value] if isinstance(value, list) else value


def local(override: Any) -> bool:
    key = str(override).lstrip("+~").partition("=")[0]
    return any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in LOCAL)


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration with the paths' defaults."""
    data = config.get("data") or {}
    data = {key: None if key in ("path", "cache_dir") else value for key, value in data.items()}
    return {**config, "data": data, "out": "outputs"}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 where nothing could be copied."""
    parser = argparse.ArgumentParser(
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
        copied, unfinished = publish(arguments.directory, arguments.target, arguments.probes)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"error: {text}", file=sys.stderr)
        return 2
    rest = f"; {unfinished} unfinished runs left out" if unfinished else ""
    print(f"{copied} runs to {arguments.target}{rest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
