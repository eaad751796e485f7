"""Rewards: pure functions in TRL's call, for every trainer of ours as for TRL's own, and the class that calls them.

    f(prompts=, completions=, completion_ids=, trainer_state=, log_extra=, log_metric=, **columns)
        -> list[float | None]

- A function names the columns that it reads and swallows the rest; its options are keywords, for `functools.partial`.
- A completion is a string, or a list of messages of which the last assistant's is read.
- None means "cannot be judged": the function is left out for that row. It never means "wrong".
- What a model wrote is read with string operations and linear regular expressions; nothing evaluates it.
- Importing this package loads none of torch, transformers, sympy.
"""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from trainers.rewards.calling import RewardBatch, RewardError, Rewards
    from trainers.rewards.formats import exact_reward, json_reward, last_number_reward, length_reward
    from trainers.rewards.instructions import instruction_reward
    from trainers.rewards.math import boxed_reward, gsm8k_reward

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "RewardBatch": "trainers.rewards.calling",
        "RewardError": "trainers.rewards.calling",
        "Rewards": "trainers.rewards.calling",
        "boxed_reward": "trainers.rewards.math",
        "exact_reward": "trainers.rewards.formats",
        "gsm8k_reward": "trainers.rewards.math",
        "instruction_reward": "trainers.rewards.instructions",
        "json_reward": "trainers.rewards.formats",
        "last_number_reward": "trainers.rewards.formats",
        "length_reward": "trainers.rewards.formats",
    },
)
