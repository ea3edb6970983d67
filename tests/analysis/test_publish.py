"""Copying the records of a sweep: all numbers, no weights, no paths of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from analysis.cleaning import clean, clean_text, system_and_machine, without_local_keys
from analysis.publish import main
from analysis.records.configs import read_config
from analysis.report import main as report
from hybrid.config import CONF_DIR, from_yaml, identity, resolve, to_yaml
from hybrid.schema import Config, DataConfig, DisplayConfig

PATHS = {"out": "/home/me/runs", "data": {"name": "text", "path": "/home/me/text.txt", "cache_dir": "/home/me/cache"},
         "sweep": {"arms": {"gain": ["data.path=/home/me/a"]},
                   "search": {"storage": "postgresql://me:secret@host/db", "n_trials": 3}},
         "display": {"progress": "off", "run_index": 2, "sweep_started": 1795323376.16}}  # fmt: skip
OVERRIDES = ["fusion=gain", "out=/home/me/runs", "data.path=/home/me/text.txt", "+data.cache_dir=/home/me/cache",
             "display.progress=plain", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "data=text", "output=none",
             "optim.lr=0.1", "sweep.search.storage=postgresql://me:secret@host/db",
             "+'data.path'=/home/me/text.txt"]  # fmt: skip
KEPT = ["fusion=gain", "data=text", "output=none", "optim.lr=0.1"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two arms of two seeds and an unfinished run."""
    folder = tmp_path / "sweep"
    runs = [(arm, seed) for arm in ("gain", "gated") for seed in (3, 4)] + [("gated", 5)]
    for arm, seed in runs:
        run = folder / f"{arm}-{seed}"
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "best.safetensors").write_bytes(b"weights")
        for name in ("metrics.jsonl", "probe.jsonl", "gpu.jsonl", "log.txt", "lock"):
            (run / name).write_text(f'{{"kind": "{name} of {arm} {seed}"}}\n')
        (run / "config.yaml").write_text(yaml.safe_dump({**PATHS, "optim": {"lr": 0.1}}))
        if seed != 5:
            record = {
                "schema": "groundthink.run/1", "variant": arm, "run_id": f"{arm}{seed}", "seed_init": seed,
                "seed_data": seed, "overrides": OVERRIDES, "final_val_loss": 1.0 + seed / 7, "status": "completed",
                "environment": {"platform": "Linux-6.18.44-gpu-x86_64-with-glibc2.39"},
            }  # fmt: skip
            (run / "summary.json").write_text(json.dumps(record))
    plan = {"schema": "groundthink.sweep/1", "runs": [{"variant": "gain", "overrides": OVERRIDES}]}
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_records_are_copied_without_paths(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "results" / "sweep"
    assert main([str(sweep), str(target)]) == 0
    assert capsys.readouterr().out == f"4 runs to {target}; 1 unfinished runs left out\n"
    assert names(target) == {"gain-3", "gain-4", "gated-3", "gated-4", "sweep.json"}
    short, long = {"config.yaml", "metrics.jsonl", "summary.json"}, {"probe.jsonl", "gpu.jsonl"}
    assert names(target / "gain-3") == short | long and names(target / "gain-4") == short
    for path in target.rglob("*"):
        assert path.is_dir() or not any(word in path.read_text() for word in ("/home/me", "secret", "display")), path
    copied = json.loads((target / "gated-4" / "summary.json").read_text())
    original = json.loads((sweep / "gated-4" / "summary.json").read_text())
    assert copied == original | {"overrides": KEPT, "environment": {"platform": "Linux x86_64"}}
    assert json.loads((target / "sweep.json").read_text())["runs"] == [{"variant": "gain", "overrides": KEPT}]
    config = yaml.safe_load((target / "gain-3" / "config.yaml").read_text())
    assert config == {
        "out": "outputs", "data": {"name": "text", "path": None, "cache_dir": "~/.cache/groundthink"},
        "optim": {"lr": 0.1},
        "sweep": {"arms": {"gain": ["data.path=<path>"]}, "search": {"storage": None, "n_trials": 3}},
    }  # fmt: skip
    assert read_config(target / "gain-3") == {"data.name": "text", "optim.lr": 0.1}
    assert (target / "gain-4" / "metrics.jsonl").read_bytes() == (sweep / "gain-4" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("probes", "seeds"), [("all", {3, 4}), ("none", set())])
def test_whose_probes_are_kept(sweep: Path, tmp_path: Path, probes: str, seeds: set[int]) -> None:
    assert main([str(sweep), str(tmp_path / "copy"), "--probes", probes]) == 0
    found = {int(path.parent.name[-1]) for path in (tmp_path / "copy").glob("*/probe.jsonl")}
    assert found == seeds


def test_of_a_search_the_first_trials_probes_are_kept(sweep: Path, tmp_path: Path) -> None:
    for number, run in enumerate(sorted(path.parent for path in sweep.glob("*/summary.json"))):
        record = json.loads((run / "summary.json").read_text())
        trial = {"study": f"s-{record['variant']}", "number": number}
        (run / "summary.json").write_text(json.dumps(record | {"variant": f"trial-{number:03d}", "trial": trial}))
    assert main([str(sweep), str(tmp_path / "copy")]) == 0
    assert {path.parent.name for path in (tmp_path / "copy").glob("*/probe.jsonl")} == {"gain-3", "gated-3"}


def test_a_report_of_the_copy_is_that_of_the_sweep(sweep: Path, tmp_path: Path) -> None:
    assert main([str(sweep), str(tmp_path / "copy")]) == 0
    for folder in (sweep, tmp_path / "copy"):
        assert report([str(folder)]) == 0
    tables = [(folder / "report" / "tables" / "comparison.csv").read_text() for folder in (sweep, tmp_path / "copy")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("place", ["sweep", "sweep/copy", "."])
def test_neither_folder_may_lie_in_the_other(
    sweep: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(sweep)
    assert main([str(sweep), str(tmp_path / place)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and names(sweep) == before


def test_nothing_to_copy_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing"), str(tmp_path / "copy")]) == 2
    assert capsys.readouterr().err == f"error: no finished runs in {tmp_path}/missing\n"
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Errno 2] No such file: '/home/me/my runs/a b.txt'", "[Errno 2] No such file: '<path>'"),
        ("FileNotFoundError: /home/me/my runs/x.txt: gone", "FileNotFoundError: <path>: gone"),
        ("full: C:\\Users\\Jane Doe\\x.txt", "full: <path>"),
        ("saw \\\\server\\share\\x here", "saw <path> here"),
        ("in file:///home/me/x and ~me/runs/a", "in <path> and <path>"),
        (
            "sweep.arms={a:[data.path=/x],b:['data.path'=/y]}",
            "sweep.arms={a:[data.path=<path>],b:['data.path'=<path>]}",
        ),
        ("sweep.arms={a:['data.path=my text.txt',optim.lr=1e-3]}", "sweep.arms={a:['data.path=<path>',optim.lr=1e-3]}"),
        ("sweep.grid={data.path:[/x,/y/z],optim.lr:[0.1]}", "sweep.grid={data.path:[<path>,<path>],optim.lr:[0.1]}"),
        ("data.path=/home/me/my text.txt", "data.path=<path>"),
        ("no postgresql://me:p@ss@host:5432/db there", "no postgresql://<login>@host:5432/db there"),
        ("postgresql://host/db?user=me&password=abc", "postgresql://host/db?user=<login>&password=<login>"),
        ("sqlite:////home/me/s.db", "sqlite:///<path>"),
    ],
)
def test_paths_and_logins_get_a_mark(text: str, expected: str) -> None:
    assert clean_text(text) == expected
    assert clean_text(expected) == expected


@pytest.mark.parametrize(
    "text",
    ["RWKV/Mamba 0.358 over 10 logged steps to 2,500", "tokens /s and 1/2 or and/or", "hydra/launcher=joblib",
     "sqlite:///searches.db", "https://github.com/a/b/c", "warmup: 3", "timeout=30", "wkv6: triton+fla, conv: torch",
     "blocks/12", "../relative/place", "'/' is the root"],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert clean_text(text) == text


@pytest.mark.parametrize(
    ("platform", "kept"),
    [
        ("Linux-6.1.0-13-amd64-x86_64-with-glibc2.36", "Linux x86_64"),
        ("Linux x86_64", "Linux x86_64"),
        ("macOS-14.4-arm64-arm-64bit", "macOS arm64"),
        ("Windows-10-10.0.19045-SP0", "Windows"),
    ],
)
def test_of_the_platform_system_and_machine_stay(platform: str, kept: str) -> None:
    assert system_and_machine(platform) == kept


def test_records_are_cleaned_at_every_depth() -> None:
    record = {
        "sweep": {"arms": {"a": ["data.path=/x", "optim.lr=0.1"], "storage": ["fusion=gain"]},
                  "grid": {"data.path": ["my texts/a.txt", "/y"], "out": ["/x"]}},
        "storage": "mysql://host/db", "trials": [{"worker": "host-17-ab", "values": [0.1, 3], "reason": "in '/a/b'"}],
        "runs": [{"overrides": ["data.path=/x", "sweep.arms={a:[out=/x]}"]}], "overrides": None, "n": 1e300,
    }  # fmt: skip
    assert clean(record) == {
        "sweep": {"arms": {"a": ["data.path=<path>", "optim.lr=0.1"], "storage": ["fusion=gain"]},
                  "grid": {"data.path": ["<path>", "<path>"], "out": ["<path>"]}},
        "storage": None, "trials": [{"worker": None, "values": [0.1, 3], "reason": "in '<path>'"}],
        "runs": [{"overrides": ["sweep.arms={a:[out=<path>]}"]}], "overrides": None, "n": 1e300,
    }  # fmt: skip


def test_hybrid_reads_a_published_configuration(sweep: Path, tmp_path: Path) -> None:
    given = ["data=text", "data.path=/home/me/text.txt", "data.cache_dir=/home/me", "out=/home/me/runs",
             "display.run_index=4", "sweep.search.storage=sqlite:////home/me/s.db", "optim.lr=3e-05"]  # fmt: skip
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        config = resolve(compose("config", given))
    (sweep / "gain-3" / "config.yaml").write_text(to_yaml(config))
    assert main([str(sweep), str(tmp_path / "copy")]) == 0
    published = from_yaml(tmp_path / "copy" / "gain-3" / "config.yaml")
    assert identity(published) == identity(config)
    assert (published.out, published.data.path, published.data.cache_dir, published.sweep.search.storage,
            published.display) == (Config.out, None, DataConfig.cache_dir, None, DisplayConfig())  # fmt: skip


def test_a_part_of_a_configuration_gets_no_new_keys() -> None:
    assert without_local_keys({"optim": {"out": "x"}, "data": None, "sweep": {"name": "s"}}) == {
        "optim": {"out": "x"}, "data": None, "sweep": {"name": "s"},
    }  # fmt: skip


def test_every_json_record_is_cleaned(sweep: Path, tmp_path: Path) -> None:
    for place in ("gain-3/diagnosis.json", "search.json", "search-gain.json", "sweep.json"):
        (sweep / place).write_text('{"note": "left in /home/me/runs", "value": 0.1, "platform": "Linux-6.1-x86_64"}')
    summary = json.loads((sweep / "gain-4" / "summary.json").read_text())
    failed = summary | {"status": "failed", "stop_reason": "OSError: no /home/me/x"}
    (sweep / "gain-4" / "summary.json").write_text(json.dumps(failed))
    assert main([str(sweep), str(tmp_path / "copy")]) == 0
    for place in ("gain-3/diagnosis.json", "search.json", "search-gain.json", "sweep.json"):
        record = {"note": "left in <path>", "value": 0.1, "platform": "Linux x86_64"}
        assert json.loads((tmp_path / "copy" / place).read_text()) == record, place
    assert json.loads((tmp_path / "copy/gain-4/summary.json").read_text())["stop_reason"] == "OSError: no <path>"


def test_the_best_of_a_search_is_copied_and_its_journal_is_not(sweep: Path, tmp_path: Path) -> None:
    (sweep / "study.journal").write_text("{}")
    about = "# Trial 3: best_val_loss 1.5 (one seed)\n#   python -m hybrid.train -m --config-dir "
    body = "defaults:\n- config\n- override fusion: gated\noptim:\n  lr: 0.0123\ndata:\n  path: "
    for name in ("best.yaml", "best-gain.yaml"):
        (sweep / name).write_text(f"{about}/home/me/runs\n{body}/home/me/text.txt\n")
    assert main([str(sweep), str(tmp_path / "copy")]) == 0
    for name in ("best.yaml", "best-gain.yaml"):
        assert (tmp_path / "copy" / name).read_text() == f"{about}<path>\n{body}null\n"
    assert not (tmp_path / "copy" / "study.journal").exists()


@pytest.mark.parametrize(
    ("place", "content"),
    [
        ("gated-4/config.yaml", "a: [1"),
        ("gated-4/config.yaml", "- a list"),
        ("gated-4/config.yaml", "data: x"),
        ("gated-4/config.yaml", "sweep: {search: x}"),
        ("gated-4/config.yaml", None),
        ("gated-4/summary.json", '{"seed_init": 3}'),
        ("gated-4/summary.json", '{"variant": "gated", "seed_init": null}'),
        ("gated-4/summary.json", '{"variant": "gated", "seed_init": true}'),
        ("gated-4/summary.json", "{"),
        ("gated-4/diagnosis.json", "[]"),
        ("sweep.json", "{"),
        ("search.json", "3"),
        ("best.yaml", "x"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_written(
    sweep: Path, tmp_path: Path, place: str, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / place).unlink() if content is None else (sweep / place).write_text(content)
    assert main([str(sweep), str(tmp_path / "copy")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert str((sweep / place).parent) in said.err and Path(place).name in said.err
    assert not (tmp_path / "copy").exists()


def test_two_seeds_of_null_are_no_traceback(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (3, 4):
        (sweep / f"gain-{seed}" / "summary.json").write_text('{"variant": "gain", "seed_init": null}')
    assert main([str(sweep), str(tmp_path / "copy")]) == 2
    assert capsys.readouterr().err == f"error: {sweep}/gain-3/summary.json: seed_init is not a whole number\n"


@pytest.mark.parametrize("place", ["copy", "copy/gated-4"])
def test_a_file_where_a_folder_is_to_be(
    sweep: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    assert main([str(sweep), str(tmp_path / "copy")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / place} is no folder\n"
    assert [path for path in tmp_path.rglob("*") if tmp_path / "copy" in path.parents] in ([], [tmp_path / place])


def test_probes_that_are_not_kept_go(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(sweep), str(tmp_path / "copy"), "--probes"]
    assert main([*arguments, "first"]) == 0 and main([*arguments, "none"]) == 0
    assert not [*tmp_path.glob("copy/*/probe.jsonl"), *tmp_path.glob("copy/*/gpu.jsonl")]
    assert "removed 4 files of probes that are not kept\n" in capsys.readouterr().out
    assert (sweep / "gain-3" / "probe.jsonl").exists()


def test_what_the_sweep_has_no_more_is_named_and_left(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "copy"
    assert main([str(sweep), str(target)]) == 0
    (sweep / "gain-4").rename(tmp_path / "away")
    (sweep / "gated-4" / "summary.json").unlink()
    (target / "search.json").write_text("{}")
    (target / "report").mkdir()
    capsys.readouterr()
    assert main([str(sweep), str(target)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"2 runs to {target}; 2 unfinished runs left out",
                    f"left in {target}, not finished in {sweep}: gain-4, gated-4, search.json"]  # fmt: skip
    assert (target / "gain-4" / "summary.json").exists() and (target / "search.json").exists()


def test_a_finished_run_without_steps_is_named(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep / "gain-4" / "metrics.jsonl").unlink()
    assert main([str(sweep), str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().out.endswith("\nwithout metrics.jsonl: gain-4\n")
