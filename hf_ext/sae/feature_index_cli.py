"""`python -m hf_ext.sae index SAE OUT --model MODEL --data TEXTS`: an index of what every latent does.

Started again with the same words after a stop, it goes on where it was.
"""

import argparse
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hf_ext.sae.texts import read_texts


def main(argv: list[str] | None = None) -> int:
    """Parse, build, say what it holds; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_ext.sae index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sae", metavar="SAE", help="folder, file or Hub id, ours or of a format that convert reads")
    parser.add_argument("folder", metavar="OUT", help="a new folder, or one of a stopped build")
    parser.add_argument("--model", required=True, help='Hub id or folder of the causal LM, or "smollm2"')
    parser.add_argument(
        "--data",
        default="tasks:stories",
        help="a Hub id, a file (.txt, .json, .jsonl, .csv, .parquet) or tasks:stories",
    )
    parser.add_argument("--split", default="train", help="of a Hub data set (default train)")
    parser.add_argument("--text-field", default="text", help="column of the texts (default text)")
    parser.add_argument("--subfolder", default="", help="of SAE")
    parser.add_argument("--k", type=int, help="budget; by default the SAE's own")
    parser.add_argument("--rows", type=int, default=512, help="rows of tokens to read (default 512)")
    parser.add_argument("--row-tokens", type=int, default=128, help="tokens a row (default 128)")
    parser.add_argument("--contexts", type=int, default=8, help="contexts of a latent (default 8)")
    parser.add_argument("--length", type=int, default=21, help="tokens of a context (default 21)")
    parser.add_argument("--dtype", default="auto", help="of the model: auto, bfloat16, float32 (default auto)")
    args = parser.parse_args(argv)
    try:
        index = built(args)
    except (FloatingPointError, ImportError, OSError, TypeError, ValueError, StrictDataclassError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    info = index.info
    sys.stdout.write(
        f"Saved {args.folder}: {info['alive']} of {info['d_sae']} latents fire on {info['tokens']} tokens.\n"
    )
    return 0


def built(args: argparse.Namespace) -> Any:
    """The index that the command line asks for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_ext.sae.feature_index_build import build_feature_index

    for name in ("rows", "row_tokens", "contexts", "length"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(args, name)}.")
    # families import no other part of hf_ext; a command line may know it by name
    named = args.model == "smollm2" and not Path(args.model).exists()
    source = str(import_module("hf_ext.tiny").path(args.model)) if named else args.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = torch.tensor(packed(read_texts(args, "index"), tokenizer, args.rows, args.row_tokens))
    sae = _sae(args.sae, args.subfolder, source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype).eval()
    return build_feature_index(
        sae,
        model,
        rows,
        args.folder,
        contexts=args.contexts,
        length=args.length,
        k=args.k,
        skip_ids=tokenizer.all_special_ids,
        info={"model": args.model, "sae": "/".join(filter(None, (args.sae, args.subfolder))), "data": args.data},
    )


def packed(documents: Iterator[str], tokenizer: Any, rows: int, size: int) -> list[list[int]]:
    """At most `rows` rows of `size` token ids: documents end to end, an end token between them."""
    found: list[int] = []
    for text in documents:
        found += tokenizer(text)["input_ids"]
        found += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if len(found) >= rows * size:
            break
    if len(found) < size:
        raise ValueError(f"`--data` must hold a row of {size} tokens, got {len(found)} tokens. Lower --row-tokens.")
    return [found[at : at + size] for at in range(0, min(len(found) // size, rows) * size, size)]


def _sae(source: str, subfolder: str, model: str) -> Any:
    """An SAE of ours, or of another library."""
    from hf_ext.sae.convert import load_sae
    from hf_ext.sae.modeling_sae import SAEModel

    try:
        theirs = load_sae(source, subfolder=subfolder, model=model)
    except ValueError as error:
        if "It is a model of ours" not in str(error):
            raise
        return SAEModel.from_pretrained(source, subfolder=subfolder).eval()
    return theirs[0]
