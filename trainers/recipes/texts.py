"""Texts for recipes: a file or a Hub data set with a field `text`, its checksum, and rows of tokens of it.

`--text TRAIN [VALID]` takes .jsonl, .jsonl.gz, .parquet or .txt files, or one Hub id. With a single file, every
twentieth text is held out.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from trainers.recipes.runner import Skip


HELD_OUT = 20  # every so-many-th text, where the corpus has no part of its own for it
FORMATS = {"jsonl": "json", "json": "json", "parquet": "parquet", "txt": "text"}


def load(places: Sequence[str], default: str, characters: int) -> tuple[list[str], list[str], dict[str, str]]:
    """
    Training and held-out texts.

    Args:
        places (sequence of `str`): One or two files, or a Hub id; `default` (a Hub id) if empty.
        default (`str`): The Hub data set to take where none is named.
        characters (`int`): Of a Hub data set only about so many are fetched; files are read whole.

    Returns:
        `(train, held_out, {"data": ..., "data_sha256": ...})`; the checksum is the training file's own, or, for a Hub
        data set, that of the texts read.

    Raises:
        ValueError: for a file of another format, or texts without a field `text`.
        Skip: where a Hub data set cannot be reached.
    """
    files = [Path(place) for place in places]
    if files and all(file.is_file() for file in files):
        train = _read(files[0])
        digest = sha256(files[0].read_bytes()).hexdigest()
        name = ", ".join(file.name for file in files)
        return *_split(train, _read(files[1]) if len(files) > 1 else []), {"data": name, "data_sha256": digest}
    if len(places) > 1 or (places and (files[0].suffix or files[0].is_absolute())):
        missing = [str(file) for file in files if not file.is_file()]
        raise ValueError(f"`--text` must name files that exist, or one Hub id, got {', '.join(missing)}.")
    name = places[0] if places else default
    train, held_out = _from_hub(name, characters)
    digest = sha256("\n".join(train).encode()).hexdigest()
    return *_split(train, held_out), {"data": name, "data_sha256": digest}


def _split(train: list[str], held_out: list[str]) -> tuple[list[str], list[str]]:
    if held_out:
        return train, held_out
    return [text for i, text in enumerate(train) if i % HELD_OUT], train[::HELD_OUT]


def _read(file: Path) -> list[str]:
    from datasets import disable_caching, load_dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_caching()
    kind = FORMATS.get(file.name.removesuffix(".gz").rpartition(".")[2])
    if kind is None:
        raise ValueError(f"`--text` must be a file of {', '.join(FORMATS)} (.gz allowed), got {file}.")
    try:
        rows = load_dataset(kind, data_files=str(file), split="train", streaming=True)
        texts = [row["text"] for row in rows]
    except (DatasetGenerationError, KeyError, ValueError) as error:
        raise ValueError(f"`--text` must hold rows with a field `text`, got {file} ({error}).") from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`--text` must hold texts, got none or other things in {file}.")
    return texts


def _from_hub(name: str, characters: int) -> tuple[list[str], list[str]]:
    from datasets import load_dataset

    cure = "Name a file with a field `text`: --text TRAIN.jsonl [VALID.jsonl]."
    try:
        splits = load_dataset(name, streaming=True)
        parts = [_some(splits["train"], characters)]
        names = [split for split in ("validation", "test") if split in splits]
        parts.append(_some(splits[names[0]], characters // HELD_OUT) if names else [])
    except Exception as error:  # datasets raises many kinds where a Hub or a data set is away
        raise Skip(f"The texts of {name} cannot be had here ({type(error).__name__}). {cure}") from error
    return parts[0], parts[1]


def _some(rows: Any, characters: int) -> list[str]:
    texts: list[str] = []
    for row in rows:
        texts.append(row["text"])
        characters -= len(row["text"])
        if characters <= 0:
            break
    return texts


def save_tokens(
    file: Path, encode: Callable[[list[str]], list[list[int]]], end: int, train: list[str], held_out: list[str]
) -> None:
    """Token ids of all texts, each followed by `end`, for `rows`; nothing where `file` is there already."""
    import torch
    from safetensors.torch import save_file

    if file.is_file():
        return
    parts = {}
    for name, texts in (("train", train), ("held_out", held_out)):
        ids = [[*row, end] for row in encode(texts)]
        parts[name] = torch.tensor([i for row in ids for i in row], dtype=torch.int32)
        parts[f"{name}_ends"] = torch.tensor([len(row) for row in ids]).cumsum(0)
    half = file.with_name(f"{file.name}.part")
    save_file(parts, half, metadata={"format": "pt"})
    half.replace(file)


def check_tokens(file: Path, needed: dict[str, int], budget: str) -> None:
    """Refuses a corpus that is too short before any cell runs."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as content:
        for name, count in needed.items():
            have = content.get_slice(name).get_shape()[0]
            if have < count:
                raise ValueError(f"`--text` must hold {count} {name} tokens for {budget}, got {have}. Add text.")


def rows(file: Path, name: str, count: int, length: int, seed: int) -> Any:
    """`count` rows of `length` tokens of "train" or "held_out": texts in an order drawn from `seed`, joined."""
    import torch
    from safetensors.torch import load_file

    content = load_file(file)
    tokens, stops = content[name], content[f"{name}_ends"].tolist()
    order = torch.randperm(len(stops), generator=torch.Generator().manual_seed(seed)).tolist()
    pieces, have = [], 0
    for at in order:
        pieces.append(tokens[(stops[at - 1] if at else 0) : stops[at]])
        have += len(pieces[-1])
        if have >= count * length:
            break
    return torch.cat(pieces)[: count * length].view(-1, length).long()


def train_bpe(texts: Sequence[str], size: int, special: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer (`tokenizers`), digits one by one; `special` are its first tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
