"""A causal LM with sparse autoencoders at some of its modules: look at latents, replace activations, steer.

- The model inside is the user's own, untouched; hooks at each place do what `sae_mode` says, in plain forwards and in
  its own `generate`, with any cache, beams and padding.
- Saved are the SAEs, and the model by its name, or embedded. SAEs keep their dtype beside a model in half precision.
- One model serves one forward at a time: what a hook must know of a call is on the model.
- Hooks read tensors of the running call, so `torch.compile` of the model breaks its graph at each, and `generate`
  compiles nothing. With gradient checkpointing call backward after each forward, before the next.
- This file travels to the Hub with its siblings, and imports nothing else of ours. It is long since the model and its
  loading must be one class: what a user calls is together, and `sae_splice.py` has what happens at a hook.
"""

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_sae_augmented import EDITED, MODES, TOKENS, SAEAugmentedConfig, check_edit
from .modeling_sae import SAEModel
from .sae_attach import device_of, fingerprint, module_at, plain_config, special_ids
from .sae_splice import Call, State, place, splice


# what a load of the base and one of the SAEs both need, and what belongs to the base alone
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_OF_BASE = (
    "attn_implementation", "device_map", "dtype", "experts_implementation", "low_cpu_mem_usage", "max_memory",
    "offload_buffers", "offload_folder", "quantization_config", "torch_dtype", "trust_remote_code", "use_kernels",
)  # fmt: skip


