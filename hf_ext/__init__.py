"""hf_ext: ten research systems as everyday Hugging Face citizens.

- Importing this package costs milliseconds and loads no torch: public names are resolved on first use (PEP 562).
- Importing it makes our models known to transformers' Auto classes, whichever of the two is imported first.
"""

from typing import TYPE_CHECKING, Any

from hf_ext._registration import register_models


if TYPE_CHECKING:
    from hf_ext.lime import LimeConfig, LimeForCausalLM, LimeModel, lime_param_groups
    from hf_ext.record import edit, record
    from hf_ext.sites import Hook, resolve

_MODULE_OF = {
    "Hook": "hf_ext.sites",
    "LimeConfig": "hf_ext.lime",
    "LimeForCausalLM": "hf_ext.lime",
    "LimeModel": "hf_ext.lime",
    "edit": "hf_ext.record",
    "lime_param_groups": "hf_ext.lime",
    "record": "hf_ext.record",
    "resolve": "hf_ext.sites",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a public name, or a submodule such as `hf_ext.hub`, the first time it is asked for."""
    from importlib import import_module
    from importlib.util import find_spec

    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_models()
