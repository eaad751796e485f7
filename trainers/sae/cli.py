"""`python -m trainers sae --config run.yaml`; a ready file is `trainers/sae/configs/smollm2_stories.yaml`.

    python -m trainers sae --config trainers/sae/configs/smollm2_stories.yaml --train_tokens 1000000

Options are those of [`SAETrainingArguments`] and those below. One SAE is described by options of its own; several by
`saes` in the file: name -> options of `SAEConfig`, where `layer` and `site` may stand for `hook_name`.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.sae.sae_config import SAETrainingArguments


@dataclass
class SAEScriptArguments:
    """Model, data and SAEs of a run from the command line."""

    model_name_or_path: str = field(metadata={"help": 'A Hub id or folder of a causal LM, or "smollm2".'})
    dataset_name: str = field(
        metadata={
            "help": "A Hub id, a file (.txt, .json, .jsonl, .csv, .parquet, packed or not), a folder of such files, "
            "or tasks:stories; several with commas between them take turns, row by row, the shorter ones again and "
            "again."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if eval_strategy is not no."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Like dataset_name; by default its test split."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read a Hub data set while it is downloaded."})
    layer: int | None = field(default=None, metadata={"help": "Layer of the site, from 0; negative from the end."})
    site: str = field(
        default="resid_post", metadata={"help": "Place in the layer: resid_post, mlp_out, attn_out, ..."}
    )
    hook_name: str | None = field(default=None, metadata={"help": "A module path, instead of layer and site."})
    hook_io: str = field(default="output", metadata={"help": "Side of that module: output or input."})
    d_sae: int = field(default=16384, metadata={"help": "Latents."})
    k: float | None = field(default=None, metadata={"help": "Active latents of a token."})
    activation: str = field(default="topk", metadata={"help": "topk, batchtopk, jumprelu or relu."})
    saes: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Several SAEs: name -> options of SAEConfig, or layer and site."}
    )


def main(argv: list[str]) -> None:
    """Parse, train, save; `--resume_from_checkpoint PATH` (or True) goes on."""
    try:
        from trl import TrlParser
    except ImportError as error:
        raise ImportError(f'The command line needs TRL: pip install "hf_ext[trainers]" ({error}).') from error
    script, args = TrlParser((SAEScriptArguments, SAETrainingArguments)).parse_args_and_config(argv)
    model = model_path(script.model_name_or_path)
    saes = sae_configs(script, args, model)
    train = read(script, script.dataset_name, script.dataset_train_split, args.dataset_text_field)
    evaluated = None
    if args.eval_strategy != "no":
        name = script.eval_dataset_name or script.dataset_name
        evaluated = read(script, name, script.dataset_test_split, args.dataset_text_field)
    from trainers.sae.sae_trainer import SAETrainer

    trainer = SAETrainer(model=model, sae=saes, args=args, train_dataset=train, eval_dataset=evaluated)
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume.lower() == "true" or resume if resume else None)
    trainer.save_model()
    trainer.create_model_card(dataset_name=script.dataset_name)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def model_path(name: str) -> str:
    """A Hub id or folder as it is; "smollm2" is a model of `hf_ext.tiny`."""
    from hf_ext import tiny

    return str(tiny.path(name)) if name == "smollm2" and not Path(name).exists() else name


def sae_configs(script: SAEScriptArguments, args: SAETrainingArguments, model: str) -> Any:
    """The configurations that the options describe, of the width that the model has at their hooks."""
    from hf_ext.sae import SAEConfig
    from hf_ext.sites import Hook, resolve
    from trainers.sae.loading import skeleton, widths_at

    keys = ("layer", "site", "hook_name", "hook_io", "d_sae", "k", "activation")
    one = {name: getattr(script, name) for name in keys}
    asked = {"sae": {}} if script.saes is None else script.saes
    if not isinstance(asked, dict) or not all(isinstance(options, dict) for options in asked.values()):
        raise ValueError(f"`saes` must map names to options, got {asked!r}.")
    probe, _ = skeleton(model, args)
    configs, hooks = {}, {}
    for name, own in asked.items():
        options = {**one, **own}
        layer, site, path = options.pop("layer"), options.pop("site"), options["hook_name"]
        if (path is None) == (layer is None):
            raise ValueError(
                f"`layer` or `hook_name` must be given for {name!r}, and not both, got {layer} and {path!r}."
            )
        hooks[name] = Hook(path, options["hook_io"]) if layer is None else resolve(probe, site, layer)
        k = options["k"]
        options["k"] = int(k) if k is not None and k == int(k) else k
        configs[name] = options | {"hook_name": hooks[name].path, "hook_io": hooks[name].io}
    widths = widths_at(probe, hooks)
    made = {name: SAEConfig(**{"d_in": widths[name], **options}) for name, options in configs.items()}
    return made["sae"] if script.saes is None else made


def read(script: SAEScriptArguments, name: str, split: str, text_field: str) -> Any:
    """Rows with a text, of a task, files or the Hub; of several names by turns, each in an order of its own."""
    from datasets import Dataset, interleave_datasets, load_dataset

    if "," in name and not Path(name).exists():
        parts = [read(script, one.strip(), split, text_field) for one in name.split(",")]
        if script.streaming or not all(text_field in part.column_names for part in parts):
            raise ValueError(
                f"`dataset_name` must be of data sets with {text_field!r} (dataset_text_field) that are not streamed, "
                f"where it names several, got {name}."
            )
        shuffled = [part.select_columns([text_field]).shuffle(seed=0) for part in parts]
        return interleave_datasets(shuffled, stopping_strategy="all_exhausted")

    if name == "tasks:stories":
        from hf_ext.tasks import stories

        held_out = split != script.dataset_train_split
        rng = random.Random(1 if held_out else 0)
        texts = [stories.sample(rng).text for _ in range(500 if held_out else 20_000)]
        return Dataset.from_list([{text_field: text} for text in texts])
    kinds = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    path = Path(name)
    if path.exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        found = {kinds[suffix] for file in files for suffix in file.suffixes if suffix in kinds}
        if len(found) != 1:
            raise ValueError(f"`dataset_name` must hold files of one kind of {', '.join(kinds)}, got {name}.")
        whole = {"sample_by": "document"} if found == {"text"} else {}
        data = load_dataset(found.pop(), data_files=[str(file) for file in files], split="train", **whole)
    else:
        data = load_dataset(name, script.dataset_config, split=split, streaming=script.streaming)
    columns = data.column_names or [text_field]
    if text_field not in columns and "input_ids" not in columns:
        raise ValueError(
            f"`dataset_text_field` must be one of {', '.join(columns)}, the columns of {name}, got {text_field!r}."
        )
    return data
