"""SAEs of other libraries become ours, and ours theirs: one door for all formats.

- `read_tensors` is the only place that opens foreign weights. Nothing that it opens can run code.
- A format is a file of `formats/`: plain functions from a folder to settings and tensors in our names, and back. What
  was transposed, folded or subtracted on the way is told by the [`ConventionReport`] of each load.
- Weights are taken as they are wherever our settings can say the same function; a round trip then changes no bit.

`python -m hf_ext.sae convert IN OUT --to sae_lens` is the same from a shell.
"""

import argparse
import logging
import os
import pickle
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from hf_ext.sae.formats import dictionary_learning, sae_lens, scopes, sparsify
from hf_ext.sae.formats.layout import Foreign, check, unit_rows


if TYPE_CHECKING:
    from hf_ext.sae.modeling_sae import SAEModel


logger = logging.getLogger(__name__)
_PICKLED = (".pt", ".pth", ".bin")
# their sites' names, as SAELens (TransformerLens) and Llama Scope write them, and ours
_SITES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
}


class Format(NamedTuple):
    """How to tell a format by its files, to load it, and (where we write it) to export it."""

    matches: Callable[[Path], bool]
    load: Callable[..., Foreign]
    export: Callable[[Any, Path], list[str]] | None = None


def _file_with(tensor: str) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and path.suffix in _PICKLED and tensor in read_tensors(path)


FORMATS = {
    "sae_lens": Format(sae_lens.matches, sae_lens.load, sae_lens.export),
    "sparsify": Format(sparsify.matches, sparsify.load, sparsify.export),
    "dictionary_learning": Format(dictionary_learning.matches, dictionary_learning.load, dictionary_learning.export),
    "gemma_scope": Format(scopes.is_gemma_scope, scopes.load_gemma_scope),
    "llama_scope": Format(scopes.is_llama_scope, scopes.load_llama_scope),
    "openai": Format(_file_with("latent_bias"), scopes.load_openai),
    "qwen_scope": Format(_file_with("W_enc"), scopes.load_qwen_scope),
}
EXPORTS = [name for name, format in FORMATS.items() if format.export]


class ConventionReport(NamedTuple):
    """
    What a load did. `str(report)` is one line each.

    Attributes:
        format (`str`): Name of the format.
        said (`list[str]`): What was subtracted, folded or transposed, and what is left to do.
    """

    format: str
    said: list[str]

    def __str__(self) -> str:
        return "\n".join([f"Format: {self.format}.", *(f"- {line}" for line in self.said)])


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    The tensors in a `.safetensors`, `.npz`, `.pt`, `.pth` or `.bin` file, on the CPU, and plain values beside them.

    Nothing in the file can run code: pickles are read by torch's loader of weights alone, arrays of objects not at
    all, and a file is what its content is, whatever its name says.

    Raises:
        ValueError: for a file that is missing, cut off, of another kind, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} must be a file of weights, and there is none. Check the path.")
    again = "Copy or download it again."
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npz":
            return _arrays(path)
        if path.suffix in _PICKLED:
            found = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(found, dict):
                return found
            raise ValueError(f"{path} must hold a dict of tensors, got {type(found).__name__}.")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} must hold tensors and plain values alone, and its pickle asks for more, which could run code. "
            f"Ask for safetensors, or convert it where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} must be a whole {path.suffix} file, got one that is cut off, damaged or of another kind "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). {again}"
        ) from error
    raise ValueError(f"{path} must end in .safetensors, .npz, {', '.join(_PICKLED)}, got {path.suffix!r}.")


def _arrays(path: Path) -> dict[str, Any]:
    import numpy

    # by its content: numpy would open a pickle of that name too
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} must be an archive of arrays, got another kind of file. Download it again.")
    with numpy.load(path, allow_pickle=False) as archive:
        found = {}
        for name in archive.files:
            try:
                found[name] = torch.from_numpy(archive[name])
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{name!r} in {path} must be an array of numbers, got something pickled or foreign, which could "
                    f"run code ({error}). Ask for safetensors, or convert it where you trust it."
                ) from error
    return found


