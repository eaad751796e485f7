"""Public names that are imported on first use (PEP 562), so that importing a package costs nothing."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def attach(package: str, module_of: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of `package`, whose public name N lives in module `module_of[N]`.

    Submodules resolve as well, so that `hf_ext.hub.card` works after `import hf_ext`.
    """
    public = sorted(module_of)

    def __getattr__(name: str) -> Any:
        if name in module_of:
            value = getattr(import_module(module_of[name]), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(public)}")
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *public})

    return __getattr__, __dir__, public
