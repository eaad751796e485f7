"""The tuner: puts vectors into a model, and what PEFT does with adapters, for steering vectors.

- Where vectors go is decided in places.py, before anything is changed.
- A saved adapter fits exactly or is refused: PEFT itself drops the vectors of layers that are not there.
- A weighted sum of adapters is exact, since the sum of vectors is a vector.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hf_ext.steering import beft
from hf_ext.steering.config import check_scale
from hf_ext.steering.context import BASE, ForwardContext
from hf_ext.steering.layer import SteeringLayer
from hf_ext.steering.places import check_base, layer_of, targets


class SteeringModel(BaseTuner):
    """
    A model with steering vectors (arXiv 2505.18706): what `get_peft_model(model, SteeringConfig())` puts inside the
    `PeftModel`, whose methods are PEFT's. Besides those, the `PeftModel` has the methods documented below.

    `adapter_names=["math", "__base__", ...]` in `generate` and in a forward gives each row of the batch its own
    vectors; in evaluation mode.

    Args:
        model (`torch.nn.Module`): The base model.
        peft_config (`SteeringConfig` or `dict[str, SteeringConfig]`): Of the adapter.
        adapter_name (`str`): Its name.

    Example:

    ```python
    >>> model = get_peft_model(AutoModelForCausalLM.from_pretrained("you/model"), SteeringConfig())
    >>> model.set_vectors("default", {12: direction})          # write one layer's vector
    >>> model.set_scale("default", 2.0)
    ```"""

    prefix = "steering_"
    tuner_layer_cls = SteeringLayer
    target_module_mapping: dict[str, list[str]] = {}  # hf_ext.sites knows the places

    context: ForwardContext
    _targets: list[str] = []

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        check_base(peft_config, self.model)
        self._targets = targets(self.model, peft_config)
        peft_config.beft_places = beft.places(self.model, self._targets, peft_config.positions)
        steered = (layer for layer in self.model.modules() if isinstance(layer, SteeringLayer))
        known = next((layer.context for layer in steered), None)
        self.context = ForwardContext(self.model) if known is None else known
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self.context.admit(
            adapter_name, peft_config.scale, peft_config.positions, self._is_after_all_keys(peft_config)
        )
        if isinstance(target, SteeringLayer):
            target.update_layer(adapter_name, peft_config.inference_mode)
            return
        layer = SteeringLayer(target, current_key, peft_config.hidden_size, self.context)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if next(target.parameters(), None) is not None:
            self._replace_module(parent, target_name, layer, target)
        else:  # PEFT asks the old module where it is, and an activation does not know
            setattr(parent, target_name, layer.to(next(self.model.parameters()).device))

    def _is_after_all_keys(self, config: PeftConfig) -> bool:
        """Whether the vectors change no key and no value: at the end of the last layer's MLP."""
        last = None if config.num_hidden_layers is None else config.num_hidden_layers - 1
        at_the_end = config.placement in ("residual", "down_proj")
        return at_the_end and all(layer_of(name) == last for name in self._targets)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is not None:
            self._check_adapter_names(names)
        if names is None and not self.context.gated:
            yield
            return
        with self.context.request(self.model, names):
            yield

    def _check_adapter_names(self, names: Any) -> None:
        """Everything about them but their number, which only the forward can tell."""
        there = ", ".join([*self.context.scaling, BASE])
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"`adapter_names` must be a list of strings, one for each row, got {names!r}.")
        unknown = sorted(set(names) - {BASE, *self.context.scaling})
        if unknown:
            raise ValueError(f"`adapter_names` must be among {there}, got {', '.join(unknown)}.")
        if self.training:
            raise ValueError("`adapter_names` must not be given in training mode. Call model.eval(), or set_adapter.")
        if any(layer.merged for layer in self.context.layers):
            raise ValueError("`adapter_names` needs unmerged adapters. Call model.unmerge_adapter() first.")

    def get_vectors(self, adapter_name: str = "default") -> dict[int, torch.Tensor]:
        """
        The vectors of an adapter as they are added, its scale in them: layer -> `(hidden_size,)`, float32, on the CPU.

        Raises:
            ValueError: for an unknown adapter, or one with several vectors in a layer.
        """
        scale = self.context.scaling.get(adapter_name, 1.0)
        return {
            layer: scale * module.steering_bias[adapter_name].detach().float().cpu()
            for layer, module in self._steered(adapter_name).items()
        }

    @torch.no_grad()
    def set_vectors(self, adapter_name: str, vectors: Mapping[int, torch.Tensor]) -> None:
        """
        Write vectors into an adapter that is there, in place: nothing is compiled or injected again.

        Args:
            adapter_name (`str`): The adapter.
            vectors (`Mapping[int, torch.Tensor]`): Layer -> `(hidden_size,)`, without the adapter's scale. Layers that
                are not named keep what they have.

        Raises:
            ValueError: before anything is written, for a layer without a vector of this adapter, a wrong shape, NaN or
                infinity.
        """
        modules = self._steered(adapter_name)
        for layer, vector in vectors.items():
            if layer not in modules:
                raise ValueError(f"`vectors` must be for layers {list(modules)} of {adapter_name!r}, got {layer!r}.")
            check_vector(f"vectors[{layer}]", vector, modules[layer].width)
        for layer, vector in vectors.items():
            modules[layer].steering_bias[adapter_name].copy_(vector)
        self.context.versions[adapter_name] += 1

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the factor of an adapter, in the model and in the configuration that is saved."""
        self._check_known(adapter_name)
        if any(adapter_name in layer.merged_adapters for layer in self.context.layers):
            raise ValueError(f"{adapter_name!r} must not be merged while its scale is set. Call unmerge_adapter().")
        self.context.scaling[adapter_name] = self.peft_config[adapter_name].scale = check_scale(scale)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """
        Add the adapter whose vectors are the weighted sum of others' (exactly), with scale 1. It is not made active.

        Args:
            adapters (`Sequence[str]`): Names of adapters with the same placement and positions.
            weights (`Sequence[float]`): One for each; a scale of an adapter is in its vector already.
            adapter_name (`str`): Name of the new one.

        Raises:
            ValueError: for unknown or taken names, another number of weights, or adapters that are put elsewhere.
        """
        for name in adapters:
            self._check_known(name)
        if adapter_name in self.peft_config:
            raise ValueError(f"`adapter_name` must be a new name, got {adapter_name!r}.")
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(
                f"`weights` must have one number for each adapter, got {len(weights)} for {len(adapters)}."
            )
        configs = [self.peft_config[name] for name in adapters]
        kinds = {(c.placement, str(c.target_modules), c.positions) for c in configs}
        if len(kinds) > 1:
            raise ValueError(f"`adapters` must have one placement and positions, got {sorted(map(str, kinds))}.")
        layers = [config.layers_to_transform for config in configs]
        union = None if None in layers else sorted({layer for some in layers for layer in some})
        config = copy.deepcopy(configs[0])
        config.scale, config.layers_to_transform = 1.0, union
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in self.context.layers:
                terms = [
                    check_scale(weight) * self.context.scaling[name] * layer.steering_bias[name].float()
                    for name, weight in zip(adapters, weights, strict=True)
                    if name in layer.steering_bias
                ]
                if terms:
                    like = next(layer.steering_bias[name] for name in adapters if name in layer.steering_bias)
                    layer.steering_bias[adapter_name] = nn.Parameter(sum(terms).to(like.dtype), requires_grad=False)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        lost = []
        if merge:
            self._check_mergeable(adapter_names)
            own = {x.name: x._own_bias if x.merged else x.get_base_layer().bias for x in self.context.layers}
            lost = [name for name, bias in own.items() if bias is None]
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self.context.remove()
        if lost:
            warnings.warn(
                f"The merged vectors are biases that {type(model).__name__} does not have (first {lost[0]}): they "
                "work now, but save_pretrained and from_pretrained lose them without a word. To save, use "
                "hf_ext.steering.export_model(peft_model) instead of merging.",
                stacklevel=3,
            )
        return model

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Before any layer is merged, so that a model is merged whole or not at all."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for layer in self.context.layers:
            layer.check_mergeable(names)

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self.context.scaling:
            there = ", ".join(self.context.scaling)
            raise ValueError(f"`adapter_name` must be one of {there}, got {adapter_name!r}.")

    def _steered(self, adapter_name: str) -> dict[int, SteeringLayer]:
        """The layers of an adapter, by number."""
        self._check_known(adapter_name)
        modules: dict[int, SteeringLayer] = {}
        for module in self.context.layers:
            if adapter_name in module.steering_bias:
                layer = layer_of(module.name)
                if layer is None or layer in modules:
                    raise ValueError(
                        f"`adapter_name` must have one vector in a layer, got {adapter_name!r} with one at "
                        f"{module.name} besides. Read its state dict instead."
                    )
                modules[layer] = module
        return dict(sorted(modules.items()))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's, and: exactly the vectors that the model has a place for, of its width, finite."""
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        places = {
            f"{name}.steering_bias.{adapter_name}": module.width
            for name, module in model.named_modules()
            if isinstance(module, SteeringLayer) and adapter_name in module.steering_bias
        }
        found = {key for key in state if ".steering_bias" in key}
        if found != places.keys():
            missing, left = sorted(places.keys() - found), sorted(found - places.keys())
            raise ValueError(
                "The file of the adapter must hold one vector for each place in the model; "
                f"missing: {missing[:3] or 'none'} ({len(missing)}), without a place: {left[:3] or 'none'} "
                f"({len(left)}). Load it into the base model that it was made for."
            )
        for key, width in places.items():
            check_vector(key, state[key], width)
        return state


def check_vector(name: str, vector: Any, width: int) -> None:
    """TypeError or ValueError unless `vector` is a finite tensor `(width,)`."""
    if not isinstance(vector, torch.Tensor) or not vector.is_floating_point():
        kind = vector.dtype if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise TypeError(f"`{name}` must be a tensor of floats, got {kind}.")
    if tuple(vector.shape) != (width,):
        raise ValueError(f"`{name}` must have the shape ({width},), the model's width, got {tuple(vector.shape)}.")
    if vector.device.type != "meta" and not torch.isfinite(vector).all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity. The file is damaged, or training diverged.")