def load_sae(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    k: float | None = None,
    input_scale: float | None = None,
    model: Any = None,
    dtype: torch.dtype | None = None,
) -> "tuple[SAEModel, ConventionReport]":
    """
    An SAE that another library saved, as an [`SAEModel`] that computes the same, and can be asked for any budget
    k' <= K as in HierarchicalTopK (arXiv 2505.24473).

    Args:
        source (`str` or path): A folder or file, or a Hub id.
        format (`str`, *optional*): One of `FORMATS`; by default told by the files.
        subfolder (`str`, *optional*, defaults to `""`): The SAE's folder or file within `source`,
            `"layer_12/width_16k/average_l0_82"`, `"layers.12"`.
        revision (`str`, *optional*): Of a Hub id.
        k (`float`, *optional*): Active latents, where the files do not say.
        input_scale (`float`, *optional*): What activations are multiplied by, where the files do not say (SAELens'
            training files with `expected_average_only_in`).
        model (`torch.nn.Module` or `str`, *optional*): The language model, or its id or folder: only that tells the
            module path of names such as `blocks.12.hook_resid_post`.
        dtype (`torch.dtype`, *optional*): By default the file's own, the widest if there are several.

    Returns:
        `(SAEModel, ConventionReport)`: In evaluation mode, and what was done to it.

    Raises:
        ValueError: for files of no known format, damaged or unsafe ones, settings that do not fit the weights, a
            missing `k`, a transcoder, and functions that SAEModel does not have; each with what to do.

    Example:

    ```python
    sae, report = load_sae("google/gemma-scope-2b-pt-res", subfolder="layer_12/width_16k/average_l0_82")
    print(report)
    ```"""
    from hf_ext.sae.configuration_sae import SAEConfig
    from hf_ext.sae.modeling_sae import SAEModel

    if format is not None and format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}.")
    place = _local(source, subfolder, revision)
    name = format or _format_of(place)
    given = {"k": k, "input_scale": input_scale, "source": f"{source}/{subfolder}".rstrip("/")}
    foreign = FORMATS[name].load(place, read_tensors, **given)
    check(foreign, str(place))
    config, tensors, said = foreign
    said = [*said, *_place_hook(config, model)]
    kinds = {tensor.dtype for tensor in tensors.values()}
    wanted = dtype or _widest(kinds)
    if kinds != {wanted}:
        said.append(f"Tensors were {', '.join(sorted(map(str, kinds)))}, and are {wanted} now.")
    tensors = {key: tensor.to(wanted) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} of {place} must be finite, got NaN or infinity. The file is damaged.")
    config.setdefault("normalize_decoder", unit_rows(tensors["W_dec"]))
    if not config.get("base_model_name_or_path"):
        config.pop("base_model_name_or_path", None)
    with torch.device("meta"):
        sae = SAEModel(SAEConfig(**config))
    sae.load_state_dict(tensors, assign=True)
    sae.config.dtype = wanted
    report = ConventionReport(name, said)
    logger.info("%s", report)
    return sae.eval(), report


def export_sae(sae: "SAEModel", folder: str | os.PathLike[str], to: str) -> ConventionReport:
    """
    Write an SAE for another library.

    One trained with `hierarchical_loss` (arXiv 2505.24473) is a plain TopK SAE there: set its `config.k` to the budget
    that you want first.

    Args:
        sae ([`SAEModel`]): Any activation that the format has.
        folder (`str` or path): A new or empty folder, which appears whole. For sparsify name it as the hooked module
            is called in the base model, `layers.12`.
        to (`str`): "sae_lens", "sparsify" or "dictionary_learning".

    Returns:
        [`ConventionReport`]: What was folded, so that the format can say it.

    Raises:
        ValueError: for a function that the format does not have, a folder with files, or an unset threshold.
    """
    if to not in EXPORTS:
        raise ValueError(f"`to` must be one of {', '.join(EXPORTS)}, got {to!r}.")
    if getattr(sae.config, "model_type", None) != "sae":
        raise ValueError(
            f"`sae` must be an SAEModel to be written for {to}, got {type(sae).__name__}: no other library has its "
            "encoder. Save it with save_pretrained."
        )
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {str(target)!r}. Name another one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as made:
        export = FORMATS[to].export
        assert export is not None
        part = Path(made) / target.name
        part.mkdir()
        said = export(sae, part)
        if target.exists():
            target.rmdir()
        shutil.move(part, target)
    return ConventionReport(to, said)


