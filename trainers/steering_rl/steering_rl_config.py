"""Options of [`SteeringRLTrainer`]; what is not here is TRL's `GRPOConfig`."""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SteeringRLConfig(GRPOConfig):
    """
    TRL's `GRPOConfig` with the settings of arXiv 2505.18706 v3 as defaults, and two options more.

    On-policy, one optimiser step for each batch of completions: no clipping, no KL (`beta=0`), no scaling of rewards,
    loss normalised by the tokens of the whole batch (`loss_type="dapo"`), sampling at temperature 1. The paper's batch
    is 128 prompts x 16 completions, on prompts and answers of 4096 tokens together; both are the user's to set.
    """

    learning_rate: float = _option(
        1e-3,
        "First learning rate. The paper: 1e-3 for Qwen2.5, 3e-4 for Llama-3.1-8B, 8e-5 for its instruct version; "
        "small models take much more (2e-2 for SmolLM2-135M), since their vectors are as long.",
    )
    num_generations: int | None = _option(16, "Completions of a prompt (K), at least 2.")
    per_device_train_batch_size: int = _option(16, "Completions in one backward pass, on each device.")
    scale_rewards: str = _option("none", 'Of advantages: "none" as in the paper, "group" or "batch" (TRL).')
    max_grad_norm: float = _option(2.0, "Largest norm of the gradient.")
    lr_scheduler_type: str = _option("constant_with_warmup", "Schedule of the learning rate.")
    warmup_steps: float = _option(0.03, "Warm-up, in steps, or as a share of all steps where below 1.")
    gradient_checkpointing: bool = _option(
        False, "Off, as in the paper: vectors need little memory. It gives the same gradients."
    )
    signed_rewards: bool = _option(
        False, "Take 2 r - 1 of each reward: those of 0 and 1 become the paper's -1 and +1. Advantages double."
    )
    depth_scaled_lr: bool = _option(
        False,
        "Multiply the learning rate of layer l by the median norm of its residual stream over that of the first "
        "layer, within [1, 30]: the norm that moves a layer grows with depth. Not in the paper, which tunes by hand.",
    )
