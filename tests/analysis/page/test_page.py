"""The page in a browser, its safety, and what it says of configurations and runs; and --watch."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.page.content import configuration_table
from analysis.records.steps import StepReader
from analysis.report import main, write_report

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--enable-logging=stderr",
    "--disable-background-networking", "--virtual-time-budget=5000", "--dump-dom",
]  # fmt: skip
# Clicks on a heading of the comparison, with the keyboard on another, and writes down what it sees.
PROBE = """<script>
const seen = { errors: [] };
addEventListener("error", (event) => seen.errors.push(event.message));
addEventListener("load", () => {
  const table = document.querySelector("#comparison table");
  const column = (i) => [...table.tBodies[0].rows].map((row) => row.cells[i].textContent);
  const heads = table.tHead.querySelectorAll("button");
  const at = [...heads].findIndex((head) => head.textContent === "Final Val Loss");
  seen.before = column(0);
  heads[at].click(); seen.up = column(0); seen.aria = heads[at].closest("th").getAttribute("aria-sort");
  heads[at].click(); seen.down = column(0);
  heads[1].focus(); seen.focus = document.activeElement === heads[1];
  heads[1].click(); seen.params = column(1);
  heads[0].click(); seen.first = column(0);
  seen.figures = [...document.querySelectorAll("figure svg")].map((svg) => {
    const box = svg.getBoundingClientRect();
    return box.width > 200 && box.height > 50 && svg.querySelectorAll("path, use").length > 20;
  });
  seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.ink = getComputedStyle(document.body).color;
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
});
</script>"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory, make_run):
    root = tmp_path_factory.mktemp("page")
    losses = {"gain": 1.6, "gated": 1.45, "<b>x</b>": 1.5, "late": 10.5}
    for i, (arm, loss) in enumerate(losses.items()):
        for seed in (0, 1):
            final = loss + 0.01 * seed * (arm != "gain")
            make_run(root, arm.replace("/", "_"), seed, final=final, params=[900, 3_000_000, 88_000, 7][i],
                     gate=0.3 if arm == "gated" else None, config=f"fusion: {{name: f{i}}}\n",
                     edit={"variant": arm})  # fmt: skip
    return write_report(root, "gain")


def browse(page, tmp_path, *options):
    """The DOM after loading, and what the console said."""
    done = subprocess.run(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_in_a_browser(paths, tmp_path):
    dom, console = browse(paths.html, tmp_path, "--window-size=1200,900")
    assert console == [] and "What was matched" in dom

    # The probe is a script that the page's own policy forbids, so it goes into a copy without the policy.
    text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", PROBE, paths.html.read_text())
    (tmp_path / "copy.html").write_text(text)
    seen = {}
    for scheme, options in {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}.items():
        dom, console = browse(tmp_path / "copy.html", tmp_path, "--window-size=1200,900", *options)
        assert console == []
        found = re.search(r'<pre id="seen">(.*?)</pre>', dom, flags=re.S)
        seen[scheme] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    light = seen["light"]
    assert light["errors"] == [] and light["wide"] <= 0
    assert light["up"] == ["gated", "<b>x</b>", "gain (baseline)", "late"] and light["aria"] == "ascending"
    assert light["down"] == light["up"][::-1]  # as numbers: as text, 10.5 or 1.455 against 1.6 would be wrong
    assert light["params"] == ["7", "900", "88,000", "3,000,000"] and light["focus"]
    assert light["figures"] == [True] * len([name for name in paths.figures if name.endswith(".svg")])
    assert light["ink"] == "rgb(27, 31, 36)" and seen["dark"]["ink"] == "rgb(230, 233, 236)"


def test_the_policy_allows_the_pages_own_script_only(paths):
    text = paths.html.read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text
    assert "<b>x</b>" not in text and "&lt;b&gt;x&lt;/b&gt;" in text


def test_configurations_and_links(paths):
    text = paths.html.read_text(encoding="utf-8")
    assert ">fusion.name<" in text and ">seed_init<" not in text
    table = configuration_table({"a": {"x": 1, "y": True}, "b": {"x": 2, "y": True, "z": [1, 2.5]}}, ["b", "c", "a"])
    assert table.header == ["Arm", "x", "z"]
    assert [[cell.text for cell in row] for row in table.rows] == [["b", "2", "[1, 2.5]"], ["a", "1", "—"]]
    assert text.count('<a href="../') >= 8
    assert "figures/gate_values.png" in paths.markdown.read_text()


def test_ids_of_figures_do_not_clash(paths):
    ids = re.findall(r'\bid="([^"]+)"', paths.html.read_text())
    assert len(ids) == len(set(ids))


def test_unchanged_metrics_are_not_read_again(tmp_path, make_run):
    folders = [make_run(tmp_path, arm, 0, steps=20) for arm in ("a", "b")]
    reader = StepReader(remember=True)
    first = reader.read(folders, ("step", "loss")).rows
    tables = {key[0]: known[1] for key, known in reader._known.items()}
    with open(folders[1] / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 30, "loss": 0.5}\n')
    second = reader.read(folders, ("step", "loss")).rows
    assert len(second) == len(first) + 1 and second["loss"].min() == 0.5
    kept = {key[0]: known[1] is tables[key[0]] for key, known in reader._known.items()}
    assert [kept[folder] for folder in folders] == [True, False]


def test_watch_until_the_sweep_is_done(tmp_path, make_run, make_plan):
    make_plan(tmp_path, [("gain", 0), ("gated", 0)], baseline="gain")
    make_run(tmp_path, "gain", 0)
    watching = subprocess.Popen(
        [sys.executable, "-m", "analysis.report", str(tmp_path), "--watch", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        page = tmp_path / "report" / "report.html"
        for _ in range(600):
            if page.exists() or watching.poll() is not None:
                break
            time.sleep(0.1)
        assert watching.poll() is None and '<meta http-equiv="refresh" content="1.0">' in page.read_text()
        make_run(tmp_path, "gated", 0)
        out, error = watching.communicate(timeout=60)
    finally:
        watching.kill()
    assert watching.returncode == 0, error
    assert "1 done, 1 to come" in out and "Final Val Loss" in out
    assert 'http-equiv="refresh"' not in page.read_text() and ">gated<" in page.read_text()


def test_watch_refuses_what_cannot_be_waited_for(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), "--watch"]) == 2
    for seconds in ("0", "soon"):
        with pytest.raises(SystemExit) as refused:
            main([str(tmp_path), "--watch", seconds])
        assert refused.value.code == 2 and "1 to 86400" in capsys.readouterr().err
