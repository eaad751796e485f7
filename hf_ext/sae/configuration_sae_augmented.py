"""Configuration of a causal LM with sparse autoencoders spliced in: which model, which SAEs, what they do at once.

- The language model is named (its weights stay where they are) or embedded (its weights are saved beside the SAEs').
- What the SAEs do, and which edits are made, can be saved too: a model that steers loads as one that steers.
"""

import difflib
import re
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_sae import SAEConfig


# keywords that every configuration takes and PreTrainedConfig handles itself
_GENERIC = {"attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "torch_dtype"}
MODES = ("off", "observe", "replace", "replace+error", "steer", "ablate", "zero", "mean")
EDITED = ("replace", "replace+error", "steer", "ablate")
OPS = ("scale", "set", "add", "ablate")
TOKENS = ("all", "prompt", "generated")
# modules whose output is the residual stream, as wide as the model
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.\d+$")


@strict
class SAEAugmentedConfig(PreTrainedConfig):
    r"""
    Configuration of a causal LM with sparse autoencoders at some of its modules, each at any k' <= K
    (HierarchicalTopK, arXiv 2505.24473).

    Args:
        base_config (`dict`, *optional*): Configuration of the causal LM, as its own config.json; needed to embed it.
        base_model_name_or_path (`str`, *optional*): Hub id (or folder) of the causal LM, whose weights are loaded from
            there unless they are embedded.
        base_revision (`str`, *optional*): Its revision.
        base_fingerprint (`str`, *optional*): What `sae_attach.fingerprint` said of it when the SAEs were attached.
            Another one at a load is warned of.
        embed_base (`bool`, *optional*, defaults to `False`): Whether the causal LM's weights are saved with the SAEs'.
        saes (`dict[str, dict]`, *optional*): Name -> configuration of an SAE, `hook_name` and `hook_io` in it: the
            path of a module of the causal LM, and its side. Names become parts of parameters' names.
        in_place (`list[str]`, *optional*): Names of SAEs at the input of a module that reads the stream in mid-layer
            (site `resid_mid`), where the stream itself is to be changed and not what that module reads alone.
        modes (`dict[str, str]`, *optional*, defaults to `"observe"` for each): What each SAE does from the load on:
            `"off"`, `"observe"`, `"replace"`, `"replace+error"`, `"steer"`, `"ablate"`, `"zero"`; see
            [`SAEAugmentedModelForCausalLM.sae_mode`].
        edits (`list[dict]`, *optional*): What is edited from the load on: dicts of `sae`, `latent`, `op`, `value`.
        tokens (`str`, *optional*, defaults to `"all"`): Where: `"all"`, `"prompt"` or `"generated"` (within
            `generate`).
        skip_positions (`int`, *optional*, defaults to 1): First tokens of each row that no SAE reads or changes, as in
            training: many models park huge norms there.
        skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether tokens that are the model's BOS, EOS or
            padding are left out too.

    Raises:
        ValueError: (at construction) where an option is unknown, two SAEs have one place, a mode or edit does not fit,
            or an SAE at a layer's output is not as wide as the model.
    """

    model_type = "sae_augmented"
    keys_to_ignore_at_inference = ["past_key_values"]
    _auto_class = "AutoConfig"

    base_config: dict | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    embed_base: bool = False
    saes: dict[str, dict] | None = None
    in_place: list[str] | None = None
    modes: dict[str, str] | None = None
    edits: list[dict] | None = None
    tokens: str = "all"
    skip_positions: int = 1
    skip_special_tokens: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        known = [field.name for field in fields(self)]
        for name in kwargs:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if name in _GENERIC or name.startswith("_") or (self.transformers_version is not None and not near):
                continue
            own = [option for option in known if option in type(self).__annotations__]
            hint = f"Did you mean `{near[0]}`?" if near else f"The options are {', '.join(own)}."
            raise ValueError(f"`{name}` is not an option of SAEAugmentedConfig, got {kwargs[name]!r}. {hint}")
        super().__post_init__(**kwargs)
        # written by every save, so that a saved model loads where hf_ext is not installed
        self.auto_map = {
            "AutoConfig": "configuration_sae_augmented.SAEAugmentedConfig",
            "AutoModelForCausalLM": "modeling_sae_augmented.SAEAugmentedModelForCausalLM",
        }

    def sae_configs(self) -> dict[str, SAEConfig]:
        """Name -> configuration of each SAE."""
        configs = {}
        for name, options in (self.saes or {}).items():
            kind = options.get("model_type", "sae")
            if kind != "sae":
                raise ValueError(f"`saes[{name!r}]` must be of model_type 'sae', got {kind!r}.")
            configs[name] = SAEConfig(**{key: value for key, value in options.items() if key != "model_type"})
        return configs

    def validate_saes(self) -> None:
        """Names, places and widths of the SAEs."""
        places: dict[tuple[str, str], str] = {}
        for name, config in self.sae_configs().items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f'`saes` must be named like "layer12", with letters, digits and _, got {name!r}.')
            if config.hook_name is None:
                raise ValueError(
                    f"`hook_name` of `saes[{name!r}]` must be a module path of the causal LM such as "
                    "'model.layers.12', got None. Set sae.config.hook_name."
                )
            place = (config.hook_name, config.hook_io)
            if place in places:
                raise ValueError(
                    f"`saes` must have one place each, got {places[place]!r} and {name!r} at {place[0]!r} "
                    f"({place[1]}). Make two models, or merge the SAEs."
                )
            places[place] = name
            if self.base_config and _LAYER.search(config.hook_name) and config.d_in != self.hidden_size:
                raise ValueError(
                    f"`d_in` of `saes[{name!r}]` must be the model's hidden size {self.hidden_size} at "
                    f"{config.hook_name!r}, got {config.d_in}. It is of another model."
                )
        unknown = [name for name in self.in_place or [] if name not in (self.saes or {})]
        if unknown:
            raise ValueError(f"`in_place` must name SAEs, {', '.join(self.saes or {})}, got {', '.join(unknown)}.")
        if self.skip_positions < 0:
            raise ValueError(f"`skip_positions` must be at least 0, got {self.skip_positions}.")

    def validate_modes(self) -> None:
        """Modes, edits and tokens that shall hold from the load on."""
        if self.tokens not in TOKENS:
            raise ValueError(f"`tokens` must be one of {', '.join(TOKENS)}, got {self.tokens!r}.")
        for name, mode in (self.modes or {}).items():
            if name not in (self.saes or {}):
                raise ValueError(f"`modes` must name SAEs, {', '.join(self.saes or {})}, got {name!r}.")
            if mode not in MODES or mode == "mean":
                allowed = [one for one in MODES if one != "mean"]
                raise ValueError(f"`modes[{name!r}]` must be one of {', '.join(allowed)}, got {mode!r}.")
        configs = self.sae_configs()
        for edit in self.edits or []:
            check_edit(edit, configs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The configuration of the model inside: its layers, heads and vocabulary are this model's."""
        made_from, config = self.__dict__.get("_inner", (None, None))
        if config is None or (made_from is not None and made_from != self.base_config):
            options = dict(self.base_config or {"model_type": "llama"})
            kind = options.pop("model_type", None)
            try:
                config = AutoConfig.for_model(kind, **options)
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"`base_config` must name a family that transformers knows as `model_type`, got {kind!r}."
                ) from error
            self.__dict__["_inner"] = dict(self.base_config or {}), config
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

    @property
    def max_position_embeddings(self) -> int | None:
        """Longest text in tokens."""
        return getattr(self.get_text_config(), "max_position_embeddings", None)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("_inner", None)
        return values


