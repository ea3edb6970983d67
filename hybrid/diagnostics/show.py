"""A diagnosis on the terminal: the branches layer by layer, what carries a token's influence, the updates."""

from __future__ import annotations

import statistics
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(console: Console, diagnosis: dict[str, Any], folder: str) -> None:
    run = diagnosis
    console.print(
        f"{run['variant']} seed {run['seed_init']}, {run['checkpoint']} weights of step {run['step']}: "
        f"loss {run['loss']:.4f} nats on {run['tokens']:,} tokens ({run['windows']} windows) in {folder}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(block_table(run))
    console.print(influence_table(run))
    moved = ", ".join(f"{group} {number(value, '.1e')}" for group, value in run["updates"].items())
    console.print(f"one update, relative to the weights: {moved}\n", markup=False, highlight=False, soft_wrap=True)


def block_table(run: dict[str, Any]) -> Table:
    """A line for each branch of each layer, and one for each in all layers together. Counted from 1, JSON from 0."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold", title_justify="left")
    table.title = "loss increase without a branch, nats; control: a random push as long as zero's"
    for head in ("layer", "branch"):
        table.add_column(head)
    for head in ("zero", "shuffle", "control", "half-life", "share", "gate"):
        table.add_column(head, justify="right")
    needs = {(e["layer"], e["branch"], e["intervention"]): e for e in run["necessity"]}
    gates = {layer["layer"]: layer for layer in run["gates"]["layers"]} if run["gates"] else {}

    def cells(layer: int | None, name: str) -> list[str]:
        zero, shuffle = (needs[layer, name, kind] for kind in ("zero", "shuffle"))
        return [with_error(zero), with_error(shuffle), number(zero["control"], ".3f")]

    for output in run["outputs"]:
        layer = output["layer"]
        for i, name in enumerate(output["rms"]):
            lives = [e["p50"] for e in run["memory"]["half_lives"] if (e["layer"], e["branch"]) == (layer, name)]
            known = [life for life in lives if life is not None]
            gate = gates.get(layer) if i == 0 else None
            table.add_row(
                "" if i else str(layer + 1), name, *cells(layer, name),
                number(statistics.median(known) if known else None, ".3g"),
                number((output["share"] or {}).get(name), ".3f"),
                "" if gate is None else f"{gate['mean']:.2f}±{gate['std']:.2f}",
                end_section=i + 1 == len(output["rms"]),
            )  # fmt: skip
    for i, name in enumerate(run["branches"]):
        table.add_row("" if i else "all", name, *cells(None, name))
    return table


def influence_table(run: dict[str, Any]) -> Table:
    """KL divergence at every lag, a line for each carrier."""
    curves = run["memory"]["influence"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold", title_justify="left")
    table.title = f"influence of a replaced token k positions later, nats ({run['memory']['changes']} replaced)"
    table.add_column("carried by")
    for lag in curves["lags"]:
        table.add_column(str(lag), justify="right")
    for carrier, values in curves.items():
        if carrier != "lags":
            words = {"full": "the whole model"}.get(carrier, f"{carrier} alone")
            table.add_row(words, *(number(value, ".1e") for value in values))
    return table


def with_error(entry: dict[str, Any]) -> str:
    if entry["loss_increase"] is None:
        return ""
    return f"{entry['loss_increase']:.3f}±{number(entry['standard_error'], '.3f')}"


def number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
