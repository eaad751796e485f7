"""Published collections of one layout each, read alone: Gemma Scope, Llama Scope, Qwen Scope, OpenAI.

| | files | function |
|---|---|---|
| Gemma Scope | `params.npz`; of Gemma 3 `config.json`, `params.safetensors` | JumpReLU, u = x W_enc + b_enc |
| Llama Scope | `hyperparams.json`, `checkpoints/final.safetensors` | JumpReLU of x sqrt(d) / mean norm |
| Qwen Scope | `layerN.sae.pt` | TopK, u = W_enc x + b_enc; k in the repository's name |
| OpenAI | one `.pt` | TopK of the layer-normalised x - pre_bias, or ReLU |

Sources (formats and formulas alone): the cards of google/gemma-scope and gemma-scope-2, fnlp's Llama Scope (arXiv
2410.20526), Qwen's Qwen-Scope, github.com/openai/sparse_autoencoder.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch

from hf_ext.sae.formats.layout import Foreign, read_json, refuse_transcoder, subtracted, take, transposed


_WIDTH = re.compile(r"width_(\d+)(k|m)(?![a-z0-9])")
_HF_HOOK = re.compile(r"(.+)\.(input|output)$")
# where Gemma Scope's three kinds are in transformers' Gemma 2 and 3
_GEMMA_HOOKS = {
    "res": ("model.layers.{}", "output"),
    "mlp": ("model.layers.{}.post_feedforward_layernorm", "output"),
    "att": ("model.layers.{}.self_attn.o_proj", "input"),
}


def is_gemma_scope(folder: Path) -> bool:
    return (folder / "params.npz").is_file() or (folder / "params.safetensors").is_file()


def load_gemma_scope(folder: Path, read: Any, **given: Any) -> Foreign:
    """One SAE's folder, `layer_12/width_16k/average_l0_82`; `source` is the full name, with the repository's."""
    # the repository and the folders in it: what lies above is the user's
    name, said = "/".join(Path(given.get("source") or folder).parts[-4:]), list[str]()
    cfg = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    file = folder / ("params.npz" if (folder / "params.npz").is_file() else "params.safetensors")
    raw = {re.sub("^w_", "W_", key): value for key, value in read(file).items()}
    kind = next((word for word in ("transcoder", "clt", "crosscoder") if word in name), None)
    refuse_transcoder(kind or ("affine_skip_connection" if "affine_skip_connection" in raw else None))
    if cfg.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"`architecture` in {folder / 'config.json'} must be jump_relu, got {cfg['architecture']!r}.")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    tensors = take(raw, {**names, "threshold": "threshold"}, str(file))
    tensors["encoder.weight"] = transposed(tensors["encoder.weight"], "W_enc", said)
    said.append(subtracted(False))
    if "embedding" in name:
        root = math.sqrt(tensors["b_dec"].shape[0])
        tensors["encoder.weight"] = tensors["encoder.weight"] / root
        tensors["W_dec"] = tensors["W_dec"] * root
        said.append("An SAE of embeddings: W_enc divided and W_dec multiplied by sqrt(d).")
    width = _WIDTH.search(name)
    if width:
        told = int(width[1]) * (2**10 if width[2] == "k" else 2**20)
        found = tensors["W_dec"].shape[0]
        # 65k, 131k, 262k and 524k are powers of two cut to thousands
        if not 0.9 < found / told < 1.1:
            raise ValueError(
                f"The folder must hold an SAE of {width[0]}, as its name says, got {found} latents in {file}. "
                "Copy or download it again."
            )
    config: dict[str, Any] = {"activation": "jumprelu", "apply_b_dec_to_input": False}
    place = _HF_HOOK.match(str(cfg.get("hf_hook_point_in")))
    layer = re.search(r"layer_(\d+)", name)
    # a folder of Gemma Scope 2 says its kind in words, a repository of the first in three letters
    site = re.search(r"scope-[\w.]+-pt-(res|mlp|att)|/(res|mlp|att)[a-z]*_", name)
    if place:
        config |= {"hook_name": place[1], "hook_io": place[2]}
    elif layer and site:
        path, side = _GEMMA_HOOKS[site[1] or site[2]]
        config |= {"hook_name": path.format(layer[1]), "hook_io": side}
    if cfg.get("model_name"):
        config["base_model_name_or_path"] = cfg["model_name"]
    return Foreign(config, tensors, said)


def is_llama_scope(folder: Path) -> bool:
    return (folder / "hyperparams.json").is_file() and (folder / "checkpoints" / "final.safetensors").is_file()


def load_llama_scope(folder: Path, read: Any, **given: Any) -> Foreign:
    """One SAE's folder; the scale of its input stays a scale, which is exact."""
    cfg, file = read_json(folder / "hyperparams.json"), folder / "checkpoints" / "final.safetensors"
    said = list[str]()
    names = {
        "encoder.weight": "encoder.weight",
        "encoder.bias": "encoder.bias",
        "W_dec": "decoder.weight",
        "b_dec": "decoder.bias",
    }
    tensors = take(read(file), names, str(file))
    tensors["W_dec"] = transposed(tensors["W_dec"], "decoder.weight", said)
    try:
        norms, width, least = cfg["dataset_average_activation_norm"], cfg["d_model"], cfg["jump_relu_threshold"]
        scale = math.sqrt(width) / norms["in"]
    except KeyError as error:
        raise ValueError(f"{folder / 'hyperparams.json'} must hold {error}, and does not.") from error
    hook_in, hook_out = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    refuse_transcoder(f"{hook_in} to {hook_out}" if hook_in and hook_out and hook_in != hook_out else None)
    tensors["threshold"] = torch.full_like(tensors["encoder.bias"], least * scale)
    said += [
        subtracted(False),
        f"The input is multiplied by sqrt(d) / its mean norm = {scale:.6g} (input_scale), the output divided by it.",
        f"threshold {least:.6g} multiplied by that: {least * scale:.6g} for all latents.",
    ]
    config = {
        "d_in": width,
        "d_sae": cfg.get("d_sae"),
        "activation": "jumprelu",
        "apply_b_dec_to_input": False,
        "input_norm": "scalar",
        "input_scale": scale,
        "their_hook": hook_in,
    }
    return Foreign(config, tensors, said)


