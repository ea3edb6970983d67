"""probe.jsonl and gpu.jsonl: what is read, joined and drawn of them, and files that are torn or not there."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from analysis.figures.style import arm_styles, look
from analysis.health import gpu, probes
from analysis.health.gpu import gpu_use, minutes, read_gpu
from analysis.health.probes import read_probes
from analysis.health.state_figure import state_health
from analysis.records.runs import read_records
from analysis.report import write_report

ARMS = ["gain", "gated"]


def styles(arms=ARMS):
    return arm_styles(arms, arms[0], arms)


def probe(step, cosines=(0.9, 0.97), novelties=(0.5, 0.3), ranks=(4.0, 8.0), **more):
    """A row of two layers, whose RWKV branch has these readings; Mamba's is one layer's only."""
    layers = [
        {"layer": i, "cosine": 0.1, "branches": {"rwkv": {
            "rms": 1.0, "cosine": {"median": 0.1, "worst": c}, "novelty": {"median": 2.0, "worst": n},
            "effective_rank": {"median": r, "worst": 1.0}}}}
        for i, (c, n, r) in enumerate(zip(cosines, novelties, ranks, strict=True))
    ]  # fmt: skip
    layers[0]["branches"]["mamba"] = {"cosine": {"worst": 0.5, "median": 0.1}, "novelty": None}
    layers[0]["branches"]["attention"] = {"rms": 1.0, "cosine": None, "novelty": None, "effective_rank": None}
    return {"kind": "probe", "step": step, "layers": layers, **more}


def write_probes(run, rows):
    (run / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_layers_are_joined_in_the_direction_of_failing(tmp_path, make_run):
    """The highest cosine and the lowest novelty of the worst heads, the median of the layers' median ranks."""
    write_probes(make_run(tmp_path, "gain", 0), [probe(0), probe(50, cosines=(0.99, 0.8))])
    found, notes = read_probes(read_records(tmp_path).runs, ["gain"])
    assert notes == []
    rwkv = found[found["branch"] == "rwkv"]
    assert rwkv[["step", "cosine", "novelty", "effective_rank"]].to_numpy().tolist() == [
        [0, 0.97, 0.3, 6.0], [50, 0.99, 0.3, 6.0]
    ]  # fmt: skip
    mamba = found[found["branch"] == "mamba"]
    assert mamba["cosine"].tolist() == [0.5, 0.5] and mamba["novelty"].isna().all()
    assert set(found["branch"]) == {"rwkv", "mamba"}  # attention has no state


def test_torn_and_foreign_lines(tmp_path, make_run):
    run = make_run(tmp_path, "gain", 0)
    lines = [json.dumps(probe(0)), "{", "[1]", '{"step": 3}', json.dumps(probe(50)), json.dumps(probe(100))[:40]]
    (run / "probe.jsonl").write_text("\n".join(lines))  # the last line is still being written
    found, (note,) = read_probes(read_records(tmp_path).runs, ["gain"])
    assert found.loc[found["branch"] == "rwkv", "step"].tolist() == [0, 50]
    assert note == f"{run.name}/probe.jsonl: 3 unreadable lines skipped"


def test_a_step_probed_again_after_a_resume_counts_once(tmp_path, make_run):
    write_probes(make_run(tmp_path, "gain", 0), [probe(0), probe(50), probe(50, cosines=(0.1, 0.2))])
    found, _ = read_probes(read_records(tmp_path).runs, ["gain"])
    assert found.loc[found["branch"] == "rwkv", ["step", "cosine"]].to_numpy().tolist() == [[0, 0.97], [50, 0.2]]


