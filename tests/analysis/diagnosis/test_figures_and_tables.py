"""Tables and figures of the branches: the numbers that they show, by hand, and what there is no data for."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.collections import QuadMesh
from matplotlib.text import Annotation

from analysis.diagnosis import report
from analysis.diagnosis.gate_figures import gate_classes, gate_drift, gate_positions
from analysis.diagnosis.memory_figures import half_lives, influence_curves, loss_by_position
from analysis.diagnosis.necessity_map import necessity_map
from analysis.diagnosis.panels import MOST_PANELS, branch_look, drawn_arms
from analysis.diagnosis.records import read_diagnoses
from analysis.diagnosis.tables import branch_tables, fall
from analysis.figures.style import arm_styles, look
from analysis.records.runs import read_records
from analysis.tables.table import DASH
from tests.analysis.diagnosis.diagnosis_files import write_diagnosis

ARMS = ["concat", "gated", "mamba_only", "twins"]
BRANCHES = {"twins": ("rwkv_a", "rwkv_b"), "mamba_only": ("mamba",)}
DRAWINGS = (necessity_map, influence_curves, half_lives, loss_by_position, gate_drift, gate_positions, gate_classes)


@pytest.fixture(scope="module")
def found(tmp_path_factory, make_run):
    """Four arms, three seeds whose loss increases differ by 0.01; only one arm has gates."""
    root = tmp_path_factory.mktemp("diagnosed")
    for arm, seed in itertools.product(ARMS, range(3)):
        run = make_run(root, arm, seed)
        write_diagnosis(run, branches=BRANCHES.get(arm, ("rwkv", "mamba")), gates=arm == "gated", shift=0.01 * seed)
    return read_diagnoses(read_records(root).runs)[0]


@pytest.fixture(scope="module")
def drawn(found):
    with look():
        return {function.__name__: function(found, ARMS, styles()) for function in DRAWINGS}


def styles():
    return arm_styles(ARMS, "concat", ARMS)


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_necessity_table_by_hand(found):
    """0.40, 0.41, 0.42: mean 0.41, +- 4.302653 x 0.01 / root 3 = 0.0248; the control is 0.01 in every seed."""
    table = branch_tables(found, ARMS)["branches"]
    rows = {(row[0], row[1]): row[2:] for row in texts(table)}
    assert rows["gated", "Mamba"][:4] == ["3", "0.410 ± 0.025", "0.010 ± 0.000", "0.310 ± 0.025"]
    assert list(rows) == [("concat", "RWKV"), ("concat", "Mamba"), ("gated", "RWKV"), ("gated", "Mamba"),
                          ("mamba_only", "Mamba"), ("twins", "RWKV a"), ("twins", "RWKV b")]  # fmt: skip


def test_what_is_not_shown_is_in_parentheses(tmp_path, make_run):
    for seed in range(3):
        write_diagnosis(make_run(tmp_path, "gated", seed), control=0.2, shift=0.01 * seed)
    own, _ = read_diagnoses(read_records(tmp_path).runs)
    rwkv, mamba = texts(branch_tables(own, ["gated"])["branches"])
    assert rwkv[3] == "(0.130 ± 0.025)" and mamba[3] == "0.410 ± 0.025"
    with look():
        figure = necessity_map(own, ["gated"], arm_styles(["gated"], "gated", ["gated"]))
    words = [text.get_text() for text in figure.axes[0].texts if text.get_text() not in ("RWKV", "Mamba")]
    assert words[:6] == ["(.130)", "(.110)", "(.210)", ".410", ".310", ".610"]


def test_fall_by_hand():
    """Through (1, 1), (4, 0.25), (16, 0.0625), a straight line of slope -1 in the log-log plot: 0.1 is at 10."""
    lags, nats = np.array([1.0, 4.0, 16.0]), np.array([1.0, 0.25, 0.0625])
    assert fall(lags, nats, 0.1) == pytest.approx(10.0)
    assert fall(lags, nats, 0.25) == pytest.approx(4.0)
    assert fall(lags, nats, 0.01) == math.inf
    assert fall(lags, np.array([1.0, 0.0, 0.0]), 0.1) == 4.0
    assert math.isnan(fall(lags, np.zeros(3), 0.1)) and math.isnan(fall(lags[:0], lags[:0], 0.1))


def test_reach_table_by_hand(found):
    """Everything falls as 0.5/lag: a tenth at 10, a hundredth beyond the last lag, 64. RWKV as 0.25/lag, Mamba as
    0.25/lag^2, which is down to a tenth at the root of 10 and to a hundredth at 10."""
    rows = {tuple(row[:2]): row[2:] for row in texts(branch_tables(found, ARMS)["reach"])}
    assert rows["gated", "everything"] == ["0.5 (0.5–0.5)", "0.0078 (0.0078–0.0078)", "10", "> 64"]
    assert rows["gated", "Mamba"][2:] == ["3.2", "10"]
    assert [path for arm, path in rows if arm == "twins"] == ["everything", "RWKV a", "RWKV b"]


def test_gate_table_by_hand(found):
    """Layer 4 starts at 0.3 and ends at 0.6, 0.61, 0.62."""
    table = branch_tables(found, ARMS)["branch_gates"]
    assert {row[0] for row in texts(table)} == {"gated"}
    assert texts(table)[3] == ["gated", "4", "0.300", "0.610", "+0.310 ± 0.010", "0.100", "2.0%", "20.0%"]


def test_output_and_update_tables(found):
    tables = branch_tables(found, ARMS)
    outputs = tables["branch_outputs"]
    assert outputs.header[:4] == ["Model", "Layer", "RWKV RMS", "Mamba RMS"] and outputs.header[-1] == "Cosine"
    rows = texts(outputs)
    assert rows[0][:4] == ["concat", "1", "0.500", "1.500"] and rows[0][-1] == "0.050"
    single = next(row for row in rows if row[0] == "mamba_only")
    assert single[2] == DASH and single[3] == "0.500" and single[-1] == DASH
    assert texts(tables["updates"])[0] == ["concat", *(f"{x} ± 0.0e+00" for x in ("2.00e-03", "1.00e-03", "5.00e-03",
                                                                                  "1.00e-03"))]  # fmt: skip


def test_the_map_shows_all_layers_and_each(drawn):
    figure = drawn["necessity_map"]
    gated = next(ax for ax in figure.axes if ax.get_title(loc="left") == "gated")
    assert [tick.get_text() for tick in gated.get_yticklabels()] == ["all", "1", "2", "3", "4"]
    assert [tick.get_text() for tick in gated.get_xticklabels()] == ["zero", "mean", "shuffle"] * 2
    (mesh,) = [item for item in gated.collections if isinstance(item, QuadMesh)]
    values = np.asarray(mesh.get_array()).reshape(5, 6)
    assert values[0] == pytest.approx([0.13, 0.11, 0.21, 0.41, 0.31, 0.61])  # COSTS and 0.01
    assert values[1] == pytest.approx([0.022, 0.02, 0.03, 0.05, 0.04, 0.07])


def test_words_on_a_map_can_be_read(drawn):
    """Contrast by WCAG 2.1 of every number with the colour of its cell: at least 4.5."""

    def luminance(colour):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3]]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for name in ("necessity_map", "gate_classes"):
        for ax in [ax for ax in drawn[name].axes if ax.get_title(loc="left")]:
            (mesh,) = [item for item in ax.collections if isinstance(item, QuadMesh)]
            table = mesh.get_array().reshape(mesh._coordinates.shape[0] - 1, -1)
            for text in ax.texts:
                column, row = text.get_position()
                if not isinstance(text, Annotation):
                    cell = colormaps["cividis"](mesh.norm(table[row, column]))
                    ink = tuple(int(text.get_color()[i : i + 2], 16) / 255 for i in (1, 3, 5))
                    high, low = sorted((luminance(cell), luminance(ink)), reverse=True)
                    assert (high + 0.05) / (low + 0.05) >= 4.5, text.get_text()


def test_influence_has_a_line_per_path(drawn):
    figure = drawn["influence_curves"]
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}
    curves = {arm: [line for line in ax.lines if len(line.get_xdata()) == 7] for arm, ax in panels.items()}
    assert {arm: len(lines) for arm, lines in curves.items()} == {"concat": 3, "gated": 3, "mamba_only": 2, "twins": 3}
    assert curves["gated"][0].get_ydata() == pytest.approx([0.5 / 2**k for k in range(7)])
    assert curves["gated"][2].get_ydata() == pytest.approx([0.25 / 4**k for k in range(7)])
    assert {line.get_color() for line in curves["gated"]} == {styles()["gated"].colour}
    assert panels["gated"].get_xscale() == panels["gated"].get_yscale() == "log"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["everything", "RWKV, RWKV a only", "Mamba, RWKV b only"]


def test_a_branch_looks_the_same_in_every_arm():
    assert branch_look("rwkv") == branch_look("rwkv_a") == branch_look("mamba_a")
    assert branch_look("mamba") == branch_look("rwkv_b") != branch_look("rwkv")


def test_half_lives_by_hand(drawn):
    """Layer 1: the heads' medians are 1 and 2 tokens, their median 1.5; the second head never forgets (triangle)."""
    ax = next(ax for ax in drawn["half_lives"].axes if ax.get_title(loc="left") == "gated")
    points = [line for line in ax.lines if len(line.get_xdata()) == 1 and line.get_marker() in ("o", "s")]
    assert [line.get_ydata()[0] for line in points] == [1.5 * 2**layer for layer in range(4) for _ in range(2)]
    assert sum(line.get_marker() == "^" for line in ax.lines) == 8
    assert "Triangle" in " ".join(text.get_text() for text in drawn["half_lives"].texts)


