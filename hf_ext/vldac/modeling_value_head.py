"""The critic of VL-DAC: a small MLP on the hidden states that a policy has at its prompt (arXiv 2508.04280).

- It reads what the policy computes anyway, so it takes hidden states and no tokens: any model that gives
  `output_hidden_states` can have one, and the policy's own files stay as they are.
- It knows the observation only, never the sampled response: it looks at the last token of the prompt, whose hidden
  state predicts the first token of the response, or at the mean over the prompt.
- With `stop_gradient` nothing of its loss reaches the policy.
- It computes in float32 whatever the policy's type is: values are regressed, and bfloat16 has three digits.
"""

import difflib
import math
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init


# keywords that every configuration takes and PreTrainedConfig handles itself
_GENERIC = {
    "attn_implementation", "auto_map", "model_type", "name_or_path", "num_labels", "output_attentions",
    "per_layer_config", "quantization_config", "tokenizer_class", "torch_dtype",
}  # fmt: skip


@strict
class ValueHeadConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ValueHead`]. Source: arXiv 2508.04280; the widths are those of the authors' code.

    Args:
        input_size (`int`, *optional*, defaults to 3584): Width of the hidden states that it reads.
        hidden_sizes (`list[int]`, *optional*, defaults to `[3072, 2048]`): Widths of its hidden layers.
        pooling (`str`, *optional*, defaults to `"last_prompt"`):
            `"last_prompt"` reads the last token of the prompt (the paper); `"mean_prompt"` the mean over the prompt,
            better for a small or untrained policy, whose last state hardly tells observations apart.
        stop_gradient (`bool`, *optional*, defaults to `True`): Whether the policy is spared the critic's gradient.
        layer (`int`, *optional*, defaults to -1):
            Which of the policy's `hidden_states` is meant, as it counts them: -1 is the last, after the final norm.

    Example:

    ```python
    >>> from hf_ext.vldac import ValueHeadConfig

    >>> ValueHeadConfig(input_size=64, hidden_sizes=[32]).pooling
    'last_prompt'

    ```"""

    model_type = "value_head"
    _auto_class = "AutoConfig"

    input_size: int = 3584
    hidden_sizes: list[int] | tuple[int, ...] = (3072, 2048)
    pooling: str = "last_prompt"
    stop_gradient: bool = True
    layer: int = -1

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
            raise ValueError(f"`{name}` is not an option of ValueHeadConfig, got {kwargs[name]!r}. {hint}")
        self.hidden_sizes = list(self.hidden_sizes)
        super().__post_init__(**kwargs)
        # written by every save, so that a saved head loads where hf_ext is not installed
        self.auto_map = {
            "AutoConfig": "modeling_value_head.ValueHeadConfig",
            "AutoModel": "modeling_value_head.ValueHead",
        }

    def validate_architecture(self) -> None:
        """Checks across fields; run at construction, before any weights load."""
        if self.input_size < 1:
            raise ValueError(f"`input_size` must be at least 1, got {self.input_size}.")
        if any(size < 1 for size in self.hidden_sizes):
            raise ValueError(f"`hidden_sizes` must be numbers of at least 1, got {self.hidden_sizes}.")
        if self.pooling not in ("last_prompt", "mean_prompt"):
            raise ValueError(f'`pooling` must be "last_prompt" or "mean_prompt", got {self.pooling!r}.')


class ValueHead(PreTrainedModel):
    """
    V of VL-DAC: Linear, ReLU, ..., Linear on a pooled hidden state; one number for an observation.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext.vldac import ValueHead, ValueHeadConfig

    >>> head = ValueHead(ValueHeadConfig(input_size=64, hidden_sizes=[32]))
    >>> head(torch.randn(2, 5, 64), torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 0]])).shape
    torch.Size([2])

    ```"""

    config_class = ValueHeadConfig
    base_model_prefix = "value_head"
    main_input_name = "hidden_states"
    _auto_class = "AutoModel"
    _keep_in_fp32_modules_strict = ["layers"]

    def __init__(self, config: ValueHeadConfig) -> None:
        super().__init__(config)
        sizes = [config.input_size, *config.hidden_sizes]
        layers: list[nn.Module] = []
        for width, following in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(width, following), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 1)).float()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As torch's own Linear does, since a spread of 0.02 would silence narrow layers."""
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)

    def forward(self, hidden_states: torch.Tensor, prompt_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, input_size)`): Of the policy, at `config.layer`.
            prompt_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*):
                1 at tokens of the prompt, 0 at padding and at the response. Without it every position has its value,
                as a critic of tokens needs.

        Returns:
            `torch.Tensor` of shape `(batch,)`, or `(batch, seq)` without `prompt_mask`: Values, in float32.

        Raises:
            ValueError: for a width that is not `input_size`, a mask that does not fit, and a row without a prompt.
        """
        width = self.config.input_size
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != width:
            raise ValueError(
                f"`hidden_states` must have shape (batch, seq, input_size={width}), got {tuple(hidden_states.shape)}. "
                "Make the head by ValueHead.for_policy(policy)."
            )
        if self.config.stop_gradient:
            hidden_states = hidden_states.detach()
        hidden_states = hidden_states.to(self.device)
        if prompt_mask is not None:
            hidden_states = self._pooled(hidden_states, prompt_mask.to(hidden_states.device))
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.layers(hidden_states.to(self.dtype)).squeeze(-1)

    def _pooled(self, hidden_states: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
        mask = prompt_mask.bool()
        if mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"`prompt_mask` must have shape {tuple(hidden_states.shape[:2])}, got {tuple(prompt_mask.shape)}."
            )
        if not bool(mask.any(1).all()):
            raise ValueError("`prompt_mask` must have a token in every row, got a row without any.")
        if self.config.pooling == "mean_prompt":
            kept = torch.where(mask[..., None], hidden_states.float(), 0.0)
            return kept.sum(1) / mask.sum(1, keepdim=True)
        places = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, places, -1).amax(1)
        return hidden_states[torch.arange(len(last), device=last.device), last]

    @classmethod
    def for_policy(cls, policy: PreTrainedModel, **options: Any) -> "ValueHead":
        """
        A new head for a policy, of the width of its text model and on its device.

        Args:
            policy (`PreTrainedModel` or a PEFT model): Any model that gives hidden states.
            options: Those of [`ValueHeadConfig`], but `input_size`.
        """
        text = policy.config.get_text_config()
        width = getattr(text, "hidden_size", None)
        if not isinstance(width, int):
            raise ValueError(
                f"`policy` must have a text model with a hidden_size, got {type(policy).__name__} of type "
                f"{policy.config.model_type}. Give ValueHeadConfig(input_size=...) yourself."
            )
        return cls(ValueHeadConfig(input_size=width, **options)).to(policy.device)


__all__ = ["ValueHead", "ValueHeadConfig"]
