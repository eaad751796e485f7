"""The error predictor of G-Star: which tokens of a finished text are likely wrong (arXiv 2510.08369).

- Three kinds: a full copy of the denoiser, its first n blocks, or a head alone that reads the denoiser's last hidden
  states. The copies belong to the predictor and are saved with it; a head shares the denoiser at run time.
- The last layer starts at 0, so a new predictor has no opinion, and G-Star with it is the unguided star sampler.
- It reads proposals without masks, at noise level 0: where the denoiser is time-conditioned, its modulation at sigma 0
  is folded into the copy.
- Diffusers loads single files, so the blocks of modeling_mdlm.py stand here a second time, without what a predictor
  does not need; a test compares the two.
"""

import difflib
from dataclasses import dataclass, fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import ModelOutput


# keywords that every configuration takes and PreTrainedConfig handles itself
_GENERIC = {
    "attn_implementation", "auto_map", "model_type", "name_or_path", "num_labels", "output_attentions",
    "per_layer_config", "quantization_config", "tokenizer_class", "torch_dtype",
}  # fmt: skip


# what the backbone of an MDLM is built from
_OF_MDLM = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_dropout",
    "layer_norm_eps", "max_position_embeddings", "rope_parameters",
)  # fmt: skip


@strict
class ErrorPredictorConfig(PreTrainedConfig):
    r"""
    Configuration of an error predictor, as [`ErrorPredictor.from_denoiser`] makes it. Source: arXiv 2510.08369.

    Args:
        vocab_size (`int`, *optional*, defaults to 50258): Vocabulary of the denoiser that it goes with.
        hidden_size (`int`, *optional*, defaults to 768): Width of the features that the head reads.
        base_config (`dict`, *optional*):
            Configuration of its own backbone, with `model_type` and the number of blocks that it keeps. Without one it
            is a head that reads the denoiser's last hidden states.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of the head's norm.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of a new backbone's weights.

    Example:

    ```python
    >>> from hf_ext import ErrorPredictorConfig

    >>> ErrorPredictorConfig(vocab_size=100, hidden_size=64).base_config is None        # a head alone
    True

    ```"""

    model_type = "error_predictor"
    _auto_class = "AutoConfig"

    vocab_size: int = 50258
    hidden_size: int = 768
    base_config: dict | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

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
            raise ValueError(f"`{name}` is not an option of ErrorPredictorConfig, got {kwargs[name]!r}. {hint}")
        super().__post_init__(**kwargs)
        # written by every save, so that a saved model loads where hf_ext is not installed
        self.auto_map = {
            "AutoConfig": "modeling_error_predictor.ErrorPredictorConfig",
            "AutoModel": "modeling_error_predictor.ErrorPredictor",
        }

    def validate_architecture(self) -> None:
        """Checks across fields; run at construction, before any weights load."""
        for name in ("vocab_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.base_config is None:
            return
        kind = self.base_config.get("model_type")
        if kind != "mdlm" and kind not in CONFIG_MAPPING:
            raise ValueError(
                f"`base_config` must have a `model_type` that transformers knows, or mdlm, got {kind!r}. For a model "
                "with remote code use a head alone: ErrorPredictor.from_denoiser(model, num_layers=0)."
            )
        lacking = [name for name in _OF_MDLM if name not in self.base_config]
        if kind == "mdlm" and lacking:
            raise ValueError(f"`base_config` must be a whole MDLMConfig, got none of {', '.join(lacking)}.")
        for name in ("hidden_size", "vocab_size"):
            if self.base_config.get(name, getattr(self, name)) != getattr(self, name):
                raise ValueError(
                    f"`{name}` must be that of `base_config`, {self.base_config[name]}, got {getattr(self, name)}."
                )


@dataclass
class ErrorPredictorOutput(ModelOutput):
    """
    Attributes:
        loss (`torch.Tensor`, *optional*): Mean binary cross-entropy of the positions with a label, in nats.
        logits (`torch.Tensor` of shape `(batch, seq)`): e: larger = more likely wrong; sigmoid(e) is a probability.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class PredictorAttention(nn.Module):
    """Bidirectional attention with RoPE, no biases; twin of MDLMAttention."""

    def __init__(self, config: ErrorPredictorConfig, width: int, heads: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = width // heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any) -> torch.Tensor:
        shape = hidden_states.shape[:-1]
        query, key, value = self.qkv_proj(hidden_states).view(*shape, 3, -1, self.head_dim).unbind(2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.o_proj(output.reshape(*shape, -1).contiguous())


class PredictorLayer(GradientCheckpointingLayer):
    """Norm, attention, norm, MLP, each with its residual; twin of MDLMLayer without modulation."""

    def __init__(self, config: ErrorPredictorConfig, base: PreTrainedConfig) -> None:
        super().__init__()
        width, eps = base.hidden_size, base.layer_norm_eps
        self.self_attn = PredictorAttention(config, width, base.num_attention_heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, base.intermediate_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(base.intermediate_size, width),
        )
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.post_attention_layernorm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(base.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.dropout(self.self_attn(self.input_layernorm(hidden_states), **kwargs))
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class PredictorBackbone(nn.Module):
    """Embedding, blocks, norm; twin of MDLMModel without time conditioning."""

    def __init__(self, config: ErrorPredictorConfig) -> None:
        super().__init__()
        kept = {name: value for name, value in config.base_config.items() if name not in ("model_type", "auto_map")}
        base = PreTrainedConfig(**kept)
        self.config = config
        self.embed_tokens = nn.Embedding(base.vocab_size, base.hidden_size)
        self.layers = nn.ModuleList([PredictorLayer(config, base) for _ in range(base.num_hidden_layers)])
        self.norm = nn.LayerNorm(base.hidden_size, base.layer_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=base)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: Any = None
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, attention_mask=mask)
        return self.norm(hidden_states)


class PredictorOutput(nn.Linear):
    """The last layer, 0 at the start."""


class PredictorHead(nn.Module):
    """Norm, and one number for each position."""

    def __init__(self, config: ErrorPredictorConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.linear = PredictorOutput(config.hidden_size, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(hidden_states)).squeeze(-1)


class ErrorPredictor(PreTrainedModel):
    """
    g_phi of G-Star (arXiv 2510.08369): one logit for each token of a proposal, larger = more likely wrong. Trained by
    `ErrorPredictorTrainer`, used by `GStarPipeline`.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import ErrorPredictor, MDLMConfig, MDLMForMaskedLM

    >>> config = MDLMConfig(vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    >>> denoiser = MDLMForMaskedLM(config)
    >>> predictor = ErrorPredictor.from_denoiser(denoiser, num_layers=1)
    >>> predictor(torch.tensor([[1, 2, 3]])).logits.tolist()            # no opinion before training
    [[0.0, 0.0, 0.0]]

    ```"""

    config_class = ErrorPredictorConfig
    base_model_prefix = "predictor"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PredictorLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _auto_class = "AutoModel"

    def __init__(self, config: ErrorPredictorConfig) -> None:
        super().__init__(config)
        self.backbone = None
        if config.base_config is not None and config.base_config["model_type"] == "mdlm":
            self.backbone = PredictorBackbone(config)
        elif config.base_config is not None:
            self.backbone = AutoModel.from_config(AutoConfig.for_model(**config.base_config))
            if hasattr(self.backbone, "pooler"):
                self.backbone.pooler = None  # BERT's, which nothing reads
        self.head = PredictorHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module.__class__.__name__ == "PredictorOutput":
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        hidden_states: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> ErrorPredictorOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): x^_0, for a predictor with a backbone.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): 1 at tokens, 0 at padding.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): As the backbone counts them.
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden_size)`, *optional*):
                The denoiser's last hidden states for x^_0, for a head alone.
            labels (`torch.Tensor` of shape `(batch, seq)`, *optional*): 1 where x^_0 is wrong, 0 where right, -100
                where it does not count.

        Raises:
            ValueError: where tokens are given to a head, or hidden states to a predictor with a backbone.
        """
        if self.backbone is None and hidden_states is None:
            raise ValueError(
                "`hidden_states` must be given: this predictor is a head alone. Pass "
                "denoiser(input_ids, output_hidden_states=True).hidden_states[-1]."
            )
        if self.backbone is not None:
            if input_ids is None or hidden_states is not None:
                got = "hidden_states" if hidden_states is not None else "None"
                raise ValueError(f"`input_ids` must be given, and nothing else to read, got {got}.")
            where = {} if position_ids is None else {"position_ids": position_ids}
            features = self.backbone(input_ids, attention_mask=attention_mask, **where)
            hidden_states = features if isinstance(features, torch.Tensor) else features.last_hidden_state
        logits = self.head(hidden_states.to(self.head.linear.weight.dtype))
        loss = None
        if labels is not None:
            counted = labels != -100
            loss = nn.functional.binary_cross_entropy_with_logits(
                logits[counted].float(), labels[counted].float(), reduction="sum"
            ) / counted.sum().clamp(min=1)
        return ErrorPredictorOutput(loss=loss, logits=logits)

    @classmethod
    def from_denoiser(
        cls, denoiser: PreTrainedModel, num_layers: int | None = None, freeze: bool = False
    ) -> "ErrorPredictor":
        """
        A new predictor for a denoiser, with copies of its weights where it has a backbone.

        Args:
            denoiser (`PreTrainedModel`): A masked language model: MDLM, or a native class such as `BertForMaskedLM`.
            num_layers (`int`, *optional*):
                How many of its first blocks to copy: all if not given, which is the paper's default; 0 for a head
                alone, the only one for a model with remote code. One block is as good in the paper.
            freeze (`bool`, *optional*, defaults to `False`): Train the head alone, above frozen copies.

        Raises:
            ValueError: where the denoiser has fewer blocks, or is of a type that cannot be copied.
        """
        config = denoiser.config
        layers = config.num_hidden_layers
        if num_layers is not None and not 0 <= num_layers <= layers:
            raise ValueError(f"`num_layers` must be in [0, {layers}], the denoiser's blocks, got {num_layers}.")
        shared = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}
        if num_layers == 0:
            return cls(ErrorPredictorConfig(**shared)).to(denoiser.device)
        base = {name: value for name, value in config.to_dict().items() if value is not None}
        for name in ("transformers_version", "architectures", "auto_map", "dtype", "_name_or_path"):
            base.pop(name, None)
        if num_layers is not None:
            base["num_hidden_layers"] = num_layers
            if isinstance(base.get("layer_types"), list):
                base["layer_types"] = base["layer_types"][:num_layers]
        if config.model_type == "mdlm":
            base["time_conditioning"] = False
        predictor = cls(ErrorPredictorConfig(**shared, base_config=base))
        backbone, state = predictor.backbone, denoiser.base_model.state_dict()
        if getattr(config, "time_conditioning", False):
            state = _at_sigma_zero(denoiser.base_model, state)
        missing = backbone.load_state_dict(
            {n: v for n, v in state.items() if n in backbone.state_dict()}, strict=False
        )
        if missing.missing_keys:
            raise ValueError(
                f"`denoiser` must have the weights of a {config.model_type}, got none for {missing.missing_keys[:3]}."
            )
        backbone.requires_grad_(not freeze)
        return predictor.to(denoiser.device)


@torch.no_grad()
def _at_sigma_zero(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A time-conditioned MDLM's weights with its modulation at sigma = 0 folded in."""
    conditioning = model.time_embedding(torch.zeros(1, device=state["norm.weight"].device))
    state = dict(state)

    def fold(norm: str, scale: torch.Tensor, shift: torch.Tensor) -> None:
        state[norm + "bias"] = state[norm + "bias"] * (1 + scale) + shift
        state[norm + "weight"] = state[norm + "weight"] * (1 + scale)

    shift, scale = model.modulation(conditioning)[0].chunk(2)
    fold("norm.", scale, shift)
    for i, layer in enumerate(model.layers):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = layer.modulation(conditioning)[0].chunk(6)
        fold(f"layers.{i}.input_layernorm.", scale_1, shift_1)
        fold(f"layers.{i}.post_attention_layernorm.", scale_2, shift_2)
        for name, gate in (("self_attn.o_proj.weight", gate_1), ("mlp.2.weight", gate_2), ("mlp.2.bias", gate_2)):
            weight = state[f"layers.{i}.{name}"]
            state[f"layers.{i}.{name}"] = weight * (gate[:, None] if weight.dim() == 2 else gate)
    return state


__all__ = ["ErrorPredictor", "ErrorPredictorConfig", "ErrorPredictorOutput"]
