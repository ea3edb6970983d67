"""Arguments of the command lines, and how they end: what is wrong in one line."""

from __future__ import annotations

import argparse
import re
import sys
from typing import NoReturn


def fail(message: str, status: int = 2) -> NoReturn:
    """End the process with one line on the error output. Status 130 is Ctrl-C, which is no error."""
    message = " ".join(message.split())
    print(f"error: {message}" if status != 130 else message, file=sys.stderr, flush=True)
    sys.exit(status)


def describe(error: OSError) -> str:
    """What the system says of a file, and of which."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


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


def plain_key(text: str) -> str:
    """The key or group of an override."""
    return text.lstrip("+~").partition("=")[0]
