"""Put a trained SAE where `hf_ext.tiny` lies, in bfloat16, with an index of its latents, its log and its card.

python -m trainers sae --config trainers/sae/configs/smollm2_bundled.yaml
python -m trainers.recipes.bundle_sae smollm2-bundled-sae hf_ext/tiny --data stories.jsonl.gz,licences.jsonl.gz
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any


NAME = "smollm2_sae"
CONTEXT, ROWS = 256, 1024
COMMAND = "python -m trainers sae --config trainers/sae/configs/smollm2_bundled.yaml"
SHOWN = 6  # latents on the card


def bundle(run: Path, folder: Path, model: str, texts: list[str], rows: int = ROWS) -> Path:
    """
    The SAE of a run's output folder, rounded, indexed and described, as `smollm2_sae` in `folder`.

    Args:
        run (`Path`): What `python -m trainers sae` wrote.
        folder (`Path`): Where to put it; what is there under the name is replaced once all is made.
        model (`str`): Its language model.
        texts (list of `str`): What the index looks at.
        rows (`int`, *optional*, defaults to 1024): Rows of 256 tokens of them.

    Returns:
        `Path` of the bundled folder.

    Raises:
        ValueError: where the run has no SAE, or the texts are too few.
    """
    import torch

    from hf_ext import tiny
    from hf_ext.sae import SAEModel, build_feature_index

    if not (run / "model.safetensors").is_file():
        raise ValueError(f"`run` must hold a trained SAE, got {run} without model.safetensors. Train it first.")
    lm, tokenizer = tiny.load(model)
    ids: list[int] = []
    for first in range(0, len(texts), 256):
        for row in tokenizer(texts[first : first + 256])["input_ids"]:
            ids += [*row, tokenizer.eos_token_id]
        if len(ids) >= rows * CONTEXT:
            break
    count = min(rows, len(ids) // CONTEXT)
    if count < 8:
        raise ValueError(f"`texts` must hold at least {8 * CONTEXT} tokens, got {len(ids)}. Name more.")
    tokens = torch.tensor(ids[: count * CONTEXT]).view(count, CONTEXT)
    target, part = folder / NAME, folder / f"{NAME}.part"
    shutil.rmtree(part, ignore_errors=True)
    SAEModel.from_pretrained(run).to(torch.bfloat16).save_pretrained(part)
    for code in part.glob("*.py"):  # the package has it
        code.unlink()
    # what is shipped is what is indexed: rounded, computed in float32
    sae: Any = SAEModel.from_pretrained(part, dtype="float32").eval()
    index = build_feature_index(
        sae, lm, tokens, part / "index", skip_ids=tokenizer.all_special_ids, info={"model": model, "sae": NAME}
    )
    log = _log(run)
    made_by = {"command": COMMAND, "index_tokens": tokens.numel(), "log": log}
    (part / "training.json").write_text(json.dumps(made_by, indent=1) + "\n", encoding="utf-8")
    (part / "README.md").write_text(card(sae.config, index, tokenizer, log), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return target


def _log(run: Path) -> list[dict[str, Any]]:
    """Evaluations of the last checkpoint's history."""
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name[11:]))
    if not states:
        return []
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "eval_ev_global" in entry]


def card(config: Any, index: Any, tokenizer: Any, log: list[dict[str, Any]]) -> str:
    """What the SAE is, what was measured in training, and the strongest contexts of a few latents."""
    figures = "\n".join(
        f"| {name.removeprefix('eval_')} | {value:.4g} |"
        for name, value in (log[-1] if log else {}).items()
        if name.startswith("eval_") and name != "eval_runtime"
    )
    alive = (index.tensors["slot"] >= 0).nonzero().squeeze(1).tolist()
    chosen = alive[:: max(1, len(alive) // SHOWN)][:SHOWN]
    shown = []
    for latent in chosen:
        contexts = []
        for ids, _, peak in index.contexts(latent)[:3]:
            before, at, after = (
                tokenizer.decode(part) for part in (ids[:peak], ids[peak : peak + 1], ids[peak + 1 :])
            )
            contexts.append(f"{_plain(before)}**{_plain(at).strip()}**{_plain(after)}")
        raised = ", ".join(
            f"`{_plain(tokenizer.decode([i])).strip()}`" for i, _ in index.effects(latent)["raised"][:5]
        )
        shown.append(f"- {latent}: " + " / ".join(contexts) + f"; raises {raised}")
    listed = "\n".join(shown)
    return f"""---
license: apache-2.0
library_name: transformers
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [hf_ext, sae, sparse-autoencoder, "arxiv:2505.24473"]
---

# A hierarchical SAE of SmolLM2, `{config.hook_name}`

{config.d_sae} latents, {config.k} of them active at a token; any smaller budget is a cut of the same codes. Of the
model as hf_ext de-quantises it from Q4_1, on children's books and licences. Weights are bfloat16.

```python
from pathlib import Path
from hf_ext import SAEModel, tiny
from hf_ext.sae import FeatureIndex

folder = Path(tiny.__file__).with_name("{NAME}")
sae = SAEModel.from_pretrained(folder, dtype="float32")
index = FeatureIndex(folder / "index")
print(index.effects({chosen[0] if chosen else 0})["raised"])
```

Made by `{COMMAND}`; the log is in training.json.

| at the end of training, held-out texts, before rounding | |
|---|---|
{figures}

## A few latents, evenly drawn from those that fire: their strongest contexts, and what they raise

{listed}
"""


def _plain(text: str) -> str:
    """On one line, without what Markdown would take for its own."""
    return re.sub(r"\s+", " ", re.sub(r"[|*`_<>]", "", text))


def main(argv: list[str] | None = None) -> None:
    """The command line that bundles a run."""
    import argparse
    import random

    from trainers.sae.cli import SAEScriptArguments, read

    parser = argparse.ArgumentParser(description="Bundle the SAE of a run with an index of its latents.")
    parser.add_argument("run", type=Path, help="output_dir of python -m trainers sae")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2", help="Hub id or folder of its language model")
    parser.add_argument("--data", required=True, help="texts for the index, as dataset_name of python -m trainers sae")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of {CONTEXT} tokens to look at (default {ROWS})")
    args = parser.parse_args(argv)
    try:
        script = SAEScriptArguments(model_name_or_path=args.model, dataset_name=args.data)
        texts = [row["text"] for row in read(script, args.data, script.dataset_train_split, "text")]
        random.Random(0).shuffle(texts)
        found = str(bundle(args.run, args.folder, args.model, texts, args.rows))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    parser.exit(0, f"{found}\n")


if __name__ == "__main__":
    main()
