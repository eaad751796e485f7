"""From what a user names to a PeftModel and its tokenizer; what cannot work is refused before weights load."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, cast


class Policy(NamedTuple):
    """What is known before any weight is there: the tokenizer, and the context in tokens; `load` gives the model."""

    tokenizer: Any
    context: int | None
    load: Callable[[], Any]


def named_policy(model: Any, tokenizer: Any, peft_config: Any, quantization_config: Any, init_kwargs: Any) -> Policy:
    """
    The model that is searched, as [`ESSATrainer`] is given it; the tokenizer pads, on the left.

    Raises:
        TypeError, ValueError: where there is no LoRA, or arguments do not go together.
    """
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        raise TypeError(f"`peft_config` must be a LoraConfig, got {type(peft_config).__name__}.")
    if not isinstance(model, str | os.PathLike | PreTrainedModel | PeftModel):
        raise TypeError(f"`model` must be a name, a PreTrainedModel or a PeftModel, got {type(model).__name__}.")
    by_name, given = isinstance(model, str | os.PathLike), cast(Any, model)
    if quantization_config is not None and not by_name:
        raise ValueError("`quantization_config` needs `model` by name: a loaded model is quantised or is not.")
    if init_kwargs and not by_name:
        raise ValueError("`model_init_kwargs` needs `model` by name: a loaded model has its arguments already.")
    name = str(model) if by_name else getattr(model, "name_or_path", "")
    has_adapter = _is_adapter(name) if by_name else isinstance(model, PeftModel)
    if tokenizer is None and not name:
        raise ValueError("`processing_class` must be given: the model has no name to load a tokenizer by.")
    if has_adapter and peft_config is not None:
        raise ValueError("`peft_config` must be left out: `model` has an adapter already.")
    if not has_adapter and peft_config is None:
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
    options = dict(init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if by_name:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path if has_adapter else name
        config = AutoConfig.from_pretrained(base, trust_remote_code=options.get("trust_remote_code"))
    else:
        config = given.config

    def load() -> Any:
        found = given
        if by_name:
            kind = AutoPeftModelForCausalLM if has_adapter else AutoModelForCausalLM
            found = kind.from_pretrained(name, **options)
        return found if isinstance(found, PeftModel) else get_peft_model(found, peft_config)

    return Policy(tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None), load)


def _is_adapter(name: str) -> bool:
    """Whether a folder or a Hub repository holds an adapter; a Hub that cannot be asked is an error of its own."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, "adapter_config.json"))
    from transformers.utils import cached_file

    return cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False) is not None
