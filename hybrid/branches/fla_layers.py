"""FLA's two layers, without what its packages import besides.

``import fla.layers.rwkv6`` runs the ``__init__`` of ``fla``, ``fla.layers`` and ``fla.ops``, which import every layer,
model and kernel of FLA, and ``fla.layers.mamba2`` that of ``mamba_ssm``, which goes on to scikit-learn: two thirds of
the time in which this project starts. Here these packages are put off: their modules can be imported, and they run
their own ``__init__`` as soon as anybody asks them for a name that they do not have yet. So is ``transformers``, of
which a log is wanted, but only until the layers are there.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

PUT_OFF = ("fla", "fla.layers", "fla.ops", "mamba_ssm")


class PutOff(ModuleType):
    """A package whose ``__init__`` has not run yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for some that need not be there
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__class__ = ModuleType  # its __init__ imports from itself
        try:
            self.__spec__.loader.exec_module(self)
        except BaseException:
            self.__class__ = PutOff
            raise
        return getattr(self, name)


def put_off(name: str) -> None:
    """Let a package's modules be importable without running its ``__init__``; nothing if it is imported or missing."""
    parent, _, leaf = name.rpartition(".")
    spec = None if name in sys.modules else PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
    if spec is None or spec.submodule_search_locations is None:
        return
    package = PutOff(name)
    package.__spec__, package.__loader__, package.__file__ = spec, spec.loader, spec.origin
    package.__package__, package.__path__ = name, list(spec.submodule_search_locations)
    if name == "fla":  # which its own modules ask for
        package.__version__ = importlib.metadata.version("fla-core")
    sys.modules[name] = package
    if parent:
        setattr(sys.modules[parent], leaf, package)


@contextmanager
def only_the_log_of_transformers() -> Iterator[None]:
    """Whoever imports ``transformers`` afterwards gets all of it anew."""
    if "transformers" in sys.modules:
        yield
        return
    for name in ("transformers", "transformers.utils"):
        put_off(name)
    try:
        importlib.import_module("transformers.utils.logging")
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
            del sys.modules[name]
        logging.getLogger("transformers").handlers.clear()  # or there would be two


for _name in PUT_OFF:
    put_off(_name)
_collecting = gc.isenabled()
gc.disable()  # thousands of modules, none of them garbage: looking for some is a fifth of the time
try:
    with warnings.catch_warnings(), only_the_log_of_transformers():
        warnings.simplefilter("ignore")
        from fla.layers.mamba2 import Mamba2
        from fla.layers.rwkv6 import RWKV6Attention
finally:
    if _collecting:
        gc.enable()

# FLA says at import and construction which of its own kernels are missing; the branches do not use them.
logging.getLogger(Mamba2.__module__).setLevel(logging.ERROR)


@contextmanager
def weights_are_initialised() -> Iterator[None]:
    """The answer to what FLA's RWKV-6 asks ``transformers.modeling_utils``, which would take seconds to import."""
    name = "transformers.modeling_utils"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment] # an ImportError, after which it initialises them
    try:
        yield
    finally:
        del sys.modules[name]


__all__ = ["Mamba2", "RWKV6Attention", "weights_are_initialised"]