class SAEAugmentedModelForCausalLM(PreTrainedModel, GenerationMixin):
    """
    A causal LM whose activations are read, replaced or edited through SAEs (HierarchicalTopK, arXiv 2505.24473, and
    every other that [`SAEModel`] holds). See [`SAEAugmentedConfig`] for what is saved, and [`sae_mode`] for what SAEs
    do. Inputs, outputs and `generate` are those of the model inside, `model`; `output.sae_codes` has the
    [`SparseCodes`] (batch, seq, K) of each SAE, empty at tokens that no SAE reads.

    Example:

    ```python
    >>> augmented = SAEAugmentedModelForCausalLM.from_base(model, {"layer15": sae})
    >>> augmented(**inputs).sae_codes["layer15"].indices.shape
    torch.Size([1, 9, 32])
    >>> with augmented.sae_mode("steer", [{"latent": 812, "op": "add", "value": 8.0}]):
    ...     augmented.generate(**inputs)
    >>> augmented.save_pretrained("steerable")  # the SAEs, and the model by its name

    ```"""

    config_class = SAEAugmentedConfig
    _auto_class = "AutoModelForCausalLM"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        config: SAEAugmentedConfig,
        base_model: PreTrainedModel | None = None,
        saes: Mapping[str, nn.Module] | None = None,
    ) -> None:
        # None unless the user chose one: the model inside knows best what it supports
        attention = config._attn_implementation
        super().__init__(config)
        given = base_model is not None
        if not given:
            # the dtype that was asked of this model goes before the one that the model inside was saved in
            base_model = AutoModelForCausalLM.from_config(
                config.get_text_config(), attn_implementation=attention, dtype=torch.get_default_dtype()
            )
        else:
            config.__dict__["_inner"] = None, base_model.config
        self.model = base_model
        self.saes: Any = nn.ModuleDict(saes if saes is not None else _new_saes(config))
        text: Any = config.get_text_config()
        special = (
            special_ids(text.bos_token_id, text.eos_token_id, text.pad_token_id) if config.skip_special_tokens else []
        )
        self._call = Call(base_model, config.skip_positions, special)
        self._states: dict[str, State] = {}
        self._apply_config()
        self._handles = [
            base_model.register_forward_pre_hook(self._begin, with_kwargs=True),
            base_model.register_forward_hook(self._end),
        ]
        one: Any
        for name, one in self.saes.items():
            module = module_at(base_model, name, one.config.hook_name)
            in_place = name in (config.in_place or [])
            self._handles.append(place(module, one.config.hook_io, partial(self._visit, name), in_place))
        # neither the model nor the SAEs are to be initialised again
        with init.no_init_weights():
            self.post_init()
        self.saes.eval()

    @classmethod
    def from_base(
        cls, model: PreTrainedModel, saes: Any, *, embed_base: bool = False, **options: Any
    ) -> "SAEAugmentedModelForCausalLM":
        """
        Attach SAEs to a causal LM, which is not copied.

        Args:
            model (`PreTrainedModel`): Any causal LM of transformers' interface.
            saes (`dict[str, SAEModel]`, or one): Name -> SAE, whose `config.hook_name` is a module of `model`.
            embed_base (`bool`, *optional*, defaults to `False`): Whether `save_pretrained` writes the model's weights.
            options: Others of [`SAEAugmentedConfig`]; `base_model_name_or_path` is by default where `model` came from.

        Raises:
            TypeError, ValueError: for an SAE without a place, two at one place, a path that is no module (with the
                nearest), a module that stands at two places of the model, an SAE of another width.
        """
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise TypeError(f"`model` must be a causal LM of transformers, got {type(model).__name__}.")
        saes = dict(saes) if isinstance(saes, Mapping) else {"sae": saes}
        for name, sae in saes.items():
            if not hasattr(sae, "encode") or not hasattr(sae, "config"):
                raise TypeError(f"`saes[{name!r}]` must be an SAEModel, got {type(sae).__name__}.")
        base = plain_config(model.config)
        # a model with code of its own is no part of transformers: it is found by its name alone
        foreign = not type(model).__module__.startswith("transformers.models.")
        if foreign and embed_base:
            raise ValueError(
                f"`embed_base` must be False for {type(model).__name__}, whose code is not in transformers, got True. "
                "Save or push that model itself, and name it: base_model_name_or_path=."
            )
        settings: dict[str, Any] = {
            "base_config": None if foreign else base,
            "base_model_name_or_path": model.config._name_or_path or None,
            "base_revision": getattr(model.config, "_commit_hash", None),
            "base_fingerprint": fingerprint(model),
            "dtype": model.config.dtype,
        }
        if "base_model_name_or_path" in options:
            settings["base_revision"] = None
        configs = {
            name: plain_config(sae.config) | {"dtype": str(sae.dtype).removeprefix("torch.")}
            for name, sae in saes.items()
        }
        config = cls.config_class(saes=configs, embed_base=embed_base, **{**settings, **options})
        for name, sae in saes.items():
            saes[name] = sae.to(device_of(module_at(model, name, sae.config.hook_name), model))
        augmented = cls(config, model, saes)
        if getattr(model, "generation_config", None) is not None:
            augmented.generation_config = copy.deepcopy(model.generation_config)
        return augmented.train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        As of any model. `base_model=` gives a loaded causal LM, or another id or folder of it, where the model is not
        embedded; one that is not as it was when the SAEs were attached is warned of.
        """
        path, config, given = pretrained_model_name_or_path, kwargs.pop("config", None), kwargs.pop("base_model", None)
        if not isinstance(config, PreTrainedConfig):
            names = (*_HUB, "revision", "subfolder", "code_revision")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            config = cls.config_class.from_pretrained(config or path, **hub)
        for name in list(kwargs):
            if name in config.__class__.__annotations__:
                setattr(config, name, kwargs.pop(name))
        if config.embed_base:
            if given is not None:
                raise ValueError("`base_model` must not be given where the model is embedded. Leave it out.")
            return super().from_pretrained(path, *args, config=config, **kwargs)
        of_base = {name: kwargs.pop(name) for name in _OF_BASE if name in kwargs}
        hub = {name: kwargs[name] for name in (*_HUB, "revision", "subfolder") if name in kwargs}
        of_base |= {name: hub[name] for name in _HUB if name in hub}
        with_info = kwargs.pop("output_loading_info", False)
        base = given
        if not isinstance(given, nn.Module):
            name = given or config.base_model_name_or_path
            if not name:
                raise ValueError(
                    f"`base_model_name_or_path` in the configuration of {path} must name the causal LM, got None. "
                    "Pass base_model=, a model or its id."
                )
            revision = None if given else config.base_revision
            base = AutoModelForCausalLM.from_pretrained(
                name, **({"revision": revision} if revision else {}), **of_base
            )
        bank, info = _Bank.from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)
        saes = {
            name: sae.to(device_of(module_at(base, name, sae.config.hook_name), base))
            for name, sae in bank.saes.items()
        }
        config = copy.deepcopy(config)
        config.dtype = base.config.dtype
        model = cls(config, base, saes)
        model.config.name_or_path = str(path)
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, **hub)
        except OSError:
            model.generation_config = copy.deepcopy(base.generation_config)
        _warn_of_another_base(config, base)
        model.eval()
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As of any model; without `embed_base` only the SAEs' weights are written."""
        self._keys_to_ignore_on_save = set()
        self.config.saes = {name: dict(options) for name, options in self.config.saes.items()}
        for name, options in self.config.saes.items():
            kind = str(self.saes[name].dtype).removeprefix("torch.")
            if options.get("dtype", "float32") != kind:
                options["dtype"] = kind
        if not self.config.embed_base:
            name = self.config.base_model_name_or_path
            if not name:
                raise ValueError(
                    "`base_model_name_or_path` must name the causal LM where it is not embedded, got None: it was "
                    "made in memory. Set it in the configuration, or embed_base=True."
                )
            if os.path.isdir(name):
                warnings.warn(
                    f"The causal LM is saved as {name!r}, a folder of this machine, which others have not. Set "
                    "config.base_model_name_or_path to a Hub id, or config.embed_base.",
                    stacklevel=2,
                )
            self._keys_to_ignore_on_save = {f"model.{key}" for key in self.model.state_dict()}
        super().save_pretrained(save_directory, **kwargs)

    def forward(self, *args: Any, output_sae_codes: bool = True, **kwargs: Any) -> Any:
        """
        As the model inside.

        Args:
            output_sae_codes (`bool`, *optional*, defaults to `True`): Whether every SAE encodes its tokens, and
                `output.sae_codes` has what it found, after edits.

        Raises:
            ValueError, FloatingPointError: for a place of another width, or edits after which logits are NaN.
        """
        self._call.collect = output_sae_codes
        output = self.model(*args, **kwargs)
        if output_sae_codes and isinstance(output, ModelOutput):
            output["sae_codes"] = self._call.codes
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model inside, which generates itself; nothing is encoded that no mode needs."""
        own = self.model.generation_config
        settings = copy.deepcopy(kwargs.get("generation_config") or self.generation_config)
        settings.disable_compile = True  # compiled code would not choose tokens anew at each step
        if kwargs.get("generation_config") is not None:
            kwargs["generation_config"] = settings
        names = ("inputs", "input_ids", "inputs_embeds")
        prompt = next((x for x in (*args[:1], *map(kwargs.get, names)) if isinstance(x, torch.Tensor)), None)
        self._call.collect, self._call.active = False, {}
        self._call.prompt = 1 if prompt is None else prompt.shape[1]
        self.model.generation_config = settings
        try:
            output = self.model.generate(*args, **kwargs)
        finally:
            self._call.prompt, self.model.generation_config = None, own
        self._tell_inactive()
        return output

    @contextmanager
    def sae_mode(
        self,
        mode: str | Mapping[str, str],
        edits: Any = None,
        *,
        saes: Any = None,
        tokens: Any = None,
        k: int | None = None,
        means: Mapping[str, torch.Tensor] | None = None,
    ) -> Iterator["SAEAugmentedModelForCausalLM"]:
        """
        What the SAEs do while the block runs.

        Args:
            mode (`str`, or `dict[str, str]` of each SAE by name):
                - `"off"`: nothing; `"observe"`: the model is as it was, codes are read;
                - `"replace"`: x becomes its reconstruction x^, at any budget `k`;
                - `"replace+error"`: x stays, to the bit, but gradients flow through x^ alone (the error x - x^ is a
                  constant), and edits are added;
                - `"steer"`: x + sum of (z_edit - z) W_dec: edits of latents z that keep the SAE's error;
                - `"ablate"`: the same with latents set to 0;
                - `"zero"`, `"mean"`: x becomes 0 or `means[name]`: what scores of reconstructions compare with.
            edits (`list`, *optional*): Of "replace", "replace+error", "steer" and "ablate": dicts of `sae` (where
                there are several), `latent`, `op`, `value`: `"scale"` z * value, `"set"` value, `"add"` z + value,
                `"ablate"` 0. Of "ablate" also plain numbers of latents. In the units of the latent's activation.
            saes (`list[str]`, *optional*): Which SAEs; by default those that edits name, or all. Others stay.
            tokens (*optional*): `"all"`; `"prompt"` or `"generated"` within `generate`, by the token whose activations
                they are; or a mask (batch, seq) whose columns count from the row's start. First tokens, special
                tokens and padding are left out everywhere, as the configuration says.
            k (`int`, *optional*): Budget of these SAEs.
            means (`dict[str, torch.Tensor]`, *optional*): Of "mean".

        Raises:
            TypeError, ValueError: for what is no mode, SAE, latent, edit or mask.

        Warns:
            UserWarning: where a latent to be scaled was active on no token of the call: nothing changed.
        """
        before = dict(self._states)
        self._states = self._wanted(mode, edits, saes, "all" if tokens is None else tokens, k, means)
        try:
            yield self
        finally:
            self._states = before

    def set_sae_mode(
        self, mode: str | Mapping[str, str], edits: Any = None, *, saes: Any = None, tokens: str = "all"
    ) -> None:
        """As [`sae_mode`] from now on; it is saved with the model."""
        if not isinstance(tokens, str):
            raise TypeError(f"`tokens` must be one of {', '.join(TOKENS)} to last, got {type(tokens).__name__}.")
        states = self._wanted(mode, edits, saes, tokens, None, None)
        if any(state.mode == "mean" for state in states.values()):
            raise ValueError('`mode` must be another than "mean" to last, got "mean". Use sae_mode for a while.')
        self._states = states
        self.config.modes = {name: state.mode for name, state in states.items()}
        self.config.edits = [edit for state in states.values() for edit in state.edits]
        self.config.tokens = tokens

    @torch.no_grad()
    def ce_metrics(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, k: int | None = None
    ) -> dict[str, torch.Tensor]:
        """
        What replacing activations by their reconstructions, of all SAEs at once, costs the model.

        Args:
            input_ids (`torch.LongTensor` of shape `(documents, T)`): Texts.
            attention_mask (`torch.Tensor` of shape `(documents, T)`, *optional*): 0 marks padding, which is not
                predicted, and predicts nothing.
            k (`int`, *optional*): Budget, as in `sae.encode`.

        Returns:
            `dict[str, torch.Tensor]`: in nats per predicted token, for each document: `ce_clean`; `ce_sae`, `ce_zero`,
            `ce_mean` with activations replaced by reconstructions, 0, their mean over these texts; `kl` from the clean
            prediction to that with reconstructions. And, over all documents, `ce_recovered_zero` =
            (ce_zero - ce_sae) / (ce_zero - ce_clean), `ce_recovered_mean`: 1 is the model as it was.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        real = (
            torch.ones_like(input_ids[:, 1:])
            if attention_mask is None
            else attention_mask[:, 1:] * attention_mask[:, :-1]
        )
        seen = _Means(self)
        with self.sae_mode("off"), seen:
            clean = self(**inputs, output_sae_codes=False).logits
        found = {"ce_clean": _cross_entropy(clean, input_ids, real)}
        for metric, mode in (("ce_sae", "replace"), ("ce_zero", "zero"), ("ce_mean", "mean")):
            with self.sae_mode(mode, k=k, means=seen.means()):
                logits = self(**inputs, output_sae_codes=False).logits
            found[metric] = _cross_entropy(logits, input_ids, real)
            if metric == "ce_sae":
                p, q = clean[:, :-1].float().log_softmax(-1), logits[:, :-1].float().log_softmax(-1)
                found["kl"] = _mean((p.exp() * (p - q)).sum(-1), real)
        weights = real.sum(1).double()
        total = {name: (value * weights).sum() / weights.sum() for name, value in found.items()}
        for worst in ("zero", "mean"):
            gap = total[f"ce_{worst}"] - total["ce_clean"]
            found[f"ce_recovered_{worst}"] = (total[f"ce_{worst}"] - total["ce_sae"]) / gap
        return found

    def detach(self) -> PreTrainedModel:
        """Take the hooks off and return the model inside, which is then as it was; this one is of no more use."""
        for handle in self._handles:
            handle.remove()
        return self.model

    def train(self, mode: bool = True) -> "SAEAugmentedModelForCausalLM":
        """As of any module; SAEs stay in evaluation mode, where a batch changes no threshold."""
        super().train(mode)
        if "saes" in self._modules:
            self.saes.eval()
        return self

    def _init_weights(self, module: nn.Module) -> None:
        # the model inside and the SAEs have their own way
        return

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.set_output_embeddings(value)

    def _apply_config(self) -> None:
        self._states = {name: State() for name in self.saes}
        modes = {**dict.fromkeys(self.saes, "observe"), **(self.config.modes or {})}
        self._states = self._wanted(modes, self.config.edits, None, self.config.tokens, None, None)

    def _wanted(self, mode: Any, edits: Any, saes: Any, tokens: Any, k: Any, means: Any) -> dict[str, State]:
        """Name -> state of every SAE, where those that are meant have changed."""
        configs = {name: sae.config for name, sae in self.saes.items()}
        if edits is not None and not isinstance(edits, list | tuple):
            raise TypeError(f"`edits` must be a list of edits, got {type(edits).__name__}.")
        plain = (int, tuple)
        made = [
            check_edit(_ablation(edit) if mode == "ablate" and isinstance(edit, plain) else edit, configs)
            for edit in edits or []
        ]
        if mode == "ablate" and any(edit["op"] != "ablate" for edit in made):
            raise ValueError('`edits` of mode "ablate" must be latents or op="ablate"; others are of mode "steer".')
        if isinstance(saes, str):
            saes = [saes]
        chosen = list(mode) if isinstance(mode, Mapping) else saes
        if chosen is None:
            chosen = list(dict.fromkeys(edit["sae"] for edit in made)) or list(configs)
        for name in chosen:
            if name not in configs:
                raise ValueError(f"`saes` must be among {', '.join(configs)}, got {name!r}.")
        modes = {name: mode[name] if isinstance(mode, Mapping) else mode for name in chosen}
        for name, one in modes.items():
            own = any(edit["sae"] == name for edit in made)
            if one not in MODES:
                raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {one!r}.")
            if own and one not in EDITED:
                raise ValueError(f"`edits` of {name!r} belong to the modes {', '.join(EDITED)}, got {one!r}.")
            if not own and one in ("steer", "ablate"):
                raise ValueError(
                    f"`edits` of {name!r} must be given for mode {one!r}, got none: nothing would change."
                )
            if one == "mean" and name not in (means or {}):
                raise ValueError(f'`means` must hold the mean of {name!r} for mode "mean", got none.')
        lost = [edit["sae"] for edit in made if edit["sae"] not in modes]
        if lost:
            raise ValueError(f"`edits` must be of the SAEs that are meant, {', '.join(modes)}, got {lost[0]!r}.")
        if isinstance(tokens, str):
            if tokens not in TOKENS:
                raise ValueError(f"`tokens` must be one of {', '.join(TOKENS)}, or a mask, got {tokens!r}.")
        elif not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
            raise TypeError(f"`tokens` must be one of {', '.join(TOKENS)}, or a mask (batch, seq), got {tokens!r}.")
        states = dict(self._states)
        for name, one in modes.items():
            edited = tuple(edit for edit in made if edit["sae"] == name)
            states[name] = State(one, edited, tokens, k, (means or {}).get(name))
        return states

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call.begin(args, kwargs)

    def _visit(self, name: str, hidden: torch.Tensor) -> torch.Tensor | None:
        return splice(name, self.saes[name], self._states[name], self._call, hidden)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        edited = {name: state for name, state in self._states.items() if state.edits}
        silent = [name for name in edited if name not in self._call.fired]
        if silent:
            raise ValueError(
                f"The hook of {silent[0]!r}, {self.saes[silent[0]].config.hook_name!r}, must be a module that the "
                "model calls, and was not called."
            )
        logits = output.logits if hasattr(output, "logits") else output[0]
        if edited and isinstance(logits, torch.Tensor) and logits.device.type != "meta":
            bad = int(logits.isnan().any(-1).sum())
            if bad:
                told = ", ".join(
                    f"{e['sae']}/{e['latent']} {e['op']} {e['value']:g}" for s in edited.values() for e in s.edits
                )
                raise FloatingPointError(
                    f"The edits must leave finite logits, got NaN at {bad} tokens ({told}). Lower their `value`."
                )
        if self._call.prompt is None:
            self._tell_inactive()

    def _tell_inactive(self) -> None:
        for (name, latent), times in self._call.active.items():
            if times == 0:
                warnings.warn(
                    f"Latent {latent} of {name!r} was active on no token that was read, so scaling it changed "
                    'nothing. Use op="add" to bring it in, or a larger budget k.',
                    stacklevel=2,
                )


