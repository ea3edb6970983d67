"""The report as Markdown that pastes into a README: figures as files beside it."""

from __future__ import annotations

from collections.abc import Iterable

from analysis.comparison.finding_words import remarks
from analysis.comparison.flags import matches
from analysis.diagnosis.report import BranchReport
from analysis.diagnosis.tables import TITLES as BRANCH_TITLES
from analysis.diagnosis.tables import WORDS as BRANCH_WORDS
from analysis.figures.drawing import Drawn
from analysis.health.report import HealthReport
from analysis.health.tables import TITLES as HEALTH_TITLES
from analysis.page.content import MOST_LEFT_OUT, Compared, Report, configuration_table
from analysis.page.environment import environment
from analysis.search.report import SearchReport
from analysis.tables.comparison import DIFFERENCE_WORDS
from analysis.tables.findings import TITLES
from analysis.tables.table import escape_markdown, markdown


def markdown_page(report: Report) -> str:
    """The same report as ``page.html_page``; addresses of figures are relative to the folder of the report."""
    text = [f"# {escape_markdown(report.title)}\n"]
    text += [f"{escape_markdown(report.question)}\n"] if report.question else []
    text += [f"**{escape_markdown(report.headline)}**\n"]
    compared = report.compared
    if compared:
        text += _compared(compared)
    for found in report.searches:
        text += _search(found, alone=compared is None and len(report.searches) == 1)
    left_out = report.records.left_out
    text += ["## Left out\n"]
    shown = [f"`{item.folder}`: {escape_markdown(item.reason)}" for item in left_out[:MOST_LEFT_OUT]]
    text += [_bullets(shown) if shown else "Nothing: every run found is in the report.\n"]
    text += [_bullets(map(escape_markdown, report.notes))] if report.notes else []
    if compared:
        facts = environment(compared.comparison.runs)
        listed = (f"{f.name}: {'**mixed**, ' if f.mixed else ''}{escape_markdown(f.text)}" for f in facts)
        text += ["## Environment\n", _bullets(listed)]
    return "\n".join(text)


def _compared(compared: Compared) -> list[str]:
    comparison, verdict = compared.comparison, compared.verdict
    text = []
    shown = verdict.told  # the others are in the table of differences
    if shown:
        text += [_bullets(f"**{escape_markdown(s.arm)}**: {escape_markdown(s.text)}" for s in shown)]
    text += [_bullets(map(escape_markdown, verdict.cautions))] if verdict.cautions else []
    text += ["## Comparison\n", markdown(compared.rows)]
    text += ["Mean over seeds \N{PLUS-MINUS SIGN} standard deviation; losses in nats per token.\n"]
    text += [f"{compared.together}\n"] if compared.together else []
    differences = compared.differences
    if differences.rows:
        text += [
            f"## Differences from {escape_markdown(comparison.baseline.arm)}\n",
            markdown(differences),
            f"{DIFFERENCE_WORDS}\n",
        ]
    found, tables = remarks(comparison.findings), compared.found_tables
    text += ["## Findings\n"] if found or tables else []
    text += [_bullets(map(escape_markdown, found))] if found else []
    text += [line for name, table in tables.items() for line in (f"### {TITLES[name]}\n", markdown(table))]
    text += [line for drawn in compared.figures for line in _figure(drawn)]
    text += _health(compared.health)
    text += _branches(compared.branches) if compared.branches else []
    text += ["## What was matched\n"]
    found = matches(comparison.runs, comparison.baseline.arm)
    text += [_bullets(f"{m.what}: {'same' if m.same else '**differs**'}, {escape_markdown(m.text)}" for m in found)]
    if comparison.flags:
        text += [_bullets(f"**{escape_markdown(f.arm)}**: {escape_markdown(f.text)}" for f in comparison.flags)]
    configurations = configuration_table(compared.configs, comparison.arms)
    if configurations.rows:
        text += ["## Configurations\n", markdown(configurations), "Only keys that differ between arms.\n"]
    return text


def _health(health: HealthReport) -> list[str]:
    text = [] if health.empty else ["## Gates and stopping\n"]
    text += [
        part for name, table in health.tables.items() for part in (f"### {HEALTH_TITLES[name]}\n", markdown(table))
    ]
    return text + [line for drawn in health.figures for line in _figure(drawn)]


def _branches(branches: BranchReport) -> list[str]:
    text = ["## What the branches do\n"]
    text += [_bullets(f"**{escape_markdown(s.arm)}**: {escape_markdown(s.text)}" for s in branches.sentences)]
    text += [_bullets(map(escape_markdown, branches.remarks))] if branches.remarks else []
    for heading, tables, figures in branches.topics:
        text += [f"### {heading}\n"]
        for name, table in tables.items():
            text += [f"{BRANCH_TITLES[name]}:\n", markdown(table), f"{escape_markdown(BRANCH_WORDS[name])}\n"]
        text += [line for drawn in figures for line in _figure(drawn)]
    return text


def _search(found: SearchReport, alone: bool) -> list[str]:
    text = [] if alone else [f"## Search {escape_markdown(found.name)}\n"]
    text += [] if alone else [f"**{escape_markdown(found.answer.headline)}**\n"]
    text += [_bullets(escape_markdown(words) for _, words in found.answer.points)]
    text += ["### Best trials\n", markdown(found.table)] if found.table.rows else []
    return text + [line for drawn in found.figures for line in _figure(drawn)]


def _figure(drawn: Drawn) -> list[str]:
    return [f"![{escape_markdown(drawn.title)}](figures/{drawn.name}.png)\n"]


def _bullets(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)