def test_gate_drift_by_hand(drawn):
    (ax,) = [ax for ax in drawn["gate_drift"].axes if ax.get_visible()]
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_ydata()[0] for line in marks] == pytest.approx([0.3, 0.31, 0.3, 0.41, 0.3, 0.51, 0.3, 0.61])
    assert [text.get_text() for text in ax.texts] == ["2%", "2%", "2%", "2%", "20%"]


def test_gate_maps(drawn):
    ax, *_ = drawn["gate_positions"].axes
    (mesh,) = [item for item in ax.collections if isinstance(item, QuadMesh)]
    assert mesh.get_array().reshape(4, 32)[1, 0] == pytest.approx(0.45)
    ax, *_ = drawn["gate_classes"].axes
    assert [text.get_text() for text in ax.texts][:3] == [".30", ".32", ".34"]
    assert [tick.get_text() for tick in ax.get_xticklabels()][:2] == ["letter", "capital"]


def test_figures_hold_no_pictures(drawn, tmp_path):
    """The page allows none, so that a rasterised map would be an empty one."""
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.svg")
        assert "<image" not in (tmp_path / f"{name}.svg").read_text(), name


def test_without_data_there_is_no_figure(tmp_path, make_run):
    write_diagnosis(make_run(tmp_path, "gated", 0), gates=False, memory=None, necessity=[], outputs=[], updates={})
    own, _ = read_diagnoses(read_records(tmp_path).runs)
    assert branch_tables(own, ["gated"]) == {}
    assert [f(own, ["gated"], arm_styles(["gated"], "gated", ["gated"])) for f in DRAWINGS] == [None] * len(DRAWINGS)


