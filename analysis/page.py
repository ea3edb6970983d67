"""The report as one self-contained HTML page and as Markdown."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from analysis.compare import Comparison
from analysis.flags import matches
from analysis.records import Records
from analysis.style import FAINT, GRID, INK, PAPER
from analysis.tables import (
    comparison_table,
    difference_table,
    escape_markdown,
    markdown,
)
from analysis.verdict import Verdict

MOST_SENTENCES = 16  # further arms are folded away, in Markdown left to the table of differences
MOST_LEFT_OUT = 200

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
class Report:
    """What a report says, before it takes a form."""

    records: Records
    comparison: Comparison
    table: pd.DataFrame  # tables.comparison_frame
    verdict: Verdict
    notes: list[str]

    @property
    def title(self) -> str:
        names = list(dict.fromkeys(plan.name for plan in self.records.plans))
        return ", ".join(names[:4]) if names else self.records.directory.resolve().name

    @property
    def question(self) -> str:
        return " ".join(plan.question for plan in self.records.plans[:4] if plan.question)


def html_page(report: Report, figures: dict[str, Path]) -> str:
    """The page, with its figures inside; ``figures`` as write_figures returns them."""
    comparison = report.comparison
    several = len(comparison.arms) > 1
    return _TEMPLATES.get_template("report.html.j2").render(
        title=report.title,
        question=report.question,
        verdict=report.verdict,
        baseline=comparison.baseline.arm,
        matches=matches(comparison.runs, comparison.baseline.arm),
        flags=comparison.flags,
        comparison=comparison_table(report.table),
        differences=difference_table(comparison),
        final_loss=inline_svg(figures["final_loss.svg"], "Final loss of every arm", narrow=not several),
        learning_curves=inline_svg(figures["learning_curves.svg"], "Learning curves of every arm"),
        left_out=report.records.left_out,
        notes=report.notes,
        environment=environment(comparison.runs),
        most_sentences=MOST_SENTENCES,
        most_left_out=MOST_LEFT_OUT,
    )


def inline_svg(path: Path, label: str, narrow: bool = False) -> Markup:
    """A figure as an element of the page, in the page's colours for ink, grid and paper (light, dark, print)."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]  # without the prolog and doctype, which name an address
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\s(xmlns(:\w+)?|width|height)="[^"]*"', "", svg, count=4)
    for colour, variable in ((INK, "ink"), (FAINT, "faint"), (GRID, "grid"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{variable})")
    kind = ' class="narrow"' if narrow else ""
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"{kind}', 1))


def environment(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """What the runs ran on, one line for each thing recorded; several values with the number of runs of each."""
    columns = {
        "device": "Device",
        "kernel_wkv6": "wkv6 kernel",
        "kernel_ssd": "ssd kernel",
        "code_version": "Code version of hybrid/",
        "git_commit": "Git commit",
        "git_dirty": "Uncommitted changes",
        "data_sha256": "Data sha256",
        "tokenizer_sha256": "Tokenizer sha256",
    }
    lines = [(name, _values_words(runs[column])) for column, name in columns.items()]
    versions: dict[str, set[str]] = {}
    for text in runs["versions"].dropna().unique():
        recorded: Any = json.loads(text) if text.startswith("{") else {}
        for package, version in recorded.items():
            versions.setdefault(package, set()).add(str(version))
    words = [f"{package} {' or '.join(sorted(found))}" for package, found in sorted(versions.items())]
    seconds = runs["wall_seconds"].sum()
    return [*lines, ("Versions", ", ".join(words) or "not recorded"), ("Time of all runs", _duration(seconds))]


def _values_words(values: pd.Series) -> str:
    counts = values.fillna("not recorded").value_counts()
    words = {"true": "yes", "false": "no"}
    if len(counts) == 1:
        return words.get(counts.index[0], counts.index[0])
    return ", ".join(f"{words.get(value, value)} ({count} runs)" for value, count in counts.head(6).items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def markdown_page(report: Report) -> str:
    """The same report for a README: figures as files beside it."""
    comparison, verdict, left_out = report.comparison, report.verdict, report.records.left_out
    differences = difference_table(comparison)
    text = [f"# {escape_markdown(report.title)}\n"]
    text += [f"{escape_markdown(report.question)}\n"] if report.question else []
    text += [f"**{escape_markdown(verdict.headline)}**\n"]
    if verdict.sentences:
        shown = verdict.sentences[:MOST_SENTENCES]
        text += [_bullets(f"**{escape_markdown(s.arm)}**: {escape_markdown(s.text)}" for s in shown)]
    text += [_bullets(map(escape_markdown, verdict.remarks))] if verdict.remarks else []
    text += ["## Comparison\n", markdown(comparison_table(report.table))]
    text += ["Mean over seeds \N{PLUS-MINUS SIGN} standard deviation; losses in nats per token.\n"]
    if differences.rows:
        text += [f"## Differences from {escape_markdown(comparison.baseline.arm)}\n", markdown(differences)]
    text += ["![Final loss](figures/final_loss.png)\n", "![Learning curves](figures/learning_curves.png)\n"]
    text += ["## What was matched\n"]
    found = matches(comparison.runs, comparison.baseline.arm)
    text += [_bullets(f"{m.what}: {'same' if m.same else '**differs**'}, {escape_markdown(m.text)}" for m in found)]
    if comparison.flags:
        text += [_bullets(f"**{escape_markdown(f.arm)}**: {escape_markdown(f.text)}" for f in comparison.flags)]
    text += ["## Left out\n"]
    shown = [f"`{item.folder}`: {escape_markdown(item.reason)}" for item in left_out[:MOST_LEFT_OUT]]
    text += [_bullets(shown) if shown else "Nothing: every run found is in the comparison.\n"]
    text += [_bullets(map(escape_markdown, report.notes))] if report.notes else []
    text += ["## Environment\n", _bullets(f"{name}: {escape_markdown(v)}" for name, v in environment(comparison.runs))]
    return "\n".join(text)


def _bullets(items: Any) -> str:
    return "".join(f"- {item}\n" for item in items)
