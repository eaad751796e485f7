"""Published MDLM weights (github.com/kuleshov-group/mdlm) as ours: keys renamed, constant modulation folded in.

MDLM's DiT modulates every block by the noise level. Its published models are trained without time conditioning: the
level is always 0 and the modulation a constant, which norms and the last projection of each branch can hold. What
comes out is a plain transformer with the same logits.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import initialization as init

from hf_ext.gstar.modeling_mdlm import FREQUENCIES, MDLMConfig, MDLMForMaskedLM


_OUTSIDE = ("vocab_embed.embedding", "output_layer.norm_final.weight", "output_layer.linear.weight")


def import_mdlm(
    weights: Mapping[str, torch.Tensor] | str | os.PathLike[str],
    *,
    num_attention_heads: int | None = None,
    time_conditioning: bool = False,
    **options: Any,
) -> MDLMForMaskedLM:
    """
    A model of ours from the state dict of MDLM's `DIT` (keys `backbone.blocks.0.attn_qkv.weight`, ...).

    Args:
        weights (`Mapping[str, torch.Tensor]`, `str` or `os.PathLike`):
            The state dict, or a safetensors file that holds it. Read a Lightning checkpoint yourself, by
            `torch.load(path, weights_only=True)["state_dict"]`; take the EMA weights, if there are any.
        num_attention_heads (`int`, *optional*): Heads, which no weight tells; of size 64 if not given.
        time_conditioning (`bool`, *optional*, defaults to `False`): Whether it was trained with the noise level.
        options: Further options of [`MDLMConfig`], for example `max_position_embeddings`, `pad_token_id`.

    Returns:
        [`MDLMForMaskedLM`] in evaluation mode, in the dtype of the weights.

    Raises:
        ValueError: where keys are missing or unknown.
    """
    if isinstance(weights, str | os.PathLike):
        weights = load_file(Path(weights))
    state = {name.removeprefix("backbone."): value for name, value in weights.items()}
    state = {name: value for name, value in state.items() if not name.startswith(("rotary_emb.", "noise."))}
    missing = [name for name in (*_OUTSIDE, "blocks.0.attn_qkv.weight") if name not in state]
    if missing:
        raise ValueError(
            f"`weights` must be those of MDLM's DIT, got no {', '.join(missing)} among {len(weights)} keys such as "
            f"{', '.join(list(weights)[:3])}."
        )
    vocab_size, hidden_size = state["vocab_embed.embedding"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    config = MDLMConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": len(state["blocks.0.mlp.0.bias"]),
            "num_hidden_layers": layers,
            "num_attention_heads": num_attention_heads or hidden_size // 64,
            "time_conditioning": time_conditioning,
            "cond_dim": len(state["sigma_map.mlp.2.bias"]),
            **options,
        }
    )
    with init.no_init_weights():
        model = MDLMForMaskedLM._from_config(config, dtype=state["vocab_embed.embedding"].dtype)
    ours = _keys(state, layers) if time_conditioning else _folded(state, layers)
    lost, unknown = model.load_state_dict(ours, strict=False)
    if lost or unknown:
        raise ValueError(f"`weights` must fit {layers} blocks of MDLM's DIT, got {(lost or unknown)[:3]} wrong.")
    return model.eval()


def _keys(state: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The published tensors under our names; norms get the bias 0 that they lack."""
    ours = {
        "model.embed_tokens.weight": state["vocab_embed.embedding"],
        "model.norm.weight": state["output_layer.norm_final.weight"],
        "lm_head.weight": state["output_layer.linear.weight"],
        "lm_head.bias": state["output_layer.linear.bias"],
    }
    renamed = {"sigma_map.": "model.time_embedding.", "output_layer.adaLN_modulation.": "model.modulation."}
    for i in range(layers):
        renamed |= {
            f"blocks.{i}.norm1.": f"model.layers.{i}.input_layernorm.",
            f"blocks.{i}.norm2.": f"model.layers.{i}.post_attention_layernorm.",
            f"blocks.{i}.attn_qkv.": f"model.layers.{i}.self_attn.qkv_proj.",
            f"blocks.{i}.attn_out.": f"model.layers.{i}.self_attn.o_proj.",
            f"blocks.{i}.mlp.": f"model.layers.{i}.mlp.",
            f"blocks.{i}.adaLN_modulation.": f"model.layers.{i}.modulation.",
        }
    for name, value in state.items():
        start = next((start for start in renamed if name.startswith(start)), None)
        if start is not None:
            ours[renamed[start] + name.removeprefix(start)] = value
    for name in [name for name in ours if name.endswith("norm.weight")]:
        ours[name.removesuffix("weight") + "bias"] = torch.zeros_like(ours[name])
    return ours


def _folded(state: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """m(norm(x)) = norm(x) w (1 + scale) + shift becomes a norm's weight and bias; a gate scales a projection."""
    silu = nn.functional.silu
    sinusoids = torch.zeros(FREQUENCIES, dtype=torch.float64)
    sinusoids[: FREQUENCIES // 2] = 1.0  # sigma = 0: cosines are 1, sines 0
    double = {name: value.double() for name, value in state.items()}
    hidden = silu(double["sigma_map.mlp.0.weight"] @ sinusoids + double["sigma_map.mlp.0.bias"])
    conditioning = silu(double["sigma_map.mlp.2.weight"] @ hidden + double["sigma_map.mlp.2.bias"])

    def constants(name: str, parts: int) -> tuple[torch.Tensor, ...]:
        return (double[f"{name}.weight"] @ conditioning + double[f"{name}.bias"]).chunk(parts)

    ours = {
        name: value.double()
        for name, value in _keys(state, layers).items()
        if ".modulation." not in name and not name.startswith("model.time_embedding.")
    }
    shift, scale = constants("output_layer.adaLN_modulation", 2)
    ours["model.norm.weight"], ours["model.norm.bias"] = ours["model.norm.weight"] * (1 + scale), shift
    for i in range(layers):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = constants(f"blocks.{i}.adaLN_modulation", 6)
        at = f"model.layers.{i}."
        ours |= {at + "input_layernorm.bias": shift_1, at + "post_attention_layernorm.bias": shift_2}
        factors = {
            "input_layernorm.weight": 1 + scale_1,
            "self_attn.o_proj.weight": gate_1[:, None],
            "post_attention_layernorm.weight": 1 + scale_2,
            "mlp.2.weight": gate_2[:, None],
            "mlp.2.bias": gate_2,
        }
        ours |= {at + name: ours[at + name] * factor for name, factor in factors.items()}
    dtype = state["vocab_embed.embedding"].dtype
    return {name: value.to(dtype) for name, value in ours.items()}
