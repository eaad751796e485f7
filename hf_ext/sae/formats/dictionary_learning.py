"""dictionary_learning: `ae.pt`, a torch state dict, and `config.json` {"trainer": {"dict_class", ...}, "buffer"}.

| dict_class | function |
|---|---|
| AutoEncoder | relu(W (x - bias) + b), its loader scales decoder rows to norm 1 |
| AutoEncoderTopK | the k largest of relu(W (x - b_dec) + b) |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | those above `threshold` (-1: unset) |
| JumpReluAutoEncoder | u [u > threshold], u = W x + b: b_dec is not subtracted |
| GatedAutoEncoder | [pi + gate_bias > 0] relu(exp(r_mag) pi + mag_bias), pi = W (x - decoder_bias) |

Source: github.com/saprmarks/dictionary_learning (formats and formulas alone).
"""

from pathlib import Path
from typing import Any

import torch

from hf_ext.sae.formats.layout import (
    Foreign,
    fold_decoder_norms,
    layer_of,
    read_json,
    refuse_norm,
    refuse_transcoder,
    subtracted,
    take,
    transposed,
    unit_rows,
    with_shift,
    without_scale,
    write_json,
)
from hf_ext.sae.formats.sae_lens import fold_gate


_LINEAR = {"encoder.weight": "encoder.weight", "encoder.bias": "encoder.bias", "W_dec": "decoder.weight"}
_ROWS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
# class -> activation of ours, names of its tensors, whether x - b_dec is read
CLASSES: dict[str, tuple[str, dict[str, str], bool]] = {
    "AutoEncoder": ("relu", {**_LINEAR, "b_dec": "bias"}, True),
    "AutoEncoderTopK": ("topk", {**_LINEAR, "b_dec": "b_dec"}, True),
    "BatchTopKSAE": ("batchtopk", {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}, True),
    "MatryoshkaBatchTopKSAE": ("batchtopk", {**_ROWS, "threshold": "threshold"}, True),
    "JumpReluAutoEncoder": ("jumprelu", {**_ROWS, "threshold": "threshold"}, False),
    "GatedAutoEncoder": (
        "jumprelu",
        {**_LINEAR, "encoder.bias": "mag_bias", "b_dec": "decoder_bias", "gate": "gate_bias", "scale": "r_mag"},
        True,
    ),
}
_CLASS_OF = {
    "relu": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
}


def matches(folder: Path) -> bool:
    return (folder / "ae.pt").is_file() and (folder / "config.json").is_file()


def load(folder: Path, read: Any, **given: Any) -> Foreign:
    """Settings and tensors of a trained dictionary's folder."""
    trainer = read_json(folder / "config.json").get("trainer")
    where, said = str(folder / "ae.pt"), list[str]()
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise ValueError(f'{folder / "config.json"} must hold {{"trainer": {{"dict_class": ...}}}}, and does not.')
    kind = trainer["dict_class"]
    raw = read(folder / "ae.pt")
    refuse_transcoder(kind if "ranscoder" in kind or "CrossCoder" in kind else None)
    if kind not in CLASSES:
        raise ValueError(
            f"`dict_class` in {folder / 'config.json'} must be one of {', '.join(CLASSES)}, got {kind!r}."
        )
    activation, names, beta = CLASSES[kind]
    tensors = take(raw, names, where)
    if names["encoder.weight"] == "W_enc":
        tensors["encoder.weight"] = transposed(tensors["encoder.weight"], "W_enc", said)
    else:
        tensors["W_dec"] = transposed(tensors["W_dec"], "decoder.weight", said)
    config: dict[str, Any] = {
        "d_in": trainer.get("activation_dim"),
        "d_sae": trainer.get("dict_size"),
        "activation": activation,
        "apply_b_dec_to_input": beta,
        "base_model_name_or_path": trainer.get("lm_name"),
    }
    said.append(subtracted(beta))
    if trainer.get("hook_name"):
        config |= {"hook_name": trainer["hook_name"], "hook_io": trainer.get("hook_io", "output")}
    elif trainer.get("layer") is not None:
        config["their_hook"] = trainer.get("submodule_name") or f"resid_post_layer_{trainer['layer']}"
    if activation in ("topk", "batchtopk"):
        saved = raw.get("k")
        k = next((k for k in (given.get("k"), trainer.get("k"), None if saved is None else float(saved)) if k), None)
        if k is None:
            raise ValueError(f"`k` must be in {where}, config.json or be given, got none. Pass k=, as it was trained.")
        config["k"] = int(k) if k == int(k) else k
    if kind == "AutoEncoder" and not unit_rows(tensors["W_dec"]):
        fold_decoder_norms(tensors, said, "its own loader does so.")
    if kind == "GatedAutoEncoder":
        fold_gate(tensors, tensors.pop("scale"), tensors.pop("gate"), said)
    if kind == "MatryoshkaBatchTopKSAE":
        said.append("Groups of latents are of the training alone: all of them are active.")
    if activation == "batchtopk" and float(tensors["threshold"]) < 0:
        said.append("threshold is unset (-1): ask for a budget, sae.encode(x, k=...), or set sae.threshold.")
    return Foreign(config, tensors, said)


def export(sae: Any, folder: Path) -> list[str]:
    """Write `ae.pt` and `config.json`."""
    config, said = sae.config, list[str]()
    refuse_norm(config, "dictionary_learning")
    kind = _CLASS_OF[config.activation]
    _, names, beta = CLASSES[kind]
    state = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    state = with_shift(without_scale(state, config, said), config.apply_b_dec_to_input, beta, said)
    by_column = "W_dec" if names["encoder.weight"] == "encoder.weight" else "encoder.weight"
    state[by_column] = transposed(state[by_column], by_column, said)
    # clones: torch would write the whole storage of a view
    tensors = {theirs: state[ours].contiguous().clone() for ours, theirs in names.items()}
    if config.activation in ("topk", "batchtopk"):
        tensors["k"] = torch.tensor(max(round(config.k), 1))
        if config.k != int(config.k):
            said.append(
                f"k = {config.k} is {int(tensors['k'])} in ae.pt, which takes whole numbers; the threshold rules."
            )
        tensors.setdefault("threshold", torch.tensor(-1.0))
    if kind == "AutoEncoder" and not unit_rows(state["W_dec"].T):
        said.append(
            "Decoder rows are not of norm 1: dictionary_learning's loader will scale them, and codes with them."
        )
    torch.save(tensors, folder / "ae.pt")
    trainer = {
        "dict_class": kind,
        "activation_dim": config.d_in,
        "dict_size": config.d_sae,
        "k": config.k,
        "layer": layer_of(config.hook_name),
        "lm_name": config.base_model_name_or_path or "",
        "hook_name": config.hook_name,
        "hook_io": config.hook_io,
    }
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    return said
