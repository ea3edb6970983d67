"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from analysis.compare import Comparison
from analysis.configs import Flat, differing, words
from analysis.environment import environment
from analysis.figures import Drawn
from analysis.finding_tables import TITLES, remarks
from analysis.flags import matches
from analysis.records import Records, Run
from analysis.search_report import SearchReport, searches_headline
from analysis.style import FAINT, GRID, INK, PAPER
from analysis.table_files import finding_tables
from analysis.tables import DASH, Cell, Table, comparison_table, difference_table
from analysis.verdict import Verdict

MOST_SENTENCES = 16  # further arms are folded away, in Markdown left to the table of differences
MOST_LEFT_OUT = 200
MOST_RUNS = 500  # rows of the table of runs
_PIXELS_PER_POINT = 1.2
MOST_KEYS = 24  # columns of the table of configurations

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


@dataclass(frozen=True)
class Compared:
    """What a report says about arms, before it takes a form."""

    comparison: Comparison
    table: pd.DataFrame  # tables.comparison_frame
    verdict: Verdict
    configs: dict[str, Flat]
    figures: list[Drawn]

    def figure(self, name: str) -> Drawn:
        return next(drawn for drawn in self.figures if drawn.name == name)


@dataclass(frozen=True)
class Report:
    """What a report says: about arms, about searches, or both."""

    records: Records
    notes: list[str]
    compared: Compared | None = None  # None where there are only trials of searches
    searches: list[SearchReport] = field(default_factory=list)

    @property
    def title(self) -> str:
        names = [plan.name for plan in self.records.plans] or [report.search.folder for report in self.searches]
        names = list(dict.fromkeys(names))
        return ", ".join(names[:4]) if names else self.records.directory.resolve().name

    @property
    def question(self) -> str:
        questions = [plan.question for plan in self.records.plans] + [r.search.question for r in self.searches]
        return " ".join(dict.fromkeys(question for question in questions[:4] if question))

    @property
    def headline(self) -> str:
        return self.compared.verdict.headline if self.compared else searches_headline(self.searches)


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
        "most_sentences": MOST_SENTENCES,
        "most_left_out": MOST_LEFT_OUT,
        "search_links": lambda found: _trial_links(found, folder),
        "left_out": report.records.left_out,
        "compared": compared,
    }
    if compared:
        comparison = compared.comparison
        context |= {
            "verdict": compared.verdict,
            "baseline": comparison.baseline.arm,
            "matches": matches(comparison.runs, comparison.baseline.arm),
            "flags": comparison.flags,
            "comparison": comparison_table(compared.table),
            "differences": difference_table(comparison),
            "configurations": configuration_table(compared.configs, comparison.arms),
            "runs": runs_table(report.records.runs, comparison.metric),
            "all_runs": len(report.records.runs),
            "run_links": [_link(run.path, folder) for run in report.records.runs[:MOST_RUNS]],
            "environment": environment(comparison.runs),
            "found": remarks(comparison.findings),
            "found_tables": [(TITLES[name], table) for name, table in finding_tables(comparison).items()],
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


def configuration_table(configs: dict[str, Flat], arms: list[str]) -> Table:
    """The keys that differ between arms, a row per arm; seeds, places and display options are no difference."""
    keys = differing(configs)[:MOST_KEYS]
    rows = [
        [Cell(arm, i), *(Cell(words(configs[arm].get(key)), _sortable(configs[arm].get(key))) for key in keys)]
        for i, arm in enumerate(arm for arm in arms if arm in configs)
    ]
    return Table(["Arm", *keys], rows if keys else [])


def _sortable(value: Any) -> float | str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None if value is None else words(value)


def runs_table(runs: list[Run], metric: str) -> Table:
    """Every run that counts, the first ``MOST_RUNS`` of them."""
    rows = []
    for place, run in enumerate(runs[:MOST_RUNS]):
        summary = run.summary
        seconds = summary.get("wall_seconds")
        timed = isinstance(seconds, int | float)
        rows.append(
            [
                Cell(run.arm, place),
                *(Cell(str(seed), seed) for seed in run.seeds),
                Cell(f"{summary[metric]:.4f}", summary[metric]),
                Cell(str(summary["status"]), str(summary["status"])),
                Cell(f"{seconds / 60:.1f}" if timed else DASH, seconds if timed else None),
            ]
        )
    header = ["Arm", "Seed init", "Seed data", metric.replace("_", " ").capitalize(), "Status", "Minutes"]
    return Table(header, rows)
