"""What one rollout leaves behind, and its advantages."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainers.vldac import losses
from trainers.vldac.policy import Prompt


@dataclass
class RolloutBuffer:
    """
    T steps of N environments.

    Attributes:
        prompts (`list[list[Prompt]]`): [t][n].
        tokens, mask (`torch.Tensor` of shape `(T, N, L)`): Responses and which of their tokens count.
        logprobs (`torch.Tensor` of shape `(T, N, L)`): At the time of the rollout, in nats.
        values (`torch.Tensor` of shape `(T, N)` or `(T, N, L)`): The critic's, of steps or before tokens.
        rewards, terminated, truncated, valid (`torch.Tensor` of shape `(T, N)`): What the environments said.
        counted (`torch.BoolTensor` of shape `(T, N)`): False where there was no step.
        final_values (`torch.Tensor` of shape `(T, N)`): Of the observation that a truncated step ended with.
        last_values (`torch.Tensor` of shape `(N,)`): Of the observation after the last step.
        ended (`torch.BoolTensor` of shape `(T, N)`): Whether the response came to its end.
    """

    prompts: list[list[Prompt]]
    tokens: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    valid: torch.Tensor
    counted: torch.Tensor
    final_values: torch.Tensor
    last_values: torch.Tensor
    ended: torch.Tensor

    def advantages(
        self, *, estimator: str, gamma: float, lam: float, num_generations: int, normalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Advantages and returns, of the shape of `values`.

        For "loo" each environment played one episode, and `num_generations` neighbours began alike.
        """
        ends = (self.last_values, self.terminated, self.truncated, self.final_values, self.counted)
        if estimator == "loo":
            totals = torch.where(self.counted, self.rewards, 0.0).sum(0)
            groups = torch.arange(len(totals)) // num_generations
            advantages = losses.leave_one_out(totals, groups).expand_as(self.rewards).clone()
            returns = torch.zeros_like(self.rewards)
            counts = self.counted
        elif self.values.dim() == 3:
            advantages, returns = losses.token_gae(self.rewards, self.values, self.mask, *ends, gamma=gamma, lam=lam)
            counts = self.counted[..., None] & self.mask
        else:
            advantages, returns = losses.gae(self.rewards, self.values, *ends, gamma=gamma, lam=lam)
            counts = self.counted
        return (losses.normalize(advantages, counts) if normalize else advantages), returns

    def batches(
        self, epochs: int, steps: int, accumulation: int, generator: torch.Generator
    ) -> Iterator[list[torch.Tensor]]:
        """
        The optimiser steps of an update: `epochs` shuffled passes over the steps that count, each in `steps` parts,
        each of these in `accumulation` micro-batches of flat indices t * N + n; some may be empty.
        """
        counted = self.counted.flatten().nonzero()[:, 0]
        for _ in range(epochs):
            order = counted[torch.randperm(len(counted), generator=generator)]
            for part in order.tensor_split(steps):
                yield list(part.tensor_split(accumulation))
