"""`python -m trainers sft --config run.yaml`: the LoRA that a search starts from, by TRL's SFTTrainer.

Options are those of TRL's `SFTConfig` and `ModelConfig`, and the data options of `trainers.script`. Prompts
come from `prompt_column`, the answers to learn from `completion_column`.
"""

from typing import Any


def main(argv: list[str]) -> None:
    """Parse, load, train, save the adapter."""
    try:
        from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config
    except ImportError as error:
        raise ImportError(f'The command line needs TRL: pip install "hf_ext[trainers]" ({error}).') from error
    from transformers import AutoTokenizer

    from trainers.script import ScriptArguments, model_path, read

    script, args, named = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(argv)
    if not named.use_peft:
        raise ValueError("`use_peft` must be true: ESSA searches a LoRA. Set lora_r and lora_target_modules too.")
    data = read(script, script.dataset_name, script.dataset_train_split, script.max_train_samples)
    if script.completion_column not in data.column_names:
        raise ValueError(
            f"`completion_column` must be one of {', '.join(data.column_names)}, got {script.completion_column!r}."
        )

    def pair(row: dict[str, Any]) -> dict[str, Any]:
        text = str(row[script.completion_column])
        chat = not isinstance(row["prompt"], str)
        return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}] if chat else text}

    name = model_path(named.model_name_or_path)
    args.model_init_kwargs = {
        "revision": named.model_revision,
        "dtype": named.dtype,
        "quantization_config": get_quantization_config(named),
        **(args.model_init_kwargs or {}),
    }
    trainer = SFTTrainer(
        model=name,
        args=args,
        train_dataset=data.map(pair, remove_columns=data.column_names),
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=get_peft_config(named),
    )
    trainer.train()
    trainer.save_model()
