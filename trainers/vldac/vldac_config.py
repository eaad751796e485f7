"""Options of [`VLDACTrainer`]; what is not here is `TrainingArguments`'."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


_CHOICES = {
    "policy_loss_level": ("token", "step"),
    "loss_aggregation": ("step_mean", "token_mean"),
    "advantage_estimator": ("gae", "loo"),
    "critic_level": ("step", "token"),
    "kl_reference": ("initial", "rollout", "none"),
    "kl_estimator": ("k3", "k1"),
    "value_pooling": ("last_prompt", "mean_prompt"),
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class VLDACConfig(TrainingArguments):
    """
    Options of [`VLDACTrainer`]. Defaults are the paper's for MiniWorld (arXiv 2508.04280, table 6) and, where it is
    silent, those of the authors' code (clip 0.1, KL to the initial policy by k3).

    An update is `num_envs * rollout_steps` steps of the environments, then `num_ppo_epochs` passes over them. An
    optimiser step takes `per_device_train_batch_size * gradient_accumulation_steps` of them, so that `max_steps`
    follows from `total_env_steps`.

    | paper | field | paper | field |
    |---|---|---|---|
    | gamma | `gamma` | eps | `cliprange` |
    | lambda of GAE | `lam` | k (frames) | `image_history` |
    | alpha | `vf_coef` (of 1/2 the square) | warm-up of the critic | `value_warmup_updates` |
    | beta | `kl_coef` | stop-gradient | `value_stop_gradient` |

    Relatives are switches: RL4VLM is `policy_loss_level="step"` (its lambda: `thought_coef`), LOOP is
    `advantage_estimator="loo"`, PPO with a value for each token is `critic_level="token"`, and
    `kl_reference="none"` leaves the KL out.
    """

    num_envs: int = _option(8, "Environments of each process, played as one batch.")
    rollout_steps: int = _option(64, "Steps of each environment between updates.")
    total_env_steps: int = _option(51_200, "Length of the run in steps of environments, over all processes.")
    max_episode_steps: int = _option(128, "An episode is truncated after so many steps.")
    image_history: int = _option(4, "Frames in a prompt: the last k, cleared when an episode begins.")
    on_env_error: str = _option(
        "raise", 'An environment that breaks: "raise", or "restart" it and leave the step out of everything.'
    )
    env_max_restarts: int = _option(3, "With restarts, how often in a row before the error is raised.")
    invalid_action_penalty: float = _option(0.0, "Taken off the reward where the action was invalid.")
    bootstrap_truncated: bool = _option(
        True,
        "A truncated step is worth the value of the observation it ended with; otherwise nothing, as if it ended.",
    )

    max_completion_length: int = _option(256, "Tokens of a response, at most.")
    temperature: float = _option(1.0, "Of sampling, and of the distribution that is scored.")
    top_p: float | None = _option(None, "Nucleus of sampling; not part of the scores.")
    top_k: int | None = _option(None, "Most probable tokens of sampling; not part of the scores.")
    min_p: float | None = _option(None, "Least probability, a share of the largest; not part of the scores.")
    mask_truncated_completions: bool = _option(
        False, "Leave responses out of the loss that reach the limit of tokens."
    )
    rollout_batch_size: int | None = _option(None, "Rows of one forward pass outside of training; all environments.")

    num_ppo_epochs: int = _option(2, "Passes over each update's steps.")
    cliprange: float = _option(0.1, "eps: a ratio counts within [1 - eps, 1 + eps]. The paper does not say its own.")
    gamma: float = _option(0.99, "Discount between steps of the environment.")
    lam: float = _option(0.95, "lambda of generalised advantage estimation.")
    normalize_advantages: bool = _option(True, "Mean 0 and spread 1 over an update's steps.")
    advantage_estimator: str = _option("gae", '"gae", or "loo": leave-one-out over whole episodes, without a critic.')
    num_generations: int = _option(4, 'For "loo": episodes that begin alike; num_envs must be a multiple.')
    policy_loss_level: str = _option("token", 'What has a ratio: each "token", or the whole "step" (RL4VLM).')
    thought_coef: float = _option(
        1.0, 'For level "step": weight of tokens before the action. Needs `action_start` of VLDACTrainer.'
    )
    loss_aggregation: str = _option(
        "step_mean", 'Each step has one weight ("step_mean"), or each token ("token_mean").'
    )

    vf_coef: float = _option(0.15, "alpha: weight of 1/2 (V - R)^2.")
    cliprange_value: float | None = _option(None, "Clip of the value's change; the authors' code has 0.1.")
    value_warmup_updates: int = _option(2, "First updates that train the critic alone.")
    value_stop_gradient: bool = _option(True, "Keep the critic's gradient from the policy.")
    value_pooling: str = _option(
        "last_prompt", 'The critic reads the prompt\'s last token, or "mean_prompt": better for tiny models.'
    )
    value_hidden_sizes: list[int] = field(
        default_factory=lambda: [3072, 2048], metadata={"help": "Hidden layers of the critic."}
    )
    value_learning_rate: float | None = _option(None, "Of the critic; without it learning_rate.")
    critic_level: str = _option("step", 'One value for an observation ("step"), or one before each "token".')

    kl_coef: float = _option(0.05, "beta: weight of the KL.")
    kl_reference: str = _option(
        "initial", 'What the KL holds to: the "initial" policy, that of the "rollout", or "none".'
    )
    kl_estimator: str = _option("k3", '"k3", which is never negative, or "k1".')

    num_eval_episodes: int = _option(50, "Episodes of an evaluation.")

    learning_rate: float = _option(5e-5, "Highest learning rate.")
    lr_scheduler_type: str = _option("cosine_with_min_lr", "Schedule of the learning rate.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = _option(
        None, "Options of the schedule; without them min_lr=1e-7 for cosine_with_min_lr."
    )
    per_device_train_batch_size: int = _option(1, "Steps of environments in one forward and backward pass.")
    gradient_accumulation_steps: int = _option(128, "Passes of an optimiser step.")
    adam_epsilon: float = _option(1e-7, "Epsilon of Adam.")
    logging_steps: float = _option(8, "Optimiser steps between log entries; 8 is an update.")

    max_steps: int = _option(-1, "Follows from total_env_steps; cannot be given.")
    save_steps: float = _option(500, "A multiple of the optimiser steps of an update.")

    def __post_init__(self) -> None:
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr": min(1e-7, self.learning_rate)}
        self._check()
        super().__post_init__()
        self.remove_unused_columns = False
        self.ignore_data_skip = True  # steps are played, not read
        if self.max_steps > 0:
            raise ValueError(f"`max_steps` follows from total_env_steps, got {self.max_steps}. Leave it out.")
        updates = self.total_env_steps // (self.num_envs * self.rollout_steps * self.world_size)
        if updates < 1:
            raise ValueError(
                f"`total_env_steps` must be at least one update, num_envs * rollout_steps * processes = "
                f"{self.num_envs * self.rollout_steps * self.world_size}, got {self.total_env_steps}."
            )
        self.max_steps = updates * self.steps_per_update
        if self.save_strategy == "steps" and (self.save_steps < 1 or self.save_steps % self.steps_per_update):
            if self.save_steps == 500:  # nobody asked for it
                self.save_steps = self.steps_per_update * max(round(500 / self.steps_per_update), 1)
            else:
                raise ValueError(
                    f"`save_steps` must be a multiple of {self.steps_per_update}, the optimiser steps of an update, "
                    f"got {self.save_steps}: between them there is a rollout under way."
                )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over an update."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return math.ceil(self.num_envs * self.rollout_steps / batch)

    @property
    def steps_per_update(self) -> int:
        """Optimiser steps of an update."""
        return self.num_ppo_epochs * self.steps_per_epoch

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.on_env_error not in ("raise", "restart"):
            raise ValueError(f'`on_env_error` must be "raise" or "restart", got {self.on_env_error!r}.')
        for name, least in (
            ("num_envs", 1),
            ("rollout_steps", 1),
            ("total_env_steps", 1),
            ("max_episode_steps", 1),
            ("image_history", 1),
            ("env_max_restarts", 0),
            ("max_completion_length", 1),
            ("num_ppo_epochs", 1),
            ("num_generations", 2),
            ("value_warmup_updates", 0),
            ("num_eval_episodes", 1),
            ("rollout_batch_size", 1),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        for name in ("temperature", "cliprange", "cliprange_value", "value_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a number above 0, got {value}.")
        for name in ("vf_coef", "kl_coef", "invalid_action_penalty", "thought_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a number >= 0, got {getattr(self, name)}.")
        if self.top_k == 1:
            raise ValueError("`top_k` must be above 1, got 1: a policy that never explores learns nothing.")
        if self.thought_coef != 1 and self.policy_loss_level != "step":
            raise ValueError(
                f'`thought_coef` belongs to policy_loss_level="step", got {self.thought_coef} with '
                f"{self.policy_loss_level!r}."
            )
        if self.critic_level == "token" and (self.policy_loss_level == "step" or self.advantage_estimator == "loo"):
            raise ValueError(
                '`critic_level="token"` gives each token an advantage, but policy_loss_level="step" and '
                'advantage_estimator="loo" need one for a step. Take critic_level="step".'
            )
        if self.advantage_estimator == "loo":
            if self.num_envs % self.num_generations:
                raise ValueError(
                    f"`num_envs` must be a multiple of num_generations={self.num_generations} for "
                    f'advantage_estimator="loo", got {self.num_envs}.'
                )
            if self.rollout_steps < self.max_episode_steps:
                raise ValueError(
                    f"`rollout_steps` must be at least max_episode_steps={self.max_episode_steps} for "
                    f'advantage_estimator="loo", got {self.rollout_steps}: episodes are compared whole.'
                )
            if self.value_warmup_updates:
                raise ValueError(
                    f'`value_warmup_updates` must be 0 for advantage_estimator="loo", got '
                    f"{self.value_warmup_updates}: there is no critic."
                )
