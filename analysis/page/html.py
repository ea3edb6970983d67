"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from analysis.comparison.finding_words import remarks
from analysis.comparison.flags import matches
from analysis.diagnosis import tables as branch_tables
from analysis.figures.drawing import Drawn
from analysis.figures.style import FAINT, GRID, INK, PAPER
from analysis.health import tables as health_tables
from analysis.page.content import MOST_LEFT_OUT, MOST_RUNS, Report, configuration_table, runs_table
from analysis.page.environment import environment
from analysis.search.report import SearchReport
from analysis.tables.comparison import DIFFERENCE_WORDS
from analysis.tables.findings import TITLES

_PIXELS_PER_POINT = 1.2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_TEMPLATES.filters["unbroken"] = lambda text: re.sub(  # "p < 0.001" stays on one line
    r"\bp ([<=]) ", "p\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text
)


def html_page(report: Report, folder: Path, refresh: float | None = None) -> str:
    """The page, with its figures inside. ``folder`` is where it will lie: links to run folders are relative to it.

    With ``refresh`` the page loads itself again after that many seconds.
    """
    script = (Path(__file__).parent / "templates" / "page.js").read_text(encoding="utf-8")
    compared = report.compared
    context: dict[str, Any] = {
        "report": report,
        "script": Markup(script),
        "script_hash": Markup(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
        "refresh": refresh,
        "inline": inline_svg,
        "link": lambda path: _link(path, folder),
        "most_left_out": MOST_LEFT_OUT,
        "search_links": lambda found: _trial_links(found, folder),
        "left_out": report.records.left_out,
        "compared": compared,
    }
    if compared:
        comparison = compared.comparison
        told = compared.verdict.told
        context |= {
            "verdict": compared.verdict,
            "told": told,
            "folded": [sentence for sentence in compared.verdict.sentences if sentence not in told],
            "baseline": comparison.baseline.arm,
            "matches": matches(comparison.runs, comparison.baseline.arm),
            "flags": comparison.flags,
            "comparison": compared.rows,
            "differences": compared.differences,
            "difference_words": DIFFERENCE_WORDS,
            "configurations": configuration_table(compared.configs, comparison.arms),
            "runs": runs_table(report.records.runs, comparison.metric),
            "all_runs": len(report.records.runs),
            "run_links": [_link(run.path, folder) for run in report.records.runs[:MOST_RUNS]],
            "environment": environment(comparison.runs),
            "found": remarks(comparison.findings),
            "health": compared.health,
            "branches": compared.branches,
            "health_titles": health_tables.TITLES,
            "branch_titles": branch_tables.TITLES,
            "branch_words": branch_tables.WORDS,
            "found_tables": [(TITLES[name], table) for name, table in compared.found_tables.items()],
        }
    context["contents"] = _contents(report, context)
    return _TEMPLATES.get_template("report.html.j2").render(context)


def _contents(report: Report, context: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of contents: anchors and titles of the sections that there are."""
    found: list[tuple[str, str]] = []
    if report.compared:
        found += [("matched", "What was matched"), ("comparison", "Comparison"), ("differences", "Differences")]
        found += [("findings", "Findings")] if context["found"] or context["found_tables"] else []
        found += [(drawn.name, drawn.title) for drawn in report.compared.figures if drawn.name != "final_loss"]
        found += [] if report.compared.health.empty else [("health", "Gates and stopping")]
        found += [("branches", "What the branches do")] if report.compared.branches else []
        found += [("configurations", "Configurations")] if context["configurations"].rows else []
        found += [("runs", "Runs")]
    found += [(one.anchor, f"Search {one.name}") for one in report.searches]
    found += [("left-out", "Left out")]
    return found + ([("environment", "Environment")] if report.compared else [])


def inline_svg(drawn: Drawn) -> Markup:
    """A figure as an element of the page, in the page's colours for ink, grid and paper (light, dark, print)."""
    svg = drawn.svg.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]  # without the prolog and doctype, which name an address
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    width = float(re.search(r'\bwidth="([\d.]+)pt"', svg)[1]) * _PIXELS_PER_POINT  # letters are as large in all figures
    svg = re.sub(r'\s(xmlns(:\w+)?|width|height)="[^"]*"', "", svg, count=4)
    for colour, variable in ((INK, "ink"), (FAINT, "faint"), (GRID, "grid"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{drawn.name}-", svg)  # ids of several figures in one page
    shape = f'{" class=narrow" if drawn.narrow else ""} style="max-width:{width:.0f}px"'
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(drawn.title)}"{shape}', 1))


def _link(path: Path | None, folder: Path) -> str | None:
    """The address of a run folder, relative to the page's."""
    return None if path is None else quote(Path(os.path.relpath(path, folder)).as_posix()) + "/"


def _trial_links(found: SearchReport, folder: Path) -> list[str | None]:
    """The addresses of the run folders of the best trials; None for one that is not inside the search's folder."""
    links = []
    for trial in found.trials:
        path = found.search.path / trial.folder if trial.folder else None
        inside = path is not None and path.is_dir() and path.resolve().is_relative_to(found.search.path.resolve())
        links.append(_link(path, folder) if inside else None)
    return links
