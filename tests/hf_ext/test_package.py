"""Importing hf_ext is free, public names are what they say, and registration does not depend on who is imported first.

Each order of imports needs a fresh process, so a process checks all that its order can show.
"""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers

import hf_ext
from hf_ext._registration import MODELS


ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "huggingface_hub", "numpy")
TINY = "dict(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)"


def type_checking_names(path):
    """Name -> module of what a package's __init__.py imports for type checkers alone."""
    tests = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    (block,) = [node for node in tests if "TYPE_CHECKING" in ast.unparse(node.test)]
    return {alias.name: node.module for node in block.body for alias in node.names}


LAZY = [path for path in ROOT.glob("hf_ext/**/__init__.py") if "attach(" in path.read_text()]


@pytest.mark.parametrize("path", LAZY, ids=lambda path: path.parent.relative_to(ROOT).as_posix())
def test_the_public_names_are_importable_sorted_and_known_to_type_checkers(path):
    package = import_module(".".join(path.parent.relative_to(ROOT).parts))
    typed = type_checking_names(path)
    assert package.__all__ == sorted(typed)
    for name, module in typed.items():
        assert getattr(package, name) is getattr(import_module(module), name)
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("path", LAZY, ids=lambda path: path.parent.relative_to(ROOT).as_posix())
def test_no_public_name_is_that_of_a_submodule(path):
    # importing the submodule, by whatever road, would put it in the name's place
    package = import_module(".".join(path.parent.relative_to(ROOT).parts))
    assert [name for name in package.__all__ if find_spec(f"{package.__name__}.{name}")] == []


def test_a_star_import_gives_the_public_names():
    namespace = {}
    exec("from hf_ext import *", namespace)
    assert {name: namespace.get(name) for name in hf_ext.__all__} == {n: getattr(hf_ext, n) for n in hf_ext.__all__}


def test_an_unknown_name_is_refused_with_the_names_that_there_are():
    with pytest.raises(AttributeError, match=f"no attribute 'LimModel'; it has {', '.join(hf_ext.__all__)}$"):
        _ = hf_ext.LimModel
    with pytest.raises(ImportError, match="cannot import name 'LimModel'"):
        from hf_ext import LimModel  # noqa: F401
    assert not hasattr(hf_ext, "_no_such_name")


def test_every_registered_class_is_a_public_name():
    for entry in MODELS:
        config = type(transformers.AutoConfig.for_model(entry.model_type))
        assert config is getattr(hf_ext, config.__name__)
        for auto, name in entry.classes.items():
            assert getattr(transformers, auto)._model_mapping[config] is getattr(hf_ext, name)


BUILD = f"""
config = AutoConfig.for_model("lime", **{TINY})
built = [type(model.from_config(config)) for model in (AutoModel, AutoModelForCausalLM)]
import hf_ext
assert built == [hf_ext.LimeModel, hf_ext.LimeForCausalLM], built
"""
HF_EXT_FIRST = f"""
import sys
import hf_ext
assert set(hf_ext.__all__) <= set(dir(hf_ext))
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, f"importing hf_ext and listing its names loads {{heavy}}"
from transformers import AutoConfig
assert AutoConfig.for_model("lime").model_type == "lime"
assert "hf_ext.lime.modeling_lime" not in sys.modules, "a configuration loads the model's code"
from transformers import AutoModel, AutoModelForCausalLM
{BUILD}
"""
TRANSFORMERS_FIRST = f"""
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
import hf_ext
{BUILD}
"""
CONFIGS_FIRST = f"""
from transformers import AutoConfig
import hf_ext
assert AutoConfig.for_model("lime").model_type == "lime"
from transformers import AutoModel, AutoModelForCausalLM
{BUILD}
"""
# transformers.modeling_layers imports the registry of model classes while it is itself half defined
PART_FIRST = f"""
import hf_ext
import transformers.modeling_layers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
{BUILD}
"""
MODEL_FIRST = f"""
import hf_ext.lime.modeling_lime
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
{BUILD}
"""


@pytest.mark.parametrize(
    "code",
    [HF_EXT_FIRST, TRANSFORMERS_FIRST, CONFIGS_FIRST, PART_FIRST, MODEL_FIRST],
    ids=["hf_ext", "transformers", "its configurations", "hf_ext and a part of transformers", "the model's file"],
)
def test_models_are_registered_whoever_is_imported_first(code, run_python):
    run_python(code, block=())


# each order in a copy of a process that has loaded what is slow, but neither hf_ext nor peft
ADAPTER_ORDERS = """
import os, sys, traceback
import torch, transformers.modeling_utils, accelerate, datasets
assert not {"peft", "hf_ext"} & sys.modules.keys()
check = '''
import hf_ext, peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners
assert configs["STEERING"] is hf_ext.SteeringConfig and tuners["STEERING"] is hf_ext.SteeringModel
from hf_ext.steering.registration import register
register()
'''
for order in [
    "import hf_ext\\nfrom peft import PeftModel",
    "import peft\\nimport hf_ext",
    "from hf_ext import SteeringConfig",
    "import hf_ext.steering.config",
    "import hf_ext.steering.layer",
    "import hf_ext.steering.model",
    "import hf_ext.steering.registration",
]:
    child = os.fork()
    if child == 0:
        try:
            exec(order + check, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""


def test_the_adapter_is_registered_whoever_is_imported_first(run_python):
    run_python(ADAPTER_ORDERS, block=())


def test_a_type_of_the_same_name_in_peft_stops_the_registration(monkeypatch):
    from peft import LoraConfig, mapping

    from hf_ext.steering.registration import register

    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "STEERING", LoraConfig)
    with pytest.raises(RuntimeError, match="must not have a type STEERING of its own, got peft.tuners.lora"):
        register()
