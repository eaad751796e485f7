"""Make our classes known to transformers without importing it.

transformers reads no entry points, so importing hf_ext must register. Doing that eagerly would load torch (seconds);
here each registration runs right after the registry's own module has been executed, or at once if it is loaded.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


# model type -> (module, config class, {Auto class: model class}); one row a model
MODELS: dict[str, tuple[str, str, dict[str, str]]] = {
    "lime": (
        "hf_ext.lime",
        "LimeConfig",
        {"AutoModel": "LimeModel", "AutoModelForCausalLM": "LimeForCausalLM"},
    ),
}


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Run `action` once, right after module `name` has been executed (now, if it already has been)."""
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        action()
        return

    class AfterImport(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
            if fullname != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(fullname)
            if spec is None or spec.loader is None:
                return spec
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, AfterImport())


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    for model_type, (module, config, _) in MODELS.items():
        AutoConfig.register(model_type, getattr(importlib.import_module(module), config), exist_ok=True)


def _register_classes() -> None:
    from transformers.models.auto import modeling_auto

    for module_name, config, classes in MODELS.values():
        module = importlib.import_module(module_name)
        for auto, model in classes.items():
            getattr(modeling_auto, auto).register(getattr(module, config), getattr(module, model), exist_ok=True)


def register_models() -> None:
    """Register every model of `MODELS` with the Auto classes, now or when transformers loads them."""
    when_imported("transformers.models.auto.configuration_auto", _register_configs)
    when_imported("transformers.models.auto.modeling_auto", _register_classes)
