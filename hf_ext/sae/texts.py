"""Texts that the command lines of SAEs read: a Hub id, a file, or the stories of `hf_ext.tasks`."""

import argparse
import itertools
import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any


KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_texts(args: argparse.Namespace, seed: str) -> Iterator[str]:
    """The texts of `--data` in their order; those of a task are drawn from `seed`."""
    if args.data == "tasks:stories":
        rng, stories = random.Random(seed), import_module("hf_ext.tasks.stories")
        return (stories.sample(rng).text for _ in itertools.count())
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f'`--data` needs datasets: pip install "hf_ext[trainers]" ({error}).') from error
    path = Path(args.data)
    kind = next((KINDS[suffix] for suffix in path.suffixes if suffix in KINDS), None)
    if path.is_file() and kind is None:
        raise ValueError(f"`--data` must be a file of {', '.join(KINDS)}, got {path.name}.")
    if path.is_file():
        more = {"sample_by": "paragraph"} if kind == "text" else {}
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=True, **more)
    else:
        rows = load_dataset(args.data, split=args.split, streaming=True)
    return _column(rows, args.text_field)


def _column(rows: Any, field: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get(field), str):
            raise ValueError(f"`--text-field` must be one of {', '.join(row)}, got {field!r}.")
        yield row[field]
