"""One SAE on texts it has not seen: each figure under its own name, with an interval over documents, beside baselines.

    for each document:  activations at the hook once; reconstruction, cross-entropy and KL for each budget
    figures:            means over all tokens; intervals by drawing documents, whose tokens depend on each other
    baselines:          a random SAE, one that learns with a random decoder kept fixed, PCA; on the same activations

`python -m hf_ext.sae eval` is the command line of this file.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from hf_ext.record import record
from hf_ext.sae.configuration_sae import SAEConfig
from hf_ext.sae.interpretability import score_latents, token_entropy
from hf_ext.sae.losses import reconstruction_loss, variance
from hf_ext.sae.metrics import (
    ReconstructionSums,
    bootstrap,
    language_metrics,
    mean_of,
    pca_ev_global,
    reconstruction_intervals,
    reconstruction_metrics,
    recovered,
)
from hf_ext.sae.modeling_sae import SAEModel
from hf_ext.sites import Hook


BASELINES = ("random", "frozen_decoder", "pca")
FROZEN_STEPS, FROZEN_BATCH, FROZEN_RATE = 200, 512, 1e-3
DENSITY_BINS = [-6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0]


def evaluate(
    sae: Any,
    model: Any,
    documents: Sequence[torch.Tensor],
    budgets: Sequence[int | None] = (None,),
    *,
    skip_positions: int = 1,
    baselines: Sequence[str] = (),
    scored_latents: int = 0,
    samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Evaluate an SAE at its hook of a model.

    Args:
        sae ([`SAEModel`]): With `hook_name`, in evaluation mode.
        model (`PreTrainedModel`): The causal LM whose activations it reads.
        documents (sequence of `torch.LongTensor` of shape `(T,)`): Token ids, at least two documents; their lengths
            may differ.
        budgets (sequence of `int` or None, *optional*, defaults to its own): k', as in `sae.encode`.
        skip_positions (`int`, *optional*, defaults to 1): First positions of each document that are neither counted
            nor replaced.
        baselines (sequence of `str`, *optional*): Of "random", "frozen_decoder" and "pca": `ev_global` of each at each
            budget, on the same tokens. The frozen decoder is trained on them as well, so it is flattered.
        scored_latents (`int`, *optional*, defaults to 0): How many latents to score by detection and fuzzing.
        samples (`int`, *optional*, defaults to 1000): Of the bootstrap.
        seed (`int`, *optional*, defaults to 0): Of all draws.
        progress (`bool`, *optional*, defaults to `True`): A bar on stderr.

    Returns:
        `dict`, ready for JSON: `documents`, `tokens`; `budgets`: a list with `k` and `figures` (name -> `value` and,
        where it is a mean over documents, `ci95`), `density` (latents by the power of ten of their density),
        `l0_quantiles`, and `scores` of latents; `baselines`: name -> budget -> `ev_global`.

    Raises:
        ValueError: for fewer than two documents, an unknown baseline, or a budget that the SAE has not.
        FloatingPointError: for activations with NaN or infinity, with the hook and how many tokens.
    """
    documents = [ids.reshape(-1) for ids in documents]
    if len(documents) < 2:
        raise ValueError(f"`documents` must be at least 2, whose spread gives intervals, got {len(documents)}.")
    short = sum(len(ids) <= skip_positions + 1 for ids in documents)
    if short:
        raise ValueError(f"`documents` must be longer than skip_positions + 1 tokens, got {short} that are not.")
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ValueError(f"`baselines` must be of {', '.join(BASELINES)}, got {', '.join(unknown)}.")
    hook = Hook(sae.config.hook_name, sae.config.hook_io)
    for k in budgets:
        sae.encode(torch.zeros(1, sae.config.d_in), k)  # refuses a budget that it has not
    rounds = len(documents) * (1 + len(budgets))
    with torch.no_grad(), tqdm(total=rounds, unit="doc", desc="evaluation", disable=not progress) as bar:
        activations = []
        for ids in documents:
            with record(model, {"x": hook}, stop=True) as seen:
                model(input_ids=ids[None], use_cache=False)
            activations.append(seen["x"][0][0, skip_positions:])
            bar.update(1)
        mean = mean_of(activations)
        found: list[dict[str, Any]] = []
        ablated: dict[str, torch.Tensor] = {}
        for k in budgets:
            parts: list[ReconstructionSums] = []
            costs: list[dict[str, torch.Tensor]] = []
            active: list[torch.Tensor] = []
            for ids, x in zip(documents, activations, strict=True):
                output = sae(x, k)
                parts.append(ReconstructionSums(mean, sae.config.d_sae))
                parts[-1].update(x, output.reconstruction, output.codes)
                active.append((output.codes.values > 0).sum(-1))
                options: dict[str, Any] = {"skip_positions": skip_positions, "k": k, "means": {"x": mean}}
                costs.append(language_metrics(model, {"x": sae}, ids[None], ablate=not ablated, **options))
                bar.update(1)
            merged = {name: torch.cat([cost[name] for cost in costs]) for name in costs[0]}
            # ablations do not depend on the budget
            ablated = ablated or {name: merged[name] for name in ("ce_zero", "ce_mean")}
            merged |= ablated
            found.append(_at_budget(sae, k, parts, merged, torch.cat(active), samples, seed))
            if scored_latents:
                found[-1]["scores"] = _scores(sae, k, documents, activations, skip_positions, scored_latents, seed)
    x = torch.cat(activations)
    return {
        "documents": len(documents),
        "tokens": len(x),
        "budgets": found,
        "baselines": {name: _baseline(name, sae, x, budgets, seed) for name in baselines},
    }


