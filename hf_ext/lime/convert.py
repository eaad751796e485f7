"""From other checkpoints to LIMe: pretrained Llama-likes, and what the authors' own training code saves.

- The weights of a Llama-like are copied by `LimeForCausalLM.from_llama`; `convert` adds the file side (tokenizer,
  dtype, a check of the result).
- The authors' v2 layout keeps keys and values in one fused matrix. `from_original_state_dict` knows the layout,
  `from_original` the files; only `_read_tensors` opens them, and nothing that it opens can run code.
- The authors' files hold no architecture: it comes from a configuration, and every name and shape must fit it.
"""

import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

    from hf_ext.lime.modeling_lime import LimeForCausalLM


logger = logging.getLogger(__name__)
_DAMAGED = "`source` must be a whole checkpoint, got {} ({}). Copy or download it again."
_PICKLED = (".bin", ".pt", ".pth")
_WRAPPERS = ("module", "_orig_mod")  # what DDP and torch.compile put into names
# names that only v1 has: routers over hidden states, and projections of what they mix
_V1 = (".attention_router.", ".k_proj_lime.", ".input_layernorm_lime.")


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

    _check_new(folder)
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
    with _all_at_once(folder) as part:
        lime.save_pretrained(part)
        # without files of its own a folder would get an empty tokenizer of its model type
        if cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
            logger.warning("No tokenizer was saved: %s has none.", source)
        else:
            AutoTokenizer.from_pretrained(source).save_pretrained(part)
    return lime


def from_original(
    source: str | os.PathLike[str], config: Any, folder: str | os.PathLike[str] | None = None
) -> "LimeForCausalLM":
    """
    A LIMe model from the files that the authors' v2 code saves.

    Args:
        source (`str` or path): A safetensors file or its index of shards, or a `.bin`, `.pt` or `.pth` of tensors
            alone; or a folder with one of these (`model.safetensors` goes first; optimizers beside it are left alone).
        config (`LimeConfig`, `LlamaConfig`, `str` or path): The architecture; or the JSON file of either, such as the
            `config/config.json` that the authors' training writes, or the folder that holds it.
        folder (`str` or path, *optional*): Where to save model and code, all at once: a new or empty folder.

    Returns:
        `LimeForCausalLM` in the dtype of the weights, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: if there is no such checkpoint or configuration.
        TypeError: if `config` is neither a configuration nor a path.
        ValueError: if the checkpoint is of v1, damaged, needs code to be read, or does not fit `config`; or `folder`
            holds files.

    Example:

        model = from_original("final", "config/config.json", "lime-1b")
    """
    if folder is not None:
        _check_new(folder)
    config = _read_config(config)
    model = from_original_state_dict(_read_tensors(Path(source)), config)
    if folder is not None:
        with _all_at_once(folder) as part:
            model.save_pretrained(part)
    return model


