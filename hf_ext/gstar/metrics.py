"""What one measures of a masked diffusion model; so far its likelihood bound."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class NELBO(NamedTuple):
    """
    Attributes:
        nats_per_token (`float`): Upper bound of the mean negative log-likelihood of a token.
        perplexity (`float`): exp of it: what masked-diffusion papers report.
        standard_error (`float`): Of `nats_per_token`, over the rows; NaN of a single row.
        tokens (`int`): Tokens that were counted.
    """

    nats_per_token: float
    perplexity: float
    standard_error: float
    tokens: int


@torch.no_grad()
def nelbo(
    denoiser: Callable[..., Any],
    input_ids: torch.Tensor,
    *,
    mask_token_id: int,
    attention_mask: torch.Tensor | None = None,
    fixed: torch.Tensor | None = None,
    num_samples: int = 8,
    generator: torch.Generator | None = None,
) -> NELBO:
    """
    The bound of MDLM on -log p(x_0), estimated with few samples.

    MDLM integrates (1/t) E[cross-entropy of the masked positions] over t. Given the number k of masked positions the
    integral over t is 1/k, so this draws k instead, evenly from 1..L for each row, and a set of k positions:

        -log p(x_0) <= L E_k[ (1/k) sum over masked i of -log x_theta(x_t)[x_0]_i ]

    the same number, without the large weights at small t. Any noise schedule has the same bound. A model that knows
    every conditional distribution reaches the entropy of the data. Sources: MDLM, arXiv 2406.07524; LLaDA, arXiv
    2502.09992, for the form over k.

    Args:
        denoiser (`Callable`): A masked language model without time conditioning; called with `input_ids` and
            `attention_mask`, gives an output with `logits`.
        input_ids (`torch.LongTensor` of shape `(B, L)`): Texts without masks.
        mask_token_id (`int`): Id of the mask.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 at padding, which is not counted.
        fixed (`torch.BoolTensor` of shape `(B, L)`, *optional*): Given and not counted, a prompt for example.
        num_samples (`int`, *optional*, defaults to 8): Forward passes, each with another k of each row.
        generator (`torch.Generator`, *optional*): On the CPU; source of the random numbers.

    Returns:
        [`NELBO`]

    Raises:
        ValueError: where a text holds the mask, or nothing is to be counted.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    if (input_ids == mask_token_id).any():
        raise ValueError(f"`input_ids` must be whole texts, got the mask (id {mask_token_id}) among them.")
    counted = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        counted &= attention_mask.bool()
    if fixed is not None:
        counted &= ~fixed
    lengths = counted.sum(1)
    if not lengths.any():
        raise ValueError("`input_ids` must hold a token that is neither padding nor fixed, got none.")
    total = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
    # one shift for each row, then even steps: each k is as likely as any other, and the samples of a row lie apart
    shift = torch.rand(len(input_ids), dtype=torch.float64, generator=generator).to(input_ids.device)
    for i in range(num_samples):
        k = (((shift + i / num_samples) % 1) * lengths).long() + 1
        noise = torch.rand(input_ids.shape, dtype=torch.float64, generator=generator).to(input_ids.device)
        rank = noise.masked_fill(~counted, 2.0).argsort(1).argsort(1)
        masked = (rank < k[:, None]) & counted
        noisy = torch.where(masked, mask_token_id, input_ids)
        logits = denoiser(input_ids=noisy, attention_mask=attention_mask).logits[masked].double()
        logits[:, mask_token_id] = -math.inf
        lost = -logits.log_softmax(-1).gather(1, input_ids[masked][:, None])[:, 0]
        rows = masked.nonzero()[:, 0]
        total.index_add_(0, rows, lost * (lengths / k).double()[rows] / num_samples)
    mean = float(total.sum() / lengths.sum())
    spread = (total - mean * lengths).square().sum() * len(total) / max(len(total) - 1, 1)
    error = float(spread.sqrt() / lengths.sum()) if len(total) > 1 else math.nan
    return NELBO(mean, math.exp(min(mean, 700.0)), error, int(lengths.sum()))
