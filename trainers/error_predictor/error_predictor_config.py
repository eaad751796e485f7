"""Options of [`ErrorPredictorTrainer`]; what is not here is `TrainingArguments`'."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ErrorPredictorTrainingArguments(TrainingArguments):
    """
    Options of [`ErrorPredictorTrainer`]. Defaults are those of the authors' code (arXiv 2510.08369): binary
    cross-entropy over all positions, AdamW at 1e-4 without weight decay, constant after 2,500 steps of warm-up.
    """

    loss: str = _option("bce", '"bce" or "ranknet", which compares wrong and right tokens of a row.')
    class_balance: bool = _option(False, 'For "bce": weigh wrong and right tokens alike.')
    positions: str = _option("all", '"all" tokens but padding and prompts count, or only the "generated" ones.')
    noise_eps: float = _option(1e-3, "eps of the log-linear schedule, and the smallest time.")
    right_shift_logits: bool = _option(False, "Read token i from the denoiser's logits at i - 1, as Dream does.")
    dataset_text_field: str = _option("text", "Column of texts; a column input_ids goes before it.")
    max_length: int | None = _option(
        None, "Tokens of a row; longer ones are cut. Without it the denoiser's positions."
    )
    append_eos: bool = _option(True, "End each text with the end-of-text token, if the tokenizer has one.")

    learning_rate: float = _option(1e-4, "Highest learning rate.")
    lr_scheduler_type: str = _option("constant_with_warmup", "Schedule of the learning rate.")
    warmup_steps: float = _option(2500, "Steps of linear warm-up; below 1 a share of the run.")
    logging_steps: float = _option(50, "Steps between log entries.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False
        for name, choices in (("loss", ("bce", "ranknet")), ("positions", ("all", "generated"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.class_balance and self.loss != "bce":
            raise ValueError(f'`class_balance` belongs to loss="bce", got True with {self.loss!r}.')
        if not 0 < self.noise_eps < 1:
            raise ValueError(f"`noise_eps` must be in (0, 1), got {self.noise_eps}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {self.max_length}.")
