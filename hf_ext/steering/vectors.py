"""Steering vectors as files and dictionaries, in and out: layer -> `(hidden_size,)`, added to the stream after it.

- A file holds what is added: an adapter's scale is in its numbers.
- GGUF is llama.cpp's control vector, which repeng writes too: tensors `direction.N`, N the layer counted from 0 whose
  output gets the vector. llama.cpp has no place for layer 0.
- Nothing that could run code is read: safetensors, GGUF, and numpy arrays without pickles.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hf_ext.sites import FAMILIES
from hf_ext.steering.config import SteeringConfig
from hf_ext.steering.model import SteeringModel, check_vector
from hf_ext.steering.places import facts, layer_of


Vectors = Mapping[int, torch.Tensor]
_KINDS = "a folder of a steering or BEFT adapter, a .gguf or .npy file, or a dict of layers and tensors"


def read_vectors(source: Vectors | str | os.PathLike[str]) -> dict[int, torch.Tensor]:
    """
    Vectors from where they were saved, by whomever.

    Args:
        source (`Mapping[int, torch.Tensor]`, `str` or path): A folder with an adapter of ours or of PEFT's type BEFT;
            a GGUF control vector (llama.cpp, repeng); a `.npy` array `(layers, hidden_size)`, row l for layer l; or a
            dict, which is checked and copied.

    Returns:
        `dict[int, torch.Tensor]`: Layer -> `(hidden_size,)`, float32, on the CPU, ascending.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ImportError: if gguf is not installed (extra `steering`).
        TypeError, ValueError: if it is none of these, damaged, or holds numbers that are not finite.
    """
    if isinstance(source, Mapping):
        found = dict(source)
    elif isinstance(source, str | os.PathLike):
        found = _read(Path(source))
    else:
        raise TypeError(f"`source` must be {_KINDS}, got {type(source).__name__}.")
    if not found:
        raise ValueError(f"`source` must hold a vector, got none in {source!s}.")
    for layer, vector in found.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise TypeError(f"`source` must have layers, counted from 0, as its keys, got {layer!r}.")
        width = vector.shape[-1] if isinstance(vector, torch.Tensor) and vector.dim() else 0
        check_vector(f"source[{layer}]", vector, width)
    widths = sorted({len(vector) for vector in found.values()})
    if len(widths) > 1:
        raise ValueError(f"`source` must hold vectors of one width, got widths {widths}.")
    return {layer: found[layer].detach().float().cpu().clone() for layer in sorted(found)}


def add_vectors(
    model: nn.Module, source: Vectors | str | os.PathLike[str], adapter_name: str = "default", **options: Any
) -> PeftModel:
    """
    Put vectors into a model, as an adapter.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The base model; or one that has steering adapters, to which this one
            is added, not active.
        source: As in [`read_vectors`].
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.
        options: Of [`SteeringConfig`], for example `scale=2.0`; the layers are those of `source`.

    Returns:
        `PeftModel`: `model` in evaluation mode with the vectors in it, frozen (`set_requires_grad(adapter_name)` to
        train them further).

    Raises:
        TypeError, ValueError, FileNotFoundError, ImportError: as [`read_vectors`] and [`SteeringConfig`], before the
            model is changed; also where the width is not the model's.

    Example:

    ```python
    >>> model = add_vectors(model, "happy.gguf", scale=1.5)
    ```"""
    vectors = read_vectors(source)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    width, here = len(next(iter(vectors.values()))), facts(base)["hidden_size"]
    if here is not None and width != here:
        raise ValueError(f"`source` must hold vectors of the model's width, {here}, got {width}.")
    config = SteeringConfig(layers_to_transform=list(vectors), inference_mode=True, **options)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(base, config, adapter_name)
    model.base_model.set_vectors(adapter_name, vectors)
    return model.eval()


def save_npy(model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """
    Save an adapter as one array `(layers, hidden_size)`, float32; rows of layers without a vector are zero.

    Args:
        model (`PeftModel`): With the adapter in it.
        path (`str` or path): The file, ending in `.npy`; written whole or not at all.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which.
    """
    vectors = stream_vectors(model, adapter_name)
    config = model.peft_config[adapter_name]
    table = np.zeros((config.num_hidden_layers, config.hidden_size), np.float32)
    for layer, vector in vectors.items():
        table[layer] = vector.numpy()
    with open(_part(path, ".npy"), "wb") as file:
        np.save(file, table, allow_pickle=False)
    os.replace(_part(path, ".npy"), path)


def save_gguf(model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """
    Save an adapter as a control vector for llama.cpp (`llama-cli --control-vector FILE`).

    Args:
        model (`PeftModel`): With the adapter in it.
        path (`str` or path): The file, ending in `.gguf`; written whole or not at all.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which.

    Raises:
        ImportError: if gguf is not installed (extra `steering`).
        ValueError: if layer 0 has a vector, for which llama.cpp has no place; or the adapter is not a vector on the
            stream at every token.
    """
    gguf = _gguf()
    vectors = stream_vectors(model, adapter_name)
    if 0 in vectors and vectors.pop(0).abs().max() > 0:
        raise ValueError(
            f"{adapter_name!r} must have no vector in layer 0 to be a control vector, since llama.cpp has no place "
            "for one, got one. Train with layers_to_transform from 1 on, or write zeros with set_vectors."
        )
    part = _part(path, ".gguf")
    writer = gguf.GGUFWriter(part, "controlvector")
    writer.add_string("controlvector.model_hint", model.peft_config[adapter_name].model_type)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, path)


def stream_vectors(model: PeftModel, adapter_name: str) -> dict[int, torch.Tensor]:
    """
    Layer -> vector of an adapter that adds to the residual stream at every token: what other programs can apply.

    Raises:
        TypeError: if `model` is no PeftModel with steering vectors.
        ValueError: for an unknown adapter, and one that adds elsewhere or at some tokens alone.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, SteeringModel):
        raise TypeError(f"`model` must be a PeftModel with steering vectors, got {type(model).__name__}.")
    vectors = tuner.get_vectors(adapter_name)
    config = model.peft_config[adapter_name]
    family = FAMILIES.get(config.model_type)
    on_stream = config.placement == "residual" or (
        config.placement == "down_proj" and family is not None and family.mlp_end == "mlp.down_proj"
    )
    if not on_stream or config.positions != "all":
        raise ValueError(
            f"{adapter_name!r} must be on the residual stream at every token to be a file of vectors, got placement="
            f"{config.placement!r}, target_modules={config.target_modules!r}, positions={config.positions!r}. "
            "Save the adapter itself: model.save_pretrained(folder)."
        )
    return vectors


