"""`python -m trainers error_predictor --config run.yaml`; a ready file is
`trainers/error_predictor/configs/smollm2_stories.yaml`.

Options are those of [`ErrorPredictorTrainingArguments`] and those below.
"""

from dataclasses import dataclass, field

from trainers.error_predictor.error_predictor_config import ErrorPredictorTrainingArguments


@dataclass
class ErrorPredictorScriptArguments:
    """Denoiser, kind of predictor and data of a run from the command line."""

    denoiser_name_or_path: str = field(metadata={"help": "A Hub id or folder of a masked language model."})
    dataset_name: str = field(
        metadata={"help": "A Hub id, a file (.txt, .json, .jsonl, .csv, .parquet, packed or not) or tasks:stories."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": 'A Hub id or folder, or "smollm2"; by default that of the denoiser.'}
    )
    num_layers: int | None = field(
        default=None, metadata={"help": "First blocks of the denoiser to copy; all by default, 0 for a head alone."}
    )
    freeze: bool = field(default=False, metadata={"help": "Train the head alone, above frozen copies."})
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
    parser = TrlParser((ErrorPredictorScriptArguments, ErrorPredictorTrainingArguments))
    script, args = parser.parse_args_and_config(argv)
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    import hf_ext  # noqa: F401  makes our models known to the Auto classes
    from hf_ext.gstar import ErrorPredictor
    from trainers.error_predictor.error_predictor_trainer import ErrorPredictorTrainer
    from trainers.script import model_path, read_texts

    denoiser = AutoModelForMaskedLM.from_pretrained(model_path(script.denoiser_name_or_path))
    tokenizer = AutoTokenizer.from_pretrained(
        model_path(script.tokenizer_name_or_path or script.denoiser_name_or_path)
    )
    name, field_name = script.dataset_name, args.dataset_text_field
    train = read_texts(name, script.dataset_train_split, field_name, False, script.dataset_config)
    evaluated = None
    if args.eval_strategy != "no":
        name = script.eval_dataset_name or name
        evaluated = read_texts(name, script.dataset_test_split, field_name, True, script.dataset_config)
    trainer = ErrorPredictorTrainer(
        model=ErrorPredictor.from_denoiser(denoiser, num_layers=script.num_layers, freeze=script.freeze),
        denoiser=denoiser,
        args=args,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=tokenizer,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume.lower() == "true" or resume if resume else None)
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
