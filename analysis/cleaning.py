"""Takes out of records what only the machine knows that made them: paths, logins, host names. Numbers stay."""

from __future__ import annotations

import re
from typing import Any

# Keys of the configuration and their defaults: hybrid reads no null where it wants a text.
PATHS = {"out": "outputs", "data.path": None, "data.cache_dir": "~/.cache/groundthink", "sweep.search.storage": None}
STARTED = ("display", "hydra")  # sections about how runs were started and shown
HIDDEN = ("storage", "worker")  # of search.json: a database or a file, and names of hosts
PATH, LOGIN = "<path>", "<login>"

_KEYS = "|".join(map(re.escape, PATHS))
_END = r"\s'\"`,;|<>()\[\]{}"  # no part of a path that is not quoted
_PART = rf"[^{_END}:/]+"
_REST = rf"[^{_END}:]*"
_DRIVE = r"(?<![A-Za-z0-9])[A-Za-z]:[\\/](?!/)"
_ROOT = rf"(?:~[\w.-]*)?/+{_PART}|{_DRIVE}|\\\\+\w|(?i:file:/)"
_SUBSTITUTES = (
    (r"(?<=://)[^\s'\"]*@", f"{LOGIN}@"),
    (r"(?i)([?&]\w*(?:user|pass|pwd|token|secret|key)\w*=)[^&\s'\",\]}]*", rf"\1{LOGIN}"),
    # an override within an override, in quotes, up to where its list ends, or up to a space
    (rf"(?<![\w.])((?:{_KEYS})['\"]?=)(?:(['\"]).*?\2|[^,\]}}'\"\n]*(?=[,\]}}'\"])|[^\s,\]}}'\"]*)", rf"\1{PATH}"),
    (rf"(['\"])(?:{_ROOT})[^'\"\n]*\1", rf"\1{PATH}\1"),
    (rf"(?i)\bfile:/[^{_END}]*", PATH),
    (rf"(?<=:///)/+{_REST}", PATH),  # sqlite:////home/me/searches.db
    # A word after a space belongs to the path where a slash follows it: /home/my runs/a
    (rf"(?:{_DRIVE}|(?<!\\)\\\\+\w){_REST}(?: [\w.-]+[\\/]{_REST})*", PATH),
    (rf"(?<![\w.~/>])(?:~[\w.-]*)?(?:(?<!:)/+|/(?!/)){_PART}(?:/+{_PART})+/*(?: [\w.-]+/{_REST})*", PATH),
    (rf"(?:^|(?<=[=:,\[{{'\"]))/{_PART}/?", PATH),  # of one part only as a value, not in a sentence
)
_PATTERNS = [(re.compile(pattern), substitute) for pattern, substitute in _SUBSTITUTES]
_MACHINE = re.compile(r"(?:x86_64|amd64|aarch64|arm64|armv\d\w*|i[3-6]86|ppc64le|riscv64|s390x)(?![a-z0-9])", re.I)


def clean(value: Any, key: str = "") -> Any:
    """A record without paths, logins and hosts, at any depth; lists of overrides without those that set such keys.

    ``key`` is what the record holds ``value`` under.
    """
    if isinstance(value, dict):
        return {name: clean(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        kept = [inner for inner in value if key != "overrides" or not _sets_local_key(inner)]
        return [clean(inner, key if key in PATHS else "") for inner in kept]
    if not isinstance(value, str):
        return value
    if key in HIDDEN:
        return None
    if key == "platform":
        return system_and_machine(value)
    return PATH if key in PATHS and "." in key else clean_text(value)


def clean_text(text: str) -> str:
    """A value or a sentence with marks for absolute paths and logins."""
    key, equals, _ = text.partition("=")
    if equals and _bare(key) in PATHS:
        return f"{key}={PATH}"
    for pattern, substitute in _PATTERNS:
        text = pattern.sub(substitute, text)
    return text


def without_local_keys(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A configuration, whole or in part, with the defaults of paths and without ``STARTED``.

    ``above`` is the section it stands in, with a dot. Raises ValueError where a section is no mapping.
    """
    kept = {}
    for name, value in config.items():
        key = f"{above}{name}"
        if key in PATHS:
            kept[name] = PATHS[key]
        elif value is not None and any(path.startswith(f"{key}.") for path in PATHS):
            if not isinstance(value, dict):
                raise ValueError(f"{key} is not a mapping")
            kept[name] = without_local_keys(value, f"{key}.")
        elif key not in STARTED:
            kept[name] = value
    return kept


def system_and_machine(platform: str) -> str:
    """``Linux-6.1.0-13-amd64-x86_64-with-glibc2.36`` is a Linux x86_64; the rest is about one host."""
    machines = _MACHINE.findall(platform)
    return " ".join([re.split(r"[-\s]", platform)[0], *machines[-1:]])


def _bare(key: str) -> str:
    return re.sub(r"[+~'\"\s]", "", key)


def _sets_local_key(override: Any) -> bool:
    key = _bare(str(override).partition("=")[0])
    return any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in (*PATHS, *STARTED))
