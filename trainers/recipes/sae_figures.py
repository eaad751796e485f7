"""What recipe `sae_hierarchical` measures of an autoencoder: curves over k', cross-entropy, detection, known facts."""

from pathlib import Path
from typing import Any

from hf_ext.tasks.stories import LATENTS


DOCUMENTS_AT_ONCE = 4


def units(most: int) -> dict[str, str]:
    """Metric -> unit, for budgets up to `most`."""
    found = {
        "ev_global": "1 - sum |x - x^|^2 / sum |x - mean x|^2 at its own k, held-out tokens",
        "ev_centered": "the same with the residual centred",
        "ev_per_token": "mean over tokens of 1 - |x - x^|^2 / |x - mean x|^2",
        "l0": "active latents per token at its own k",
        "dead_fraction": "share of latents that none of 32,768 held-out tokens activates, at its own k",
        "ce_clean": "nats per token, held-out texts",
        "tokens_per_cpu_s": "training samples per CPU second",
    }
    for k in powers(most):
        found[f"ev_global_at_{k}"] = f"ev_global with {k} latents a token"
        found[f"delta_ce_at_{k}"] = f"nats per token above the model, its stream replaced, {k} latents a token"
        found[f"ce_recovered_zero_at_{k}"] = f"share of what zero ablation costs, {k} latents a token"
        found[f"detection_at_{k}"] = f"(TPR + TNR) / 2, mean over latents, {k} latents a token"
        found[f"fuzzing_at_{k}"] = f"(TPR + TNR) / 2, mean over latents, {k} latents a token"
        found[f"token_entropy_at_{k}"] = f"nats, mean over the latents scored, {k} latents a token"
        found[f"f1_at_{k}"] = f"F1 of the best latent, mean over the grammar's, {k} latents a token"
        found |= {f"f1_{kind}_at_{k}": f"F1, mean over values of {kind}, {k} latents a token" for kind in LATENTS}
    return found


def at_any_budget(sae: Any, k: int) -> Any:
    """A TopK autoencoder that may also be asked for more latents than it was trained with."""
    sae.config.k = max(int(sae.config.k), k)
    return sae


def reconstruction_figures(sae: Any, x: Any, k: int, most: int) -> tuple[dict[str, float], list[float]]:
    """`ev_global` at powers of two up to `most`, other figures at its own `k`; and `ev_global` at each of 1..most."""
    from hf_ext.sae.metrics import budget_curve, reconstruction_metrics

    own = reconstruction_metrics(at_any_budget(sae, most), x, k)
    curve = budget_curve(sae, x, range(1, most + 1))
    figures = {f"ev_global_at_{budget}": curve[budget] for budget in powers(most)}
    figures |= {name: own[name] for name in ("ev_global", "ev_centered", "ev_per_token", "l0", "dead_fraction")}
    return figures, [round(value, 5) for value in curve.values()]


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**i for i in range(most.bit_length())]


def language_figures(sae: Any, model: str, input_ids: Any, budgets: list[int]) -> dict[str, float]:
    """Cross-entropy with the stream replaced by its reconstruction, at some budgets, over whole rows."""
    import torch

    from hf_ext import tiny
    from hf_ext.sae.metrics import language_metrics, recovered

    lm, _ = tiny.load(model)
    figures: dict[str, float] = {}
    with torch.no_grad():
        for k in budgets:
            parts = [language_metrics(lm, {"sae": sae}, ids, k=k) for ids in input_ids.split(DOCUMENTS_AT_ONCE)]
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            figures["ce_clean"] = float(found["ce_clean"].mean())
            figures[f"delta_ce_at_{k}"] = float((found["ce_sae"] - found["ce_clean"]).mean())
            figures[f"ce_recovered_zero_at_{k}"] = recovered(found, "zero")
    return figures


def interpretability_figures(
    sae: Any, x: Any, kept: Any, input_ids: Any, budgets: list[int], settings: dict[str, Any]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Detection and fuzzing scores at some budgets, means over some latents drawn at random; and each score."""
    import torch

    from hf_ext.sae import SparseCodes
    from hf_ext.sae.interpretability import score_latents, token_entropy

    with torch.no_grad():
        parts = [sae.encode(row) for row in x.split(16)]
        values = torch.cat([part.values for part in parts]) * kept[:, :, None]
        codes = SparseCodes(values, torch.cat([part.indices for part in parts]), sae.config.d_sae)
    figures: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    for k in budgets:
        cut = codes.first(k)
        scores = score_latents(cut, input_ids, most=settings["latents"], least=settings["least"])
        if not scores:
            continue
        for name in ("detection", "fuzzing"):
            each = [getattr(score, name) for score in scores]
            series[f"{name}_at_{k}"] = [round(value, 4) for value in each]
            figures[f"{name}_at_{k}"] = sum(each) / len(each)
        entropies = token_entropy(cut, input_ids, [score.latent for score in scores])
        figures[f"token_entropy_at_{k}"] = sum(entropies) / len(entropies)
    return figures, series


def known_latent_figures(sae: Any, file: Path, budgets: list[int]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """F1 of the best autoencoder latent for each of the grammar's, chosen on half of the tokens; means by kind."""
    import json

    import torch
    from safetensors import safe_open

    from hf_ext.sae.interpretability import best_f1

    with safe_open(file, framework="pt") as content:
        x, labels = content.get_tensor("test").float(), content.get_tensor("labels")
        names = json.loads(content.metadata()["names"])
    # halves of the test in its order, so that no story is in both but one
    half = torch.arange(len(x)) < len(x) // 2
    with torch.no_grad():
        codes = sae.encode(x)
    figures: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    for k in budgets:
        f1, _ = best_f1(codes.first(k), labels, half)
        seen = ~f1.isnan()
        series[f"f1_at_{k}"] = [round(float(value), 4) for value in f1.nan_to_num(-1.0)]
        figures[f"f1_at_{k}"] = float(f1[seen].mean())
        for kind in dict.fromkeys(latent for latent, _ in names):
            mine = torch.tensor([latent == kind for latent, _ in names]) & seen
            if mine.any():
                figures[f"f1_{kind}_at_{k}"] = float(f1[mine].mean())
    return figures, series