def load_qwen_scope(file: Path, read: Any, **given: Any) -> Foreign:
    """One `layerN.sae.pt`; k is taken from a name that ends in `L0_50`, or given."""
    source, said = given.get("source") or str(file), list[str]()
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    tensors = take(read(file), names, str(file))
    tensors["W_dec"] = transposed(tensors["W_dec"], "W_dec", said)
    told, layer = re.search(r"L0[_-](\d+)", source), re.search(r"layer(\d+)", file.name)
    k = given.get("k") or (int(told[1]) if told else None)
    if k is None:
        raise ValueError(
            f"`k` must be given for {file}: Qwen Scope writes it in the repository's name alone (L0_50). Pass k=50."
        )
    config = {"activation": "topk", "k": k, "apply_b_dec_to_input": False}
    if layer:
        config |= {"hook_name": f"model.layers.{layer[1]}", "hook_io": "output"}
    return Foreign(config, tensors, [*said, subtracted(False)])


def load_openai(file: Path, read: Any, **given: Any) -> Foreign:
    """One `.pt` of OpenAI's sparse_autoencoder."""
    raw, said = read(file), list[str]()
    names = {
        "encoder.weight": "encoder.weight",
        "encoder.bias": "latent_bias",
        "W_dec": "decoder.weight",
        "b_dec": "pre_bias",
    }
    tensors = take(raw, names, str(file))
    tensors["W_dec"] = transposed(tensors["W_dec"], "decoder.weight", said)
    said.append(subtracted(True))
    config: dict[str, Any] = {"apply_b_dec_to_input": True}
    activation, state = raw.get("activation", "ReLU"), raw.get("activation_state_dict") or {}
    if activation == "TopK":
        k = state.get("k") if given.get("k") is None else given["k"]
        if k is None:
            raise ValueError(f"`k` must be in {file} or be given, got neither. Pass k=, as it was trained.")
        if state.get("postact_fn", "ReLU") != "ReLU":
            raise ValueError(f"`postact_fn` in {file} must be ReLU, got {state['postact_fn']!r}.")
        config |= {"activation": "topk", "k": int(k), "input_norm": "layer_norm"}
        said.append("The input is layer-normalised, and the output put back: OpenAI's TopK autoencoders do so.")
    elif activation == "ReLU":
        config["activation"] = "relu"
    else:
        raise ValueError(f"`activation` in {file} must be TopK or ReLU, got {activation!r}.")
    return Foreign(config, tensors, said)
