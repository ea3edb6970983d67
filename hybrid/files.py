"""Replacing a file as a whole, for records and caches alike."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> str:
    """Write a file so that others see the old one, none, or the whole new one; return its sha256, hex.

    Writers at the same time do not disturb each other, and the last one stands. Raises ``OSError``. A process that is
    killed meanwhile leaves ``NAME.*.partial``.
    """
    # Not tempfile: its files are readable by their owner only, and a cache may be shared.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before its name says that it is whole
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(partial, path)
        return digest
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """The same for text, as UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))
