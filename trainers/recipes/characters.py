"""What the recipes of small character models share: the tokenizer, and two-digit sums of which a tenth is held out."""

import random
import zlib
from collections.abc import Sequence
from typing import Any


def tokenizer_of(characters: Sequence[str]) -> Any:
    """Characters as tokens, after `<pad>` (0) and `<end>` (1)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<end>", *characters]
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", padding_side="left")


def problems(seed: int, count: int, held_out: bool) -> list[dict[str, str]]:
    """Sums `12+34=` with their answers of three digits; a tenth of all pairs is held out."""
    rng = random.Random(seed)
    found: list[dict[str, str]] = []
    while len(found) < count:
        a, b = rng.randrange(100), rng.randrange(100)
        if (zlib.crc32(f"{a}+{b}".encode()) % 10 == 0) == held_out:
            found.append({"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}"})
    return found
