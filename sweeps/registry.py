"""What Hydra is told about this package: its plugins, and that files of ours are not those of others."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from hybrid.config import CONF_DIR


def make_known(plugin: type) -> None:
    """Hydra wants plugins in modules named ``hydra_plugins.*``; ours need no folder of that name to be found.

    The class keeps its true module, so that other processes can unpickle what holds it.
    """
    plugins = Plugins.instance()
    plugins.register(plugin)
    plugins.class_name_to_class[f"hydra_plugins.groundthink.{plugin.__name__}"] = plugin


def forget_namesakes() -> None:
    """Take out of Hydra's store the launchers of other packages that have the name of one of ours.

    Hydra merges a file with whatever the store holds under its name: where hydra-joblib-launcher is installed,
    ``hydra/launcher=joblib`` would be refused because of keys that its launcher does not know.
    """
    Plugins.instance()  # reads the installed plugins, which fill the store
    stored = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for file in (CONF_DIR / "hydra" / "launcher").glob("*.yaml"):
        stored.pop(file.name, None)
