"""From other checkpoints to LIMe: pretrained Llama-likes, and what the authors' own training code saves.

The weights of a Llama-like are copied by `LimeForCausalLM.from_llama`; this module adds the file side (tokenizer,
dtype, a check of the result) and the authors' v2 layout, whose keys and values share one fused matrix.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

    from hf_ext.lime.modeling_lime import LimeForCausalLM


logger = logging.getLogger(__name__)


def convert(source: str | os.PathLike[str], folder: str | os.PathLike[str], **overrides: Any) -> "LimeForCausalLM":
    """
    Convert a Llama, Mistral, Qwen2 or Qwen3 (a Hub id or a folder) and save model, code and tokenizer in `folder`.

    Args:
        source (`str` or path): Hub id or folder of the source model.
        folder (`str` or path): Where to save, all at once: a new or empty folder.
        overrides: Options of [`LimeConfig`], for example `routing="first", routing_window=4`.

    Returns:
        `LimeForCausalLM`: the saved model; its logits were compared with the source's on one row of tokens.

    Raises:
        ValueError: if the source is of another family or an option is wrong (before weights load), or `folder` holds
            files.
        RuntimeError: if the logits differ, in which case nothing is saved.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import cached_file

    from hf_ext.lime.configuration_lime import LimeConfig
    from hf_ext.lime.modeling_lime import LimeForCausalLM

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {folder}, which holds files. Name another folder.")
    LimeConfig.from_llama_config(AutoConfig.from_pretrained(source), **overrides)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    lime = LimeForCausalLM.from_llama(model, **overrides)
    ids = torch.arange(min(model.config.vocab_size, 64))[None]
    with torch.no_grad():
        difference = (lime(ids).logits - model(ids).logits).abs().max().item()
    if lime.config.router_init == "identity" and difference != 0:
        raise RuntimeError(
            f"The converted model must have the source's logits, and differs by {difference:.2e}. Please report the "
            f"source ({source})."
        )
    part = folder.with_name(f"{folder.name}.part")  # a run that breaks leaves no half model
    shutil.rmtree(part, ignore_errors=True)
    lime.save_pretrained(part)
    # without files of its own a folder would get an empty tokenizer of its model type
    if cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
        logger.warning("No tokenizer was saved: %s has none.", source)
    else:
        AutoTokenizer.from_pretrained(source).save_pretrained(part)
    os.replace(part, folder)
    return lime


def from_original_state_dict(state: "Mapping[str, torch.Tensor]", config: Any) -> "LimeForCausalLM":
    """
    A LIMe model from the state dict that the authors' v2 code saves (`kv_proj_weight`, `lime_router.static_weights`).

    Their fused [2dG, D] matrix has rows in the order (feature, head) with keys before values; ours are two matrices in
    Llama's order (head, feature). Their router [G, l G] is ours [G, l, G], flattened.

    Args:
        state (mapping of names to tensors): As loaded by safetensors or `torch.load(..., weights_only=True)`.
        config (`LimeConfig`): The architecture; their files hold none. `routing` must be `"full"`.

    Raises:
        ValueError: if the state is of v1 (softmax routers over hidden states), or does not fit `config`.
    """
    from hf_ext.lime.modeling_lime import LimeForCausalLM

    keys = [key for key in state if key.endswith(".self_attn.kv_proj_weight")]
    if not keys:
        raise ValueError(
            f"`state` must come from LIMe v2, whose layers have `self_attn.kv_proj_weight`, got {sorted(state)[:3]}. "
            "v1 mixes hidden states by softmax routers: it is another model, which this library does not hold."
        )
    heads, dim = config.num_key_value_heads, config.head_dim
    renamed: dict[str, Any] = {}
    for name, tensor in state.items():
        if name.endswith(".kv_proj_weight"):
            if tensor.shape[0] != 2 * dim * heads:
                raise ValueError(
                    f"`config` must fit the state: {name} has {tensor.shape[0]} rows, and 2 * head_dim * "
                    f"num_key_value_heads is {2 * dim * heads}."
                )
            fused = tensor.view(2, dim, heads, -1).transpose(1, 2).flatten(1, 2)
            renamed[name.replace("kv_proj_weight", "k_proj.weight")] = fused[0]
            renamed[name.replace("kv_proj_weight", "v_proj.weight")] = fused[1]
        elif name.endswith(".lime_router.static_weights"):
            renamed[name.replace("lime_router.static_weights", "router.weight")] = tensor.view(heads, -1, heads)
        else:
            renamed[name] = tensor
    model = LimeForCausalLM(config)
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    missing = [key for key in missing if not (config.tie_word_embeddings and key == "lm_head.weight")]
    if missing or unexpected:
        raise ValueError(f"`config` must fit the state, got missing {missing[:3]} and unknown {unexpected[:3]}.")
    model.tie_weights()
    return model.eval()
