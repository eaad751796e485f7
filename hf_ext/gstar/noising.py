"""What the two trainers of masked diffusion share: batches, times, noise, and a one-step proposal."""

import math
from collections.abc import Sequence
from typing import Any

import torch


class MaskedDiffusionCollator:
    """
    Rows of tokens as a padded batch that says what may be masked.

    A row is a dict with `input_ids` and, if its first tokens are a prompt, their number `prompt_length`. Batches hold
    `input_ids`, `attention_mask` (0 at padding, on the right) and `fixed` (True at padding and prompts), of shape
    `(B, L)`, and `prompt_length` `(B,)`.

    Args:
        pad_token_id (`int`): Id of the padding.
        max_length (`int`, *optional*): Longer rows are cut.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None) -> None:
        self.pad_token_id, self.max_length = pad_token_id, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = [torch.as_tensor(row["input_ids"], dtype=torch.long)[: self.max_length] for row in rows]
        lengths = torch.tensor([len(row) for row in tokens])
        prompts = torch.tensor([int(row.get("prompt_length") or 0) for row in rows])
        if (prompts > lengths).any():
            i = int((prompts > lengths).nonzero()[0])
            raise ValueError(
                f"`prompt_length` must be at most the length of its row, {int(lengths[i])}, got {int(prompts[i])}. "
                "Raise `max_length`, or leave such rows out."
            )
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=self.pad_token_id)
        place = torch.arange(ids.shape[1])
        present = place < lengths[:, None]
        return {
            "input_ids": ids,
            "attention_mask": present.long(),
            "fixed": ~present | (place < prompts[:, None]),
            "prompt_length": prompts,
        }


def stratified_times(count: int, eps: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """`(count,)` times in [eps, 1], one from each of `count` equal parts: (u/n + i/n) mod 1, as in MDLM."""
    u = torch.rand(count, dtype=torch.float64, generator=generator)
    return eps + (1 - eps) * ((u + torch.arange(count)) / max(count, 1) % 1)


def mask_tokens(
    input_ids: torch.Tensor,
    fixed: torch.Tensor,
    t: torch.Tensor,
    mask_token_id: int,
    eps: float = 1e-3,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """x_t ~ q(x_t | x_0) `(B, L)` for times t `(B,)`: each open position is masked with probability (1 - eps) t."""
    u = torch.rand(input_ids.shape, dtype=torch.float64, generator=generator)
    masked = (u < (1 - eps) * t[:, None].cpu()).to(input_ids.device) & ~fixed
    return torch.where(masked, mask_token_id, input_ids)


def sigma_of(t: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """-log alpha(t) of the log-linear schedule."""
    return -torch.log1p(-(1 - eps) * t)


def shift_right(logits: torch.Tensor) -> torch.Tensor:
    """Logits of token i from those at i - 1 (Dream); the first stay."""
    return torch.cat((logits[:, :1], logits[:, :-1]), 1)


@torch.no_grad()
def propose(
    logits: torch.Tensor, noisy: torch.Tensor, mask_token_id: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """x^_0 `(B, L)`: a token drawn from the denoiser's logits `(B, L, V)` at every mask, the present one elsewhere."""
    at = noisy == mask_token_id
    wanted = logits[at].float()
    wanted[:, mask_token_id] = -math.inf
    proposal = noisy.clone()
    if len(wanted):
        proposal[at] = torch.multinomial(wanted.softmax(-1), 1, generator=generator)[:, 0]
    return proposal
