"""FLA's packages are there as ever, but not all of FLA is imported for two layers."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = """('fla.models', 'fla.layers.gla', 'fla.ops.abc', 'sklearn', 'scipy', 'transformers.modeling_utils',
          'transformers.utils.import_utils')"""
BUILD = """
from hybrid.branches.rwkv6 import RWKV6
from hybrid.schema import KernelsConfig, RWKVConfig
layer = RWKV6(32, RWKVConfig(), KernelsConfig())
"""


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_the_layers_do_not_bring_the_rest_along() -> None:
    """Not where models are built in several threads either."""
    program = f"""
import sys, threading
{BUILD}
failed = []
def build():
    try:
        for _ in range(20):
            RWKV6(32, RWKVConfig(), KernelsConfig())
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=build) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(failed, [m for m in {HEAVY} if m in sys.modules])
"""
    assert python(program) == "[] []"


@pytest.mark.parametrize("first", ["", "import transformers.modeling_utils"])
def test_weights_are_initialised_and_transformers_is_there_when_it_is_wanted(first: str) -> None:
    program = f"""
{first}
import logging
own = logging.NullHandler()
logging.getLogger("transformers").addHandler(own)
{BUILD}
assert own in logging.getLogger("transformers").handlers
logging.getLogger("transformers").removeHandler(own)
import transformers
low, up = layer.w_proj.linear.lora[0].weight, layer.w_proj.linear.lora[2].weight
print(low.any().item(), (up.float() @ up.float().T).diagonal().std().item() < 1e-6, up.any().item())
from transformers import AutoConfig
from transformers.modeling_utils import PreTrainedModel
transformers.utils.logging.get_logger("a")
print(len(logging.getLogger("transformers").handlers))
print(AutoConfig.__name__, transformers.AutoConfig is AutoConfig, hasattr(transformers, "no_such_model"))
"""
    assert python(program).split("\n") == ["False True True", "1", "AutoConfig True False"]


@pytest.mark.parametrize("first", ["import fla", "import hybrid.model, fla.models.rwkv6"])
def test_the_rest_of_fla_is_there_when_it_is_wanted(first: str) -> None:
    """Whichever is imported first, and the layers are the same classes."""
    program = f"""
{first}
import fla, hybrid.model
from fla.layers import *
from hybrid.branches.mamba2 import Mamba2
from hybrid.branches.rwkv6 import RWKV6
GatedLinearAttention
from fla.models import RWKV6Config
from fla.ops import chunk_gla
print(issubclass(RWKV6, fla.layers.RWKV6Attention), issubclass(Mamba2, fla.layers.Mamba2), fla.ops.rwkv6.__name__)
print(fla.__version__, type(fla.layers).__name__, hasattr(fla.layers, "no_such_layer"))
"""
    version = python("import importlib.metadata as m; print(m.version('fla-core'))")
    assert python(program).split("\n") == ["True True fla.ops.rwkv6", f"{version} module False"]


def test_a_package_whose_init_fails_says_so_every_time(tmp_path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("import there_is_no_such_module\n")
    (tmp_path / "broken" / "whole.py").write_text("number = 6\n")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from hybrid.branches.fla_layers import put_off
put_off("broken"); put_off("no_such_package")
from broken.whole import number
import broken
for _ in range(2):
    try:
        broken.anything
    except ModuleNotFoundError as error:
        print(number, error.name)
"""
    assert python(program).split("\n") == ["6 there_is_no_such_module"] * 2


def test_fla_in_two_folders_is_found(tmp_path) -> None:
    """fla-core and flash-linear-attention each bring a part of one package."""
    program = f"""
import importlib.util, os, sys
whole = importlib.util.find_spec("fla").submodule_search_locations[0]
for place, parts in (("a", ["__init__.py", "ops", "modules", "utils", "backends.py"]), ("b", ["layers", "models"])):
    os.makedirs({str(tmp_path)!r} + f"/{{place}}/fla")
    for part in parts:
        os.symlink(f"{{whole}}/{{part}}", {str(tmp_path)!r} + f"/{{place}}/fla/{{part}}")
os.symlink(f"{{whole}}/__init__.py", {str(tmp_path)!r} + "/b/fla/__init__.py")
sys.path[:0] = [{str(tmp_path)!r} + "/a", {str(tmp_path)!r} + "/b"]
from hybrid.branches import fla_layers
print(sys.modules["fla.layers"].__file__.startswith({str(tmp_path)!r}), type(sys.modules["fla.layers"]).__name__)
"""
    assert python(program) == "True PutOff"


def test_where_it_cannot_be_put_off_all_is_imported() -> None:
    program = """
import importlib.metadata, sys
version = importlib.metadata.version
def none(name):
    if name == "fla-core":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = none
from hybrid.branches import fla_layers
print(type(sys.modules["fla.layers"]).__name__, fla_layers.Mamba2.__name__)
"""
    assert python(program) == "module Mamba2"
