"""A causal LM of any family with constant vectors added at some modules (arXiv 2505.18706).

- The model inside is transformers' own, untouched; a hook at each place adds a row of `vectors`.
- For families whose layer has a linear map with a bias at its end a plain model is enough: see the exporter.
- This file travels to the Hub with configuration_steered.py, and imports nothing else of ours.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_steered import SteeredConfig


class SteeredModelForCausalLM(PreTrainedModel, GenerationMixin):
    """
    A causal LM whose hidden states get the vectors of arXiv 2505.18706: h <- h + s at each of `config.hook_names`.

    Inputs, outputs and `generate` are those of the model inside, `model`. `vectors` (`(places, hidden_size)`) are in
    the order of `hook_names`. [`hf_ext.steering.export_model`] makes one from a model with an adapter.
    """

    config_class = SteeredConfig
    _auto_class = "AutoModelForCausalLM"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: SteeredConfig) -> None:
        # None unless the user chose one: the model inside knows best what it supports
        attention = config._attn_implementation
        super().__init__(config)
        inner = config.get_text_config()
        self.model = AutoModelForCausalLM.from_config(inner, attn_implementation=attention)
        self.vectors = nn.Parameter(torch.zeros(len(config.hook_names), inner.hidden_size))
        for row, name in enumerate(config.hook_names):
            try:
                module = self.model.get_submodule(name)
            except AttributeError as error:
                raise ValueError(
                    f"`hook_names` must be modules of {type(self.model).__name__}, got {name!r}. "
                    "model.named_modules() lists them."
                ) from error
            module.register_forward_hook(partial(_add, self, row))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # the model inside has its own way; the vectors start at zero, where they were made
        return

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.set_output_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the model inside."""
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


def _add(owner: SteeredModelForCausalLM, row: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    hidden = hidden + owner.vectors[row].to(hidden.dtype)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


__all__ = ["SteeredModelForCausalLM"]
