"""Reinforcement learning of steering vectors (arXiv 2505.18706)."""

from typing import TYPE_CHECKING

from hf_ext._lazy import attach


if TYPE_CHECKING:
    from trainers.steering_rl.steering_rl_config import SteeringRLConfig
    from trainers.steering_rl.steering_rl_trainer import SteeringRLTrainer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "SteeringRLConfig": "trainers.steering_rl.steering_rl_config",
        "SteeringRLTrainer": "trainers.steering_rl.steering_rl_trainer",
    },
)