def test_most_panels_and_the_baseline():
    arms = [f"arm{i}" for i in range(20)]
    assert drawn_arms(arms, "arm15") == [*arms[: MOST_PANELS - 1], "arm15"]
    assert drawn_arms(arms, "other") == arms[:MOST_PANELS]


def test_every_figure_is_cleared_away_later():
    from analysis.figures.drawing import NAMES
    from analysis.health.report import FIGURES

    assert set(report.FIGURES) | set(FIGURES) <= set(NAMES)


def test_page_and_files(tmp_path, make_run):
    from analysis.report import write_report

    for arm, seed in itertools.product(("gated", "gain"), range(2)):
        run = make_run(tmp_path, arm, seed, final=1.5 + 0.01 * seed + 0.1 * (arm == "gain"))
        if arm == "gated":
            write_diagnosis(run, layers=1, shift=0.001 * seed)
    paths = write_report(tmp_path)
    page, text = paths.html.read_text(), paths.markdown.read_text()
    assert '<section id="branches">' in page and 'href="#branches"' in page and "## What the branches do" in text
    assert "switching Mamba off everywhere costs 0.401 ± 0.006 nats" in page
    assert "Not diagnosed: gain." in page and "](figures/branch\\_layers.png)" not in text
    assert "](figures/branch_layers.png)" in text
    for name in ("branches.csv", "branches.md", "branches.tex", "reach.csv", "half_lives.csv", "gate_positions.csv"):
        assert paths.tables[name].stat().st_size > 50, name
    assert paths.tables["branches.csv"].read_text().splitlines()[0] == (
        "arm,seed_init,seed_data,layer,branch,intervention,increase,error,control,control_error"
    )

    first, second = sorted(tmp_path.rglob("diagnosis.json"))
    first.write_text(json.dumps({"schema": "other"}))
    second.unlink()
    bare = write_report(tmp_path)
    words = bare.markdown.read_text().replace("\\", "")
    assert f"{first.parent.name}: diagnosis.json has the schema 'other' instead of" in words
    assert 'id="branches"' not in bare.html.read_text() and "What the branches" not in words
    left = {path.stem for path in paths.folder.rglob("*") if path.is_file()}
    assert not left & {"branches", "branch_layers", "influence", "gate_drift", "reach", "gate_classes"}
