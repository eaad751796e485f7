"""Models, processors and LoRA for VL-DAC, and what can be known to be wrong before weights load."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor


# modules of a vision tower have the same last names as those of the text model
LANGUAGE_ONLY = r"^(?!.*(?:visual|vision)).*\.(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"


def language_lora(r: int = 16, lora_alpha: int = 32, **options: Any) -> Any:
    """The authors' LoRA, on the text model alone, and without dropout, so that ratios start at 1."""
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=lora_alpha, **{"target_modules": LANGUAGE_ONLY, "task_type": "CAUSAL_LM", **options}
    )


def check_config(config: Any) -> None:
    """Refuse a model that sees no images."""
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"`model` must be an image-text-to-text model, got one of type {config.model_type} without a "
            "vision_config. Take for example Qwen2.5-VL or Gemma 3."
        )


def load(model: Any, processing_class: Any, model_init_kwargs: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A model and its processor, by id or folder or as they are."""
    name = model if isinstance(model, str) else model.config._name_or_path
    check_config(AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config)
    if processing_class is None:
        if not name:
            raise ValueError("`processing_class` must be given for a model that came from no folder or id.")
        processing_class = AutoProcessor.from_pretrained(name)
    if not hasattr(processing_class, "image_processor"):
        raise ValueError(
            f"`processing_class` must be a processor of images and text, got {type(processing_class).__name__}. Load "
            "the model's own with AutoProcessor."
        )
    if isinstance(model, str):
        model = AutoModelForImageTextToText.from_pretrained(model, **(model_init_kwargs or {}))
    ours = getattr(processing_class, "image_token_id", None)
    theirs = getattr(model.config, "image_token_id", None)
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f"`processing_class` must mark images by the model's token {theirs}, got {ours}. Load the model's own "
            "with AutoProcessor."
        )
    return model, processing_class


def without_dropout(policy: nn.Module) -> None:
    """Switch all dropout off: ratios compare a policy with itself, so both must be the same function."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def factories(given: Callable[[], Any] | list[Callable[[], Any]], num_envs: int) -> list[Callable[[], Any]]:
    """One factory for each environment: the one given, or those of a list in turn."""
    several = list(given) if isinstance(given, list | tuple) else [given]
    if not several or not all(callable(one) for one in several):
        raise TypeError(
            f"`environment_factory` must be a function that makes a gymnasium.Env, or a list of these, got {given!r}."
        )
    return [several[i % len(several)] for i in range(num_envs)]
