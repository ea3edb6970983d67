"""Arguments of the command lines beside ``hybrid.train``: what is wrong with them in one line, exit status 2."""

from __future__ import annotations

import argparse
import re
import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """End the process with one line on the error output and exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Says in a line what argparse would say below its usage."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help shows the arguments)")


def amount(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, got '{text}'")
    return value


def override(text: str) -> str:
    """``key=value``, as for ``hybrid.train``."""
    if not re.match(r"[+~]*[\w.@/]+=", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no key=value")
    return text
