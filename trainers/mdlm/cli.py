"""`python -m trainers mdlm --config run.yaml`; a ready file is `trainers/mdlm/configs/smollm2_stories.yaml`.

Options are those of [`MDLMTrainingArguments`] and those below. `model` in the file holds options of `MDLMConfig` for a
new model; `model_name_or_path` goes on with one.
"""

from dataclasses import dataclass, field
from typing import Any

from trainers.mdlm.mdlm_config import MDLMTrainingArguments


@dataclass
class MDLMScriptArguments:
    """Model, tokenizer and data of a run from the command line."""

    dataset_name: str = field(
        metadata={"help": "A Hub id, a file (.txt, .json, .jsonl, .csv, .parquet, packed or not) or tasks:stories."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Hub id or folder of a masked language model to go on with."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": 'A Hub id or folder, or "smollm2"; by default that of the model.'}
    )
    model: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of MDLMConfig for a new model; the vocabulary is the tokenizer's."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if eval_strategy is not no."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Like dataset_name; by default its test split."}
    )


def main(argv: list[str]) -> None:
    """Parse, train, save; `--resume_from_checkpoint PATH` (or True) goes on."""
    try:
        from trl import TrlParser
    except ImportError as error:
        raise ImportError(f'The command line needs TRL: pip install "hf_ext[trainers]" ({error}).') from error
    script, args = TrlParser((MDLMScriptArguments, MDLMTrainingArguments)).parse_args_and_config(argv)
    if (script.model is None) == (script.model_name_or_path is None):
        raise ValueError("Give either `model`, options of a new one, or `model_name_or_path`, and not both.")
    options = {} if script.model is None else script.model
    if not isinstance(options, dict):
        raise ValueError(f"`model` must map options of MDLMConfig to values, got {options!r}.")
    from transformers import AutoModelForMaskedLM, AutoTokenizer, set_seed

    from hf_ext.gstar import MDLMConfig, MDLMForMaskedLM
    from trainers.mdlm.mdlm_trainer import MDLMTrainer
    from trainers.script import model_path, read_texts

    tokenizer = AutoTokenizer.from_pretrained(model_path(script.tokenizer_name_or_path or script.model_name_or_path))
    if script.model_name_or_path is not None:
        model = AutoModelForMaskedLM.from_pretrained(model_path(script.model_name_or_path))
    else:
        set_seed(args.seed)
        model = MDLMForMaskedLM(MDLMConfig(**{**vocabulary(tokenizer), **options}))
    name, field_name = script.dataset_name, args.dataset_text_field
    train = read_texts(name, script.dataset_train_split, field_name, False, script.dataset_config)
    evaluated = None
    if args.eval_strategy != "no":
        name = script.eval_dataset_name or name
        evaluated = read_texts(name, script.dataset_test_split, field_name, True, script.dataset_config)
    trainer = MDLMTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=evaluated, processing_class=tokenizer
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume.lower() == "true" or resume if resume else None)
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def vocabulary(tokenizer: Any) -> dict[str, Any]:
    """Options of MDLMConfig that a tokenizer settles; one without a mask gets one more token."""
    mask = tokenizer.mask_token_id
    return {
        "vocab_size": len(tokenizer) + (mask is None),
        "mask_token_id": len(tokenizer) if mask is None else mask,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