def main(argv: list[str] | None = None) -> int:
    """`python -m hf_ext.sae convert IN OUT --to FORMAT`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_ext.sae convert", description="An SAE of one library becomes one of another."
    )
    parser.add_argument("source", metavar="IN", help="folder, file or Hub id: ours or of " + ", ".join(FORMATS))
    parser.add_argument("folder", metavar="OUT", help="a new folder")
    parser.add_argument("--to", default="hf_ext", choices=["hf_ext", *EXPORTS], help="by default a model of ours")
    parser.add_argument("--format", choices=list(FORMATS), help="of IN; by default told by its files")
    parser.add_argument("--subfolder", default="", help="of IN")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--k", type=float, help="active latents, where the files do not say")
    parser.add_argument("--input-scale", type=float, help="of activations, where the files do not say")
    parser.add_argument("--model", help="id or folder of the language model, which tells the module's path")
    args = parser.parse_args(argv)
    try:
        if args.format is None and _is_ours(args.source, args.subfolder):
            from hf_ext.sae.modeling_sae import SAEModel

            sae = SAEModel.from_pretrained(args.source, subfolder=args.subfolder, revision=args.revision or "main")
        else:
            options = {name: getattr(args, name) for name in ("format", "subfolder", "revision", "k", "input_scale")}
            sae, report = load_sae(args.source, model=args.model, **options)
            sys.stdout.write(f"{report}\n")
        if args.to == "hf_ext":
            if Path(args.folder).exists() and any(Path(args.folder).iterdir()):
                raise ValueError(f"OUT must be new or empty, got {args.folder!r}. Name another one.")
            sae.save_pretrained(args.folder)
        else:
            said = export_sae(sae, args.folder, args.to).said
            sys.stdout.write("".join(f"- {line}\n" for line in said))
    except (ImportError, OSError, ValueError, StrictDataclassError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"Saved {args.folder}: {sae.config.d_sae} latents of width {sae.config.d_in}.\n")
    return 0


def _local(source: str | os.PathLike[str], subfolder: str, revision: str | None) -> Path:
    """The folder or file on this machine, downloaded if `source` is a Hub id."""
    root = Path(source).expanduser()
    if not root.exists():
        from huggingface_hub.errors import HFValidationError

        try:
            root = _downloaded(str(source), subfolder, revision)
        except (HFValidationError, OSError, ValueError) as error:
            raise ValueError(
                f"`source` must be a folder, a file or a Hub id, got {str(source)!r} ({str(error).splitlines()[0]})."
            ) from error
    place = root / subfolder if subfolder else root
    if not place.exists():
        raise ValueError(f"`subfolder` must be in {root}, got {subfolder!r}, which is not there.")
    return place


def _downloaded(repo: str, subfolder: str, revision: str | None) -> Path:
    """The files of one SAE alone: repositories of SAEs hold hundreds of gigabytes."""
    from huggingface_hub import HfApi, snapshot_download

    if subfolder:
        wanted = [subfolder, f"{subfolder}/**"]
    else:
        try:
            files = HfApi().list_repo_files(repo, revision=revision)
        except OSError:  # no network: what is in the cache already
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        wanted = [name for name in files if "/" not in name or name.startswith("checkpoints/")]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _format_of(place: Path) -> str:
    for name, format in FORMATS.items():
        if format.matches(place):
            return name
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else [place.name]
    hint = "It is a model of ours: SAEModel.from_pretrained loads it. " if _is_ours(place, "") else ""
    raise ValueError(
        f"`source` must be an SAE in one of the formats {', '.join(FORMATS)}, got {place} with "
        f"{', '.join(names[:8]) or 'nothing'}. {hint}Name the SAE's own folder by `subfolder`, or `format`."
    )


def _is_ours(source: Any, subfolder: str) -> bool:
    from hf_ext.sae.formats.layout import read_json

    file = Path(source) / subfolder / "config.json"
    return file.is_file() and "auto_map" in read_json(file)


def _widest(kinds: set[torch.dtype]) -> torch.dtype:
    widest = torch.bfloat16 if torch.bfloat16 in kinds else next(iter(kinds))
    for kind in kinds:
        widest = torch.promote_types(widest, kind)
    return widest


def _place_hook(config: dict[str, Any], model: Any) -> list[str]:
    """Turn a place's foreign name into a module path, if the model is known; else say what is left to do."""
    from hf_ext.sites import base_model, resolve

    theirs = config.pop("their_hook", None)
    if config.get("hook_name"):
        return [f"Hook: {config['hook_name']} ({config.get('hook_io', 'output')})."]
    if not theirs:
        return ["The files do not say which activations they are of: set sae.config.hook_name."]
    if model is None:
        return [f"Their place is called {theirs!r}: pass model=, or set sae.config.hook_name yourself."]
    probe = model if isinstance(model, nn.Module) else _skeleton(model)
    lens = re.fullmatch(r"blocks\.(\d+)\.(.+)", theirs)
    plain = re.fullmatch(r"(resid_post|attn_out|mlp_out)_layer_?(\d+)", theirs)
    if lens and lens[2] in _SITES:
        hook = resolve(probe, _SITES[lens[2]], int(lens[1]))
    elif plain:
        hook = resolve(probe, plain[1], int(plain[2]))
    else:
        from hf_ext.sites import Hook

        prefix = base_model(probe)[0]
        hook = Hook(f"{prefix}.{theirs}" if prefix else theirs, "output")
        if hook.path not in dict(probe.named_modules()):
            raise ValueError(
                f"`model` must have the module {hook.path!r}, which the SAE calls {theirs!r}, and has not. Is it the "
                "model that the SAE was trained on?"
            )
    config["hook_name"], config["hook_io"] = hook
    return [f"Hook: {hook.path} ({hook.io}), which they call {theirs!r}."]


def _skeleton(name: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))


__all__ = ["EXPORTS", "FORMATS", "ConventionReport", "export_sae", "load_sae", "main", "read_tensors"]
