"""Attaching SAEs to a causal LM: the modules they stand at, and what is remembered of the model.

This file travels to the Hub with modeling_sae_augmented.py.
"""

import hashlib
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def module_at(base: nn.Module, name: str, path: str) -> nn.Module:
    """The module of an SAE's place, which must stand at one place of the model."""
    modules = dict(base.named_modules(remove_duplicate=False))
    if path not in modules:
        near = get_close_matches(str(path), modules, n=3)
        hint = f"The nearest are {', '.join(near)}." if near else "model.named_modules() lists them."
        raise ValueError(
            f"`hook_name` of SAE {name!r} must be a module of {type(base).__name__}, got {path!r}. {hint}"
        )
    others = [other for other, module in modules.items() if module is modules[path] and other != path]
    if others:
        raise ValueError(
            f"`hook_name` of SAE {name!r} must be a module with one place in the model, got {path!r}, which is also "
            f"{', '.join(others)}: an SAE would act at all of them. Hook a module inside or around it."
        )
    return modules[path]


def device_of(module: nn.Module, model: PreTrainedModel) -> torch.device:
    parameter = next(module.parameters(), None)
    device = model.device if parameter is None else parameter.device
    return torch.device("cpu") if device.type == "meta" else device


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as a dict of what differs from the defaults, without what a file says of itself."""
    values = config.to_diff_dict() | {"model_type": config.model_type}
    for note in ("transformers_version", "architectures", "_name_or_path", "auto_map"):
        values.pop(note, None)
    return values


def special_ids(*tokens: Any) -> list[int]:
    found = [token for given in tokens for token in (given if isinstance(given, list | tuple) else [given])]
    return sorted({token for token in found if isinstance(token, int)})


def fingerprint(model: nn.Module) -> str | None:
    """
    A short mark of a model's weights: names, shapes and some numbers of each, as bfloat16 rounds them, so that it is
    the same in any dtype that holds them. None for what is quantised, in float16, or has no weights yet.
    """
    digest = hashlib.sha256()
    if getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False):
        return None
    for name, tensor in sorted(model.named_parameters()):
        if tensor.device.type == "meta" or tensor.dtype == torch.float16:
            return None
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(len(flat) // 16, 1)][:16].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {some.tolist()}".encode())
    return digest.hexdigest()[:16]


__all__ = ["device_of", "fingerprint", "module_at", "plain_config", "special_ids"]