class _Bank(PreTrainedModel):
    """The SAEs alone, under the names that they have in the whole model."""

    config_class = SAEAugmentedConfig

    def __init__(self, config: SAEAugmentedConfig) -> None:
        super().__init__(config)
        self.saes = nn.ModuleDict(_new_saes(config))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        return


class _Means:
    """Means over the tokens that SAEs read, of what stands at their places while the block runs."""

    def __init__(self, model: SAEAugmentedModelForCausalLM) -> None:
        self.model = model
        self.rows: dict[str, list[torch.Tensor]] = {name: [] for name in model.saes}
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, sae in self.model.saes.items():
            module = self.model.model.get_submodule(sae.config.hook_name)
            self.handles.append(place(module, sae.config.hook_io, partial(self._keep, name), False))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, name: str, hidden: torch.Tensor) -> None:
        index = self.model._call.chosen("all", hidden, name)
        self.rows[name].append(hidden.reshape(-1, hidden.shape[-1])[index])

    def means(self) -> dict[str, torch.Tensor]:
        return {name: torch.cat(rows).mean(0, dtype=torch.double) for name, rows in self.rows.items()}


def _warn_of_another_base(config: SAEAugmentedConfig, base: nn.Module) -> None:
    found = fingerprint(base) if config.base_fingerprint else None
    if found is not None and found != config.base_fingerprint:
        revision = f" (revision {config.base_revision})" if config.base_revision else ""
        warnings.warn(
            f"The causal LM must be {config.base_model_name_or_path}{revision}, to which the SAEs were attached, with "
            f"fingerprint {config.base_fingerprint}, got one with {found}: another revision, or finetuned since. What "
            "latents mean may have changed.",
            stacklevel=3,
        )


def _new_saes(config: SAEAugmentedConfig) -> dict[str, nn.Module]:
    saes = {}
    for name, one in config.sae_configs().items():
        # their own dtype, whatever the model's
        saes[name] = SAEModel(one).to(one.dtype or torch.float32)
    return saes


def _ablation(edit: Any) -> dict[str, Any]:
    if isinstance(edit, tuple):
        name, latent = edit
        return {"sae": name, "latent": latent, "op": "ablate"}
    return {"latent": edit, "op": "ablate"}


def _cross_entropy(logits: torch.Tensor, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    labels = input_ids[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return _mean(losses, real)


def _mean(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean of each row over its real tokens."""
    real = real.to(values.device).double()
    return (values.double() * real).sum(1) / real.sum(1)


__all__ = ["SAEAugmentedModelForCausalLM"]
