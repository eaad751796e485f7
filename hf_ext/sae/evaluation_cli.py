"""`python -m hf_ext.sae eval SAE --model MODEL --data TEXTS`: how well an SAE explains activations, as JSON."""

import argparse
import json
import math
import os
import random
import sys
from datetime import date
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hf_ext.sae.configuration_sae import SAEConfig
from hf_ext.sae.texts import read_texts


SHOWN = ("activation", "d_in", "d_sae", "k", "hook_name", "hook_io")
SHORTEST = 16  # tokens of a document, below which it says little


def main(argv: list[str]) -> None:
    """Parse the command line, evaluate, and print or write what was found."""
    parser = argparse.ArgumentParser(prog="python -m hf_ext.sae eval", description=__doc__)
    parser.add_argument("sae", metavar="SAE", help="Hub id or folder of an SAE")
    parser.add_argument("--subfolder", default="", help="which SAE, where one repository holds several")
    parser.add_argument("--model", required=True, help='Hub id or folder of its model, or "smollm2"')
    parser.add_argument(
        "--data",
        default="tasks:stories",
        help="a Hub id, a file (.txt, .json, .jsonl, .csv, .parquet, packed or not) or tasks:stories (default)",
    )
    parser.add_argument("--text-field", default="text", help="column of the texts (default text)")
    parser.add_argument("--split", default="test", help="split of a Hub data set (default test)")
    parser.add_argument("--k", type=int, nargs="+", help="budgets k' (default: its own)")
    parser.add_argument("--documents", type=int, default=64, help="texts to read (default 64)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a text at most (default 256)")
    parser.add_argument("--skip-positions", type=int, default=1, help="first positions left out (default 1)")
    parser.add_argument(
        "--baselines", nargs="*", default=[], choices=["random", "frozen_decoder", "pca"], help="to stand beside it"
    )
    parser.add_argument("--latents", type=int, default=0, help="latents to score by detection (default 0: none)")
    parser.add_argument("--dtype", default="auto", help="of the model: auto, bfloat16, float32 (default auto)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    parser.add_argument("--out", type=Path, help="write JSON here instead of on standard output")
    args = parser.parse_args(argv)
    try:
        found = evaluated(args)
        if args.out is not None:
            _write(args.out, found)
    except (
        FloatingPointError,
        ImportError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        StrictDataclassError,
    ) as error:
        parser.exit(1, f"{' '.join(str(error).split())}\n")
    sys.stdout.write((_json(found) if args.out is None else table(found)) + "\n")


def evaluated(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything that is known before weights load, load, and evaluate."""
    for name, least in (("documents", 2), ("context", SHORTEST), ("skip_positions", 0), ("latents", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least {least}, got {getattr(args, name)}.")
    config = _config(args.sae, args.subfolder)
    for k in args.k or ():
        most = config.k if config.activation == "topk" else config.d_sae
        if not 1 <= k <= most:
            raise ValueError(f"`--k` must be in [1, {most}], the latents that the SAE can be asked for, got {k}.")
    texts = _texts(args)
    source = _model_path(args.model)
    _check_fit(config, source, args.model)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    from hf_ext.sae.evaluation import evaluate
    from hf_ext.sae.modeling_sae import SAEModel

    tokenizer = AutoTokenizer.from_pretrained(source)
    documents = [torch.tensor(ids[: args.context]) for ids in tokenizer(texts)["input_ids"] if len(ids) >= SHORTEST]
    if len(documents) < 2:
        raise ValueError(
            f"`--data` must hold at least 2 texts of {SHORTEST} tokens, got {len(documents)} among {len(texts)}."
        )
    sae: Any = SAEModel.from_pretrained(args.sae, subfolder=args.subfolder).eval()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype).eval()
    found = evaluate(
        sae,
        model,
        documents,
        args.k or (None,),
        skip_positions=args.skip_positions,
        baselines=args.baselines,
        scored_latents=args.latents,
        seed=args.seed,
    )
    # a folder by its bare name: where it lies is nobody's business
    head = {
        "sae": "/".join(filter(None, (_shown(args.sae), args.subfolder))),
        "model": _shown(args.model),
        "data": _shown(args.data),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": __version__},
        "config": {
            name: getattr(config, name) for name in ("activation", "d_in", "d_sae", "k", "hook_name", "hook_io")
        },
    }
    return head | found


def table(found: dict[str, Any]) -> str:
    """The figures in columns, one for each budget."""
    heads = ["figure", *(f"k = {entry['k'] or found['config']['k']}" for entry in found["budgets"])]
    rows = []
    for name in found["budgets"][0]["figures"]:
        cells = [name]
        for entry in found["budgets"]:
            figure = entry["figures"][name]
            low, high = figure.get("ci95", (None, None))
            cells.append(f"{figure['value']:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]"))
        rows.append(cells)
    for name, values in found["baselines"].items():
        rows.append([f"ev_global of {name}", *(f"{value:.4g}" for value in values.values())])
    widths = [max(len(row[at]) for row in [heads, *rows]) for at in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in [heads, *rows]
    )


def _config(name: str, subfolder: str) -> SAEConfig:
    config = SAEConfig.from_pretrained(name, subfolder=subfolder)
    if config.hook_name is None:
        raise ValueError(f"`SAE` must say where in a model it belongs, got {_shown(name)} without `hook_name`.")
    return config


def _model_path(name: str) -> str:
    # families import no other part of hf_ext; a command line may know it by name
    return str(import_module("hf_ext.tiny").path(name)) if name == "smollm2" and not Path(name).exists() else name


def _check_fit(config: SAEConfig, source: str, name: str) -> None:
    """The model has the hook, and of this width: by its skeleton and two tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_ext.record import record
    from hf_ext.sites import Hook

    with torch.device("meta"):
        probe = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with torch.no_grad(), record(probe, {"hook": Hook(config.hook_name, config.hook_io)}, stop=True) as seen:
        probe(input_ids=ids)
    if not seen["hook"]:
        raise ValueError(f"`--model` must call {config.hook_name!r}, the SAE's hook; {_shown(name)} does not.")
    width = seen["hook"][0].shape[-1]
    if width != config.d_in:
        raise ValueError(
            f"`--model` must have activations of width d_in={config.d_in} at {config.hook_name!r}, got {width} in "
            f"{_shown(name)}. It is another model than the SAE was trained on."
        )
    base = config.base_model_name_or_path
    if base and Path(base).name.lower() != Path(name).name.lower() and name != "smollm2":
        sys.stderr.write(f"The SAE was trained on {base}; it is evaluated on {_shown(name)}.\n")


def _texts(args: argparse.Namespace) -> list[str]:
    """So many texts, drawn from the first 20 times as many."""
    found = list(islice(read_texts(args, f"evaluation-{args.seed}"), 20 * args.documents))
    random.Random(args.seed).shuffle(found)
    return found[: args.documents]


def _json(found: Any) -> str:
    """JSON has no NaN: what cannot be computed (a variance of 0) is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(found), indent=1, allow_nan=False)


def _shown(name: str) -> str:
    return Path(name).name if Path(name).exists() else name


def _write(path: Path, found: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(_json(found) + "\n", encoding="utf-8")
    os.replace(part, path)
