"""How far a candidate has moved from the start: for the first step size, and beside the reward while it rises."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainers.essa.strategies import noise
from trainers.essa.svd_lora import SearchSpace


logger = logging.getLogger(__name__)
SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CALIBRATION_CANDIDATES, CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 8, 16, 64
LOGITS_AT_ONCE = 32_000_000  # float32 numbers: 128 MB


def mean_token_kl(
    model: Any, space: SearchSpace, X: np.ndarray, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> np.ndarray:
    """
    KL(start || candidate) of the next token, in nats, mean over the tokens of completions that the start wrote.

    Args:
        model, space: The model, and what x means in it; x = 0 is the start.
        X (`np.ndarray` [candidates, dim]): Candidates.
        prompts, completions (lists of lists of int): Token ids; completions by the start, sampled from it.

    Returns:
        `np.ndarray` [candidates] float64: infinite where the candidate's logits are not finite.
    """
    X = np.atleast_2d(X)
    totals, tokens = np.zeros(len(X)), 0
    with torch.inference_mode():
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([prompt + completion], device=model.device)
            places = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
            start = _log_probs(model, space, np.zeros((1, X.shape[1])), ids, places)
            at_once = max(1, LOGITS_AT_ONCE // start.numel())
            for first in range(0, len(X), at_once):
                part = X[first : first + at_once]
                found = _log_probs(model, space, part, ids, places)
                kl = (start.exp() * (start - found)).sum(-1).sum(-1).double()
                totals[first : first + len(part)] += kl.nan_to_num(nan=np.inf).cpu().numpy()
            tokens += len(completion)
    return totals / tokens


def _log_probs(model: Any, space: SearchSpace, X: np.ndarray, ids: torch.Tensor, places: slice) -> torch.Tensor:
    """[candidates, tokens, vocabulary] of one text."""
    with space.candidates(X, range(len(X))):
        logits = model(ids.expand(len(X), -1), use_cache=False).logits[:, places]
    return logits.float().log_softmax(-1)


def calibrate_sigma(
    model: Any,
    space: SearchSpace,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    target: float,
    seed: int,
) -> tuple[float, dict[float, float]]:
    """
    The largest sigma of `SIGMAS` whose candidates stay, on average, within `target` nats per token of the start.

    Returns:
        `(sigma, {sigma: mean KL})` of those that were tried, from small to large until one was too far.
    """
    draws = np.stack([noise(seed, 0, index, space.dim) for index in range(CALIBRATION_CANDIDATES)])
    tried: dict[float, float] = {}
    for sigma in SIGMAS:
        tried[sigma] = float(mean_token_kl(model, space, sigma * draws, prompts, completions).mean())
        if not tried[sigma] <= target:
            break
    near = [sigma for sigma, kl in tried.items() if kl <= target]
    if not near:
        logger.warning(
            "Even sigma=%g moves candidates %.3g nats per token from the start, more than sigma_kl=%g: it is used, "
            "though it may be too large. Set `sigma`.",
            SIGMAS[0],
            tried[SIGMAS[0]],
            target,
        )
    return (near or [SIGMAS[0]])[-1], tried
