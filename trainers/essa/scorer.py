"""Scores candidates on prompts in this process: generate, reward, nothing else. Every backend ends here."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trainers.essa.essa_config import ESSAConfig
from trainers.essa.rollout import Prompts, Rollouts, generate_rows
from trainers.essa.svd_lora import SearchSpace
from trainers.rewards.calling import Rewards


class Row(NamedTuple):
    """One completion to be made: candidate (row of X) and prompt (row of the dataset)."""

    candidate: int
    prompt: int


class Scores(NamedTuple):
    """
    What came of rows, in their order.

    Attributes:
        values (`np.ndarray` [rows, 4 + functions] float64): reward, tokens, finished, failed, then each function's.
            The reward is NaN where no function gave one, and where the row failed.
        texts (`list[str]`): Completions.
        metrics (`dict[str, list[float]]`): What reward functions logged.
    """

    values: np.ndarray
    texts: list[str]
    metrics: dict[str, list[float]]


REWARD, TOKENS, FINISHED, FAILED, FUNCTIONS = range(5)


class Scorer:
    """
    Args:
        model (`PeftModel`), space ([`SearchSpace`]): The model, and what candidates mean in it.
        tokenizer (`PreTrainedTokenizerBase`): With a padding token.
        rewards ([`Rewards`]): What completions are worth.
        args ([`ESSAConfig`]): Decoding options.
    """

    def __init__(self, model: Any, space: SearchSpace, tokenizer: Any, rewards: Rewards, args: ESSAConfig) -> None:
        self.model, self.space, self.tokenizer, self.rewards, self.args = model, space, tokenizer, rewards, args
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
            ends.append(tokenizer.eos_token_id)
        self.eos_token_ids = ends

    def score(
        self, X: np.ndarray, rows: Sequence[Row], prompts: Prompts, generation: int, state: Any = None
    ) -> Scores:
        """
        Complete and reward each row.

        Args:
            X (`np.ndarray` [candidates, dim]): Candidates.
            rows (list of [`Row`]): What to complete, in one call of `generate`.
            prompts ([`Prompts`]): The dataset.
            generation (`int`): Part of the noise's key, with temperature > 0.
            state (`TrainerState`, *optional*): Handed to reward functions.

        Raises:
            RewardError: where a reward function fails or gives what is no reward; no state changes.
        """
        if self.args.candidate_backend == "sequential":
            rollouts = self._one_by_one(X, rows, prompts, generation)
        else:
            with self.space.candidates(X, [row.candidate for row in rows]):
                rollouts = self._generate(rows, prompts, generation)
        texts = self.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
        asked = [prompts.rows[row.prompt]["prompt"] for row in rows]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(asked, texts, strict=True)
        ]
        found = self.rewards(
            asked,
            completions,
            rollouts.completion_ids,
            prompts.columns([row.prompt for row in rows]),
            trainer_state=state,
        )
        values = np.column_stack(
            [
                np.where(rollouts.failed, np.nan, found.rewards),
                [len(ids) for ids in rollouts.completion_ids],
                rollouts.finished,
                rollouts.failed,
                found.by_function,
            ]
        ).astype(np.float64)
        return Scores(values, texts, found.metrics)

    def _generate(self, rows: Sequence[Row], prompts: Prompts, generation: int) -> Rollouts:
        args = self.args
        seed = args.seed if args.noise_seed is None else args.noise_seed
        return generate_rows(
            self.model,
            [prompts.ids[row.prompt] for row in rows],
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_ids=self.eos_token_ids,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            noise_keys=[(seed, generation, row.prompt) for row in rows],
            options=args.generation_kwargs,  # type: ignore[arg-type]
        )

    def _one_by_one(self, X: np.ndarray, rows: Sequence[Row], prompts: Prompts, generation: int) -> Rollouts:
        """One candidate after the other, each written to the adapter: slow, and what the batched form must equal."""
        parts: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            parts.setdefault(row.candidate, []).append(i)
        ids: list[list[int]] = [[] for _ in rows]
        finished, failed = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
        for candidate, places in parts.items():
            self.space.write(X[candidate])
            found = self._generate([rows[i] for i in places], prompts, generation)
            for at, i in enumerate(places):
                ids[i] = found.completion_ids[at]
            finished[places], failed[places] = found.finished, found.failed
        return Rollouts(ids, finished, failed)


def candidate_fitness(values: np.ndarray, rows: Sequence[Row], population_size: int) -> np.ndarray:
    """
    Mean reward of each candidate, `[population_size]`; NaN where one of its rows failed or none was rewarded.

    Raises:
        ValueError: where rows did not fail and still nothing was rewarded: there is nothing to learn from.
    """
    candidate = np.array([row.candidate for row in rows])
    reward, failed = values[:, REWARD], values[:, FAILED] > 0
    if np.isnan(reward[~failed]).all() and not failed.all():
        raise ValueError("Reward functions must reward some completion, but all of a generation's were None.")
    fitness = np.full(population_size, np.nan)
    for k in range(population_size):
        own = candidate == k
        if not failed[own].any() and not np.isnan(reward[own]).all():
            fitness[k] = np.nanmean(reward[own])
    return fitness


def describe(
    values: np.ndarray, functions: Sequence[str], metrics: dict[str, list[float]], prefix: str = ""
) -> dict[str, float]:
    """What the log says of rows, of a generation or an evaluation; a function that judged none is left out."""
    logs = {
        f"{prefix}completions/mean_length": float(values[:, TOKENS].mean()),
        f"{prefix}completions/clipped_ratio": float(1 - values[:, FINISHED].mean()),
    }
    for i, name in enumerate(functions):
        given = values[:, FUNCTIONS + i]
        if not np.isnan(given).all():
            logs[f"{prefix}rewards/{name}/mean"] = float(np.nanmean(given))
    return logs | {f"{prefix}{name}": float(np.mean(logged)) for name, logged in metrics.items()}
