"""Which modules of a model an adapter is put on, and whether this is the model that it was made for."""

import re
from difflib import get_close_matches
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from hf_ext.sites import FAMILIES, anatomy
from hf_ext.steering.config import SteeringConfig


_WITHIN = {"down_proj": "mlp.down_proj"}
STAMPS = ("model_type", "hidden_size", "num_hidden_layers")


def layer_of(name: str) -> int | None:
    """The layer that a module lies in: the first number of its path."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def facts(model: nn.Module) -> dict[str, Any]:
    """What an adapter remembers of its base; None where the model has no configuration."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {name: getattr(text, name, None) for name in STAMPS}
    found["model_type"] = getattr(config, "model_type", None)
    return found


def check_base(config: SteeringConfig, model: nn.Module) -> None:
    """
    Compare the base that `config` remembers with `model`, and fill in what it does not.

    Raises:
        ValueError: if width, depth or type differ. PEFT would drop the vectors of layers that are not there.
    """
    for name, here in facts(model).items():
        made_for = getattr(config, name)
        if made_for is None:
            setattr(config, name, here)
        elif here is not None and here != made_for:
            raise ValueError(
                f"`{name}` of the adapter must be the base model's, {here!r}, got {made_for!r}: it was made for a "
                f"{config.model_type} with {config.num_hidden_layers} layers of width {config.hidden_size}. Load that "
                "base, or make a new SteeringConfig for each model. To use the vectors here all the same, read them "
                "with hf_ext.steering.read_vectors and put them in with add_vectors."
            )


def layers(config: SteeringConfig, num_layers: int) -> list[int]:
    """The layers of `config`, ascending and counted from 0."""
    given = config.layers_to_transform
    if given is None:
        return list(range(num_layers))
    numbers = [given] if isinstance(given, int) else list(given)
    wrong = [number for number in numbers if not -num_layers <= number < num_layers]
    if wrong:
        raise ValueError(
            f"`layers_to_transform` must hold numbers in [{-num_layers}, {num_layers - 1}], got {wrong}. The model "
            f"has {num_layers} layers."
        )
    return sorted({number % num_layers for number in numbers})


def targets(model: nn.Module, config: SteeringConfig) -> list[str]:
    """
    Names of the modules whose output gets a vector, in the model's order.

    Raises:
        ValueError: for a layer or module that the model does not have, with those that it has.
    """
    names = [name for name, _ in model.named_modules() if name and ".base_layer" not in name]
    known = facts(model)["model_type"] in FAMILIES
    num_layers = anatomy(model).num_layers if known else config.num_hidden_layers
    chosen = None
    if config.layers_to_transform is not None:
        if num_layers is None:
            raise ValueError(
                f"`layers_to_transform` must be None for a model whose number of layers is not known, got "
                f"{config.layers_to_transform!r}. Name the modules by `target_modules`."
            )
        chosen = config.layers_to_transform = layers(config, num_layers)
    if config.placement is None:
        found = [name for name in names if check_target_module_exists(config, name)]
        return _some(found, f"`target_modules` must match a module, got {config.target_modules!r}.", names, "")
    if config.placement in names:
        if chosen is not None and layer_of(config.placement) not in chosen:
            raise ValueError(
                f"`layers_to_transform` must be None where `placement` names one module, got {chosen} beside "
                f"{config.placement!r}."
            )
        return [config.placement]
    if known:
        return _in_family(model, config, names, range(num_layers) if chosen is None else chosen)
    if config.placement == "residual":
        raise ValueError(
            f"`placement` must be the path of a module for a model of a family that hf_ext.sites does not know "
            f"({facts(model)['model_type']!r}; it knows {', '.join(FAMILIES)}), got 'residual'. For example "
            '"mlp.down_proj"; model.named_modules() lists them.'
        )
    end = _WITHIN.get(config.placement, config.placement)
    found = [name for name in names if name.endswith(f".{end}") and (chosen is None or layer_of(name) in chosen)]
    return _some(found, f"`placement` must be the path of a module, got {config.placement!r}.", names, end)


def _in_family(model: nn.Module, config: SteeringConfig, names: list[str], chosen: Any) -> list[str]:
    """Modules within the layers of the language model alone: a vision tower may have modules of the same names."""
    family, prefix, _ = anatomy(model)
    within = family.mlp_end if config.placement == "residual" else _WITHIN.get(config.placement, config.placement)
    wanted = [f"{prefix}{family.layers}.{layer}.{within}" for layer in chosen]
    lacking = [name for name in wanted if name not in names]
    if lacking:
        start = lacking[0].removesuffix(within)
        there = [name.removeprefix(start) for name in names if name.startswith(start)]
        cure = 'placement="residual" is the stream in every family. ' if config.placement == "down_proj" else ""
        _some([], f"`placement` must be a module of every layer, but there is no {lacking[0]}. {cure}", there, within)
    return wanted


def _some(found: list[str], message: str, names: list[str], wanted: str) -> list[str]:
    if found:
        return found
    near = get_close_matches(wanted, {name for name in names if layer_of(name) in (None, 0)}, n=4, cutoff=0.4)
    raise ValueError(
        message.rstrip() + (f" The nearest are {', '.join(near)}." if near else " model.named_modules() lists them.")
    )