def from_original_state_dict(state: "Mapping[str, torch.Tensor]", config: Any) -> "LimeForCausalLM":
    """
    A LIMe model from the state dict that the authors' v2 code saves (`kv_proj_weight`, `lime_router.static_weights`).

    Their fused [2dG, D] matrix has rows in the order (feature, head) with keys before values; ours are two matrices in
    Llama's order (head, feature). Their router [G, l G] is ours [G, l, G], flattened.

    Args:
        state (mapping of names to tensors): As loaded by safetensors or `torch.load(..., weights_only=True)`. Names
            may have the prefixes of `torch.compile`, DDP or one module around the model.
        config (`LimeConfig`): The architecture; their files hold none. Its `routing` must be `"full"`, its
            `router_type` `"kv"`. Where it ties the embeddings, one of the two names is enough.

    Returns:
        `LimeForCausalLM` in the dtype of the keys' and values' weights (routers in float32 at least), in eval mode.

    Raises:
        ValueError: if the state is of v1 (softmax routers over hidden states), or does not fit `config`: the first
            tensors that are missing, unknown or of another shape are named.
    """
    import torch
    from transformers import initialization as init

    from hf_ext.lime.modeling_lime import LimeForCausalLM

    if config.routing != "full" or config.router_type != "kv":
        raise ValueError(
            "`config` must have routing='full' and router_type='kv', the only ones that the authors' v2 code has, got "
            f"routing={config.routing!r} and router_type={config.router_type!r}."
        )
    state = _unwrapped(state)
    fused = [tensor for name, tensor in state.items() if name.endswith(".self_attn.kv_proj_weight")]
    if not fused:
        raise ValueError(
            "`state` must come from LIMe v2, whose layers have `self_attn.kv_proj_weight`, got "
            f"{_some(state) or 'no tensors'}. "
            + (
                "These are names of v1, which mixes hidden states: another model, whose checkpoints are not read here."
                if any(mark in name for name in state for mark in _V1)
                else "Pretrained Llama-likes are converted by `convert`."
            )
        )
    with init.no_init_weights():
        model = LimeForCausalLM._from_config(config, dtype=fused[0].dtype)
    if model.dtype == torch.float64:  # routers are made in float32
        model.double()
    ours = _renamed(state, config)
    if config.tie_word_embeddings:  # which of the two names a file keeps is up to the library that wrote it
        pair = ("lm_head.weight", "model.embed_tokens.weight")
        ours = {**{name: ours[other] for name, other in (pair, pair[::-1]) if other in ours}, **ours}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    others = [
        f"{name} {tuple(tensor.shape)} instead of {shapes[name]}"
        for name, tensor in ours.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    wrong = {
        "missing": shapes.keys() - ours.keys(),
        "unknown": ours.keys() - shapes.keys(),
        "of another shape": others,
    }
    if any(wrong.values()):
        found = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items() if names)
        raise ValueError(
            f"`config` must fit the checkpoint, got tensors {found}. Pass the one that it was trained with."
        )
    model.load_state_dict(ours)
    model.tie_weights()
    return model.eval()


def _renamed(state: "Mapping[str, torch.Tensor]", config: Any) -> "dict[str, torch.Tensor]":
    """The authors' names and layouts as ours; what has no such layout keeps its shape, to be reported."""
    heads, dim = config.num_key_value_heads, config.head_dim
    ours = {}
    for name, tensor in state.items():
        if name.endswith(".kv_proj_weight"):
            if tensor.shape != (2 * dim * heads, config.hidden_size):
                raise ValueError(
                    "`config` must fit the checkpoint: 2 * head_dim * num_key_value_heads rows of hidden_size are "
                    f"{(2 * dim * heads, config.hidden_size)}, got {tuple(tensor.shape)} for {name}. Pass the "
                    "configuration that it was trained with."
                )
            key, value = tensor.reshape(2, dim, heads, -1).transpose(1, 2).flatten(1, 2)
            ours[name.replace("kv_proj_weight", "k_proj.weight")] = key
            ours[name.replace("kv_proj_weight", "v_proj.weight")] = value
        elif name.endswith(".lime_router.static_weights"):
            fits = tensor.dim() == 2 and tensor.shape[1] % heads == 0
            name = name.replace("lime_router.static_weights", "router.weight")
            ours[name] = tensor.unflatten(1, (-1, heads)) if fits else tensor
        else:
            ours[name] = tensor
    return ours


