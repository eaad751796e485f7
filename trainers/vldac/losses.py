"""The mathematics of VL-DAC (arXiv 2508.04280): tensors in, tensors out; usable in any training loop.

    ratio    rho_{t,i} = exp(log pi(a_t^i) - log pi_old(a_t^i))
    policy   L_pi = -mean_t 1/L_t sum_i min(rho_{t,i} A_t, clip(rho_{t,i}, 1 - eps, 1 + eps) A_t)          (eq. 3)
    KL       L_KL =  mean_t 1/L_t sum_i KL_{t,i}                                                             (eq. 5)
    value    L_V  =  mean_t 1/2 (V(s_t) - R_t)^2
    total    L    =  L_pi + beta L_KL + alpha L_V                                                            (eq. 6)

- Time is counted in steps of the environment: T of them in N environments, and one advantage for all tokens of a step.
- Two ends of an episode differ: after a *terminated* step nothing follows, so it is worth 0; a *truncated* one was cut
  by a clock, so the value of the observation it ended with stands for the rest.
- Losses take `num_items`, the number of steps (or tokens) of the whole optimiser step, so that the sum over its
  micro-batches does not depend on how it was cut.
- A number that is not finite is refused where it comes in, by name and place; nothing is replaced.
"""

import torch


# beyond it a ratio says no more than "far away", and exp would overflow in float32 soon after
MOST_LOG_RATIO = 20.0


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    last_values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    final_values: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generalised advantage estimation over environment steps.

        delta_t = r_t + gamma V'_t - V(s_t);   A_t = delta_t + gamma lambda c_t A_{t+1};   R_t = A_t + V(s_t)

    V'_t is 0 after a terminated step, `final_values` after a truncated one, V(s_{t+1}) else; c_t is 0 where an episode
    ended. A step that is both counts as terminated.

    Args:
        rewards, values (`torch.Tensor` of shape `(T, N)`): r_t and V(s_t).
        last_values (`torch.Tensor` of shape `(N,)`): Value of the observation after the last step.
        terminated, truncated (`torch.BoolTensor` of shape `(T, N)`): How an episode ended at this step, if it did.
        final_values (`torch.Tensor` of shape `(T, N)`, *optional*):
            Value of the observation that a truncated step ended with, read there alone. Without it that is 0, as if
            truncation were termination.
        counted (`torch.BoolTensor` of shape `(T, N)`, *optional*):
            False where a step never happened (its environment broke). Its advantage is 0, its return is its value, and
            the step before it looks no further than its value.
        gamma, lam (`float`, *optional*, default to 0.99 and 0.95): Discount and lambda, in [0, 1].

    Returns:
        `(advantages, returns)`, each `(T, N)`.

    Raises:
        ValueError: for shapes that do not fit, factors outside of [0, 1], and numbers that are not finite.

    Example:

    ```python
    >>> ends = torch.tensor([[False], [True]])
    >>> never = torch.zeros(2, 1, dtype=torch.bool)
    >>> gae(torch.ones(2, 1), torch.zeros(2, 1), torch.zeros(1), ends, never, gamma=0.5, lam=1.0)[0].tolist()
    [[1.5], [1.0]]

    ```

    Source: arXiv 2508.04280 (steps as the unit), arXiv 1506.02438 (the estimator).
    """
    bootstrap, cut, counted = _ends(
        rewards, values, last_values, terminated, truncated, final_values, counted, gamma, lam
    )
    follows = torch.cat([values[1:], last_values[None]])
    delta = rewards + gamma * torch.where(cut, bootstrap, follows) - values
    advantages = torch.zeros_like(values)
    later = torch.zeros_like(last_values)
    for t in reversed(range(len(rewards))):
        later = delta[t] + gamma * lam * torch.where(cut[t], 0.0, later)
        later = torch.where(counted[t], later, 0.0)
        advantages[t] = later
    return advantages, advantages + values


def token_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    last_values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    final_values: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages of a token-level critic, for comparison: each token has a value, and the reward falls on a step's last.

        i < L_t:  delta = V_{t,i+1} - V_{t,i};                   A = delta + lambda A_{t,i+1}
        i = L_t:  delta = r_t + gamma V'_t - V_{t,i};            A = delta + gamma lambda c_t A_{t+1,1}

    Tokens of one step are not discounted against one another, so both critics have the same returns at lambda 1.

    Args:
        rewards (`torch.Tensor` of shape `(T, N)`): r_t.
        values (`torch.Tensor` of shape `(T, N, L)`): Value before each token; [..., 0] is that of the observation.
        mask (`torch.BoolTensor` of shape `(T, N, L)`): True at tokens of the response, which come first.
        last_values, terminated, truncated, final_values, counted, gamma, lam: As in [`gae`].

    Returns:
        `(advantages, returns)`, each `(T, N, L)`, 0 outside of `mask`.

    Raises:
        ValueError: as in [`gae`], and for a step that counts but has no token.
    """
    if values.dim() != 3 or mask.shape != values.shape:
        raise ValueError(
            f"`values` and `mask` must have one shape (T, N, L), got {tuple(values.shape)} and {tuple(mask.shape)}."
        )
    first = values[..., 0]
    bootstrap, cut, counted = _ends(
        rewards, first, last_values, terminated, truncated, final_values, counted, gamma, lam
    )
    _finite("values", values.masked_fill(~mask, 0.0))
    if bool((counted & ~mask[..., 0]).any()):
        raise ValueError("`mask` must have a token for every step that counts, got a step with none.")
    after = torch.where(cut, bootstrap, torch.cat([first[1:], last_values[None]]))
    is_last = mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
    advantages = torch.zeros_like(values)
    next_step = torch.zeros_like(last_values)
    for t in reversed(range(len(rewards))):
        at_end = rewards[t] + gamma * after[t]
        beyond = gamma * lam * torch.where(cut[t], 0.0, next_step)
        later, value = torch.zeros_like(last_values), torch.zeros_like(last_values)
        for i in reversed(range(values.shape[2])):
            end = is_last[t, :, i]
            delta = torch.where(end, at_end, value) - values[t, :, i]
            found = delta + torch.where(end, beyond, lam * later)
            later = torch.where(mask[t, :, i] & counted[t], found, 0.0)
            value = values[t, :, i]
            advantages[t, :, i] = later
        next_step = later
    return advantages, torch.where(mask, advantages + values, 0.0)