def check_edit(edit: dict[str, Any], configs: dict[str, SAEConfig]) -> dict[str, Any]:
    """
    An edit of one latent z of one SAE, checked: `scale` (value * z), `set` (value), `add` (z + value), `ablate` (0).

    Args:
        edit (`dict`): `latent`, `op`; `value`, which `ablate` has not; `sae`, which may be left out if there is one.
        configs (`dict[str, SAEConfig]`): Name -> configuration.

    Returns:
        `dict`: With all four keys.
    """
    if not isinstance(edit, dict):
        raise TypeError(f'`edits` must be dicts like {{"latent": 12, "op": "add", "value": 4.0}}, got {edit!r}.')
    odd = [name for name in edit if name not in ("sae", "latent", "op", "value")]
    if odd:
        raise ValueError(f"An edit must have `sae`, `latent`, `op`, `value` alone, got {', '.join(odd)}.")
    name = edit.get("sae") or (next(iter(configs)) if len(configs) == 1 else None)
    if name not in configs:
        raise ValueError(f"`sae` of an edit must be one of {', '.join(configs)}, got {edit.get('sae')!r}.")
    latent, op, value = edit.get("latent"), edit.get("op"), edit.get("value")
    most = configs[name].d_sae
    if not isinstance(latent, int) or isinstance(latent, bool) or not 0 <= latent < most:
        raise ValueError(f"`latent` must be in [0, {most - 1}], the latents of {name!r}, got {latent!r}.")
    if op not in OPS:
        raise ValueError(f"`op` of an edit must be one of {', '.join(OPS)}, got {op!r}.")
    if op == "ablate":
        value = 0.0 if value is None else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < float("inf"):
        raise ValueError(f"`value` of an edit must be a finite number, got {value!r} for latent {latent} of {name!r}.")
    if op == "ablate" and value != 0:
        raise ValueError(f"`value` must be left out for op='ablate', got {value}. op='set' sets another one.")
    return {"sae": name, "latent": latent, "op": op, "value": float(value)}


__all__ = ["EDITED", "MODES", "OPS", "TOKENS", "SAEAugmentedConfig", "check_edit"]
