"""Options of [`ESSATrainer`]; what is not here is `TrainingArguments`'."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


STRATEGIES = ("sep-cma", "cma", "openai-es", "random")
RESAMPLE = ("generation", "candidate", "never")
# TrainingArguments that speak of gradients; a value other than the default is told that it has no effect
_WITHOUT_EFFECT = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "per_device_train_batch_size",
)
_IMPOSSIBLE = ("deepspeed", "fsdp")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ESSAConfig(TrainingArguments):
    """
    Options of [`ESSATrainer`].

    One step is one generation: `max_steps`, `logging_steps`, `eval_steps` and `save_steps` count generations. Options
    of `TrainingArguments` that concern gradients have no effect, and say so where they are set.

    The paper (arXiv 2507.04453) uses populations of 24 to 96, 100 to 500 prompts for each candidate, and names no
    step size, number of generations or decoding; those are ours: sep-CMA-ES, `sigma="auto"`, greedy.
    """

    population_size: int = _option(96, "Candidates in a generation (lambda). The paper: 24 to 96.")
    batch_size_per_candidate: int = _option(100, "Prompts that each candidate answers. The paper: 100 to 500.")
    # a str for the sake of the command line, where a number arrives as one
    sigma: str = _option(
        "auto",
        'First step size, in units of the singular values (see sigma_mode). "auto": the largest of a grid at which '
        "candidates stay within sigma_kl of the start.",
    )
    sigma_kl: float = _option(0.1, 'For sigma="auto": mean KL of candidates to the start, in nats per token.')
    sigma_mode: str = _option(
        "absolute", '"absolute": offsets as in the paper; "relative": in mean singular values of their factor.'
    )
    svd_fraction: float = _option(1.0, "Share of each factor's singular values that is searched, the largest (alpha).")
    clamp_min: float | None = _option(
        None, "Least singular value; without it one may change its sign, as in the paper."
    )
    optimizer: str = _option(
        "sep-cma",
        '"sep-cma" (diagonal covariance); "cma" (full, extra hf_ext[cma]; some thousand dimensions at most); '
        '"openai-es"; "random" (the best of random candidates, a baseline).',
    )
    optimizer_kwargs: dict[str, Any] | str | None = _option(None, "More options of the strategy.")
    resample: str = _option(
        "generation",
        'Which prompts: "generation" (new ones each generation, the same for its candidates), "candidate" (new ones '
        'for each candidate) or "never".',
    )
    noise_seed: int | None = _option(None, "Seed of candidates and prompts; without it `seed`.")
    min_population_fraction: float = _option(0.75, "Least share of candidates that must be scored for an update.")

    max_completion_length: int = _option(256, "Tokens that a completion may have.")
    temperature: float = _option(
        0.0, "0: greedy. Above, sampling whose noise depends on seed, generation and prompt but not on the candidate."
    )
    top_p: float = _option(1.0, "With temperature > 0: the smallest set of tokens of this probability.")
    top_k: int = _option(0, "With temperature > 0: the likeliest tokens; 0 for all.")
    generation_kwargs: dict[str, Any] | str | None = _option(None, "More options of `generate`.")
    chat_template_kwargs: dict[str, Any] | str | None = _option(None, "More arguments of the chat template.")
    max_concurrent_sequences: int | None = _option(
        None, "Rows in one call of `generate` (candidates x prompts); without it all, shared among processes."
    )

    reward_weights: list[float] | None = _option(None, "Weights of the reward functions; without them all 1.")
    reward_time_limit: float | None = _option(None, "Seconds that a call of a reward function may take.")

    target_reward: float | None = _option(
        None, "Stop when the mean of the search reaches this (eval_reward, or reward)."
    )
    stop_patience: int | None = _option(
        None, "Stop after so many evaluations (or generations) without a better reward."
    )
    max_wall_time: float | None = _option(None, "Stop after so many seconds of training; a resumed run counts on.")

    kl_probe_prompts: int = _option(0, "Prompts on which each evaluation measures the KL to the start; 0 for none.")
    log_completions: bool = _option(False, "Write completions at each logging step, as JSON lines, into output_dir.")
    candidate_backend: str = _option(
        "batched", '"batched": every row its own candidate; "sequential": one candidate after the other, written to '
        'the adapter; "ray": candidates in a queue of Ray workers (extra hf_ext[ray]).'
    )  # fmt: skip
    num_workers: int | None = _option(None, "Ray workers; without it one for each GPU of the cluster, or CPU.")
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Arguments of from_pretrained, if `model` is a str."
    )

    # One step is a whole generation, so each is worth its line
    logging_steps: float = _option(1, "Generations between log entries.")

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "optimizer_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
        "model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        self._check_gradient_options()
        super().__post_init__()
        self.remove_unused_columns = False
        _ = self.first_sigma
        for name, choices in (
            ("optimizer", STRATEGIES),
            ("resample", RESAMPLE),
            ("sigma_mode", ("absolute", "relative")),
            ("candidate_backend", ("batched", "sequential", "ray")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name, least in (
            ("population_size", 4),
            ("batch_size_per_candidate", 1),
            ("max_completion_length", 1),
            ("max_concurrent_sequences", 1),
            ("stop_patience", 1),
            ("num_workers", 1),
            ("kl_probe_prompts", 0),
            ("top_k", 0),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")
        for name in ("sigma_kl", "reward_time_limit", "max_wall_time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be > 0, got {value}.")
        if not 0 < self.svd_fraction <= 1:
            raise ValueError(f"`svd_fraction` must be above 0 and at most 1, got {self.svd_fraction}.")
        if not 0 < self.min_population_fraction <= 1:
            raise ValueError(
                f"`min_population_fraction` must be above 0 and at most 1, got {self.min_population_fraction}."
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` must be >= 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "`top_p` and `top_k` need sampling, but `temperature` is 0. Set a temperature, or leave them."
            )

    @property
    def first_sigma(self) -> float | None:
        """`sigma` as a number, None for "auto"."""
        if self.sigma == "auto":
            return None
        try:
            value = float(self.sigma)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f'`sigma` must be a number > 0 or "auto", got {self.sigma!r}.')
        return value

    def _check_gradient_options(self) -> None:
        for name in _IMPOSSIBLE:
            if getattr(self, name, None):
                raise ValueError(f"`{name}` shards a model for gradients, of which ESSA has none. Leave it out.")
        defaults = TrainingArguments.__dataclass_fields__
        changed = [name for name in _WITHOUT_EFFECT if getattr(self, name) != defaults[name].default]
        if changed:
            warnings.warn(f"ESSA has no gradients: {', '.join(changed)} will be ignored.", stacklevel=3)