def _at_budget(
    sae: Any,
    k: int | None,
    parts: list[ReconstructionSums],
    costs: dict[str, torch.Tensor],
    active: torch.Tensor,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    whole = ReconstructionSums(parts[0].mean, sae.config.d_sae)
    for part in parts:
        whole.merge(part)
    values: dict[str, float] = whole.compute()
    intervals: dict[str, tuple[float, float]] = reconstruction_intervals(parts, samples=samples, seed=seed)
    count = len(parts)

    def cost(name: str, statistic: Any) -> None:
        values[name] = statistic(torch.arange(count))
        intervals[name] = bootstrap(statistic, count, samples=samples, seed=seed)

    for name in costs:
        cost(name, lambda chosen, name=name: float(costs[name][chosen].mean()))
    cost("delta_ce", lambda chosen: float((costs["ce_sae"] - costs["ce_clean"])[chosen].mean()))
    for of in ("zero", "mean"):
        at = lambda chosen, of=of: recovered({name: each[chosen] for name, each in costs.items()}, of)  # noqa: E731
        cost(f"ce_recovered_{of}", at)
    del values["tokens"]
    figures = {
        name: {"value": value} | ({"ci95": list(intervals[name])} if name in intervals else {})
        for name, value in values.items()
    }
    density = whole.density()
    edges = torch.tensor(DENSITY_BINS, dtype=density.dtype)
    places = torch.bucketize(density[density > 0].log10(), edges[1:-1])
    counts = torch.bincount(places, minlength=len(edges) - 1).tolist()
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    return {
        "k": k,
        "figures": figures,
        "density": {"log10_edges": DENSITY_BINS, "latents": counts, "never": int((density == 0).sum())},
        "l0_quantiles": active.float().quantile(shares).tolist() if len(active) < 2**24 else None,
    }


def _scores(
    sae: Any,
    k: int | None,
    documents: list[torch.Tensor],
    activations: list[torch.Tensor],
    skip_positions: int,
    most: int,
    seed: int,
) -> dict[str, Any]:
    """Detection and fuzzing over the documents cut to one length, left-out positions silent."""
    length = min(map(len, documents)) - skip_positions
    x = torch.stack([part[:length] for part in activations])
    ids = torch.stack([ids[skip_positions:][:length] for ids in documents])
    codes = sae.encode(x, k)
    scored = score_latents(codes, ids, most=most, seed=seed)
    if not scored:
        return {"latents": 0}
    entropies = token_entropy(codes, ids, [score.latent for score in scored])
    figures: dict[str, Any] = {"latents": len(scored)}
    for name, each in (
        ("detection", [score.detection for score in scored]),
        ("fuzzing", [score.fuzzing for score in scored]),
        ("token_entropy", entropies),
    ):
        column = torch.tensor(each, dtype=torch.double)
        figures[name] = {"value": float(column.mean())}
        if len(each) > 1:  # over latents, which are what was drawn
            mean = lambda chosen, column=column: float(column[chosen].mean())  # noqa: E731
            figures[name]["ci95"] = list(bootstrap(mean, len(each), seed=seed))
    return figures


def _baseline(name: str, sae: Any, x: torch.Tensor, budgets: Sequence[int | None], seed: int) -> dict[str, float]:
    """Budget -> `ev_global` on the same tokens."""
    own = sae.config.k if sae.config.activation == "topk" else None
    if own is None and None in budgets:
        own = reconstruction_metrics(sae, x)["l0"]
    counts = [max(1, round(own if k is None else k)) for k in budgets]
    if name == "pca":
        return {str(k): value for k, value in pca_ev_global(x, counts).items()}
    found = {}
    for k in counts:
        other = _untrained(sae, x, k, seed)
        if name == "frozen_decoder":
            _train_encoder(other, x.float(), seed)
        found[str(k)] = reconstruction_metrics(other.eval(), x)["ev_global"]
    return found


def _untrained(sae: Any, x: torch.Tensor, k: int, seed: int) -> SAEModel:
    """A TopK SAE of the same size as initialised, its b_dec the mean of what it reads."""
    kept = ("d_in", "d_sae", "input_norm", "input_scale", "apply_b_dec_to_input", "hook_name", "hook_io")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = SAEModel(SAEConfig(k=k, **{name: getattr(sae.config, name) for name in kept}))
    with torch.no_grad():
        other.b_dec.copy_(other.normalize(x).mean(0))
    return other


def _train_encoder(sae: SAEModel, x: torch.Tensor, seed: int) -> None:
    sae.W_dec.requires_grad_(False)
    learned = [parameter for parameter in sae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=FROZEN_RATE)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(FROZEN_STEPS):
            batch = x[torch.randint(len(x), (min(FROZEN_BATCH, len(x)),), generator=generator)]
            target = sae.normalize(batch)
            loss, _ = reconstruction_loss(target, sae.encode(batch), sae.W_dec, sae.b_dec)
            (loss / variance(target)).backward()
            optimizer.step()
            optimizer.zero_grad()
