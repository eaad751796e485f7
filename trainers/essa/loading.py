"""From what a user names to a PeftModel and its tokenizer; what cannot work is refused before weights load."""

import os
from typing import Any


def load_policy(
    model: Any, tokenizer: Any, peft_config: Any, quantization_config: Any, init_kwargs: Any
) -> tuple[Any, Any]:
    """
    The model that is searched, and its tokenizer.

    Args: as of [`ESSATrainer`].

    Returns:
        `(PeftModel, PreTrainedTokenizerBase)`: the tokenizer with a padding token and padding on the left.
    """
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        raise TypeError(f"`peft_config` must be a LoraConfig, got {type(peft_config).__name__}.")
    if not isinstance(model, str | os.PathLike | PreTrainedModel | PeftModel):
        raise TypeError(f"`model` must be a name, a PreTrainedModel or a PeftModel, got {type(model).__name__}.")
    by_name = isinstance(model, str | os.PathLike)
    name = str(model) if by_name else ""
    if quantization_config is not None and not by_name:
        raise ValueError("`quantization_config` needs `model` by name: a loaded model is quantised or is not.")
    if init_kwargs and not by_name:
        raise ValueError("`model_init_kwargs` needs `model` by name: a loaded model has its arguments already.")
    if tokenizer is None and not by_name:
        name = getattr(model, "name_or_path", "")
        if not name:
            raise ValueError("`processing_class` must be given: the model has no name to load a tokenizer by.")
    is_adapter = by_name and _is_adapter(name)
    if is_adapter and peft_config is not None:
        raise ValueError(f"`peft_config` must be left out: {name} is an adapter already.")
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError("`peft_config` must be left out: `model` has an adapter already.")
    if not is_adapter and not isinstance(model, PeftModel) and peft_config is None:
        raise ValueError(
            "`model` must have a trained LoRA, got a model without one. Train one first (trl's SFTTrainer with a "
            "LoraConfig), or pass `peft_config` to search from an untrained one, which reaches less."
        )
    tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.eos_token_id is None:
        raise ValueError("`processing_class` must have an end token (eos_token): completions would never end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if by_name:
        options = dict(init_kwargs or {})
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        load = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
        model = load.from_pretrained(name, **options)
    if not isinstance(model, PeftModel):
        model = get_peft_model(model, peft_config)
    return model, tokenizer


def _is_adapter(name: str) -> bool:
    """Whether a folder or a Hub repository holds an adapter; a Hub that cannot be asked is an error of its own."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, "adapter_config.json"))
    from transformers.utils import cached_file

    return cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False) is not None