def _read(path: Path) -> dict[int, torch.Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"`source` must be {_KINDS}, got {path}: there is no such file.")
    try:
        if path.is_dir():
            return _read_adapter(path)
        if path.suffix == ".npy":
            return _read_npy(path)
        if path.suffix == ".gguf":
            return _read_gguf(path)
    except (SafetensorError, EOFError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`source` must be whole, got {path} ({error}). Copy or download it again.") from error
    raise ValueError(f"`source` must be {_KINDS}, got {path}.")


def _read_adapter(folder: Path) -> dict[int, torch.Tensor]:
    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (settings, weights):
        if not file.is_file():
            raise FileNotFoundError(f"`source` must be {_KINDS}, got {folder} without {file.name}.")
    config = json.loads(settings.read_text(encoding="utf-8"))
    kind = config.get("peft_type")
    if kind not in ("STEERING", "BEFT"):
        raise ValueError(f"`source` must be an adapter of type STEERING or BEFT, got {kind!r} in {folder}.")
    end = ".steering_bias" if kind == "STEERING" else ".beft_bias"
    scale = config.get("scale", 1.0) if kind == "STEERING" else 1.0
    found: dict[int, torch.Tensor] = {}
    for name, tensor in load_file(weights).items():
        layer = layer_of(name)
        if not name.endswith(end):
            continue
        if layer is None or layer in found:
            raise ValueError(f"`source` must have one vector in a layer, got {name} besides in {folder}.")
        found[layer] = scale * tensor.float().flatten()
    return found


def _read_npy(path: Path) -> dict[int, torch.Tensor]:
    try:
        table = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"`source` must be a whole array without Python objects, got {path} ({error}).") from error
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.floating):
        raise ValueError(
            f"`source` must be an array of floats (layers, hidden_size), got {table.dtype} {table.shape} in {path}."
        )
    return {layer: torch.from_numpy(row.astype(np.float32)) for layer, row in enumerate(table)}


def _read_gguf(path: Path) -> dict[int, torch.Tensor]:
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"`source` must be a whole GGUF file, got {path} ({error}).") from error
    field = reader.get_field("general.architecture")
    kind = None if field is None else bytes(field.parts[-1]).decode("utf-8", "replace")
    if kind != "controlvector":
        raise ValueError(f"`source` must be a control vector, got a GGUF file of architecture {kind!r}: {path}.")
    found = {}
    for tensor in reader.tensors:
        number = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if number is not None:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found[int(number[1])] = torch.from_numpy(np.array(values, np.float32).reshape(-1))
    return found


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF control vectors need gguf: pip install 'hf_ext[steering]'.") from error
    return gguf


def _part(path: str | os.PathLike[str], suffix: str) -> Path:
    """Where a file is written before it takes its name."""
    if Path(path).suffix != suffix:
        raise ValueError(f"`path` must end in {suffix}, got {os.fspath(path)!r}.")
    return Path(f"{os.fspath(path)}.part")
