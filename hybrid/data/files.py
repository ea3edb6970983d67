"""Reading texts, with errors of one line."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Data that cannot be used; the message is one line that says what to do next."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def reason(error: OSError) -> str:
    """The short cause of an OSError, without its number and path."""
    return error.strerror or str(error) or type(error).__name__


def user_path(key: str, path: str) -> Path:
    """``path`` with ``~`` expanded. ``key`` is the configuration key it came from."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{key}={path}: there is no home directory; give a path without '~'") from error


def read_bytes(path: Path, what: str) -> bytes:
    """The content of a file; ``what`` names it in the ``DataError`` for one that is missing, unreadable or empty."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{what}: there is no such file; give the path of an existing text file") from error
    except IsADirectoryError as error:
        raise DataError(f"{what} is a directory; give the path of one text file") from error
    except OSError as error:
        raise DataError(f"{what} cannot be read ({reason(error)}); give a file that can be read") from error
    if not data:
        raise DataError(f"{what} is empty; give a file that holds text")
    return data


def decode_utf8(data: bytes, what: str) -> str:
    """Bytes as text, exactly: no newline translation and no byte order mark removed. Raises ``DataError``."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} is not UTF-8 text: byte 0x{data[error.start]:02x} at byte offset {error.start}; "
            "convert the file to UTF-8 (iconv -f OLD -t UTF-8)"
        ) from error