def _unwrapped(state: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Without the prefixes of what was around the model when it was saved."""
    bare = {".".join(p for p in name.split(".") if p not in _WRAPPERS): tensor for name, tensor in state.items()}
    while any(name.startswith("model.model.") for name in bare):
        bare = {name.removeprefix("model."): tensor for name, tensor in bare.items()}
    if len(bare) < len(state):
        raise ValueError(
            f"`state` must hold each tensor once, got {len(state)} names for {len(bare)} tensors: some are there with "
            "and without a prefix such as `module.`. Save the model alone."
        )
    return bare


def _read_tensors(source: Path) -> "dict[str, torch.Tensor]":
    """Every tensor of a checkpoint, on the CPU. Of pickles only tensors and plain containers are read, never code."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = _checkpoint_file(source)
    try:
        if file.suffix in _PICKLED:
            return _state_dict(torch.load(file, map_location="cpu", weights_only=True), file)
        shards = {file.name}
        if file.suffix == ".json":
            shards = {*json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()}
        return {name: tensor for shard in sorted(shards) for name, tensor in load_file(file.with_name(shard)).items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"`source` must have all its shards, got {file} ({error}). Copy or download them."
        ) from error
    except pickle.UnpicklingError as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"`source` must hold tensors alone, got {file}, which runs code ({asked[1]}) when it is read. Where "
                "you trust it, load it where it was made, and save its state dict by safetensors.torch.save_file."
            ) from error
        raise ValueError(_DAMAGED.format(file, "not written by torch.save")) from error
    except (EOFError, OSError, RuntimeError, SafetensorError, LookupError, json.JSONDecodeError) as error:
        raise ValueError(_DAMAGED.format(file, " ".join(str(error).split())[:160] or "it is empty")) from error


def _state_dict(content: Any, file: Path) -> "dict[str, torch.Tensor]":
    """The mapping of names to tensors in what a `.pt` holds, which may be `model` or `state_dict` in a larger one."""
    import torch

    inner = content
    while isinstance(inner, Mapping) and (nested := [inner[n] for n in ("model", "state_dict") if n in inner]):
        inner = nested[0]
    if isinstance(inner, Mapping) and all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in inner.items()
    ):
        return dict(inner)
    found = f"a dict of {_some(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise ValueError(f"`source` must hold a state dict, alone or as `model` or `state_dict`, got {found} in {file}.")


def _checkpoint_file(source: Path) -> Path:
    kinds = (".safetensors", *_PICKLED)
    if source.is_dir():
        usual = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
        files = [file for name in usual if (file := source / name).is_file()][:1]
        files = files or sorted(file for file in source.iterdir() if file.suffix in kinds)
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ValueError(
                f"`source` must be a file, or a folder with one checkpoint ({', '.join(usual)}, or any one of "
                f"{', '.join(kinds)}), got {source} with {names}. Name the file."
            )
        return files[0]
    if not source.is_file():
        raise FileNotFoundError(f"`source` must be a checkpoint or a folder with one, got {source}: no such file.")
    if source.suffix not in kinds and not source.name.endswith(".safetensors.index.json"):
        raise ValueError(f"`source` must end in {', '.join(kinds)} or .safetensors.index.json, got {source.name}.")
    return source


def _read_config(config: Any) -> Any:
    """A LimeConfig from what `from_original` takes."""
    from transformers import LlamaConfig, PreTrainedConfig

    from hf_ext.lime.configuration_lime import LimeConfig

    if isinstance(config, str | os.PathLike):
        file = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        if not file.is_file():
            raise FileNotFoundError(f"`config` must be a config.json or its folder, got {config}: no such file.")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            kind = {"lime": LimeConfig, "llama": LlamaConfig}[values["model_type"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"`config` must be JSON with a model_type of 'lime' or 'llama', got {file} ({error!r}). Pass the one "
                "that the training wrote, or that LimeConfig.save_pretrained writes."
            ) from error
        config = kind.from_dict(values)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"`config` must be a LimeConfig, a LlamaConfig or the path of one, got {type(config).__name__}."
        )
    if config.model_type == "lime":
        return config
    return LimeConfig.from_llama_config(config, router_init="identity_plus_noise")


def _check_new(folder: str | os.PathLike[str]) -> None:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {folder}, which holds files. Name another folder.")


@contextmanager
def _all_at_once(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to, which takes the name of `folder` at the end: a run that breaks leaves no half model."""
    folder = Path(folder)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    yield part
    os.replace(part, folder)


def _some(names: Any) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
