"""Configuration of a sparse autoencoder: TopK, BatchTopK, JumpReLU or ReLU.

- The fields describe the function that the saved weights compute. How it was trained (loss, budgets, auxiliary term)
  belongs to the trainer's arguments.
- Conventions of other libraries that are mere scales (decoder norms inside the activation, an input scale) can be
  folded into the weights; the fields below are those that cannot be.
- An unknown keyword is refused, where transformers' configs would keep it silently as an attribute. What a config.json
  holds besides (other tools write notes there) is kept, unless it is a misspelt option.
"""

import difflib
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# keywords that every configuration takes and PreTrainedConfig handles itself
_GENERIC = {
    "auto_map", "model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config",
    "quantization_config", "tokenizer_class", "torch_dtype",
}  # fmt: skip


@strict
class SAEConfig(PreTrainedConfig):
    r"""
    Configuration of a sparse autoencoder of activations x of width D = `d_in`, with F = `d_sae` latents:

        x' = norm(x),   u = W_enc (x' - beta b_dec) + b_enc,   v = activation(u),
        x^ = norm^-1(sum_i v_i W_dec[i] + b_dec)

    - `topk`: the k = `k` largest u of each token are active, where positive;
    - `batchtopk`: in training the `k` * B largest positive u of a batch of B tokens; in evaluation those above one
      threshold, which training estimates;
    - `jumprelu`: those with u > theta_i, one learned threshold for each latent;
    - `relu`: those with u > 0.

    Whatever the activation, a call may ask for the k' largest of a token. Sources: TopK as in HierarchicalTopK (arXiv
    2505.24473), which makes one SAE good at every k' <= K; BatchTopK (arXiv 2412.06410); JumpReLU (arXiv 2407.14435).

    Args:
        d_in (`int`, *optional*, defaults to 2304): Width D of the activations.
        d_sae (`int`, *optional*, defaults to 65536): Number F of latents.
        k (`int` or `float`, *optional*): Active latents of a token: K of `topk`, the mean of `batchtopk` (which may be
            a fraction), by default 128 as in HierarchicalTopK, or `d_sae` where that is less. None for `jumprelu` and
            `relu`.
        activation (`str`, *optional*, defaults to `"topk"`): `"topk"`, `"batchtopk"`, `"jumprelu"` or `"relu"`.
        apply_b_dec_to_input (`bool`, *optional*, defaults to `True`): beta: whether the encoder reads x' - b_dec.
        normalize_decoder (`bool`, *optional*, defaults to `True`): Whether training keeps the rows of W_dec at norm 1.
        input_norm (`str`, *optional*, defaults to `"none"`): `"none"`; `"scalar"`, x' = `input_scale` * x; or
            `"layer_norm"`, x' = (x - mean) / (standard deviation + 1e-5) of each token; the output is multiplied by
            the standard deviation and the mean added, as OpenAI and SAELens do.
        input_scale (`float`, *optional*, defaults to 1.0): For `"scalar"`.
        jump_threshold (`float`, *optional*, defaults to 0.001): For `jumprelu`: theta_i before training.
        jump_bandwidth (`float`, *optional*, defaults to 0.001):
            For `jumprelu`: width epsilon of the band around theta in which the straight-through gradient acts.
        hook_name (`str`, *optional*): Module path of the activations in their model, `"model.layers.12"`.
        hook_io (`str`, *optional*, defaults to `"output"`): Side of that module, `"output"` or `"input"`.
        base_model_name_or_path (`str`, *optional*): Hub id of that model.

    Raises:
        ValueError: (at construction) where a value is out of range, with the value and the range.

    Example:

    ```python
    >>> from hf_ext import SAEConfig, SAEModel

    >>> sae = SAEModel(SAEConfig(d_in=64, d_sae=512, k=16, hook_name="model.layers.3"))
    >>> sae.encode(torch.randn(10, 64), k=4).indices.shape
    torch.Size([10, 4])

    ```"""

    model_type = "sae"
    _auto_class = "AutoConfig"

    d_in: int = 2304
    d_sae: int = 65536
    k: int | float | None = None
    activation: Literal["topk", "batchtopk", "jumprelu", "relu"] = "topk"
    apply_b_dec_to_input: bool = True
    normalize_decoder: bool = True
    input_norm: Literal["none", "scalar", "layer_norm"] = "none"
    input_scale: float | int = 1.0
    jump_threshold: float | int = 0.001
    jump_bandwidth: float | int = 0.001
    hook_name: str | None = None
    hook_io: Literal["input", "output"] = "output"
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
            raise ValueError(f"`{name}` is not an option of {type(self).__name__}, got {kwargs[name]!r}. {hint}")
        if self.k is None and self.activation in ("topk", "batchtopk"):
            self.k = min(128, self.d_sae)
        super().__post_init__(**kwargs)
        # written by every save, so that a saved model loads where hf_ext is not installed
        self.auto_map = {"AutoConfig": "configuration_sae.SAEConfig", "AutoModel": "modeling_sae.SAEModel"}

    def validate_architecture(self) -> None:
        """Checks across fields; run at construction, before any weights load."""
        for name in ("d_in", "d_sae"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("input_scale", "jump_bandwidth"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be a number above 0, got {getattr(self, name)}.")
        if not 0 <= self.jump_threshold < float("inf"):
            raise ValueError(f"`jump_threshold` must be a number >= 0, got {self.jump_threshold}.")
        if self.input_norm != "scalar" and self.input_scale != 1:
            raise ValueError(
                f"`input_scale` must be 1 for input_norm={self.input_norm!r}, got {self.input_scale}. "
                'It belongs to input_norm="scalar".'
            )

    def validate_k(self) -> None:
        """`k` belongs to the activations that have a budget, and is at most the number of latents."""
        if self.activation in ("jumprelu", "relu"):
            if self.k is not None:
                raise ValueError(
                    f"`k` must be None for activation={self.activation!r}, got {self.k}. Ask for a budget at the "
                    "call: sae.encode(x, k=...)."
                )
            return
        if not 0 < self.k <= self.d_sae:
            raise ValueError(
                f"`k` must be in [1, d_sae={self.d_sae}] for activation={self.activation!r}, got {self.k}. "
                "Lower `k` or raise `d_sae`."
            )
        if self.activation == "topk" and (self.k < 1 or self.k != int(self.k)):
            raise ValueError(
                f"`k` must be a whole number for activation='topk', got {self.k}. A fraction belongs to 'batchtopk'."
            )


__all__ = ["SAEConfig"]
