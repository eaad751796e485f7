"""EleutherAI's sparsify: `<hookpoint>/cfg.json` and `<hookpoint>/sae.safetensors`.

    v = topk_k(relu(W_enc (x - b_dec) + b_enc)),  x^ = v W_dec + b_dec

`encoder.weight` [F, d] and `W_dec` [F, d] lie as ours do. Folders are named by the path of the hooked module within
the base model, `layers.12`, `h.5.mlp`. Source: github.com/EleutherAI/sparsify (formats and formulas alone).
"""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hf_ext.sae.formats.layout import (
    Foreign,
    read_json,
    refuse_norm,
    refuse_transcoder,
    subtracted,
    take,
    with_shift,
    without_scale,
    write_json,
)


_NAMES = {"encoder.weight": "encoder.weight", "encoder.bias": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_HOOKPOINT = re.compile(r"embed_tokens|embed_in|wte|(?:layers|h)\.\d+(?:\.\w+)*")


def matches(folder: Path) -> bool:
    return (folder / "cfg.json").is_file() and (folder / "sae.safetensors").is_file()


def load(folder: Path, read: Any, **given: Any) -> Foreign:
    """Settings and tensors of one hookpoint's folder."""
    cfg, where = read_json(folder / "cfg.json"), str(folder / "sae.safetensors")
    raw = read(folder / "sae.safetensors")
    refuse_transcoder("transcode" if cfg.get("transcode") else "W_skip" if "W_skip" in raw else None)
    if cfg.get("activation", "topk") != "topk" or cfg.get("signed"):
        kind = "signed" if cfg.get("signed") else cfg["activation"]
        raise ValueError(
            f"`activation` in {folder / 'cfg.json'} must be topk, got {kind!r}, which SAEModel does not have."
        )
    k = cfg.get("k") if given.get("k") is None else given["k"]
    if k is None:
        raise ValueError(f"`k` must be in {folder / 'cfg.json'} or be given, got neither. Pass k=, as it was trained.")
    d_in = cfg.get("d_in")
    latents = cfg.get("num_latents") or (
        d_in * cfg["expansion_factor"] if d_in and "expansion_factor" in cfg else None
    )
    config = {
        "d_in": d_in,
        "d_sae": latents,
        "activation": "topk",
        "k": k,
        "apply_b_dec_to_input": True,
        "normalize_decoder": bool(cfg.get("normalize_decoder", True)),
        "base_model_name_or_path": cfg.get("base_model_name_or_path"),
    }
    if "hook_name" in cfg:
        config |= {"hook_name": cfg["hook_name"], "hook_io": cfg.get("hook_io", "output")}
    elif _HOOKPOINT.fullmatch(folder.name):
        config["their_hook"] = folder.name
    return Foreign(config, take(raw, _NAMES, where), [subtracted(True), "Nothing is transposed: rows are latents."])


def export(sae: Any, folder: Path) -> list[str]:
    """Write a hookpoint's folder; name it as the module is called in the base model, `layers.12`."""
    config, said = sae.config, list[str]()
    if config.activation != "topk":
        raise ValueError(
            f'`sae` must have activation="topk" for sparsify, got {config.activation!r}. SAELens has it: '
            'to="sae_lens".'
        )
    refuse_norm(config, "sparsify")
    state = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    state = with_shift(without_scale(state, config, said), config.apply_b_dec_to_input, True, said)
    save_file({name: state[name].contiguous() for name in _NAMES}, folder / "sae.safetensors")
    cfg = {
        "activation": "topk",
        "expansion_factor": max(config.d_sae // config.d_in, 1),
        "normalize_decoder": config.normalize_decoder,
        "num_latents": config.d_sae,
        "k": int(config.k),
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_in,
    }
    # its reader drops what it does not know; ours finds the place again
    ours = {name: getattr(config, name) for name in ("hook_name", "hook_io", "base_model_name_or_path")}
    write_json(folder / "cfg.json", {**cfg, **ours} if config.hook_name else cfg)
    return said
