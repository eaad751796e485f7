"""Figures of merit of a sparse autoencoder, each under its own name: there is no bare "explained variance".

With e = x - x^ and means over tokens b unless said otherwise:

    ev_global    = 1 - sum |e_b|^2 / sum |x_b - mean x|^2             SAELens' explained_variance, sparsify's 1 - FVU
    ev_centered  = 1 - sum |e_b - mean e|^2 / sum |x_b - mean x|^2    dictionary_learning, the formula in KronSAE
    ev_per_token = mean_b (1 - |e_b|^2 / |x_b - mean x|^2)            what KronSAE's listing computes

They differ most where a few tokens have huge norms. Sums are kept in float64.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch


class ReconstructionSums:
    """
    Sums over tokens, from which [`compute`] makes the figures; what does not fit in memory comes piece by piece.

    Args:
        mean (`torch.Tensor` of shape `(D,)`): Mean of x over all tokens that will come, see [`mean_of`].
        d_sae (`int`): Number of latents.
    """

    def __init__(self, mean: torch.Tensor, d_sae: int) -> None:
        self.mean = mean.double()
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=mean.device)
        self.error_sum = torch.zeros_like(self.mean)
        self.tokens = 0
        self._sums: dict[str, float] = dict.fromkeys(
            ("error", "spread", "per_token", "active", "cosine", "ratio", "along", "made"), 0.0
        )

    @torch.no_grad()
    def update(self, x: torch.Tensor, reconstruction: torch.Tensor, codes: Any) -> None:
        """Add tokens x (..., D), their reconstruction, and their codes (..., K)."""
        x = x.reshape(-1, x.shape[-1]).double()
        reconstruction = reconstruction.reshape(x.shape).double()
        error = x - reconstruction
        squares, spread = error.square().sum(1), (x - self.mean).square().sum(1)
        norms, new_norms = x.norm(dim=1), reconstruction.norm(dim=1)
        tiny = torch.finfo(torch.double).tiny
        values, indices = codes.values.reshape(-1), codes.indices.reshape(-1)
        self.fired += torch.bincount(indices[values > 0], minlength=len(self.fired))
        self.error_sum += error.sum(0)
        self.tokens += len(x)
        for name, amount in (
            ("error", squares),
            ("spread", spread),
            ("per_token", 1 - squares / spread.clamp_min(tiny)),
            ("active", (values > 0).double()),
            ("cosine", (x * reconstruction).sum(1) / (norms * new_norms).clamp_min(tiny)),
            ("ratio", new_norms / norms.clamp_min(tiny)),
            ("along", (x * reconstruction).sum(1)),
            ("made", new_norms.square()),
        ):
            self._sums[name] += float(amount.sum())

    def merge(self, other: "ReconstructionSums") -> None:
        """Add the tokens of `other`, which has the same `mean`."""
        self.fired += other.fired
        self.error_sum += other.error_sum
        self.tokens += other.tokens
        for name, amount in other._sums.items():
            self._sums[name] += amount

    def compute(self) -> dict[str, float]:
        """
        The figures.

        Returns:
            `dict[str, float]`: `ev_global`, `ev_centered`, `ev_per_token` (fractions, at most 1); `l0` (active latents
            per token); `dead_fraction` (latents that never fired) among `tokens`; `cosine` and `norm_ratio` (means
            over tokens of the cosine of x and x^, and of |x^| / |x|); `relative_bias` (sum |x^|^2 / sum x x^: below 1
            where x^ is too short, arXiv 2404.16014).
        """
        if not self.tokens:
            raise ValueError("There must be at least one token to measure, got none.")
        figures = _figures(self._sums, self.error_sum, self.tokens)
        return figures | {"dead_fraction": float((self.fired == 0).double().mean()), "tokens": self.tokens}

    def density(self) -> torch.Tensor:
        """`(d_sae,)`: the fraction of tokens on which each latent fires."""
        return self.fired.double() / max(self.tokens, 1)


def _figures(sums: dict[str, float], error_sum: torch.Tensor, tokens: int) -> dict[str, float]:
    spread = sums["spread"] if sums["spread"] > 0 else math.nan
    centred = sums["error"] - float(error_sum.square().sum()) / tokens
    return {
        "ev_global": 1 - sums["error"] / spread,
        "ev_centered": 1 - centred / spread,
        "ev_per_token": sums["per_token"] / tokens,
        "l0": sums["active"] / tokens,
        "cosine": sums["cosine"] / tokens,
        "norm_ratio": sums["ratio"] / tokens,
        "relative_bias": sums["made"] / sums["along"] if sums["along"] else math.nan,
    }


def reconstruction_intervals(
    parts: Sequence[ReconstructionSums], *, samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """
    The 95 % interval of each figure of [`ReconstructionSums.compute`] that is a mean, by drawing documents.

    Args:
        parts (sequence of [`ReconstructionSums`]): One for each document, all with the same `mean`.
        samples, seed (`int`): As in [`bootstrap`].
    """
    columns = {name: torch.tensor([p._sums[name] for p in parts], dtype=torch.double) for name in parts[0]._sums}
    errors = torch.stack([part.error_sum for part in parts])
    tokens = torch.tensor([part.tokens for part in parts])

    def figures(chosen: torch.Tensor) -> dict[str, float]:
        sums = {name: float(column[chosen].sum()) for name, column in columns.items()}
        return _figures(sums, errors[chosen].sum(0), int(tokens[chosen].sum()))

    drawn = [figures(chosen) for chosen in _draws(len(parts), samples, seed)]
    return {name: _interval([found[name] for found in drawn]) for name in drawn[0]}


@torch.no_grad()
def reconstruction_metrics(sae: Any, x: torch.Tensor, k: int | None = None, *, batch: int = 4096) -> dict[str, float]:
    """
    The figures of [`ReconstructionSums.compute`] for activations that are at hand.

    Args:
        sae ([`SAEModel`]): In evaluation mode.
        x (`torch.Tensor` of shape `(N, D)`): Activations.
        k (`int`, *optional*): Budget, as in `sae.encode`.
        batch (`int`, *optional*, defaults to 4096): Tokens at a time.
    """
    sums = ReconstructionSums(mean_of([x]), sae.config.d_sae)
    for part in x.split(batch):
        output = sae(part, k)
        sums.update(part, output.reconstruction, output.codes)
    return sums.compute()


@torch.no_grad()
def budget_curve(sae: Any, x: torch.Tensor, budgets: Sequence[int], *, batch: int = 4096) -> dict[int, float]:
    """
    `ev_global` at each budget k': the codes are found once, and cut (HierarchicalTopK, arXiv 2505.24473, figure 3).

    Args:
        sae ([`SAEModel`]), x (`torch.Tensor` of shape `(N, D)`): As in [`reconstruction_metrics`].
        budgets (`Sequence[int]`): Numbers in [1, K].
    """
    mean = mean_of([x])
    errors, spread = dict.fromkeys(budgets, 0.0), 0.0
    for part in x.split(batch):
        codes = sae.encode(part)
        spread += float((part.double() - mean).square().sum())
        for k in budgets:
            # codes of an activation without a fixed budget may be narrower than k'
            found = sae.decode(codes.first(min(k, codes.k)), part)
            errors[k] += float((part.double() - found.double()).square().sum())
    return {k: 1 - error / spread for k, error in errors.items()}


def mean_of(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """`(D,)` in float64: the mean over the tokens of all parts, each (..., D)."""
    total: Any = 0
    tokens = 0
    for part in parts:
        rows = part.reshape(-1, part.shape[-1])
        total = total + rows.sum(0, dtype=torch.double)
        tokens += len(rows)
    if not tokens:
        raise ValueError("There must be at least one token to measure, got none.")
    return total / tokens


def pca_ev_global(x: torch.Tensor, budgets: Sequence[int]) -> dict[int, float]:
    """
    `ev_global` of the best linear reconstruction of x (N, D) by k' directions: a baseline that is not sparse, since
    every token uses the same ones.
    """
    centred = x.double() - mean_of([x])
    variances = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp_min(0)
    shares = variances.cumsum(0) / variances.sum()
    return {k: float(shares[min(k, len(shares)) - 1]) for k in budgets}


@torch.no_grad()
def language_metrics(
    model: Any,
    saes: dict[str, Any],
    input_ids: torch.Tensor,
    *,
    skip_positions: int = 1,
    k: int | None = None,
    means: dict[str, torch.Tensor] | None = None,
    ablate: bool = True,
) -> dict[str, torch.Tensor]:
    """
    What replacing activations by their reconstructions costs the language model, document by document.

    Args:
        model (`PreTrainedModel`): A causal LM.
        saes (`dict[str, SAEModel]`): Name -> SAE with `hook_name`; all are spliced in at once.
        input_ids (`torch.LongTensor` of shape `(documents, T)`): Whole rows, without padding.
        skip_positions (`int`, *optional*, defaults to 1): First positions of each row that are left as they are.
        k (`int`, *optional*): Budget, as in `sae.encode`.
        means (`dict[str, torch.Tensor]`, *optional*): Name -> (D,), what mean ablation puts in; by default the mean
            over these documents.
        ablate (`bool`, *optional*, defaults to `True`): Whether ablations are measured, too: two passes more.

    Returns:
        `dict[str, torch.Tensor]`, each `(documents,)` in nats per token: `ce_clean`; `ce_sae`, `ce_zero` and `ce_mean`
        with the activations replaced by reconstructions, by 0, and by their mean; `kl`, from the clean prediction to
        the one with reconstructions. See [`recovered`] for scores.
    """
    from hf_ext.record import edit, record
    from hf_ext.sites import Hook

    hooks = {name: Hook(sae.config.hook_name, sae.config.hook_io) for name, sae in saes.items()}
    with record(model, hooks) as seen:
        clean = model(input_ids, use_cache=False).logits
    if means is None:
        means = {name: mean_of([part[:, skip_positions:] for part in parts]) for name, parts in seen.items()}
    replacements: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
        "ce_sae": lambda name, hidden: saes[name](hidden, k).reconstruction
    }
    if ablate:
        replacements["ce_zero"] = lambda name, hidden: torch.zeros_like(hidden)
        replacements["ce_mean"] = lambda name, hidden: means[name].to(hidden).expand_as(hidden)
    found = {"ce_clean": _cross_entropy(clean, input_ids)}
    for metric, replace in replacements.items():

        def change(name: str, hidden: torch.Tensor, step: Any, replace: Any = replace) -> torch.Tensor:
            return torch.cat([hidden[:, :skip_positions], replace(name, hidden[:, skip_positions:])], 1).to(hidden)

        with edit(model, hooks, change):
            logits = model(input_ids, use_cache=False).logits
        found[metric] = _cross_entropy(logits, input_ids)
        if metric == "ce_sae":
            p, q = clean[:, :-1].float().log_softmax(-1), logits[:, :-1].float().log_softmax(-1)
            found["kl"] = (p.exp() * (p - q)).sum(-1).double().mean(1)
    return found


def recovered(found: dict[str, torch.Tensor], of: str = "zero") -> float:
    """
    CE recovered: `(ce_zero - ce_sae) / (ce_zero - ce_clean)` over all documents, or with `of="mean"` over `ce_mean`.
    1 is the model as it was, 0 is no better than zero (mean) ablation. The two differ widely: name which.
    """
    if of not in ("zero", "mean"):
        raise ValueError(f'`of` must be "zero" or "mean", got {of!r}.')
    worst, sae, clean = (float(found[name].mean()) for name in (f"ce_{of}", "ce_sae", "ce_clean"))
    return (worst - sae) / (worst - clean)


def bootstrap(
    statistic: Callable[[torch.Tensor], float],
    documents: int,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """
    The percentile interval of `statistic(chosen)`, where `chosen` are document numbers drawn with repetition: tokens
    of a document depend on each other, so documents are what is drawn.

    Example:

        low, high = bootstrap(lambda chosen: float(found["ce_sae"][chosen].mean()), len(found["ce_sae"]))
    """
    return _interval([statistic(chosen) for chosen in _draws(documents, samples, seed)], level)


def _draws(documents: int, samples: int, seed: int) -> Iterator[torch.Tensor]:
    if documents < 2:
        raise ValueError(f"`documents` must be at least 2 to draw from, got {documents}.")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        yield torch.randint(documents, (documents,), generator=generator)


def _interval(found: list[float], level: float = 0.95) -> tuple[float, float]:
    values = torch.tensor(found, dtype=torch.double)
    tail = (1 - level) / 2
    return float(values.quantile(tail)), float(values.quantile(1 - tail))


def _cross_entropy(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean over each row's tokens but the first, in nats."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), input_ids[:, 1:], reduction="none"
    )
    return losses.double().mean(1)
