"""Make our classes known to transformers and PEFT without importing them.

Neither reads entry points, so importing hf_ext must register. Doing that eagerly would load torch (seconds),
so each registry is filled right after its own module has been executed. The registries are often run amid another
import (transformers.modeling_layers imports one before it has defined what our models need), so our classes are not
imported then: they are named, and found by transformers' own lazy look-up when one is asked for. PEFT looks
classes up in plain dictionaries, so they are put there once both PEFT and they have been executed, in either order.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One model: its `model_type`, package, configuration class, and the model class for each Auto class."""

    model_type: str
    package: str
    config: str
    classes: dict[str, str]


MODELS = [
    Entry("lime", "hf_ext.lime", "LimeConfig", {"AutoModel": "LimeModel", "AutoModelForCausalLM": "LimeForCausalLM"}),
    Entry("steered", "hf_ext.steering", "SteeredConfig", {"AutoModelForCausalLM": "SteeredModelForCausalLM"}),
    Entry("sae", "hf_ext.sae", "SAEConfig", {"AutoModel": "SAEModel"}),
    Entry(
        "sae_augmented",
        "hf_ext.sae",
        "SAEAugmentedConfig",
        {"AutoModelForCausalLM": "SAEAugmentedModelForCausalLM"},
    ),
    Entry("mdlm", "hf_ext.gstar", "MDLMConfig", {"AutoModel": "MDLMModel", "AutoModelForMaskedLM": "MDLMForMaskedLM"}),
    Entry("error_predictor", "hf_ext.gstar", "ErrorPredictorConfig", {"AutoModel": "ErrorPredictor"}),
]


# whichever of these is executed last, PEFT's dictionaries are filled after it
REGISTRATION = "hf_ext.steering.registration"
STEERING = ("peft", "hf_ext.steering.config", "hf_ext.steering.layer", "hf_ext.steering.model", REGISTRATION)
_seen_to_end: set[str] = set()


def _executed(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and (name in _seen_to_end or not getattr(module.__spec__, "_initializing", False))


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Run `action` once, right after module `name` has been executed (now, if it already has been)."""
    if _executed(name):
        action()
        return

    class AfterImport(MetaPathFinder):
        looking = False

        def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
            if fullname != name or self.looking:
                return None
            self.looking = True
            try:
                spec = importlib.util.find_spec(fullname)
            finally:
                self.looking = False
            if spec is None or spec.loader is None:
                return spec
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _seen_to_end.add(name)
                sys.meta_path.remove(self)  # not before: others look a module up without executing it
                action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, AfterImport())


def _add_configs() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

    for entry in MODELS:
        # AutoConfig.register would need the class, and gstar's lie in files that import transformers' registries
        CONFIG_MAPPING._mapping[entry.model_type] = entry.config
        module = importlib.import_module(entry.package)  # lazy: loads no model
        CONFIG_MAPPING._modules[model_type_to_module_name(entry.model_type)] = module


def _add_classes() -> None:
    from transformers.models.auto import modeling_auto

    for entry in MODELS:
        for auto, model in entry.classes.items():
            # what transformers does for a model of its own: a model type, a class name, and the module that has it
            mapping = getattr(modeling_auto, auto)._model_mapping
            mapping._reverse_config_mapping[entry.config] = entry.model_type
            mapping._model_mapping[entry.model_type] = model
            mapping._modules[entry.model_type] = importlib.import_module(entry.package)  # lazy: loads no model


def _add_adapter() -> None:
    half_way = [name for name in STEERING if name in sys.modules and not _executed(name)]
    if "peft" in sys.modules and not half_way:
        importlib.import_module(REGISTRATION).register()


def register_adapters() -> None:
    """Register the steering adapter with PEFT, now or when PEFT is loaded."""
    for name in STEERING:
        when_imported(name, _add_adapter)


def register_models() -> None:
    """Register every model of `MODELS` with the Auto classes, now or when transformers loads them."""
    when_imported("transformers.models.auto.configuration_auto", _add_configs)
    when_imported("transformers.models.auto.modeling_auto", _add_classes)
