"""A masked diffusion language model: a bidirectional transformer with the SUBS projection (MDLM, arXiv 2406.07524).

- Pre-norm blocks with RoPE and a GELU MLP: MDLM's DiT. Without time conditioning its modulation is a constant, which
  norms and projections can hold, so such a model has none; `hf_ext.gstar.import_mdlm` folds published weights.
- The mask is never predicted: its logit is -infinity. Carrying revealed tokens over is left to samplers and losses
  (`subs`), because some samplers want to know what the model thinks of a revealed token.
- With `prefix_attention="causal"` a prompt reads only what stands before it in the prompt, so that its keys and values
  do not depend on the answer and are computed once.
- Configuration and model are one file, as diffusers loads single files; it imports nothing else of ours.
"""

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


# keywords that every configuration takes and PreTrainedConfig handles itself
_GENERIC = {
    "attn_implementation", "auto_map", "model_type", "name_or_path", "num_labels", "output_attentions",
    "per_layer_config", "quantization_config", "rope_scaling", "rope_theta", "tokenizer_class", "torch_dtype",
}  # fmt: skip
# width of the sinusoids that a noise level becomes
FREQUENCIES = 256


@strict
class MDLMConfig(PreTrainedConfig):
    r"""
    Configuration of a masked diffusion language model, the denoiser of G-Star (arXiv 2510.08369). Defaults are MDLM's
    small model. Source: arXiv 2406.07524.

    Args:
        vocab_size (`int`, *optional*, defaults to 50258): Entries of the vocabulary, the mask among them.
        hidden_size (`int`, *optional*, defaults to 768): Width of the residual stream.
        intermediate_size (`int`, *optional*): Width of the MLP; 4 `hidden_size` if not given.
        num_hidden_layers (`int`, *optional*, defaults to 12): Blocks, at least 1.
        num_attention_heads (`int`, *optional*, defaults to 12): Heads of an even size `hidden_size` / heads.
        max_position_embeddings (`int`, *optional*, defaults to 1024): Longest sequence in tokens.
        hidden_dropout (`float`, *optional*, defaults to 0.1): Dropout of both branches of a block, in [0, 1).
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of the norms.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
        rope_parameters (`dict`, *optional*): RoPE settings as in Llama (`rope_theta`, `rope_type`, ...).
        mask_token_id (`int`, *optional*): Id of the mask; the last of the vocabulary if not given.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Ids of special tokens, if there are any.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Whether the head shares the embedding's weights.
        time_conditioning (`bool`, *optional*, defaults to `False`):
            Whether blocks are modulated by the noise level sigma, which every forward then needs. Off as in MDLM, so
            that any noise schedule may be sampled with.
        cond_dim (`int`, *optional*, defaults to 128): Width of the conditioning, with `time_conditioning`.
        prefix_attention (`str`, *optional*, defaults to `"full"`):
            `"full"`: all tokens see all. `"causal"` (ours): the first `prefix_length` tokens, a prompt, see themselves
            and those before; the others see all. Has to be trained that way; then a prompt is computed once.
        base_model_name_or_path (`str`, *optional*): Hub id of the model that this one was converted from.

    Raises:
        ValueError: (at construction) where a value is out of range, with the value and the range.

    Example:

    ```python
    >>> from hf_ext import MDLMConfig, MDLMForMaskedLM

    >>> config = MDLMConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> model = MDLMForMaskedLM(config)
    >>> config.mask_token_id
    99

    ```"""

    model_type = "mdlm"
    keys_to_ignore_at_inference = ["past_key_values"]
    _auto_class = "AutoConfig"

    vocab_size: int = 50258
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    hidden_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    time_conditioning: bool = False
    cond_dim: int = 128
    prefix_attention: Literal["full", "causal"] = "full"
    base_model_name_or_path: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = [field.name for field in fields(self)]
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(f"`model_type` must be {self.model_type!r}, got {kwargs['model_type']!r}.")
        from_file = self.transformers_version is not None
        for name in kwargs:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if name in _GENERIC or name.startswith("_") or (from_file and not near):
                continue
            own = [option for option in known if option in type(self).__annotations__]
            hint = f"Did you mean `{near[0]}`?" if near else f"The options are {', '.join(own)}."
            raise ValueError(f"`{name}` is not an option of MDLMConfig, got {kwargs[name]!r}. {hint}")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)
        # written by every save, so that a saved model loads where hf_ext is not installed
        self.auto_map = {
            "AutoConfig": "modeling_mdlm.MDLMConfig",
            "AutoModel": "modeling_mdlm.MDLMModel",
            "AutoModelForMaskedLM": "modeling_mdlm.MDLMForMaskedLM",
        }

    def validate_architecture(self) -> None:
        """Checks across fields; run at construction, before any weights load."""
        names = (
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "cond_dim",
            "max_position_embeddings",
        )
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.vocab_size < 2:
            raise ValueError(f"`vocab_size` must be at least 2, a token and the mask, got {self.vocab_size}.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` must be a multiple of 2 * num_attention_heads={2 * self.num_attention_heads}, since "
                f"RoPE turns pairs, got {self.hidden_size}."
            )
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"`hidden_dropout` must be in [0, 1), got {self.hidden_dropout}.")

    def validate_mask(self) -> None:
        """The mask is a token of its own."""
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` must be in [0, vocab_size={self.vocab_size}), got {self.mask_token_id}. Leave it "
                "out for the last token, and count the mask in `vocab_size`."
            )
        if self.mask_token_id == self.pad_token_id:
            raise ValueError(
                f"`mask_token_id` must differ from `pad_token_id`, got {self.mask_token_id} for both: padding would "
                "be generated."
            )


@dataclass
class MDLMOutput(ModelOutput):
    """
    Attributes:
        loss (`torch.Tensor`, *optional*): Mean cross-entropy of the masked positions that have labels, in nats.
        logits (`torch.Tensor` of shape `(batch, seq, vocab_size)`): Of x_0; the mask's own is -infinity.
        past_key_values (`Cache`, *optional*): Keys and values of the prefix, where `use_cache` asked for them.
        hidden_states, attentions (`tuple`, *optional*): Of each layer, where asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class MDLMAttention(nn.Module):
    """Multi-head attention with RoPE, no biases. Its twin stands in modeling_error_predictor.py."""

    def __init__(self, config: MDLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden_states.shape[:-1]
        query, key, value = self.qkv_proj(hidden_states).view(*shape, 3, -1, self.head_dim).unbind(2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if use_cache:
            key, value = past_key_values.update(key, value, self.layer_idx)
        elif past_key_values is not None:
            # read only: every step of a chain stands on the same prefix
            past = past_key_values.layers[self.layer_idx]
            key, value = torch.cat((past.keys, key), 2), torch.cat((past.values, value), 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, is_causal=False, **kwargs
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class MDLMModulation(nn.Linear):
    """Shifts, scales and gates from the conditioning; 0 at the start, so that blocks start as the identity (DiT)."""


class MDLMLayer(GradientCheckpointingLayer):
    """x <- x + g_1 attention(m_1(norm(x))), x <- x + g_2 mlp(m_2(norm(x))), with m(y) = y (1 + scale) + shift where
    there is time conditioning, and g = 1, m the identity where not."""

    def __init__(self, config: MDLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MDLMAttention(config, layer_idx)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.modulation = MDLMModulation(config.cond_dim, 6 * config.hidden_size) if config.time_conditioning else None

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if self.modulation is None:
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + self.dropout(attended)
            return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(conditioning)[:, None].chunk(6, dim=-1)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states) * (1 + scale_1) + shift_1, **kwargs)
        hidden_states = hidden_states + gate_1 * self.dropout(attended)
        normed = self.post_attention_layernorm(hidden_states) * (1 + scale_2) + shift_2
        return hidden_states + gate_2 * self.dropout(self.mlp(normed))


class MDLMTimeEmbedding(nn.Module):
    """silu(MLP(sinusoids of sigma)), (B,) -> (B, cond_dim)."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, config.cond_dim), nn.SiLU(), nn.Linear(config.cond_dim, config.cond_dim)
        )

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=sigma.device, dtype=torch.float32))
        angles = sigma.float()[:, None] * rates
        sinusoids = torch.cat((angles.cos(), angles.sin()), -1)
        dtype = next(self.parameters()).dtype
        return nn.functional.silu(self.mlp(sinusoids.to(dtype)))


class MDLMPreTrainedModel(PreTrainedModel):
    config_class = MDLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MDLMLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MDLMLayer, "attentions": MDLMAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module.__class__.__name__ == "MDLMModulation":
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class MDLMModel(MDLMPreTrainedModel):
    """The bidirectional transformer of MDLM (arXiv 2406.07524) without its head; G-Star (arXiv 2510.08369) uses it."""

    _auto_class = "AutoModel"

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MDLMLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.time_embedding = MDLMTimeEmbedding(config) if config.time_conditioning else None
        self.modulation = MDLMModulation(config.cond_dim, 2 * config.hidden_size) if config.time_conditioning else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        sigma: torch.Tensor | None = None,
        prefix_length: int | torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): Tokens, some of them the mask.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*):
                1 at tokens, 0 at padding; with `past_key_values` for its tokens, too.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Counted from the prefix on.
            sigma (`torch.Tensor` of shape `(batch,)`, *optional*): Noise level, -log alpha(t); with time conditioning.
            prefix_length (`int` or `torch.Tensor` of shape `(batch,)`, *optional*):
                With `prefix_attention="causal"`: how many tokens, padding on the left included, are the prompt.
            past_key_values (`Cache`, *optional*):
                Keys and values of a prompt that is not in `input_ids`. Read, and not added to unless `use_cache`.
            inputs_embeds (`torch.Tensor` of shape `(batch, seq, hidden_size)`, *optional*): Instead of `input_ids`.
            use_cache (`bool`, *optional*, defaults to `False`): Return the keys and values of these tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            which = "neither" if input_ids is None else "both"
            raise ValueError(f"Give exactly one of `input_ids` and `inputs_embeds`, got {which}.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        self._check(sigma, prefix_length, past_key_values, use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        seq = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + seq, device=inputs_embeds.device).unsqueeze(0)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            and_mask_function=_prefix_rule(prefix_length, inputs_embeds),
        )
        conditioning = None if self.time_embedding is None else self.time_embedding(sigma)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                conditioning,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        if self.modulation is not None:
            shift, scale = self.modulation(conditioning)[:, None].chunk(2, dim=-1)
            hidden_states = hidden_states * (1 + scale) + shift
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None
        )

    def _check(self, sigma: Any, prefix_length: Any, past_key_values: Any, use_cache: bool) -> None:
        if (sigma is None) == self.config.time_conditioning:
            got = "None" if sigma is None else f"one of shape {tuple(sigma.shape)}"
            wanted = "given" if sigma is None else "None"
            raise ValueError(
                f"`sigma` must be {wanted} for time_conditioning={self.config.time_conditioning}, got {got}."
            )
        if self.config.prefix_attention == "causal":
            return
        for name, value in (("prefix_length", prefix_length), ("past_key_values", past_key_values)):
            if value is not None:
                raise ValueError(f'`{name}` must be None for prefix_attention="full": a prompt sees the answer there.')
        if use_cache:
            raise ValueError('`use_cache` must be False for prefix_attention="full": a prompt sees the answer there.')


class MDLMForMaskedLM(MDLMPreTrainedModel):
    """
    MDLM (arXiv 2406.07524): logits of x_0 for a partly masked text. Any masked-LM code can read it; `GStarPipeline`
    (G-Star, arXiv 2510.08369) generates with it, `MDLMTrainer` trains it.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import MDLMConfig, MDLMForMaskedLM

    >>> config = MDLMConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> model = MDLMForMaskedLM(config)
    >>> model(torch.tensor([[1, 99, 3]])).logits.shape
    torch.Size([1, 3, 100])

    ```"""

    _auto_class = "AutoModelForMaskedLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.model = MDLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        sigma: torch.Tensor | None = None,
        prefix_length: int | torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> MDLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                x_0. The loss is of positions that are masked in `input_ids`, and whose label is not -100.
            input_ids, attention_mask, position_ids, sigma, prefix_length, past_key_values, inputs_embeds, use_cache:
                See [`MDLMModel`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            sigma=sigma,
            prefix_length=prefix_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        # SUBS, first half: no probability for the mask
        logits[..., self.config.mask_token_id] = -math.inf
        loss = None
        if labels is not None:
            if input_ids is None:
                raise ValueError("`input_ids` must be given with `labels`, got None: they tell what is masked.")
            counted = (input_ids == self.config.mask_token_id) & (labels != -100)
            # a batch without a masked position still has gradients, all 0
            loss = nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="sum")
            loss = loss / counted.sum().clamp(min=1)
        return MDLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def subs(self, logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """
        log x_theta(x_t): the log-probabilities after the whole SUBS projection.

        Args:
            logits (`torch.Tensor` of shape `(batch, seq, vocab_size)`): Of a forward pass.
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): x_t.

        Returns:
            `torch.Tensor` of shape `(batch, seq, vocab_size)`, float32: never the mask; revealed tokens have 1.
        """
        logits = logits.float().index_fill(
            -1, torch.tensor(self.config.mask_token_id, device=logits.device), -math.inf
        )
        kept = torch.full_like(logits, -math.inf).scatter_(-1, input_ids[..., None], 0.0)
        return torch.where((input_ids == self.config.mask_token_id)[..., None], logits.log_softmax(-1), kept)


def _prefix_rule(prefix_length: int | torch.Tensor | None, inputs_embeds: torch.Tensor) -> Any:
    """Which pairs may see each other, for transformers' masks: a token of the prefix sees what is before it."""
    if prefix_length is None:
        return None
    lengths = torch.as_tensor(prefix_length, device=inputs_embeds.device).expand(inputs_embeds.shape[0])

    def rule(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= lengths[batch]) | (key <= query)

    return rule


__all__ = ["MDLMConfig", "MDLMForMaskedLM", "MDLMModel", "MDLMOutput", "MDLMPreTrainedModel"]
