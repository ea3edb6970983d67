"""The whole report: command line, files, figures, page."""

from __future__ import annotations

import html.parser
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from analysis.figures.learning_curves import _limit_losses
from analysis.figures.style import arm_styles, shorten, spread_out
from analysis.report import ReportError, main, write_report

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """Collects addresses and text, and checks that elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.texts, self.unbalanced = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name.split(":")[-1] in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def run_cli(*arguments, limit=60.0):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "analysis.report", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=limit,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, make_run, make_plan):
    """Three arms and two seeds, a diverged run, and an unfinished one with a name that needs escaping."""
    folder = tmp_path_factory.mktemp("outputs") / "smoke"
    make_plan(folder, [(arm, seed) for arm in ("gain", "gated", "concat") for seed in (0, 1)], baseline="gain")
    for arm, losses in {"gain": (1.50, 1.52), "gated": (1.46, 1.49), "concat": (1.55,)}.items():
        for seed, loss in enumerate(losses):
            make_run(folder, arm, seed, final=loss)
    make_run(folder, "concat", 1, status="diverged", stop_reason="loss is not finite", best_val_loss=None)
    make_run(folder, "<b>&bold|*", 0, finished=False)
    return folder


@pytest.fixture(scope="module")
def paths(sweep):
    return write_report(sweep)


def test_report_files(sweep, paths):
    assert paths.folder == sweep / "report"
    written = {path.relative_to(paths.folder).as_posix() for path in paths.folder.rglob("*") if path.is_file()}
    names = ("learning_curves", "final_loss", "gradient_ratio")
    assert {name for name in written if not name.startswith("tables/")} == {"report.html", "report.md"} | {
        f"figures/{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    assert written >= {
        f"tables/{name}" for name in ("comparison.csv", "comparison.md", "differences.csv", "left_out.csv", "runs.csv")
    }
    for name, path in paths.figures.items():
        if name.endswith(".png"):
            with Image.open(path) as image:
                colours = image.convert("RGB").getcolors(maxcolors=2**24)
                assert image.width > 1000 and image.height > 150 and len(colours) > 50

    comparison = pd.read_csv(paths.tables["comparison.csv"]).set_index("arm")
    assert comparison.index[:3].tolist() == ["gated", "gain", "concat"]
    assert comparison.loc["gain", "best_val_loss_mean"] == pytest.approx(1.51)
    assert comparison.loc["concat", "runs_diverged"] == 1
    assert len(pd.read_csv(paths.tables["runs.csv"])) == 5
    assert set(pd.read_csv(paths.tables["left_out.csv"])["kind"]) == {"diverged", "unfinished"}
    differences = pd.read_csv(paths.tables["differences.csv"])
    assert len(differences) == 2 * 2  # two arms, two metrics


def test_page_is_self_contained_and_escaped(paths):
    text = paths.html.read_text(encoding="utf-8")
    page = Page(text)
    assert page.unbalanced == [] and page.open == []
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert all(re.match(r"#|(tables|figures)/\w+\.(csv|png|svg|md|tex)$|\.\./", address) for address in page.addresses)
    for address in page.addresses:
        if not address.startswith("#"):
            assert (paths.folder / unquote(address)).exists(), address
    anchors = {address[1:] for address in page.addresses if address.startswith("#")}
    assert anchors <= set(re.findall(r'\bid="([^"]+)"', text))
    assert text.count("<svg") == 3
    words = " ".join(page.texts)
    assert "no difference shown from gain" in words
    assert "<b>&bold|*" in words  # as text, not as an element
    assert words.index("no difference shown") < words.index("What was matched")


def test_svg_figures_take_the_colours_of_the_page(paths):
    text = paths.html.read_text(encoding="utf-8")
    assert "var(--ink)" in text[text.index("<svg") :] and "#1b1f24" not in text[text.index("<svg") :]


def test_report_markdown(paths):
    text = paths.markdown.read_text(encoding="utf-8")
    assert "](figures/final_loss.png)" in text and "| gated |" in text and "diverged at step 150" in text


def test_the_same_records_give_the_same_report(sweep, paths):
    first = {path: path.read_bytes() for path in paths.folder.rglob("*") if path.is_file()}
    again = {path: path.read_bytes() for path in write_report(sweep).folder.rglob("*") if path.is_file()}
    assert first == again


@pytest.mark.parametrize(
    "runs", [[("gated", 0)], [("gated", 0), ("gated", 1)], [("gated", 0), ("gain", 0)], [("gated", 0), ("gain", 1)]]
)
def test_few_runs(tmp_path, make_run, runs, capsys):
    for arm, seed in runs:
        make_run(tmp_path, arm, seed, final=1.5 + 0.1 * seed)
    assert main([str(tmp_path), "--metric", "final_val_loss"]) == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert "learning_curves.png" in capsys.readouterr().out


def test_runs_without_metrics(tmp_path, make_run):
    for arm in ("gated", "gain"):
        (make_run(tmp_path, arm, 0) / "metrics.jsonl").unlink()
    assert main([str(tmp_path)]) == 0


def test_only_one_evaluation_and_bare_summaries(tmp_path, make_run):
    for arm in ("gated", "gain"):
        bare = {"params": {}, "environment": None, "data": {}} | dict.fromkeys(
            ("final_train_loss", "best_val_loss", "grad_ratio", "peak_memory_bytes", "tokens", "tokens_per_second")
        )
        make_run(tmp_path, arm, 0, best=1.5, steps=10, eval_every=10, edit=bare)
    assert main([str(tmp_path)]) == 0


def test_many_arms(tmp_path, make_run):
    for i in range(20):
        make_run(tmp_path, f"a_rather_long_name_of_an_arm_number_{i}", 0, final=1.5 + 0.01 * i, steps=20, eval_every=10)
    with Image.open(write_report(tmp_path).figures["final_loss.png"]) as image:
        assert image.height > 1000


def test_terminal_output(sweep, capsys):
    assert main([str(sweep)]) == 0
    out = capsys.readouterr().out
    for words in ("Final Val Loss", "gain (baseline)", "no difference shown from gain", "Left out: 2 runs",
                  "loss is not finite", str(sweep / "report" / "report.html"),
                  str(sweep / "report" / "figures" / "final_loss.png")):  # fmt: skip
        assert words in out
    assert out.index("Final Val Loss") < out.index("no difference shown") < out.index("Left out")


def test_exit_codes(tmp_path, make_run, capsys):
    def says(arguments, *words):
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == 1 and captured.err.startswith("error: ")
        assert all(word in captured.err + captured.out for word in words)

    says([tmp_path / "nowhere"], "does not exist")
    says([tmp_path], "no run folders")
    (tmp_path / "file").write_text("")
    says([tmp_path / "file"], "is a file")
    make_run(tmp_path, "gated", 0, status="failed", stop_reason="out of memory")
    says([tmp_path], "no usable run", "failed at step 150: out of memory")
    make_run(tmp_path, "gain", 0)
    says([tmp_path, "--baseline", "gated"], "no usable run of an arm 'gated'")
    assert main([str(tmp_path), "--baseline", "gain"]) == 0


def test_unwritable_report(tmp_path, make_run, capsys):
    make_run(tmp_path, "gain", 0)
    (tmp_path / "report").write_text("in the way")
    assert main([str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_wrong_metric_through_the_function(tmp_path):
    with pytest.raises(ReportError, match="there are final_val_loss and best_val_loss"):
        write_report(tmp_path, metric="accuracy")


def test_wrong_arguments_are_answered_at_once(tmp_path, make_run):
    make_run(tmp_path, "gain", 0)
    for arguments, code in ((["--help"], 0), ([], 2), ([tmp_path, "--metric", "x"], 2), ([tmp_path / "no"], 2),
                            ([tmp_path, "--baseline", "gian"], 2)):  # fmt: skip
        returned, _, error, seconds = run_cli(*arguments)
        assert returned == code and seconds < 2.0, (arguments, error, seconds)
    assert "did you mean 'gain'" in error


def test_analysis_needs_no_model_code(tmp_path, make_run):
    make_run(tmp_path, "gain", 0)
    code = (
        "import sys, analysis.report as r; code = r.main([sys.argv[1]]); "
        "bad = {'torch', 'hydra', 'omegaconf', 'hybrid', 'sweeps', 'fla'} & set(sys.modules); "
        "print(bad, file=sys.stderr); sys.exit(code or len(bad))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_an_arm_keeps_its_colour_when_the_ranking_changes():
    arms = [f"arm{i}" for i in range(12)]
    first, second = (arm_styles(arms, "arm3", order) for order in (arms, arms[::-1]))
    assert first == second
    looks = {(style.colour, str(style.line), style.marker) for style in first.values()}
    assert len(looks) == 12


def test_labels_do_not_overlap():
    placed = spread_out([0.5, 0.5, 0.51, 0.0, 1.0], gap=0.1, low=0.0, high=1.0)
    assert all(b - a >= 0.0999 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
    assert min(placed) >= 0.0 and max(placed) <= 1.0
    crowded = spread_out([0.2] * 30, gap=0.1, low=0.0, high=1.0)
    assert max(crowded) - min(crowded) == pytest.approx(1.0)
    assert shorten("x" * 50, 11) == "xxxxx…xxxxx"


def test_two_evaluations_are_shown_whole():
    figure, ax = plt.subplots()
    _limit_losses(ax, {"gated": pd.DataFrame({0: [4.2, 2.1]}, index=[0, 100])}, last=100.0)
    low, high = ax.get_ylim()
    plt.close(figure)
    assert low < 2.1 and high > 4.2
