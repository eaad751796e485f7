"""Configuration of a causal LM with steering vectors in it, for families without a bias that could hold them."""

import difflib
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


# keywords that every configuration takes and PreTrainedConfig handles itself
_GENERIC = {"attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "torch_dtype"}


@strict
class SteeredConfig(PreTrainedConfig):
    r"""
    Configuration of a model of any family whose hidden states get a constant vector at some modules.

    Source: arXiv 2505.18706, h_l <- h_l + s_l. What is saved is a model, not an adapter: it loads with
    `AutoModelForCausalLM` and `trust_remote_code=True` where neither hf_ext nor peft is installed.

    Args:
        base_config (`dict`): Configuration of the causal LM, as its own config.json; `model_type` says which.
        hook_names (`list[str]`): Paths of the modules in that model whose output gets a vector, a tensor or a tuple
            that starts with one: `["model.layers.0.post_feedforward_layernorm", ...]`.
        base_model_name_or_path (`str`, *optional*): Hub id of the model that this one was made from.

    Raises:
        ValueError: (at construction) where an option is unknown, or `base_config` names no family of transformers.
    """

    model_type = "steered"
    keys_to_ignore_at_inference = ["past_key_values"]
    _auto_class = "AutoConfig"

    base_config: dict | None = None
    hook_names: list[str] | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = [field.name for field in fields(self)]
        for name in kwargs:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if name in _GENERIC or name.startswith("_") or (self.transformers_version is not None and not near):
                continue
            hint = f"Did you mean `{near[0]}`?" if near else "Options of the model itself belong in `base_config`."
            raise ValueError(f"`{name}` is not an option of SteeredConfig, got {kwargs[name]!r}. {hint}")
        self.base_config = dict(self.base_config or {"model_type": "llama"})
        self.hook_names = list(self.hook_names or [])
        super().__post_init__(**kwargs)
        # written by every save, so that a saved model loads where hf_ext is not installed
        self.auto_map = {
            "AutoConfig": "configuration_steered.SteeredConfig",
            "AutoModelForCausalLM": "modeling_steered.SteeredModelForCausalLM",
        }

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The configuration of the model inside: its layers, heads and vocabulary are this model's."""
        made_from, config = self.__dict__.get("_inner", (None, None))
        if made_from != self.base_config:
            options = dict(self.base_config)
            kind = options.pop("model_type", None)
            try:
                config = AutoConfig.for_model(kind, **options)
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"`base_config` must name a family that transformers knows as `model_type`, got {kind!r}."
                ) from error
            self.__dict__["_inner"] = dict(self.base_config), config
        return config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.get_text_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        return self.get_text_config().num_hidden_layers

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("_inner", None)
        return values


__all__ = ["SteeredConfig"]
