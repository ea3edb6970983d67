"""Arguments of the command lines, and how they end: what is wrong in one line.

As ``hybrid.arguments``, which nothing here imports.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says in a line what argparse would say below its usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help shows the arguments)", file=sys.stderr)
        sys.exit(2)


def end(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its exit code; Ctrl-C is 130 and a word."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
