"""Configuration of LIMe (Layer-Integrated Memory, arXiv 2502.09245 v2).

- Every field but the LIMe ones carries Llama's name, meaning and default.
- `layer_types` is always filled, since transformers' masks and caches read it, and cut to `num_hidden_layers`, so that
  a deeper checkpoint loads as its first layers.
- An unknown keyword is refused, where transformers' configs would keep it silently as an attribute. What a config.json
  holds besides (other tools write notes there) is kept, unless it is a misspelt option.
"""

import difflib
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# model types whose attention is Llama's up to biases, query/key norms and sliding windows
CONVERTIBLE = ("llama", "mistral", "qwen2", "qwen3")
# keywords that every configuration takes and PreTrainedConfig handles itself
_GENERIC = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "per_layer_config", "quantization_config", "rope_scaling", "rope_theta", "tokenizer_class",
    "torch_dtype",
}  # fmt: skip


@strict
class LimeConfig(PreTrainedConfig):
    r"""
    Configuration of a Llama-like decoder whose attention heads also read the keys and values of earlier layers.

    In layer l (1-based) with kv heads h = 1..G, the raw keys and values of all layers so far are mixed by the router

        K_l[h] = sum_{j<=l} sum_{h'} R_l[h, j, h'] Kraw_j[h'],   the same R_l for V,

    before RoPE. Map: L = `num_hidden_layers`, H = `num_attention_heads`, G = `num_key_value_heads`, d = `head_dim`,
    D = `hidden_size`. Source: arXiv 2502.09245 v2, section 3.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000): Entries of the vocabulary.
        hidden_size (`int`, *optional*, defaults to 4096): Width D of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 11008): Width of the gated MLP.
        num_hidden_layers (`int`, *optional*, defaults to 32): Layers L, at least 1. With one layer nothing is routed.
        num_attention_heads (`int`, *optional*, defaults to 32): Query heads H, a multiple of `num_key_value_heads`.
        num_key_value_heads (`int`, *optional*): Key/value heads G; H if not given (MHA), 1 is MQA.
        head_dim (`int`, *optional*): Head size d, even; `hidden_size // num_attention_heads` if not given.
        hidden_act (`str`, *optional*, defaults to `"silu"`): Activation of the MLP.
        max_position_embeddings (`int`, *optional*, defaults to 2048): Longest sequence in tokens.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
        rms_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of the RMS norms.
        use_cache (`bool`, *optional*, defaults to `True`): Whether the forward returns key/value states.
        pad_token_id (`int`, *optional*): Id of the padding token.
        bos_token_id (`int`, *optional*, defaults to 1): Id of the first token.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 2): Id or ids that end a text.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Whether the head shares the embedding's weights.
        rope_parameters (`dict`, *optional*): RoPE settings as in Llama (`rope_theta`, `rope_type`, ...).
        attention_bias (`bool`, *optional*, defaults to `False`): Biases on q, k, v. Raw keys and values include them.
        attention_output_bias (`bool`, *optional*, defaults to `False`): Bias on the output projection.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of the attention weights, in [0, 1).
        mlp_bias (`bool`, *optional*, defaults to `False`): Biases in the MLP.
        use_qk_norm (`bool`, *optional*, defaults to `False`):
            RMS norm on each query and key head (Qwen3). The key norm acts after routing.
        sliding_window (`int`, *optional*): Attention window in tokens. Routing is token-local: windows leave it alone.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` for each layer; all alike if not given (sliding if
            `sliding_window` is), and cut to `num_hidden_layers` if longer.
        routing (`str`, *optional*, defaults to `"full"`):
            Which layers a router reads besides its own: `"full"` all earlier ones (the paper); `"first"` the first
            `routing_window` and the one before (constant cost per layer; the paper's first-4 keeps 94 % of the gain);
            `"last"` the newest `routing_window`, its own included; `"period"` every `routing_window`-th counted back
            from its own; `"none"` no router at all, plain Llama.
        routing_window (`int`, *optional*): The number that `"first"`, `"last"` and `"period"` need, in [1, L).
        router_init (`str`, *optional*, defaults to `"identity_plus_noise"`):
            `"identity_plus_noise"`: own layer and head 1, every other entry uniform with standard deviation
            1 / sqrt(sources * G) (the paper, for training from scratch); `"identity"`: the others are 0 and the model
            equals its Llama (conversion).
        router_type (`str`, *optional*, defaults to `"kv"`):
            What is looked up: `"kv"` mixes projected keys and values (the paper's v2). The paper's v1 mixes hidden
            states by a softmax over layers, for each head: `"static"` learned weights; `"static_top_p"` of these the
            fewest whose mass exceeds `router_top_p`; `"dynamic"` weights computed for each token. They need
            `num_key_value_heads == num_attention_heads` and cannot start as the identity.
        router_top_p (`float`, *optional*, defaults to 0.9): The mass that `"static_top_p"` keeps, in (0, 1).
        router_implementation (`str`, *optional*, defaults to `"auto"`):
            `"auto"` is two GEMMs a layer over a shared buffer in eager mode, and the plain chain under
            `torch.compile`; `"reference"` is the plain chain everywhere (needed for double backward).
        base_model_name_or_path (`str`, *optional*): Hub id of the model that this one was converted from.

    Raises:
        ValueError: (at construction) where a value is out of range, with the value and the range.

    Example:

    ```python
    >>> from hf_ext import LimeConfig, LimeForCausalLM

    >>> model = LimeForCausalLM(LimeConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    ...                                    num_attention_heads=4, num_key_value_heads=2, vocab_size=100))
    >>> model.model.layers[3].self_attn.router.weight.shape        # (head, source layer, source head)
    torch.Size([2, 4, 2])

    ```"""

    model_type = "lime"
    keys_to_ignore_at_inference = ["past_key_values"]
    # R mixes all kv heads of a token, so attention stays whole on every rank; only the MLP is split
    base_model_tp_plan = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = None
    _auto_class = "AutoConfig"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    use_qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    routing: Literal["full", "first", "last", "period", "none"] = "full"
    routing_window: int | None = None
    router_init: Literal["identity_plus_noise", "identity"] = "identity_plus_noise"
    router_type: Literal["kv", "static", "static_top_p", "dynamic"] = "kv"
    router_top_p: float = 0.9
    router_implementation: Literal["auto", "reference"] = "auto"
    base_model_name_or_path: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = [field.name for field in fields(self)]
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"`model_type` must be {self.model_type!r}, got {kwargs['model_type']!r}. To convert a model "
                "use LimeForCausalLM.from_llama."
            )
        from_file = self.transformers_version is not None
        for name in kwargs:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if name in _GENERIC or name.startswith("_") or (from_file and not near and not name.startswith("rout")):
                continue
            hint = f"Did you mean `{near[0]}`?" if near else f"The routing options are {_options(known)}."
            raise ValueError(f"`{name}` is not an option of LimeConfig, got {kwargs[name]!r}. {hint}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        windowed = self.sliding_window is not None
        default = ["sliding_attention" if windowed else "full_attention"] * self.num_hidden_layers
        self.layer_types = (self.layer_types or default)[: self.num_hidden_layers]
        super().__post_init__(**kwargs)
        # written by every save, so that a saved model loads where hf_ext is not installed
        self.auto_map = {
            "AutoConfig": "configuration_lime.LimeConfig",
            "AutoModel": "modeling_lime.LimeModel",
            "AutoModelForCausalLM": "modeling_lime.LimeForCausalLM",
        }

    def validate_architecture(self) -> None:
        """Checks across fields; run at construction, before any weights load."""
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` must be a multiple of `num_key_value_heads`, got {self.num_attention_heads} "
                f"and {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, since RoPE turns pairs, got {self.head_dim}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"`sliding_window` must be at least 1 token or None, got {self.sliding_window}.")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("`layer_types` names sliding_attention, so `sliding_window` must be given, got None.")

    def validate_routing(self) -> None:
        """`routing_window` belongs to the routings that need it, and lies in [1, L)."""
        if self.routing in ("full", "none"):
            if self.routing_window is not None:
                raise ValueError(
                    f"`routing_window` must be None for routing={self.routing!r}, got {self.routing_window}. "
                    "It belongs to 'first', 'last' and 'period'."
                )
            return
        if self.routing_window is None or not 1 <= self.routing_window < max(self.num_hidden_layers, 2):
            raise ValueError(
                f"`routing_window` must be in [1, num_hidden_layers={self.num_hidden_layers}) for "
                f"routing={self.routing!r}, got {self.routing_window}."
            )

    def validate_router_type(self) -> None:
        """v1 mixes one input for each head, by a softmax: no shared keys and values, no identity."""
        if not 0 < self.router_top_p < 1:
            raise ValueError(f"`router_top_p` must be in (0, 1), got {self.router_top_p}.")
        if self.router_type == "kv":
            return
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"`num_key_value_heads` must equal num_attention_heads={self.num_attention_heads} for "
                f"router_type={self.router_type!r}, got {self.num_key_value_heads}. Grouped heads need 'kv'."
            )
        if self.router_init == "identity":
            raise ValueError(
                f"`router_init` must not be 'identity' for router_type={self.router_type!r}: a softmax over layers "
                "never equals one of them. Train from scratch, or convert with router_type='kv'."
            )

    def sources(self, layer_idx: int) -> list[int]:
        """Layers (0-based, ascending, its own last) that the router of layer `layer_idx` reads; [] if it has none."""
        newest, window = layer_idx, self.routing_window
        if layer_idx == 0 or self.routing == "none":
            return []
        if self.routing == "first":
            return sorted({*range(min(window, newest)), newest - 1, newest})
        if self.routing == "last":
            return list(range(max(newest - window + 1, 0), newest + 1))
        if self.routing == "period":
            return list(range(newest % window, newest + 1, window))
        return list(range(newest + 1))

    @classmethod
    def from_llama_config(cls, config: PreTrainedConfig, **overrides: Any) -> "LimeConfig":
        """The LIMe twin of a Llama, Mistral, Qwen2 or Qwen3 configuration, with identity routers.

        Args:
            config (`PreTrainedConfig`): Configuration of the source model.
            overrides: Options of LimeConfig to set besides, for example `routing="first", routing_window=4`.

        Raises:
            ValueError: if the model type is none of these four.
        """
        kind = getattr(config, "model_type", None)
        if kind not in CONVERTIBLE:
            raise ValueError(
                f"`config` must be of a Llama-like model ({', '.join(CONVERTIBLE)}), got model_type={kind!r}. "
                "LIMe needs one set of keys and values per layer, which latent (MLA) and shared-KV attention lack."
            )
        values = {k: v for k, v in config.to_dict().items() if k in {field.name for field in fields(cls)}}
        for name in ("architectures", "transformers_version"):
            values.pop(name, None)
        has_bias = bool(getattr(config, "attention_bias", False))
        values["attention_bias"] = has_bias or kind == "qwen2"
        values["attention_output_bias"] = has_bias
        values["use_qk_norm"] = kind == "qwen3"
        if set(values.get("layer_types") or []) == {"full_attention"}:
            values["sliding_window"] = None
        return cls(**{**values, "router_init": "identity", **overrides})


def _options(known: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in known if name.startswith("rout"))


__all__ = ["LimeConfig"]
