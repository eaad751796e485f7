"""Losses and figures of an error predictor: e larger = more likely wrong, y = 1 where the token is wrong."""

import math

import torch
from torch.nn import functional as F


def bce_loss(e: torch.Tensor, y: torch.Tensor, counted: torch.Tensor, balance: bool = False) -> torch.Tensor:
    """
    Mean binary cross-entropy of the counted positions, in nats.

    Args:
        e (`torch.Tensor` of shape `(B, L)`): Logits.
        y (`torch.Tensor` of shape `(B, L)`): True or 1 where wrong.
        counted (`torch.BoolTensor` of shape `(B, L)`): Which positions count; with none the loss is 0.
        balance (`bool`, *optional*, defaults to `False`):
            Weigh both classes alike over the batch: n / (2 n_wrong), n / (2 n_right).

    Source: arXiv 2510.08369.
    """
    e, y = e[counted].float(), y[counted].float()
    weight = None
    if balance:
        wrong = y.sum()
        weight = torch.where(y > 0, len(y) / (2 * wrong.clamp(min=1)), len(y) / (2 * (len(y) - wrong).clamp(min=1)))
    return F.binary_cross_entropy_with_logits(e, y, weight, reduction="sum") / max(len(y), 1)


def ranknet_loss(e: torch.Tensor, y: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """
    Mean over rows of the mean over (wrong i, right j) of softplus(e_j - e_i): only the order counts, as in sampling.
    Rows that lack a class are left out; without any row the loss is 0 and has gradients. Source: arXiv 2510.08369.
    """
    wrong, right = (y > 0) & counted, (y <= 0) & counted
    pairs = wrong[:, :, None] & right[:, None, :]
    lost = F.softplus(e.float()[:, None, :] - e.float()[:, :, None]).masked_fill(~pairs, 0.0)
    number = pairs.sum((1, 2))
    rows = lost.sum((1, 2)) / number.clamp(min=1)
    return rows.sum() / (number > 0).sum().clamp(min=1)


def rank_auc(e: torch.Tensor, y: torch.Tensor) -> float:
    """P(e of a wrong token > e of a right one), ties half; NaN where a class is missing. Tensors of one dimension."""
    wrong, right = int((y > 0).sum()), int((y <= 0).sum())
    if not wrong or not right:
        return math.nan
    values, place, number = e.double().unique(return_inverse=True, return_counts=True)
    last = number.cumsum(0)
    rank = (last - (number - 1) / 2.0)[place]  # mean rank of equal values, from 1
    return float((rank[y > 0].sum() - wrong * (wrong + 1) / 2) / (wrong * right))