def leave_one_out(returns: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """
    LOOP's advantage of an episode against the K - 1 others that began alike: K / (K - 1) (R_k - mean_j R_j).

    Args:
        returns (`torch.Tensor` of shape `(E,)`): Return of each episode.
        groups (`torch.LongTensor` of shape `(E,)`): Which episodes began in the same state.

    Returns:
        `torch.Tensor` of shape `(E,)`: R_k minus the mean of its group's other returns.

    Raises:
        ValueError: for a group of one, and returns that are not finite.

    Source: arXiv 2502.01600, as compared in arXiv 2508.04280.
    """
    if returns.dim() != 1 or groups.shape != returns.shape:
        raise ValueError(
            f"`returns` and `groups` must have one shape (E,), got {tuple(returns.shape)} and {tuple(groups.shape)}."
        )
    _finite("returns", returns)
    _, index, size = groups.unique(return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise ValueError("`groups` must have at least 2 episodes each, got one alone. Raise `num_generations`.")
    total = torch.zeros(len(size), dtype=returns.dtype, device=returns.device).index_add_(0, index, returns)
    others = (total[index] - returns) / (size[index] - 1)
    return returns - others


def normalize(advantages: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """
    (A - mean) / (std + 1e-8) over entries that count, 0 elsewhere, whatever the shape. Equal advantages become 0.

    The spread is that of a sample (n - 1), as in the authors' code.
    """
    chosen = advantages[counted]
    _finite("advantages", chosen)
    if len(chosen) < 2 or bool((chosen == chosen[0]).all()):
        return torch.zeros_like(advantages)
    return torch.where(counted, (advantages - chosen.mean()) / (chosen.std() + 1e-8), 0.0)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange: float = 0.1,
    level: str = "token",
    aggregation: str = "step_mean",
    weights: torch.Tensor | None = None,
    num_items: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The clipped surrogate of PPO, over tokens (VL-DAC) or over whole steps (RL4VLM).

        token:  rho_{t,i} for each token; the mean over a step's tokens, then over steps (eq. 3)
        step:   one ratio for a step, exp(sum_i w_i (log pi - log pi_old)); the mean over steps

    Args:
        logprobs, old_logprobs (`torch.Tensor` of shape `(B, L)`): Of the sampled tokens, in nats.
        advantages (`torch.Tensor` of shape `(B,)` or `(B, L)`): Of the step, or of each token (token-level critic).
        mask (`torch.BoolTensor` of shape `(B, L)`): True at tokens of the response. A row without any is left out.
        cliprange (`float`, *optional*, defaults to 0.1): eps, above 0.
        level (`str`, *optional*, defaults to `"token"`): `"token"` or `"step"`.
        aggregation (`str`, *optional*, defaults to `"step_mean"`):
            For tokens: `"step_mean"` gives each step one weight (the paper), `"token_mean"` each token.
        weights (`torch.Tensor` of shape `(B, L)`, *optional*):
            For steps: w, RL4VLM's lambda at tokens of the thought and 1 at those of the action. Without it 1.
        num_items (`float`, *optional*): Divides the sum, instead of the number of steps (or tokens) here.

    Returns:
        `(loss, figures)`: a scalar; `clip_fraction` (of ratios where the clip decides), `ratio_clamped` (share of
        log-ratios beyond 20, which are cut there and pass no gradient) and `approx_kl` (k3 to the old policy, nats).

    Raises:
        ValueError: for options that do not fit. FloatingPointError: for log-probabilities that are not finite.

    Source: arXiv 2508.04280, eq. 3; RL4VLM arXiv 2405.10292.
    """
    if not cliprange > 0:
        raise ValueError(f"`cliprange` must be above 0, got {cliprange}.")
    if level not in ("token", "step"):
        raise ValueError(f'`level` must be "token" or "step", got {level!r}.')
    if level == "token" and weights is not None:
        raise ValueError('`weights` belong to level="step", got them with "token".')
    if level == "step" and advantages.dim() != 1:
        raise ValueError(
            f'`advantages` must have shape (B,) for level="step", got {tuple(advantages.shape)}: a step has one ratio.'
        )
    difference = (_scores("logprobs", logprobs, mask) - _scores("old_logprobs", old_logprobs, mask)) * mask
    with torch.no_grad():
        near = k3(difference, torch.zeros_like(difference))
        approx_kl = (near * mask).sum() / mask.sum().clamp(min=1)
    if level == "step":
        difference = (difference * (1.0 if weights is None else weights)).sum(1, keepdim=True)
        mask = mask.any(1, keepdim=True)
    ratio = difference.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()
    advantage = advantages if advantages.dim() == 2 else advantages[:, None]
    _finite("advantages", torch.where(mask, advantage, 0.0).detach())
    plain, clipped = ratio * advantage, ratio.clamp(1 - cliprange, 1 + cliprange) * advantage
    loss = -aggregate(torch.minimum(plain, clipped), mask, aggregation, num_items)
    entries = mask.sum().clamp(min=1)
    with torch.no_grad():
        figures = {
            "clip_fraction": ((clipped < plain) & mask).sum() / entries,
            "ratio_clamped": ((difference.abs() > MOST_LOG_RATIO) & mask).sum() / entries,
            "approx_kl": approx_kl,
        }
    return loss, figures


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """
    KL(pi || ref) of each sampled token, estimated without a negative value: exp(d) - d - 1, d = log ref - log pi.

    Its mean under pi is the KL itself. d is cut at 20 in both directions, beyond which no gradient passes.
    """
    d = (ref_logprobs - logprobs).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    return d.expm1() - d


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(pi || ref) of each sampled token, estimated by log pi - log ref. As a loss on given samples it does not hold
    a policy at its reference: its gradient has mean 0 there wherever the policy is."""
    return logprobs - ref_logprobs


def kl_loss(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    estimator: str = "k3",
    aggregation: str = "step_mean",
    num_items: float | None = None,
) -> torch.Tensor:
    """
    L_KL, in nats a token: the estimator's mean over a step's tokens, then over steps (eq. 5).

    Args:
        logprobs, ref_logprobs (`torch.Tensor` of shape `(B, L)`): Of the sampled tokens; the reference is constant.
        mask (`torch.BoolTensor` of shape `(B, L)`): True at tokens of the response.
        estimator (`str`, *optional*, defaults to `"k3"`): `"k3"` or `"k1"`.
        aggregation, num_items: As in [`policy_loss`].
    """
    if estimator not in ("k3", "k1"):
        raise ValueError(f'`estimator` must be "k3" or "k1", got {estimator!r}.')
    of = k3 if estimator == "k3" else k1
    reference = _scores("ref_logprobs", ref_logprobs, mask).detach()
    return aggregate(of(_scores("logprobs", logprobs, mask), reference), mask, aggregation, num_items)


def value_loss(
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_values: torch.Tensor | None = None,
    cliprange_value: float | None = None,
    num_items: float | None = None,
) -> torch.Tensor:
    """
    L_V = 1/2 mean (V - R)^2; with `cliprange_value` the larger of that and of V_old + clip(V - V_old, -eps, eps).

    Args:
        values, returns (`torch.Tensor` of shape `(B,)` or `(B, L)`): V and R, of steps or of tokens.
        mask (`torch.BoolTensor`, as `values`): What counts. Tokens count for 1 / L_t, so that a step has weight 1.
        old_values (`torch.Tensor`, as `values`, *optional*): V at the time of the rollout, for the clip.
        cliprange_value (`float`, *optional*): eps. The paper has no such clip, the authors' code has 0.1.
        num_items (`float`, *optional*): Divides the sum, instead of the number of steps here.
    """
    _finite("returns", returns.masked_fill(~mask, 0.0))
    error = (values - returns).square()
    if cliprange_value is not None:
        if old_values is None or not cliprange_value > 0:
            raise ValueError(f"`cliprange_value` must be above 0 and come with `old_values`, got {cliprange_value}.")
        near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        error = torch.maximum(error, (near - returns).square())
    if values.dim() == 1:
        error, mask = error[:, None], mask[:, None]
    return aggregate(0.5 * error, mask, "step_mean", num_items)


def aggregate(
    entries: torch.Tensor, mask: torch.Tensor, aggregation: str = "step_mean", num_items: float | None = None
) -> torch.Tensor:
    """
    `(B, L)` to a scalar: `"step_mean"` is the mean over tokens of a row, then over rows that have any; `"token_mean"`
    the mean over all tokens. `num_items` divides instead of the count here. Nothing masked has a gradient.
    """
    if aggregation not in ("step_mean", "token_mean"):
        raise ValueError(f'`aggregation` must be "step_mean" or "token_mean", got {aggregation!r}.')
    kept = torch.where(mask, entries, 0.0)
    length = mask.sum(1)
    if aggregation == "token_mean":
        return kept.sum() / (length.sum().clamp(min=1) if num_items is None else num_items)
    rows = kept.sum(1) / length.clamp(min=1)
    return rows.sum() / ((length > 0).sum().clamp(min=1) if num_items is None else num_items)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R) of `(n,)` values: 1 is a perfect critic, 0 a constant; NaN where returns do not vary."""
    spread = returns.double().var(unbiased=False)
    if len(returns) < 2 or spread == 0:
        return float("nan")
    return float(1 - (returns.double() - values.double()).var(unbiased=False) / spread)


def _ends(
    rewards: torch.Tensor,
    values: torch.Tensor,
    last_values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    final_values: torch.Tensor | None,
    counted: torch.Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checks what both estimators take: what stands for the rest where an episode ends, where that is, what counts."""
    if rewards.dim() != 2 or last_values.shape != rewards.shape[1:]:
        raise ValueError(
            f"`rewards` must have shape (T, N) and `last_values` (N,), got {tuple(rewards.shape)} and "
            f"{tuple(last_values.shape)}."
        )
    counted = torch.ones_like(terminated) if counted is None else counted
    final = torch.zeros_like(values) if final_values is None else final_values
    for name, tensor in (
        ("values", values),
        ("terminated", terminated),
        ("truncated", truncated),
        ("final_values", final),
        ("counted", counted),
    ):
        if tensor.shape != rewards.shape:
            raise ValueError(f"`{name}` must have shape {tuple(rewards.shape)}, got {tuple(tensor.shape)}.")
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {factor}.")
    cut = terminated | truncated
    bootstrap = torch.where(truncated & ~terminated, final, 0.0)
    _finite("rewards", torch.where(counted, rewards, 0.0))
    _finite("values", values)
    _finite("last_values", torch.where(cut[-1], 0.0, last_values) if len(cut) else last_values)
    _finite("final_values", bootstrap)
    return bootstrap, cut, counted


def _scores(name: str, logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities with 0 outside of the mask, whatever stands there; refused if not finite within."""
    if logprobs.shape != mask.shape:
        raise ValueError(f"`{name}` must have the mask's shape {tuple(mask.shape)}, got {tuple(logprobs.shape)}.")
    kept = torch.where(mask, logprobs, 0.0)
    if not bool(torch.isfinite(kept).all()):
        row, token = (~torch.isfinite(kept)).nonzero()[0].tolist()
        raise FloatingPointError(
            f"`{name}` must be finite, got {float(kept[row, token])} at token {token} of row {row}. Lower the "
            "learning rate, or score in float32."
        )
    return kept


def _finite(name: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise ValueError(
            f"`{name}` must be finite, got {float(tensor[tuple(place)])} at {place}. Leave the step out, or see why "
            "the environment or the critic gave it."
        )
