"""Block patterns: which kind of block stands at which depth.

``P`` runs two branches in parallel and fuses them, ``R`` is RWKV-6 alone, ``M`` Mamba-2 alone and ``A`` causal
attention. ``X*n`` repeats, spaces are free: ``"P*8"``, ``"R M*21 R"``, ``"R M*5 R M*5 R R"``.
"""

from __future__ import annotations

import re

KINDS = "PRMA"
ALONE = {"R": "rwkv", "M": "mamba", "A": "attention"}  # the branch of the kinds that have one; P has two
MAX_BLOCKS = 256


class PatternError(ValueError):
    """A pattern that describes no stack of blocks; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\s*\n\s*", " ", message))


def parse_pattern(pattern: str) -> list[str]:
    """The kinds of the blocks from the first to the last, e.g. ``"R M*2 R" -> ["R", "M", "M", "R"]``.

    Raises ``PatternError``.
    """
    blocks: list[str] = []
    position = 0
    token = re.compile(r"\s*([A-Za-z])\s*(?:\*\s*(\d{1,9}))?\s*")
    while position < len(pattern):
        match = token.match(pattern, position)
        if not match:
            raise PatternError(f"cannot read '{pattern[position:]}' in '{pattern}'; write blocks like \"R M*21 R\"")
        kind, count = match.group(1), int(match.group(2) or 1)
        if kind not in KINDS:
            raise PatternError(f"unknown block '{kind}' in '{pattern}'; blocks are {', '.join(KINDS)}")
        if count < 1 or len(blocks) + count > MAX_BLOCKS:
            raise PatternError(f"'{pattern}' must have 1 to {MAX_BLOCKS} blocks, and no repetition of 0")
        blocks += [kind] * count
        position = match.end()
    if not blocks:
        raise PatternError('an empty pattern; write e.g. "P*8"')
    return blocks


def branches_of(pattern: str, parallel: list[str]) -> list[tuple[str, ...]]:
    """The branches (rwkv, mamba, attention) of every block; ``parallel`` names the two of a P block.

    Raises ``PatternError``.
    """
    return [tuple(parallel) if kind == "P" else (ALONE[kind],) for kind in parse_pattern(pattern)]
