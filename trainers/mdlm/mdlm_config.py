"""Options of [`MDLMTrainer`]; what is not here is `TrainingArguments`'."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MDLMTrainingArguments(TrainingArguments):
    """
    Options of [`MDLMTrainer`]. Defaults are MDLM's (arXiv 2406.07524): AdamW at 3e-4 without weight decay, constant
    after 2,500 steps of warm-up, gradients clipped at 1, an average of the weights with decay 0.9999.
    """

    ema_decay: float | None = _option(
        0.9999, "Decay of the averaged weights, which are evaluated and saved; None for none."
    )
    noise_eps: float = _option(1e-3, "eps of the log-linear schedule, and the smallest time.")
    random_prefix: bool = _option(
        False, "Take a random number of first tokens of each row for a prompt; for prefix_attention='causal'."
    )
    right_shift_logits: bool = _option(False, "Read token i from the logits at i - 1, as Dream does.")
    dataset_text_field: str = _option("text", "Column of texts; a column input_ids goes before it.")
    max_length: int | None = _option(None, "Tokens of a row; longer ones are cut. Without it the model's positions.")
    append_eos: bool = _option(True, "End each text with the end-of-text token, if the tokenizer has one.")

    learning_rate: float = _option(3e-4, "Highest learning rate.")
    lr_scheduler_type: str = _option("constant_with_warmup", "Schedule of the learning rate.")
    warmup_steps: float = _option(2500, "Steps of linear warm-up; below 1 a share of the run.")
    logging_steps: float = _option(50, "Steps between log entries.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1) or None, got {self.ema_decay}.")
        if not 0 < self.noise_eps < 1:
            raise ValueError(f"`noise_eps` must be in (0, 1), got {self.noise_eps}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {self.max_length}.")
        if self.ema_decay is not None and self.load_best_model_at_end:
            raise ValueError(
                f"`load_best_model_at_end` must be False with an average of the weights (ema_decay={self.ema_decay}), "
                "since it loads other weights, got True. Set `ema_decay` to None."
            )
        for name in ("deepspeed", "fsdp"):
            if self.ema_decay is not None and getattr(self, name, None):
                raise ValueError(
                    f"`ema_decay` must be None with `{name}`, which splits weights, got {self.ema_decay}."
                )