def test_of_many_runs_every_arms_first_is_read_first(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr(probes, "MOST_RUNS", 3)
    for arm in ARMS:
        for seed in range(3):
            write_probes(make_run(tmp_path, arm, seed), [probe(0)])
    runs = read_records(tmp_path).runs
    found, _ = read_probes(runs, ARMS)
    read = {(runs[place].arm, runs[place].seeds[0]) for place in found["run"]}
    assert read == {("gain", 0), ("gated", 0), ("gain", 1)}


def test_long_files_are_thinned_evenly(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr(probes, "MOST_ROWS", 3)
    write_probes(make_run(tmp_path, "gain", 0), [probe(step) for step in range(0, 101, 10)])
    found, _ = read_probes(read_records(tmp_path).runs, ["gain"])
    assert found.loc[found["branch"] == "rwkv", "step"].tolist() == [0, 50, 100]


def test_state_figure(tmp_path, make_run):
    for seed, highest in enumerate((0.96, 0.98)):
        rows = [probe(step, cosines=(0.9, highest)) for step in (50, 100)]
        write_probes(make_run(tmp_path, "gain", seed), rows)
    found, _ = read_probes(read_records(tmp_path).runs, ["gain"])
    with look():
        figure = state_health(found, ["gain"], styles(["gain"]))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[:3] == [
        "RWKV: cosine of successive states", "RWKV: novelty (calibrated)", "RWKV: effective rank"
    ]  # fmt: skip
    colour = styles(["gain"])["gain"].colour
    (line,) = [line for line in figure.axes[0].lines if line.get_color() == colour]
    assert line.get_ydata() == pytest.approx([0.03, 0.03])  # 1 - mean of 0.96 and 0.98
    ticks = figure.axes[0].yaxis.get_major_formatter()
    assert [ticks(value) for value in (0.05, 0.01)] == ["0.95", "0.99"]
    assert state_health(found.iloc[:0], ["gain"], styles(["gain"])) is None


def sample(time, **readings):
    return {"time": time, "utilisation_percent": 90, "memory_bytes": 2**31, "temperature_c": None} | readings


def write_samples(run, samples):
    (run / "gpu.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))


def test_interruptions_count_for_no_time():
    """Samples every second, one gap of an hour, which becomes one of a second."""
    times = np.array([0.0, 1.0, 2.0, 3602.0, 3603.0]) + 1.7e9
    assert minutes(times) == pytest.approx(np.arange(5) / 60)
    assert minutes(times[:1]).tolist() == [0.0] and minutes(times[:0]).tolist() == []


def test_gpu_samples_of_the_first_run(tmp_path, make_run):
    for seed in range(2):
        write_samples(make_run(tmp_path, "gain", seed), [sample(100.0 + t, power_w=10 * seed + t) for t in range(4)])
    (make_run(tmp_path, "gated", 0) / "gpu.jsonl").write_text("no sample\n{")
    found = read_gpu(read_records(tmp_path).runs, ARMS)
    assert list(found) == ["gain"]
    assert found["gain"]["minutes"].tolist() == pytest.approx([0, 1 / 60, 2 / 60, 3 / 60])
    assert found["gain"]["power_w"].tolist() == [0, 1, 2, 3]
    with look():
        figure = gpu_use(found, styles())
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}
    assert list(panels) == ["Utilisation, %", "Memory held on the GPU, GiB", "Power, W"]  # no temperature was given
    assert set(panels["Memory held on the GPU, GiB"].lines[0].get_ydata()) == {2.0}
    assert panels["Power, W"].get_xlabel() == "seconds of training"


def test_many_samples_become_medians(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr(gpu, "MOST_POINTS", 2)
    samples = [sample(float(t), power_w=power) for t, power in enumerate((1, 2, 9, 20, 30, 40))]
    write_samples(make_run(tmp_path, "gain", 0), samples)
    found = read_gpu(read_records(tmp_path).runs, ["gain"])["gain"]
    assert found["power_w"].tolist() == [2, 30] and found["minutes"].tolist() == pytest.approx([1 / 60, 4 / 60])


def test_without_samples_there_is_no_figure():
    assert gpu_use({}, styles()) is None


def test_figures_on_the_page(tmp_path, make_run):
    run = make_run(tmp_path, "gain", 0)
    write_probes(run, [probe(step) for step in (0, 50, 100)])
    write_samples(run, [sample(float(t), power_w=math.nan if t == 3 else 250.0) for t in range(9)])
    paths = write_report(tmp_path)
    page = paths.html.read_text()
    assert 'id="figure-state_health"' in page and 'id="figure-gpu"' in page and '<section id="health">' in page
    assert "](figures/gpu.png)" in paths.markdown.read_text()
    for name in ("probe.jsonl", "gpu.jsonl"):
        (run / name).unlink()
    assert 'id="health"' not in write_report(tmp_path).html.read_text()
    assert not any(path.stem in ("gpu", "state_health") for path in paths.folder.rglob("*"))
