"""Put the trained story models where `hf_ext.tiny` finds them, each with its tokenizer, log and card.

python -m trainers.recipes stories --budget small && python -m trainers.recipes.bundle_stories hf_ext/tiny
"""

import json
import shutil
from pathlib import Path
from typing import Any

from trainers.recipes.stories import UNITS


COMMAND = "python -m trainers.recipes stories --budget small"
KEPT = ("arm", "seed", "settings", "commit", "params_trained", "metrics", "cost")


def bundle(cells: Path, folder: Path) -> list[Path]:
    """The models of seed 0, with tokenizer, log and card, copied to `stories` and `stories_lime` in `folder`."""
    made = []
    for file in sorted(cells.glob("*-0-*/cell.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        target = folder / ("stories" if cell["arm"] == "llama" else "stories_lime")
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        # the code of a LIMe lies in the package already
        shutil.copytree(file.parent / "model", part, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        log = {name: cell["series"][name] for name in ("step", "nll")}
        kept = {name: cell[name] for name in KEPT}
        made_by = {"command": COMMAND, **kept, "log": log}
        (part / "training.json").write_text(json.dumps(made_by, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(card(cell), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        made.append(target)
    return made


def card(cell: dict[str, Any]) -> str:
    """What the model is, what was measured, and ten samples as they came."""
    kind, name = ("Llama", "stories") if cell["arm"] == "llama" else ("LIMe", "stories-lime")
    rows = "\n".join(f"| {UNITS[metric]} | {value:.4g} |" for metric, value in cell["metrics"].items())
    samples = "\n\n".join(f"> **{asked}**\n>\n> {text}" for asked, text in cell["samples"])
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [hf_ext, {cell["arm"]}]
---

# {name}: a {kind} of {cell["params_trained"]:,} parameters that writes micro-stories with known answers

Trained from scratch on chats of the grammar `hf_ext.tasks.stories` and of `hf_ext.tasks.word_problems`, for tests and
fast experiments: whether a story is right can be checked exactly, and who, where, what, how many, which event and
which mood is known for every token. It knows nothing else.

```python
from hf_ext import tiny
from hf_ext.tasks import stories

model, tokenizer = tiny.load("{name}")
chat = [{{"role": "user", "content": "Tell me a story about Mia in the park."}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
written = model.generate(**inputs, max_new_tokens=160)[0, inputs["input_ids"].shape[1] :]
print(stories.parse(chat[0]["content"], tokenizer.decode(written, skip_special_tokens=True)).latents)
```

Made by `{COMMAND}`, seed {cell["seed"]}, {cell["cost"]["tokens"]:,} tokens, one CPU
thread for {cell["cost"]["cpu_s"] / 60:.0f} minutes; settings and log are in training.json. Weights are bfloat16.

| measured on these weights | |
|---|---|
{rows}

## Ten samples, the first ten drawn at temperature 1

{samples}
"""


def main() -> None:
    """The command line that copies the models."""
    import argparse

    from hf_ext.tiny.smollm2 import cache_dir

    parser = argparse.ArgumentParser(description="Copy the trained story models of seed 0 into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=cache_dir() / "recipes", help="as given to trainers.recipes")
    args = parser.parse_args()
    made = bundle(args.work / "stories" / "small" / "cells", args.folder)
    parser.exit(0 if made else 1, f"{', '.join(map(str, made)) or 'nothing: run the recipe first'}\n")


if __name__ == "__main__":
    main()
