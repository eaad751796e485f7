"""LIMe: a Llama whose attention heads read the keys and values of all earlier layers (arXiv 2502.09245 v2).

- Norm, MLP, RoPE and eager attention are transformers' own Llama parts; only what LIMe adds is written here.
- `memory` is what layers hand on: flat positional tensors, since reentrant checkpointing differentiates only these.
  Eagerly it is one buffer that each layer fills and mixes by two GEMMs (`_RouteShared`); under torch.compile, and on
  request, it is the growing list of raw tensors [G, 2 B T d] (`route`, the plain reference). For the routers of the
  paper's v1 it is the growing list of the layers' inputs [B, T, D], normed.
- Routing at a position reads that position only, so masks, padding, packing and every cache are Llama's. Cached are
  the routed keys (after RoPE) and values: a LIMe cache has exactly Llama's shape.
- This file travels to the Hub with configuration_lime.py and modeling_lime_routers.py, and imports nothing else of
  ours.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_lime import LimeConfig
from .modeling_lime_routers import LimeHiddenRouter, LimeRouter, _RouteShared, route, tokens_first, unit_rms


class LimeAttention(nn.Module):
    """Llama's attention over routed keys and values (arXiv 2502.09245 v2, section 3)."""

    def __init__(self, config: LimeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None

        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.use_qk_norm else None
        kind = LimeRouter if config.router_type == "kv" else LimeHiddenRouter
        self.router = kind(config, layer_idx) if config.sources(layer_idx) else None
        # v1 norms what it looks up by a weight of its own
        looks_up = self.router is not None and config.router_type != "kv"
        self.source_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if looks_up else None

    def look_up(self, memory: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """v1: key and value [B, H, T, d] of each head's own mixture of the layers' normed inputs, `memory`."""
        batch, tokens, width = memory[-1].shape
        mixed = self.router([memory[j] for j in self.router.sources]) * self.source_layernorm.weight

        def project(linear: nn.Module) -> torch.Tensor:
            if type(linear) is not nn.Linear:  # LoRA, quantised: all heads of each mixture, of which its own is kept
                out = linear(mixed).view(-1, batch, tokens, len(mixed), self.head_dim)
                return out.diagonal(dim1=0, dim2=3).permute(0, 3, 1, 2)
            out = mixed @ linear.weight.view(-1, self.head_dim, width).transpose(1, 2)
            if linear.bias is not None:
                out = out + linear.bias.view(-1, 1, self.head_dim)
            return out.view(-1, batch, tokens, self.head_dim).transpose(0, 1)

        return project(self.k_proj), project(self.v_proj)

    def mix(self, key: torch.Tensor, value: torch.Tensor, *memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raw key and value [B, T, G, d], memory so far -> routed ones [B, G, T, d], memory with the raw ones."""
        batch, tokens, heads, dim = key.shape
        if self.config.routing == "none" or self.config.router_type != "kv":
            return key.transpose(1, 2), value.transpose(1, 2), *memory
        weight = None if self.router is None else self.router.weight
        if torch.compiler.is_compiling() or self.config.router_implementation == "reference":
            raw = torch.stack((key, value)).permute(3, 0, 1, 2, 4).reshape(heads, -1)
            memory = (*memory, raw)
            routed = raw if weight is None else route(weight, [memory[j] for j in self.router.sources])
            key, value = (tokens_first(half, key.shape) for half in routed.view(heads, 2, -1).unbind(1))
        else:
            if not memory:
                memory = (key.new_empty(2, self.config.num_hidden_layers, heads, batch * tokens * dim),)
            runs = [] if self.router is None else self.router.runs
            key, value, *memory = _RouteShared.apply(*memory, key, value, weight, self.layer_idx, runs)
        return key.transpose(1, 2), value.transpose(1, 2), *memory

    def forward(
        self,
        hidden_states: torch.Tensor,
        *memory: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Returns (output [B, T, D], attention weights or None, *memory)."""
        input_shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*input_shape, -1, self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)
        query = query.transpose(1, 2)
        if self.source_layernorm is not None:
            key, value = self.look_up(memory)
        else:
            key = self.k_proj(hidden_states).view(*input_shape, -1, self.head_dim)
            value = self.v_proj(hidden_states).view(*input_shape, -1, self.head_dim)
            # route raw keys, then norm, then RoPE: stays right if layers had norms or RoPEs of their own
            key, value, *memory = self.mix(key, value, *memory)
        if self.k_norm is not None:
            key = self.k_norm(key)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights, *memory


class LimeDecoderLayer(GradientCheckpointingLayer):
    """Norm, attention, norm, MLP, each with its residual; takes and returns the memory beside the hidden states."""

    def __init__(self, config: LimeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LimeAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, *memory: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        if self.self_attn.config.router_type != "kv":
            memory = (*memory, unit_rms(hidden_states, self.input_layernorm.variance_epsilon))
        attended, _, *memory = self.self_attn(self.input_layernorm(hidden_states), *memory, **kwargs)
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, *memory


class LimePreTrainedModel(PreTrainedModel):
    config_class = LimeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LimeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["router"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LimeDecoderLayer, "attentions": LimeAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module.__class__.__name__ == "LimeRouter":
            init.copy_(module.weight, module.initial_weight(self.config.router_init == "identity_plus_noise"))
        elif module.__class__.__name__ == "LimeHiddenRouter":
            init.copy_(module.weight, module.initial_weight(self.config.initializer_range))


class LimeModel(LimePreTrainedModel):
    """The LIMe decoder (arXiv 2502.09245 v2) without a head. Inputs and outputs are those of `LlamaModel`."""

    _auto_class = "AutoModel"

    def __init__(self, config: LimeConfig) -> None:
        # from_pretrained(num_hidden_layers=n) sets it after the configuration was made
        config.layer_types = config.layer_types[: config.num_hidden_layers]
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([LimeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`, got " + _which(input_ids))
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if 0 in inputs_embeds.shape[:2]:
            raise ValueError(
                f"`input_ids` must hold at least one row and one token, got shape {tuple(inputs_embeds.shape[:2])}."
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        self._check_cache(past_key_values, inputs_embeds)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past

        masks = attention_mask
        if not isinstance(masks, dict):
            mask_kwargs = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
            used = {layer.self_attn.layer_type for layer in self.layers}
            masks = {kind: make(**mask_kwargs) for kind, make in makers.items() if kind in used}

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        memory: tuple[torch.Tensor, ...] = ()
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states, *memory = layer(
                hidden_states,
                *memory,
                attention_mask=masks[layer.self_attn.layer_type],
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        self._check_finite(hidden_states, memory)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _check_cache(self, cache: Cache | None, inputs_embeds: torch.Tensor) -> None:
        """A cache of another model would otherwise fail deep inside torch, or not at all."""
        layers = getattr(cache, "layers", None)
        if not layers or torch.compiler.is_compiling():
            return
        keys = getattr(layers[0], "keys", None)
        expected = (inputs_embeds.shape[0], self.config.num_key_value_heads, self.config.head_dim)
        if len(layers) > self.config.num_hidden_layers:
            raise ValueError(
                f"`past_key_values` must come from this model with {self.config.num_hidden_layers} layers, got one "
                f"of {len(layers)}. Pass None, or DynamicCache(config=model.config)."
            )
        if isinstance(keys, torch.Tensor) and keys.dim() == 4:
            found = (keys.shape[0], keys.shape[1], keys.shape[3])
            if found != expected:
                raise ValueError(
                    f"`past_key_values` must hold keys of (batch, key/value heads, head size) = {expected}, got "
                    f"{found}. It belongs to another model or another batch: pass None to start afresh."
                )
            room = getattr(layers[0], "max_cache_len", None)
            if room is not None and self.layers[0].self_attn.sliding_window is None and inputs_embeds.shape[1] > room:
                raise ValueError(
                    f"`past_key_values` must have room for the {inputs_embeds.shape[1]} tokens given, got a static "
                    f"cache of {room}. Make it with max_cache_len={inputs_embeds.shape[1]} or more."
                )

    def _check_finite(self, hidden_states: torch.Tensor, memory: tuple[torch.Tensor, ...]) -> None:
        """0 * inf is NaN: one bad key would reach every later layer, so say where it arose. Eager mode only."""
        if torch.compiler.is_compiling() or hidden_states.device.type == "meta":
            return
        if torch.isfinite(hidden_states.detach().sum(dtype=torch.float32)):
            return
        raws = memory[0].transpose(0, 1) if memory and memory[0].dim() == 4 else memory
        bad = [i for i, raw in enumerate(raws) if not torch.isfinite(raw).all()]
        what = "keys or values" if self.config.router_type == "kv" else "normed inputs"
        where = f"the {what} of layer {bad[0]} are the first" if bad else f"all {what} are finite"
        raise FloatingPointError(
            f"The hidden states of the last layer hold NaN or infinity; {where}. Check input and learning rate, "
            "or use bfloat16 or float32 where float16 overflows."
        )


class LimeForCausalLM(LimePreTrainedModel, GenerationMixin):
    """
    LIMe (arXiv 2502.09245 v2) with a language-modelling head. Inputs, outputs and `generate` are those of
    `LlamaForCausalLM`; [`LimeForCausalLM.from_llama`] converts a pretrained model.
    """

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LimeConfig) -> None:
        super().__init__(config)
        self.model = LimeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
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
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @classmethod
    def from_llama(cls, model: PreTrainedModel | str | os.PathLike, **overrides: Any) -> "LimeForCausalLM":
        """
        The LIMe twin of a pretrained Llama, Mistral, Qwen2 or Qwen3: the same weights and identity routers, so the
        same logits to the last bit. Train the routers alone, or everything (see `lime_param_groups`).

        Args:
            model (`PreTrainedModel`, `str` or `os.PathLike`): A causal LM, or its Hub id or folder. It is copied.
            overrides: Options of [`LimeConfig`] to set besides, for example `routing="first", routing_window=4`.

        Returns:
            `LimeForCausalLM` in the dtype and on the device of the source, in eval mode; its routers in float32.

        Raises:
            ValueError: if the model is of another family, with the families that work.
        """
        if isinstance(model, (str, os.PathLike)):
            from transformers import AutoConfig

            LimeConfig.from_llama_config(AutoConfig.from_pretrained(model), **overrides)  # refuse before weights load
            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        config = LimeConfig.from_llama_config(model.config, **overrides)
        name = getattr(model.config, "_name_or_path", "")
        config.base_model_name_or_path = name if name and not os.path.exists(name) else None
        with init.no_init_weights():
            lime = cls._from_config(config, dtype=model.dtype).to(model.device)
        for name, buffer in model.named_buffers():  # RoPE's frequencies may have been cast with the source
            lime.get_buffer(name).data = buffer.clone()
        missing, unexpected = lime.load_state_dict(model.state_dict(), strict=False)
        if unexpected or any(".router." not in key for key in missing):
            odd = [*unexpected, *(key for key in missing if ".router." not in key)]
            raise ValueError(
                f"`model` must have the parameters of a {model.config.model_type}, got unknown {odd[:4]}."
            )
        with torch.no_grad():
            for layer in lime.model.layers:
                if (router := layer.self_attn.router) is not None:
                    router.weight.copy_(router.initial_weight(noise=config.router_init == "identity_plus_noise"))
        lime.tie_weights()
        if getattr(model, "generation_config", None) is not None:
            lime.generation_config = model.generation_config
        return lime.eval()


def _which(input_ids: torch.Tensor | None) -> str:
    return "neither." if input_ids is None else "both."


__all__ = ["LimeForCausalLM", "LimeModel", "LimePreTrainedModel"]
