"""What a reader of a format hands over, and the steps that several formats share."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Foreign(NamedTuple):
    """
    An SAE as its files hold it, in our names.

    Attributes:
        config (`dict[str, Any]`): Options of [`SAEConfig`].
        tensors (`dict[str, torch.Tensor]`): `encoder.weight` (F, D), `encoder.bias` (F,), `W_dec` (F, D), `b_dec` (D,)
            and perhaps `threshold`.
        said (`list[str]`): What was done to the file's tensors, one sentence each.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    said: list[str]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an error names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path.name} must be a whole JSON file, got {error} in {path}. Copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def take(tensors: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, torch.Tensor]:
    """`names` (ours -> the file's) of `tensors`; one that is missing is told with those that are there."""
    lacking = [theirs for theirs in names.values() if not isinstance(tensors.get(theirs), torch.Tensor)]
    if lacking:
        raise ValueError(
            f"{where} must hold the tensors {', '.join(names.values())}, and lacks {', '.join(lacking)}; it has "
            f"{', '.join(map(str, tensors)) or 'none'}. Is it of another format? `format` names one."
        )
    return {ours: tensors[theirs] for ours, theirs in names.items()}


def refuse_transcoder(what: str | None) -> None:
    """A transcoder predicts another place's activations, so it reconstructs nothing that it reads."""
    if what:
        raise ValueError(
            f"The files must hold an autoencoder, got a transcoder ({what}), which predicts another place's "
            "activations. Load it with the library that wrote it."
        )


def transposed(tensor: torch.Tensor, name: str, said: list[str]) -> torch.Tensor:
    said.append(f"{name} transposed: the file holds one latent a column, we hold one a row.")
    return tensor.T.contiguous()


def subtracted(beta: bool) -> str:
    return "b_dec is subtracted from the input." if beta else "b_dec is not subtracted from the input."


def fold_decoder_norms(tensors: dict[str, torch.Tensor], said: list[str], why: str) -> None:
    """u_f * |row f| and row f / |row f|: the same function with rows of norm 1. A row of zeros stays."""
    norms = tensors["W_dec"].norm(dim=1)
    norms = torch.where(norms > 0, norms, 1)
    tensors["encoder.weight"] = tensors["encoder.weight"] * norms[:, None]
    tensors["encoder.bias"] = tensors["encoder.bias"] * norms
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    said.append(f"Norms of decoder rows ({norms.min():.4g} to {norms.max():.4g}) folded into the encoder: {why}")


def unit_rows(rows: torch.Tensor) -> bool:
    """Whether each row of W_dec has norm 1, to what its dtype can tell, or is zero."""
    norms = rows.double().norm(dim=1)
    close = 1e-5 if rows.dtype in (torch.float32, torch.float64) else 1e-2
    return bool(((norms - 1).abs() < close).logical_or(norms == 0).all())


def with_shift(tensors: dict[str, torch.Tensor], beta: bool, wanted: bool, said: list[str]) -> dict[str, torch.Tensor]:
    """The same function where the encoder reads x - b_dec (`wanted`) or x, though it read the other (`beta`)."""
    if beta == wanted:
        return tensors
    # W (x - b) + c = W x + (c - W b)
    shift = (tensors["encoder.weight"].double() @ tensors["b_dec"].double()).to(tensors["b_dec"].dtype)
    bias = tensors["encoder.bias"] + shift if wanted else tensors["encoder.bias"] - shift
    said.append(f"b_dec folded into the encoder's bias, since this format {'subtracts' if wanted else 'reads'} it so.")
    return {**tensors, "encoder.bias": bias}


def without_scale(tensors: dict[str, torch.Tensor], config: Any, said: list[str]) -> dict[str, torch.Tensor]:
    """The same function of x itself, where an SAE reads `input_scale` * x."""
    if config.input_norm != "scalar":
        return tensors
    scale = config.input_scale
    said.append(f"input_scale {scale:.6g} folded: W_enc times it, W_dec and b_dec divided by it.")
    return {
        **tensors,
        "encoder.weight": tensors["encoder.weight"] * scale,
        "W_dec": tensors["W_dec"] / scale,
        "b_dec": tensors["b_dec"] / scale,
    }


def refuse_norm(config: Any, format: str) -> None:
    if config.input_norm == "layer_norm":
        raise ValueError(
            f'`sae` must have input_norm="none" or "scalar" for {format}, got "layer_norm", which that format cannot '
            'say. SAELens\' can: to="sae_lens".'
        )


def layer_of(hook_name: str | None) -> int | None:
    """The number in a module path such as "model.layers.12.mlp"."""
    found = re.search(r"\.(\d+)(?:\.|$)", hook_name or "")
    return int(found[1]) if found else None


def check(foreign: Foreign, where: str) -> None:
    """Shapes agree with each other and with what the settings say."""
    tensors, config = foreign.tensors, foreign.config
    for name in ("encoder.weight", "W_dec"):
        if tensors[name].dim() != 2:
            raise ValueError(f"{name} in {where} must be a matrix, got shape {tuple(tensors[name].shape)}.")
    d_sae, d_in = tensors["W_dec"].shape
    for name, width, axis in (("d_in", d_in, "columns"), ("d_sae", d_sae, "rows")):
        told = config.get(name)
        if told is not None and told != width:
            raise ValueError(
                f"`{name}` of {where} must be the width of its tensors, {width} ({axis} of W_dec), got {told}. "
                "Settings and weights are of different SAEs: copy the folder again."
            )
        config[name] = width
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "b_dec": (d_in,)}
    if "threshold" in tensors:
        shapes["threshold"] = (d_sae,) if config["activation"] == "jumprelu" else ()
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name} of {where} must have shape {shape}, got {tuple(tensors[name].shape)}. The file is damaged, "
                "or of another format: `format` names one."
            )
