"""FLA's two layers, without what its packages import besides.

``import fla.layers.rwkv6`` runs the ``__init__`` of ``fla``, ``fla.layers`` and ``fla.ops``, which import every layer,
model and kernel of FLA, and ``fla.layers.mamba2`` that of ``mamba_ssm``, which goes on to scikit-learn: two thirds of
the time in which this project starts. Here these packages are put off: their modules can be imported, and they run
their own ``__init__`` as soon as anybody asks them for a name that they do not have yet. So is ``transformers``, of
which a log is wanted, but only until the layers are there. Where that fails, they are imported as ever.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import extend_path
from types import ModuleType
from typing import Any

from hybrid.start import collector_paused

PUT_OFF = ("fla", "fla.layers", "fla.ops", "mamba_ssm")
MODELLING = "transformers.modeling_utils"
_ONE_AT_A_TIME = threading.RLock()


class PutOff(ModuleType):
    """A package whose ``__init__`` has not run yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # the import system asks for some that need not be there
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
    if name in sys.modules or (parent and parent not in sys.modules):
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return
    package = PutOff(name)
    package.__spec__, package.__loader__, package.__file__ = spec, spec.loader, spec.origin
    # As fla's own __init__ does: fla-core and flash-linear-attention may lie in two folders.
    package.__package__, package.__path__ = name, extend_path(list(spec.submodule_search_locations), name)
    if name == "fla":  # which its own modules ask for
        package.__version__ = importlib.metadata.version("fla-core")
    sys.modules[name] = package
    if parent:
        setattr(sys.modules[parent], leaf, package)


def forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]


@contextmanager
def only_the_log_of_transformers() -> Iterator[None]:
    """Whoever imports ``transformers`` afterwards gets all of it anew."""
    if "transformers" in sys.modules:
        yield
        return
    log = logging.getLogger("transformers")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    for name in ("transformers", "transformers.utils"):
        put_off(name)
    try:
        importlib.import_module("transformers.utils.logging")
        yield
    finally:
        forget("transformers")
        log.handlers[:], log.level, log.propagate = handlers, level, propagate


def import_layers() -> tuple[type, type]:
    """FLA's ``Mamba2`` and ``RWKV6Attention``."""
    return (
        importlib.import_module("fla.layers.mamba2").Mamba2,
        importlib.import_module("fla.layers.rwkv6").RWKV6Attention,
    )


def import_layers_only() -> tuple[type, type]:
    """The same, soon."""
    before = {"fla", "mamba_ssm"} & sys.modules.keys()
    try:
        for name in PUT_OFF:
            put_off(name)
        with only_the_log_of_transformers():
            return import_layers()
    except (ImportError, AttributeError, KeyError):  # an installation that this does not know
        logging.getLogger(__name__).debug("FLA is imported whole", exc_info=True)
        forget(*{"fla", "mamba_ssm"} - before)
        return import_layers()


with warnings.catch_warnings(), collector_paused():
    warnings.simplefilter("ignore")
    Mamba2, RWKV6Attention = import_layers_only()

# FLA says at import and construction which of its own kernels are missing; the branches do not use them.
logging.getLogger(Mamba2.__module__).setLevel(logging.ERROR)


@contextmanager
def weights_are_initialised() -> Iterator[None]:
    """The answer to what FLA's RWKV-6 asks ``transformers.modeling_utils``, which would take seconds to import."""
    with _ONE_AT_A_TIME:
        if MODELLING in sys.modules:
            yield
            return
        sys.modules[MODELLING] = None  # type: ignore[assignment] # an ImportError, after which it initialises them
        try:
            yield
        finally:
            sys.modules.pop(MODELLING, None)


__all__ = ["Mamba2", "RWKV6Attention", "weights_are_initialised"]
