"""From a model with an adapter to a plain model that has the vectors in it, saves them, and loads without hf_ext.

Merging is not enough: where a family has no such bias, `from_pretrained` drops the merged one without a word. So:

| family | becomes |
|---|---|
| GPT-2, GPT-NeoX, and whatever has the bias already | itself |
| Llama, LIMe | itself with `mlp_bias`, the other new biases zero |
| Qwen2 without sliding windows | a Llama with `attention_bias` and `mlp_bias`, the new ones zero |
| all others | [`SteeredModelForCausalLM`], whose code is saved beside it (`trust_remote_code=True`) |
"""

import copy
import os
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from hf_ext.steering.model import SteeringModel


_OF_LLAMA = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
)  # fmt: skip


@torch.no_grad()
def export_model(model: PeftModel, adapter_names: list[str] | None = None) -> PreTrainedModel:
    """
    A causal LM with the vectors of adapters in it: `save_pretrained` and `push_to_hub` keep them.

    Args:
        model (`PeftModel`): With steering adapters that are not merged. It is copied and stays as it is.
        adapter_names (`list[str]`, *optional*): Which; the active ones if not given.

    Returns:
        `PreTrainedModel` in evaluation mode, in the dtype and on the device of the base model; of which class, the
        table above says.

    Raises:
        TypeError: if `model` is no PeftModel with steering vectors.
        ValueError: for an unknown or merged adapter, one that steers some tokens alone, and a base that is no causal
            LM of transformers or has no family that could hold the vectors.

    Example:

    ```python
    >>> export_model(model).save_pretrained("steered")
    >>> AutoModelForCausalLM.from_pretrained("steered", trust_remote_code=True)
    ```"""
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, SteeringModel):
        raise TypeError(f"`model` must be a PeftModel with steering vectors, got {type(model).__name__}.")
    names = tuner.active_adapters if adapter_names is None else adapter_names
    shifts = _shifts(tuner, names)
    base = model.get_base_model()
    state = {
        key.replace(".base_layer.", "."): value
        for key, value in base.state_dict().items()
        if ".steering_bias." not in key
    }
    kind, ends_in_linear = base.config.model_type, all(name.endswith("mlp.down_proj") for name in shifts)
    if all(f"{name}.bias" in state for name in shifts):
        exported = _made(type(base), copy.deepcopy(base.config), base, state, shifts)
    elif kind in ("llama", "lime") and ends_in_linear:
        config = copy.deepcopy(base.config)
        config.mlp_bias = True
        exported = _made(type(base), config, base, state, shifts)
    elif kind == "qwen2" and ends_in_linear and type(base).__name__ == "Qwen2ForCausalLM" and not _slides(base.config):
        options = {name: getattr(base.config, name) for name in _OF_LLAMA}
        config = LlamaConfig(**options, attention_bias=True, mlp_bias=True, head_dim=_head_dim(base))
        exported = _made(LlamaForCausalLM, config, base, state, shifts)
    else:
        exported = _hooked(base, state, shifts)
    if getattr(base, "generation_config", None) is not None:
        exported.generation_config = copy.deepcopy(base.generation_config)
    return exported.eval()


def _shifts(tuner: SteeringModel, names: list[str]) -> dict[str, torch.Tensor]:
    """Module -> what the adapters add to its output."""
    for name in names:
        tuner.get_vectors(name)  # an unknown name is told with those that there are
        if tuner.context.positions[name] != "all":
            raise ValueError(
                f"An adapter must steer all tokens to be exported, got positions={tuner.context.positions[name]!r} of "
                f"{name!r}: a plain model does not know where a completion begins."
            )
    shifts: dict[str, torch.Tensor] = {}
    for layer in tuner.context.layers:
        if layer.merged:
            raise ValueError("`model` must not be merged, got merged vectors. Call model.unmerge_adapter() first.")
        terms = [
            tuner.context.scaling[name] * layer.steering_bias[name].float()
            for name in names
            if name in layer.steering_bias
        ]
        if terms:
            shifts[layer.name] = sum(terms)
    if not shifts:
        raise ValueError(f"`adapter_names` must name an adapter, got {names}.")
    return shifts


def _made(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    base: PreTrainedModel,
    state: dict[str, torch.Tensor],
    shifts: dict[str, torch.Tensor],
) -> PreTrainedModel:
    """A new model with the weights of the old one, and the vectors added to biases; biases that are new start at 0."""
    made = _empty(kind, config, base)
    missing, unexpected = made.load_state_dict(state, strict=False)
    new = dict(made.named_parameters())
    odd = [*unexpected, *(name for name in missing if not name.endswith(".bias"))]
    if odd:
        raise ValueError(f"`model` must have the parameters of a {kind.__name__}, and differs in {odd[:4]}.")
    for name in missing:
        new[name].zero_()
    for name, shift in shifts.items():
        bias = new[f"{name}.bias"]
        bias.copy_(bias.float() + shift)
    made.tie_weights()
    return made


def _hooked(base: PreTrainedModel, state: dict[str, torch.Tensor], shifts: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Any family: its own model inside one that adds the vectors."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from hf_ext.steering.configuration_steered import SteeredConfig
    from hf_ext.steering.modeling_steered import SteeredModelForCausalLM

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base.config.model_type) == type(base).__name__
    known = known and type(base).__module__.startswith("transformers.models.")  # the Auto classes know ours as well
    if not known or base.config.get_text_config() is not base.config:
        raise ValueError(
            f"`model` must be a causal language model of transformers to be exported, got {type(base).__name__}. Save "
            "the adapter, or its vectors with save_npy."
        )
    widths = {len(shift) for shift in shifts.values()}
    if len(widths) > 1:
        raise ValueError(f"`adapter_names` must name vectors of one width, got widths {sorted(widths)}.")
    inner = base.config.to_diff_dict() | {"model_type": base.config.model_type}
    for note in ("transformers_version", "architectures", "_name_or_path"):
        inner.pop(note, None)
    name = getattr(base.config, "_name_or_path", "")
    config = SteeredConfig(
        base_config=inner,
        hook_names=list(shifts),
        base_model_name_or_path=name if name and not os.path.exists(name) else None,
        dtype=base.config.dtype,
    )
    made = _empty(SteeredModelForCausalLM, config, base)
    made.load_state_dict({f"model.{key}": value for key, value in state.items()}, strict=False)
    made.vectors.copy_(torch.stack([shift.to(made.vectors.device) for shift in shifts.values()]))
    made.tie_weights()
    return made


def _empty(kind: type[PreTrainedModel], config: PreTrainedConfig, base: PreTrainedModel) -> Any:
    with init.no_init_weights():
        made = kind._from_config(config, dtype=base.dtype).to(base.device)
    # RoPE's frequencies were computed for the base, and may have been cast with it
    buffers = dict(base.named_buffers())
    for name, buffer in made.named_buffers():
        own = buffers.get(name.removeprefix("model.") if name not in buffers else name)
        if isinstance(own, torch.Tensor) and own.shape == buffer.shape:
            buffer.data = own.clone()
    return made


def _slides(config: PreTrainedConfig) -> bool:
    return "sliding_attention" in (getattr(config, "layer_types", None) or [])


def _head_dim(base: Any) -> int:
    return base.model.layers[0].self_attn.head_dim
