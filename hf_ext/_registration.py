"""Make our classes known to transformers without importing it.

transformers reads no entry points, so importing hf_ext must register. Doing that eagerly would load torch (seconds).
Instead each registration runs right after both modules it needs, the registry's and ours, have been executed; which of
them comes first is the user's choice, and either may be what loads the other.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One model: its `model_type`, the modules of its configuration and its classes, and the class for each Auto."""

    model_type: str
    config: tuple[str, str]
    modeling: str
    classes: dict[str, str]


MODELS = [
    Entry(
        "lime",
        ("hf_ext.lime.configuration_lime", "LimeConfig"),
        "hf_ext.lime.modeling_lime",
        {"AutoModel": "LimeModel", "AutoModelForCausalLM": "LimeForCausalLM"},
    ),
]
_CONFIGS = "transformers.models.auto.configuration_auto"
_CLASSES = "transformers.models.auto.modeling_auto"


def _executed(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Run `action` once, right after module `name` has been executed (now, if it already has been)."""
    if _executed(name):
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
                module.__spec__._initializing = False  # type: ignore[union-attr]  # executed: nothing of it is missing
                action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, AfterImport())


def _register(registry: str, ours: str, action: Callable[[ModuleType, ModuleType], None]) -> None:
    """Run `action(registry, ours)` once both modules have been executed; the registry loads ours, not vice versa."""

    def attempt() -> None:
        if not _executed(registry):
            return
        if ours not in sys.modules:
            importlib.import_module(ours)
        if _executed(ours):  # else it is being executed now, and its own hook comes back here
            action(sys.modules[registry], sys.modules[ours])

    when_imported(ours, attempt)
    when_imported(registry, attempt)


def register_models() -> None:
    """Register every model of `MODELS` with the Auto classes, now or when transformers loads them."""
    for entry in MODELS:

        def add_config(auto: ModuleType, ours: ModuleType, entry: Entry = entry) -> None:
            auto.AutoConfig.register(entry.model_type, getattr(ours, entry.config[1]), exist_ok=True)

        def add_classes(auto: ModuleType, ours: ModuleType, entry: Entry = entry) -> None:
            config = getattr(sys.modules[entry.config[0]], entry.config[1])
            for name, model in entry.classes.items():
                getattr(auto, name).register(config, getattr(ours, model), exist_ok=True)

        _register(_CONFIGS, entry.config[0], add_config)
        _register(_CLASSES, entry.modeling, add_classes)
