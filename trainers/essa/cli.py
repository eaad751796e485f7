"""`python -m trainers essa --config run.yaml`; ready files lie in `trainers/essa/configs`.

    python -m trainers sft --config trainers/essa/configs/smollm2_capitals_sft.yaml   # a LoRA to start from
    python -m trainers essa --config trainers/essa/configs/smollm2_capitals_essa.yaml

Options are those of [`ESSAConfig`] and of TRL's `ModelConfig` (`model_name_or_path`, `dtype`, `use_peft`, `lora_r`,
`load_in_8bit`, ...), and those of `trainers.script`.
"""

from trainers.script import ScriptArguments, model_path, read, reward_function


def main(argv: list[str]) -> None:
    """Parse, load, search, save; `--resume_from_checkpoint PATH` (or True) goes on."""
    from trainers.essa.essa_config import ESSAConfig

    try:
        from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
    except ImportError as error:
        raise ImportError(f'The command line needs TRL: pip install "hf_ext[trainers]" ({error}).') from error
    script, args, named = TrlParser((ScriptArguments, ESSAConfig, ModelConfig)).parse_args_and_config(argv)
    if not script.reward_funcs:
        raise ValueError("`reward_funcs` must be given, for example gsm8k_reward.")
    rewards = [reward_function(name) for name in script.reward_funcs]
    train = read(script, script.dataset_name, script.dataset_train_split, script.max_train_samples)
    evaluated = None
    if args.eval_strategy != "no":
        name = script.eval_dataset_name or script.dataset_name
        evaluated = read(script, name, script.dataset_test_split, script.max_eval_samples)
    args.model_init_kwargs = {
        "revision": named.model_revision,
        "attn_implementation": named.attn_implementation,
        "dtype": named.dtype,
        **(args.model_init_kwargs or {}),
    }
    from trainers.essa.essa_trainer import ESSATrainer

    trainer = ESSATrainer(
        model=model_path(named.model_name_or_path),
        reward_funcs=rewards,
        args=args,
        train_dataset=train,
        eval_dataset=evaluated,
        quantization_config=get_quantization_config(named),
        peft_config=get_peft_config(named),
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume.lower() == "true" or resume if resume else None)
    trainer.save_model()
    trainer.create_model_card(dataset_name=script.dataset_name)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
