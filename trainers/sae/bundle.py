"""The SAEs of a run as one module: each reads its place of a batch, and their losses add up.

Sums that a loss divides by are taken over all processes, so that two with half a batch learn what one with the whole
does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_ext.sae.losses import (
    auxk_loss,
    hierarchical_loss,
    matryoshka_loss,
    multi_topk_loss,
    reconstruction_loss,
    variance,
)
from trainers.sae.sae_config import SAETrainingArguments


# (x', codes, W_dec, b_dec) -> (loss, reconstruction)
LossFunction = Callable[[torch.Tensor, Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Bundle(nn.Module):
    """
    Several SAEs, trained side by side and independently of each other.

    Args:
        saes (`dict[str, SAEModel]`): Name -> SAE.
        places (`dict[str, str]`): Name -> place of the batch that it reads.
        loss_funcs (`dict[str, Callable]`): Name -> loss.
        args ([`SAETrainingArguments`]): Coefficients.
    """

    def __init__(
        self,
        saes: dict[str, Any],
        places: dict[str, str],
        loss_funcs: dict[str, LossFunction],
        args: SAETrainingArguments,
    ) -> None:
        super().__init__()
        self.names = list(saes)
        self.saes = nn.ModuleList(saes.values())  # a ModuleDict takes no names with dots
        self.places, self.loss_funcs, self.args = places, loss_funcs, args

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.names, self.saes, strict=True))

    def forward(
        self, batch: dict[str, torch.Tensor], dead: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """
        The sum of losses over SAEs, and for each SAE `fvu`, `l0`, `auxk` (scalars) and `fired` (d_sae,).

        Args:
            batch (`dict[str, torch.Tensor]`): Place -> activations (B, D).
            dead (list of `torch.BoolTensor` of shape `(d_sae,)`): Which latents AuxK is to revive, for each SAE.
        """
        total, found = [], []
        for (name, sae), mask in zip(self.items(), dead, strict=True):
            loss, figures = self._one(sae, batch[self.places[name]], self.loss_funcs[name], mask)
            total.append(loss)
            found.append(figures)
        return torch.stack(total).sum(), found

    def _one(
        self, sae: Any, x: torch.Tensor, loss_func: LossFunction, dead: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        args = self.args
        target, codes = sae.normalize(x), sae.encode(x)
        error, reconstruction = loss_func(target, codes, sae.decoder_rows(), sae.b_dec)
        spread = all_variance(target)
        spread = torch.where(spread > 0, spread, 1)  # tokens that are all alike still have a loss
        residual = target.detach() - reconstruction
        loss = error / spread
        aux = loss.new_zeros(())
        if args.auxk_coefficient and dead.any():
            aux = auxk_loss(sae, x, residual, dead, args.k_aux, all_variance(residual))
            loss = loss + args.auxk_coefficient * aux
        if sae.config.activation == "jumprelu":
            loss = loss + args.sparsity_coefficient * codes.l0().mean()
        elif sae.config.activation == "relu":
            loss = loss + args.sparsity_coefficient * codes.values.sum(-1).mean()
        fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=x.device)
        fired[codes.indices[codes.values > 0]] = True
        return loss, {
            "fvu": residual.square().mean() / spread,
            "l0": (codes.values > 0).sum(-1).float().mean(),
            "auxk": aux.detach(),
            "fired": fired,
        }


def all_variance(x: torch.Tensor) -> torch.Tensor:
    """[`variance`] of the tokens of all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rows = x.detach()
        sums = torch.cat([rows.sum(0, dtype=torch.double), rows.new_tensor([len(rows)]).double()])
        torch.distributed.all_reduce(sums)
        squares = (rows - (sums[:-1] / sums[-1]).to(rows)).square().sum(dtype=torch.double)
        torch.distributed.all_reduce(squares)
        spread = (squares / (sums[-1] * x.shape[1])).to(x.dtype)
    else:
        spread = variance(x)
    return spread


def named_loss(name: str, args: SAETrainingArguments, config: Any) -> LossFunction:
    """
    The loss called `name`, for an SAE of this configuration.

    Raises:
        ValueError: where the SAE has no codes of the kind that the loss needs.
    """
    if name == "reconstruction":
        return reconstruction_loss
    if name == "matryoshka":
        if sum(args.groups or ()) != config.d_sae:
            raise ValueError(f"`groups` must sum to d_sae={config.d_sae}, got {args.groups}.")
        return partial(matryoshka_loss, groups=args.groups or [])
    if config.activation != "topk":
        raise ValueError(f"`loss` {name!r} needs activation='topk', got {config.activation!r}.")
    if name == "multi_topk":
        if config.k % 4:
            raise ValueError(f"`k` must be a multiple of 4 for loss='multi_topk', got {config.k}.")
        return partial(multi_topk_loss, k=config.k // 4)
    budgets = args.budgets
    if isinstance(budgets, str):
        budgets = sorted({config.k, *(2**i for i in range(config.k.bit_length()))})
    if budgets is not None and not all(isinstance(k, int) and 1 <= k <= config.k for k in budgets):
        raise ValueError(f"`budgets` must be whole numbers in [1, k={config.k}], got {budgets}.")
    return partial(hierarchical_loss, budgets=budgets)
