"""Where a study is kept: a journal file that survives kill -9, or a database; and what can go wrong with either."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import optuna
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.exc import SQLAlchemyError

from hybrid.config import ConfigError

PATIENCE = 60.0  # seconds that a lock, held for milliseconds, may be held by others before that is an error


class StudyError(OSError):
    """The study's storage cannot be used; the message is one line. What was recorded stays as it is."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[IO[str]]:
    """Hold a lock file; it is free again when the process dies, however that happens. Raises ``StudyError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StudyError(f"{path} has been held by another process for {PATIENCE:.0f} s") from error
                time.sleep(0.01)
        yield handle


class JournalLock(BaseJournalFileLock):
    """Excludes other writers of a journal file, and mends what a writer that was killed left half written.

    Optuna's own locks are files that stay when their owner is killed, and its journal cannot be read any more once a
    line follows a torn one.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.open = contextlib.ExitStack()

    def acquire(self) -> bool:
        self.open.enter_context(held(self.journal.with_suffix(".journal-lock")))
        with self.journal.open("rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            journal.seek(max(0, size - 1))
            if journal.read() not in (b"", b"\n"):
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.open.close()


def open_storage(url: str | None, root: Path, create: bool) -> BaseStorage:
    if url is not None:
        if "://" not in url:
            raise ConfigError(f"sweep.search.storage={url} is no database URL, e.g. sqlite:///searches.db")
        return RDBStorage(
            url, engine_kwargs={"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite") else None
        )
    journal = root / "study.journal"
    if create:
        root.mkdir(parents=True, exist_ok=True)
        journal.touch()
    return JournalStorage(JournalFileBackend(str(journal), JournalLock(journal)))


def preview_storage(url: str | None, root: Path, name: str) -> BaseStorage:
    """The storage if it holds the study, else one in memory."""
    if url is None and not (root / "study.journal").exists():
        return InMemoryStorage()
    if url is not None and url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        return InMemoryStorage()
    storage = open_storage(url, root, create=False)
    return storage if name in optuna.get_all_study_names(storage) else InMemoryStorage()


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """What a storage raises as a ``StudyError`` of one line."""
    try:
        yield
    except (ConfigError, StudyError):
        raise
    except OSError as error:  # no right to write, no space left, a disk that is gone
        raise StudyError(f"{where}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AssertionError) as error:
        raise StudyError(
            f"{where} is damaged ({type(error).__name__}: {str(error).partition(chr(10))[0]}); restore it, or move it "
            "away to begin a new study: runs that are done are found again"
        ) from error
    except (OptunaError, SQLAlchemyError, ImportError, ValueError) as error:
        raise StudyError(f"{where}: {' '.join(str(error).split())}") from error
