"""`python -m trainers steering_rl --config run.yaml`; ready files lie in `trainers/steering_rl/configs`.

Options are those of [`SteeringRLConfig`], of [`SteeringConfig`] (`placement`, `layers_to_transform`, `positions`), of
TRL's `ModelConfig` (`model_name_or_path`, `dtype`, ...), and those of `trainers.script`.
"""

from dataclasses import dataclass, field

from trainers.script import ScriptArguments, model_path, read, reward_function


@dataclass
class SteeringArguments:
    """Where vectors are added; see [`SteeringConfig`]."""

    placement: str = field(default="residual", metadata={"help": '"residual", "down_proj" or the path of a module.'})
    layers_to_transform: list[int] | None = field(default=None, metadata={"help": "Layers with a vector; all."})
    positions: str = field(default="all", metadata={"help": '"all", "first" or "completion".'})


def main(argv: list[str]) -> None:
    """Parse, load, train, save; `--resume_from_checkpoint PATH` (or True) goes on."""
    try:
        from trl import ModelConfig, TrlParser, get_quantization_config
    except ImportError as error:
        raise ImportError(f'The command line needs TRL: pip install "hf_ext[trainers]" ({error}).') from error
    from transformers import AutoTokenizer

    from hf_ext.steering import SteeringConfig
    from trainers.steering_rl import SteeringRLConfig, SteeringRLTrainer

    parser = TrlParser((ScriptArguments, SteeringArguments, SteeringRLConfig, ModelConfig))
    script, steering, args, named = parser.parse_args_and_config(argv)
    if not script.reward_funcs:
        raise ValueError("`reward_funcs` must be given, for example gsm8k_reward.")
    if named.use_peft:
        raise ValueError("`use_peft` makes a LoRA, but steering vectors are trained here. Leave it out.")
    config = SteeringConfig(**vars(steering))
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
    model = model_path(named.model_name_or_path)
    trainer = SteeringRLTrainer(
        model=model,
        reward_funcs=rewards,
        args=args,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        quantization_config=get_quantization_config(named),
        peft_config=config,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume.lower() == "true" or resume if resume else None)
    trainer.save_model()
    trainer.create_model_card(dataset_name=script.dataset_name)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
