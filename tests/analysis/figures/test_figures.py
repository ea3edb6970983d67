"""Figures: which are made of what, that they show the numbers, and that labels stay apart."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis.comparison.baseline import choose_baseline
from analysis.comparison.compare import compare
from analysis.figures import curves, drawing
from analysis.figures.curves import CurveReading
from analysis.figures.drawing import Drawn, _figures, drop_stale, write_figures
from analysis.figures.gradient_ratio import _bands
from analysis.figures.over_steps import by_step, thin_out
from analysis.figures.style import PALETTE, arm_styles, look, shrink
from analysis.figures.tradeoffs import pareto_front, tradeoffs
from analysis.records.configs import differing, read_config
from analysis.records.frames import runs_frame
from analysis.records.runs import read_records
from analysis.records.steps import StepReader

FUSIONS = ("gain", "gated")


def curves_of(comparison, records):
    return CurveReading(comparison.runs, comparison.arms, comparison.baseline.arm, records, StepReader()).result()


def figures_of(directory, baseline=None):
    records = read_records(directory)
    comparison = compare(records, runs_frame(records.runs), choose_baseline(records, baseline, "final_val_loss"),
                         "final_val_loss")  # fmt: skip
    read = curves_of(comparison, records)
    with look():
        return {name: figure for name, _, _, figure in _figures(comparison, records, read)}, comparison


def config(**keys):
    return "".join(f"{key}: {{{inner}}}\n" for key, inner in keys.items())


@pytest.fixture(scope="module")
def factorial(tmp_path_factory, make_run):
    """fusion x branch_norm, two seeds, of which two arms have gates and one is larger."""
    root = tmp_path_factory.mktemp("factorial")
    for i, (fusion, norm) in enumerate(itertools.product(FUSIONS, ("none", "rms"))):
        for seed in (0, 1):
            make_run(root, f"{fusion}-branch_norm={norm}", seed, final=1.5 + 0.01 * i + 0.001 * seed,
                     gate=0.3 if fusion == "gated" else None, params=3_500_000 * (1 + (i == 3)),
                     overrides=[f"fusion={fusion}", f"fusion.branch_norm={norm}"])  # fmt: skip
    for metrics in root.glob("gated*/metrics.jsonl"):
        start = {"kind": "eval", "step": 0, "val_loss": 4.5, "train_loss": None, "gate_mean": [0.3] * 4}
        metrics.write_text(json.dumps(start) + "\n" + metrics.read_text())
    return root


@pytest.fixture(scope="module")
def drawn(factorial):
    return figures_of(factorial, "gain-branch_norm=none")


def test_a_figure_without_data_is_not_made(drawn, tmp_path, make_run):
    assert set(drawn[0]) == {
        "final_loss", "learning_curves", "interaction", "gate_values", "gradient_ratio", "tradeoffs"
    }  # fmt: skip
    for arm in FUSIONS:
        (make_run(tmp_path, arm, 0) / "metrics.jsonl").unlink()
    assert set(figures_of(tmp_path)[0]) == {"final_loss", "learning_curves"}


def test_one_colour_per_arm_in_every_figure(drawn):
    figures, comparison = drawn
    styles = arm_styles(sorted(comparison.arms), comparison.baseline.arm, comparison.arms)
    gated = {styles[arm].colour for arm in comparison.arms if arm.startswith("gated")}
    lines = {line.get_color() for ax in figures["gate_values"].axes for line in ax.lines}
    assert lines == gated and len(gated) == 2
    everyone = {style.colour for style in styles.values()}
    for name in ("learning_curves", "gradient_ratio", "tradeoffs", "interaction"):
        own = {line.get_color() for ax in figures[name].axes for line in ax.lines}
        assert everyone <= own, name


def test_gates_start_where_they_were_measured(drawn, factorial):
    axes = [ax for ax in drawn[0]["gate_values"].axes if ax.get_visible()]
    assert len(axes) == 4  # write_run logs four blocks
    assert axes[0].get_title(loc="left") == "Layer 1 of 4"
    for line in axes[2].lines:
        assert line.get_xdata().tolist() == [0, 50, 100, 150] and set(line.get_ydata()) == {0.3}


def test_an_arm_without_a_recurrent_state_is_drawn():
    """Attention has none: 0 floats, which a logarithmic axis would leave out."""
    states = {"attention": 0, "rwkv": 17_000, "hybrid": 270_000}
    runs = pd.DataFrame(
        {"arm": [*states], "final_val_loss": [1.6, 1.5, 1.4], "params_total": 5e6, "tokens_per_second": 1e5,
         "state_floats": [*states.values()], "members": 1}
    )  # fmt: skip
    for arms, scale in (([*states], "linear"), (["rwkv", "hybrid"], "log")):
        figure = tradeoffs(runs, "final_val_loss", arms, arm_styles(arms, arms[0], arms))
        (ax,) = figure.axes
        drawn = {x for line in ax.lines for x in line.get_xdata()}
        low, high = ax.get_xlim()
        assert ax.get_xscale() == scale and {states[arm] for arm in arms} <= drawn
        assert all(low <= states[arm] <= high for arm in arms)


def test_gate_mean_over_seeds_by_hand(tmp_path, make_run):
    for seed, gate in enumerate((0.2, 0.6)):
        make_run(tmp_path, "gated", seed, gate=gate)
    figures, _ = figures_of(tmp_path)
    line = figures["gate_values"].axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([0.4] * 3)


def test_bands_of_the_gradient_ratio(drawn):
    """write_run logs 0.8 in every step; between 0.3 and 3 is pass, above is warn."""
    ax = drawn[0]["gradient_ratio"].axes[0]
    assert ax.get_yscale() == "log"
    for line in [line for line in ax.lines if len(line.get_xdata()) > 5]:
        assert line.get_ydata() == pytest.approx(0.8)
    ax.set_ylim(0.01, 100)
    for text in list(ax.texts):
        text.remove()
    _bands(ax)
    places = {(text.get_text(), round(float(text.get_position()[1]), 3)) for text in ax.texts}
    assert places == {("fail", 0.097), ("warn", 0.291), ("pass", 2.91), ("warn", 3.09), ("fail", 10.3)}


def test_learning_rate_curve(tmp_path, make_run):
    for fusion, (rate, loss) in itertools.product(FUSIONS, ((1e-3, 1.6), (3e-3, 1.5), (1e-2, 1.7))):
        overrides = [f"fusion={fusion}", f"optim.lr={rate}"]
        make_run(tmp_path, f"{fusion}-lr={rate}", 0, final=loss + 0.01 * (fusion == "gain"), overrides=overrides)
    figures, _ = figures_of(tmp_path)
    assert "interaction" not in figures  # it would show the same once more
    ax = figures["learning_rates"].axes[0]
    assert ax.get_xscale() == "log"
    curves = sorted(line.get_ydata().tolist() for line in ax.lines if len(line.get_xdata()) == 3)
    assert curves == [[1.6, 1.5, 1.7], [pytest.approx(1.61), pytest.approx(1.51), pytest.approx(1.71)]]


def test_interaction_by_hand(drawn):
    """Two factors of two levels: a line per fusion over branch_norm, each through its own two means over seeds."""
    (ax,) = drawn[0]["interaction"].axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["none", "rms"] and ax.get_xlabel() == "branch_norm"
    curves = [
        line.get_ydata().tolist()
        for line in ax.lines
        if len(line.get_xdata()) == 2 and line.get_zorder() == 2 and line.get_ydata()[0] > 1
    ]
    assert curves == [pytest.approx([1.5005, 1.5105]), pytest.approx([1.5205, 1.5305])]
    assert {text.get_text() for text in ax.texts} == {"fusion=gain", "fusion=gated"}


def test_differing_keys():
    configs = {f"a{i}": {"fusion.n": i, "model": "tiny"} | ({"extra": 1} if i else {}) for i in (0, 1)}
    assert differing(configs) == ["fusion.n", "extra"]


def test_read_config(tmp_path, make_run):
    folder = make_run(tmp_path, "gain", 3, config=config(fusion="name: gain", display="run_index: 3"))
    assert read_config(folder) == {"trainer.max_steps": 150, "fusion.name": "gain"}
    for content in ("a: [", "- 1", "\x00", ""):
        (folder / "config.yaml").write_text(content)
        assert read_config(folder) is None


def test_pareto_front_by_hand():
    loss, cost = np.array([1.0, 2.0, 1.5, 1.0, 0.9]), np.array([3.0, 1.0, 2.0, 4.0, 9.0])
    assert pareto_front(loss, cost).tolist() == [True, True, True, False, True]


def test_by_step_keeps_arms_and_steps_apart():
    runs = pd.DataFrame({"arm": ["a", "b", "a"]})
    rows = [(0, "train", 10, 1.0), (0, "train", 20, 2.0), (2, "train", 10, 3.0), (1, "eval", 10, 9.0)]
    steps = pd.DataFrame(rows, columns=["run", "kind", "step", "loss"])
    tables = by_step(steps, runs, ["a", "b"], "train", "loss")
    assert tables["a"].loc[10].tolist() == [1.0, 3.0]
    assert tables["a"].loc[20].isna().tolist() == [False, True]
    assert tables["b"].empty
    assert thin_out(pd.DataFrame({0: range(3)}, index=[0, 1, 2]), log=True).index.tolist() == [1, 2]


def test_no_labels_overlap_with_many_arms(tmp_path, make_run):
    for i in range(17):
        make_run(tmp_path, f"arm_with_a_long_name_{i}", 0, final=1.5 + 1e-4 * i, gate=0.3, params=10**6 * (i + 1))
    figures, _ = figures_of(tmp_path)
    for name in ("learning_curves", "gate_values", "gradient_ratio", "tradeoffs"):
        figure = figures[name]
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        legends = [text for legend in figure.legends for text in legend.get_texts()]
        texts = [text for ax in figure.axes for text in ax.texts] + legends
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text().startswith("arm_with")]
        assert len(boxes) == 17, name
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), name


def test_stale_figures_are_removed_and_nothing_else(tmp_path):
    for name in ("learning_rates.png", "search_history-1-a.svg", "my_own.png", "final_loss.png", "final_loss.svg"):
        (tmp_path / name).write_bytes(b"")
    drop_stale(tmp_path, [Drawn("final_loss", "", "", tmp_path / "final_loss.png", tmp_path / "final_loss.svg")])
    assert {path.name for path in tmp_path.iterdir()} == {"my_own.png", "final_loss.png", "final_loss.svg"}


def test_figures_written_beside_are_the_same(factorial, tmp_path, monkeypatch):
    records = read_records(factorial)
    baseline = choose_baseline(records, "gain-branch_norm=none", "final_val_loss")
    comparison = compare(records, runs_frame(records.runs), baseline, "final_val_loss")
    read = curves_of(comparison, records)
    here = write_figures(tmp_path / "here", comparison, records, read)
    monkeypatch.setattr(drawing, "MANY_RUNS", 1)
    beside = write_figures(tmp_path / "beside", comparison, records, read)
    assert [drawn.name for drawn in here] == [drawn.name for drawn in beside] and len(here) == 6
    for one, other in zip(here, beside, strict=True):
        assert one.png.read_bytes() == other.png.read_bytes() and one.svg.read_bytes() == other.svg.read_bytes()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        write_figures(tmp_path / "file", comparison, records, read)


def test_only_arms_that_are_drawn_are_read(factorial, monkeypatch):
    """The best arm and the baseline, and the runs keep their numbers."""
    monkeypatch.setattr(curves, "MOST_ARMS", 1)
    records = read_records(factorial)
    baseline = choose_baseline(records, "gated-branch_norm=rms", "final_val_loss")
    comparison = compare(records, runs_frame(records.runs), baseline, "final_val_loss")
    found = curves_of(comparison, records)
    read = {comparison.runs["arm"][run] for run in found.steps.rows["run"]}
    assert read == set(curves.drawn_arms(comparison)) == {"gain-branch_norm=none", "gated-branch_norm=rms"}
    gated = found.steps.lists["gate_mean"]
    assert {comparison.runs["arm"][run] for run in gated["run"]} == {"gated-branch_norm=rms"}


def test_a_small_palette_keeps_the_colours(tmp_path):
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(6, 3))
    panel = figure.subplots()
    for i, colour in enumerate(PALETTE):
        panel.plot([0, 1, 2], [i, i + 1, i], color=colour, lw=3)
    whole = tmp_path / "whole.png"
    figure.savefig(whole, dpi=160, bbox_inches="tight")
    large = whole.stat().st_size
    with Image.open(whole) as image:
        before = np.asarray(image.convert("RGB")).astype(int)
    shrink(whole)
    with Image.open(whole) as image:
        after = np.asarray(image.convert("RGB")).astype(int)
    assert whole.stat().st_size < 0.6 * large
    assert (before[0, 0] == after[0, 0]).all() and abs(after - before).mean() < 0.5
