"""SAELens: `cfg.json` and `sae_weights.safetensors`, one latent a column of W_enc and a row of W_dec.

    x' = norm(x) - b_dec [apply_b_dec_to_input],  u = x' W_enc + b_enc

Architectures `standard` (relu), `topk`, `jumprelu` (u [u > threshold]), `gated`, and what its trainers keep of
`batchtopk` and `matryoshka_batchtopk`. Read: files of versions 6 and before; written: version 6.
Source: github.com/decoderesearch/SAELens, 6.54.12 (formats and formulas alone).
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_ext.sae.formats.layout import (
    Foreign,
    fold_decoder_norms,
    read_json,
    refuse_transcoder,
    subtracted,
    take,
    transposed,
    without_scale,
    write_json,
)


VERSION = "6.54.12"
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# layers' modules, whose output SAELens calls hook_resid_post
_LAYER = re.compile(r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)$")


def matches(folder: Path) -> bool:
    return (folder / "cfg.json").is_file() and (folder / "sae_weights.safetensors").is_file()


def load(folder: Path, read: Any, **given: Any) -> Foreign:
    """Settings and tensors of a folder; `input_scale` gives the factor of an average norm that was not folded."""
    cfg = _settings(read_json(folder / "cfg.json"))
    where = str(folder / "sae_weights.safetensors")
    raw, said = read(folder / "sae_weights.safetensors"), list[str]()
    architecture, metadata = cfg.get("architecture", "standard"), cfg["metadata"]
    refuse_transcoder(architecture if "transcoder" in architecture or "W_skip" in raw else None)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    if architecture == "gated":
        names["encoder.bias"] = "b_mag"
    tensors = take(raw, names, where)
    tensors["encoder.weight"] = transposed(tensors["encoder.weight"], "W_enc", said)
    config: dict[str, Any] = {
        "d_in": cfg.get("d_in"),
        "d_sae": cfg.get("d_sae"),
        "apply_b_dec_to_input": bool(cfg.get("apply_b_dec_to_input", True)),
        "base_model_name_or_path": metadata.get("model_name"),
        **_hook(metadata),
    }
    said.append(subtracted(config["apply_b_dec_to_input"]))
    factor = raw.get("scaling_factor")
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise ValueError(f"scaling_factor in {where} must be 1, got a finetuned one. Fold it with SAELens before 6.")

    if architecture == "topk":
        config |= {"activation": "topk", "k": _k(cfg, given.get("k"), where)}
    elif architecture == "standard":
        config["activation"] = "relu"
    elif architecture == "jumprelu":
        config["activation"] = "jumprelu"
        tensors |= take(raw, {"threshold": "threshold"}, where)
        trained = metadata.get("training_architecture")
        if trained in ("batchtopk", "matryoshka_batchtopk") and len(tensors["threshold"].unique()) == 1:
            details = metadata.get("training_architecture_details") or {}
            config |= {"activation": "batchtopk", "k": given.get("k") or details.get("k")}
            tensors["threshold"] = tensors["threshold"][0].clone()
            said.append(f"One threshold for all latents, {tensors['threshold']:.6g}: the BatchTopK that was trained.")
    elif architecture in ("batchtopk", "matryoshka_batchtopk"):
        config |= {"activation": "batchtopk", "k": _k(cfg, given.get("k"), where)}
        tensors |= take(raw, {"threshold": "topk_threshold"}, where)
    elif architecture == "gated":
        config["activation"] = "jumprelu"
        gate = take(raw, {"gate": "b_gate", "scale": "r_mag"}, where)
        fold_gate(tensors, gate["scale"], gate["gate"], said)
    else:
        raise ValueError(
            f"`architecture` in {folder / 'cfg.json'} must be standard, topk, jumprelu, gated, batchtopk or "
            f"matryoshka_batchtopk, got {architecture!r}, whose function SAEModel does not have."
        )
    if cfg.get("rescale_acts_by_decoder_norm"):
        fold_decoder_norms(tensors, said, "rescale_acts_by_decoder_norm multiplies u by them before the choice.")
    _normalization(cfg, config, given.get("input_scale"), where, said)
    if cfg.get("reshape_activations", "none") != "none":
        said.append("Heads lie side by side: hook the input of the attention's output projection (site z).")
    return Foreign(config, tensors, said)


def export(sae: Any, folder: Path) -> list[str]:
    """Write the folder that `SAE.load_from_disk` of SAELens reads; returns what was folded."""
    config, said = sae.config, list[str]()
    state = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    state = without_scale(state, config, said)
    tensors = {
        "W_enc": transposed(state["encoder.weight"], "W_enc", said),
        "b_enc": state["encoder.bias"].contiguous(),
        "W_dec": state["W_dec"].contiguous(),
        "b_dec": state["b_dec"].contiguous(),
    }
    hook = None if config.hook_name is None else f"{config.hook_name}.{config.hook_io}"
    layer = _LAYER.match(config.hook_name or "") if config.hook_io == "output" else None
    metadata = {
        "model_name": config.base_model_name_or_path,
        "hook_name": f"blocks.{layer[1]}.hook_resid_post" if layer else hook,
        "hf_hook_name": hook,
        "prepend_bos": True,
        "sae_lens_version": VERSION,
    }
    cfg: dict[str, Any] = {
        "architecture": {"topk": "topk", "relu": "standard"}.get(config.activation, "jumprelu"),
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(state["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "layer_norm" if config.input_norm == "layer_norm" else "none",
        "reshape_activations": "none",
    }
    if config.activation == "topk":
        cfg |= {"k": int(config.k), "rescale_acts_by_decoder_norm": False}
    elif config.activation == "jumprelu":
        tensors["threshold"] = state["threshold"].contiguous()
    elif config.activation == "batchtopk":
        if float(state["threshold"]) < 0:
            raise ValueError(
                "`threshold` of a BatchTopK SAE must be estimated before it is written for SAELens, got -1 (unset). "
                "Train it, or set sae.threshold."
            )
        tensors["threshold"] = state["threshold"].expand(config.d_sae).contiguous()
        metadata |= {"training_architecture": "batchtopk", "training_architecture_details": {"k": config.k}}
        said.append("A BatchTopK is written as a JumpReLU with its one threshold, as SAELens itself does.")
    save_file(tensors, folder / "sae_weights.safetensors")
    write_json(folder / "cfg.json", {**cfg, "metadata": metadata})
    return said


def fold_gate(tensors: dict[str, torch.Tensor], scale: torch.Tensor, gate: torch.Tensor, said: list[str]) -> None:
    """A gated SAE with tied weights is a JumpReLU (arXiv 2407.14435, appendix): with pi = W x',

    [pi + b_gate > 0] relu(e^r pi + b_mag) = relu(u) [u > theta],  u = e^r pi + b_mag,  theta = b_mag - e^r b_gate
    """
    growth = scale.exp()
    tensors["threshold"] = torch.relu(tensors["encoder.bias"] - growth * gate)
    tensors["encoder.weight"] = tensors["encoder.weight"] * growth[:, None]
    said.append("The gate folded: encoder rows times exp(r_mag), thresholds b_mag - exp(r_mag) b_gate of a JumpReLU.")


def _settings(cfg: dict[str, Any]) -> dict[str, Any]:
    """Settings in the names of version 6, whichever version wrote them."""
    metadata = dict(cfg.get("metadata") or {})
    version = str(cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    if int(version.partition(".")[0] or 0) >= 6:
        return {**cfg, "metadata": metadata}
    new = {_OLD_NAMES.get(name, name): value for name, value in cfg.items()}
    if new.get("activation_fn") == "topk":
        new["architecture"] = "topk"
        new["k"] = (new.get("activation_fn_kwargs") or {}).get("k")
    norm = new.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        new["normalize_activations"] = "expected_average_only_in" if norm else "none"
    if "hook_z" in str(new.get("hook_name")):
        new.setdefault("reshape_activations", "hook_z")
    return {**new, "metadata": {**new, **metadata}}


def _k(cfg: dict[str, Any], given: Any, where: str) -> Any:
    k = cfg.get("k") if given is None else given
    if k is None:
        raise ValueError(f"`k` must be in cfg.json or be given, got neither for {where}. Pass k=, as it was trained.")
    return k


def _hook(metadata: dict[str, Any]) -> dict[str, Any]:
    path = metadata.get("hf_hook_name")
    if path is None:
        return {"their_hook": metadata.get("hook_name")}
    name, _, side = path.rpartition(".")
    return {"hook_name": name, "hook_io": side} if side in ("input", "output") else {"hook_name": path}


def _normalization(
    cfg: dict[str, Any], config: dict[str, Any], scale: float | None, where: str, said: list[str]
) -> None:
    norm = cfg.get("normalize_activations") or "none"
    if norm == "layer_norm":
        config["input_norm"] = "layer_norm"
        said.append("The input is layer-normalised, and the output put back.")
    elif norm == "expected_average_only_in":
        if scale is None:
            raise ValueError(
                f"`input_scale` must be given for {where}: it reads activations times sqrt(d) / E|x|, and that number "
                "is in none of its files. Pass input_scale=."
            )
        config |= {"input_norm": "scalar", "input_scale": float(scale)}
        said.append(f"The input is multiplied by input_scale {scale:.6g}, the output divided by it.")
    elif norm != "none":
        raise ValueError(
            f"`normalize_activations` in cfg.json must be none, layer_norm or expected_average_only_in, got {norm!r}, "
            "which SAEModel does not have."
        )
