"""Options of [`SAETrainer`]; what is not here is `TrainingArguments`'."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


LOSSES = ("reconstruction", "hierarchical", "multi_topk", "matryoshka")
_IMPOSSIBLE = ("deepspeed", "fsdp")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SAETrainingArguments(TrainingArguments):
    """
    Options of [`SAETrainer`]. A batch is counted in tokens: `per_device_train_batch_size=8192` activations a step.

    Recipe of KronSAE (arXiv 2505.22255), which HierarchicalTopK (arXiv 2505.24473) shares as far as it is known: AdamW
    at 8e-4, 10 % warm-up, cosine to 1e-6, batches of 8192, AuxK with 1/32. What they leave open is ours: no weight
    decay, clipping at 1 (each SAE by itself), b_dec from the first batch, dead after 10 million tokens or a twentieth
    of a short run.
    """

    loss: str = _option(
        "reconstruction",
        '"reconstruction" (the squared error at K), "hierarchical" (its mean over `budgets`), "multi_topk" (at K / 4, '
        'and an eighth of that at K) or "matryoshka" (its mean over prefixes of `groups`). An SAE may have its own: '
        "see `loss_funcs` of SAETrainer.",
    )
    budgets: list[int] | str | None = _option(
        None,
        'For "hierarchical": the budgets; without them 1..K as in the paper; "powers_of_two" is a third of the cost.',
    )
    groups: list[int] | None = _option(None, 'For "matryoshka": sizes of the groups of latents, which sum to d_sae.')
    sparsity_coefficient: float = _option(
        0.0, "Weight of L0 (jumprelu) or of the sum of activations (relu) beside the loss, a fraction of variance."
    )
    auxk_coefficient: float = _option(1 / 32, "Weight of AuxK, by which dead latents learn; 0 for none.")
    k_aux: int | None = _option(None, "Dead latents of AuxK for each token; without it half of d_in.")
    dead_after_tokens: int | None = _option(
        None, "A latent is dead that has not fired for so many tokens; without it 10 million or 1/20 of the run."
    )
    init_b_dec: bool = _option(True, "Set a b_dec that is 0 to the mean of the first batch.")

    train_tokens: int | None = _option(None, "Length of the run in tokens, instead of max_steps.")
    dataset_text_field: str = _option("text", "Column of texts; a column input_ids goes before it.")
    context_size: int = _option(256, "Tokens of a row that the model reads.")
    rows_at_once: int = _option(8, "Rows of one forward pass of the model.")
    skip_positions: int = _option(
        1, "First positions of each row that are left out: many models park huge norms there."
    )
    drop_special_tokens: bool = _option(True, "Leave out the tokenizer's special tokens.")
    max_norm_ratio: float | None = _option(
        None, "Leave out tokens whose norm is beyond so many medians; 10 drops massive activations."
    )
    buffer_tokens: int = _option(20 * 8192, "Tokens of the shuffle buffer, at least a batch.")
    buffer_mix: float = _option(0.5, "Share of the buffer that stays at each refill.")

    activation_cache: str | None = _option(
        None, "Folder of harvested activations, filled by the first run that needs it and shared by others."
    )
    cache_tokens: int | None = _option(None, "Tokens that the cache shall hold; without it those of the run.")
    activation_dtype: str = _option(
        "auto", 'Of the buffer and the cache: "auto" (the model\'s), "float16", "bfloat16" or "float32".'
    )

    eval_tokens: int = _option(16384, "Tokens of each evaluation.")
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Arguments of from_pretrained, if `model` is a str."
    )

    per_device_train_batch_size: int = _option(8192, "Tokens of a step, of each process.")
    learning_rate: float = _option(8e-4, "Highest learning rate.")
    lr_scheduler_type: str = _option("cosine_with_min_lr", "Schedule of the learning rate.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = _option(
        None, "Options of the schedule; without them min_lr=1e-6 for cosine_with_min_lr."
    )
    warmup_steps: float = _option(0.1, "Steps of linear warm-up; below 1 a share of the run.")
    logging_steps: float = _option(50, "Steps between log entries.")

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]

    def __post_init__(self) -> None:
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr": min(1e-6, self.learning_rate)}
        super().__post_init__()
        self.remove_unused_columns = False
        self.ignore_data_skip = True  # the stream goes back to its position by itself
        for name in _IMPOSSIBLE:
            if getattr(self, name, None):
                raise ValueError(f"`{name}` splits weights that a step has to see whole. Leave it out.")
        for name, choices in (("loss", LOSSES), ("activation_dtype", ("auto", "float16", "bfloat16", "float32"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name, least in (
            ("k_aux", 1),
            ("dead_after_tokens", 1),
            ("train_tokens", 1),
            ("context_size", 2),
            ("rows_at_once", 1),
            ("skip_positions", 0),
            ("buffer_tokens", 1),
            ("cache_tokens", 1),
            ("eval_tokens", 2),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")
        for name in ("sparsity_coefficient", "auxk_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a number >= 0, got {getattr(self, name)}.")
        if not 0 <= self.buffer_mix < 1:
            raise ValueError(f"`buffer_mix` must be in [0, 1), got {self.buffer_mix}.")
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise ValueError(f"`max_norm_ratio` must be above 1, got {self.max_norm_ratio}.")
        if self.skip_positions >= self.context_size:
            raise ValueError(
                f"`skip_positions` must be below context_size={self.context_size}, got {self.skip_positions}: "
                "no token would be left."
            )
        if isinstance(self.budgets, str) and self.budgets != "powers_of_two":
            raise ValueError(f'`budgets` must be a list of numbers or "powers_of_two", got {self.budgets!r}.')
        if (self.loss == "matryoshka") != (self.groups is not None):
            raise ValueError(
                f'`groups` must be given for loss="matryoshka" and for no other, got {self.groups} with {self.loss!r}.'
            )
        if self.budgets is not None and self.loss != "hierarchical":
            raise ValueError(f'`budgets` belongs to loss="hierarchical", got {self.budgets} with {self.loss!r}.')
        if self.train_tokens is not None and self.max_steps > 0:
            raise ValueError(
                f"`train_tokens` and `max_steps` both say how long to train, got {self.train_tokens} and "
                f"{self.max_steps}. Give one."
            )
        if self.cache_tokens is not None and self.activation_cache is None:
            raise ValueError(
                f"`cache_tokens` belongs to `activation_cache`, got {self.cache_tokens} without a folder."
            )
