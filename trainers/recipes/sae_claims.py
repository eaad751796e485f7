"""The claims of recipe `sae_hierarchical`, from its finished cells."""

from typing import Any

from hf_ext.tasks.stories import LATENTS
from trainers.recipes import statistics


Cells = list[dict[str, Any]]


def all_claims(
    cells: Cells, paper: str, match: float, truncated: float, detection: float, known: float
) -> list[dict[str, Any]]:
    """One after the other, each paired by seed where it can be; a threshold for each kind."""
    most = max((cell["settings"]["most"] for cell in cells), default=64)
    low = most // 8
    specialists = [low, most // 4, most // 2, most]
    claim = lambda id, **rest: statistics.claim(id, paper=paper, **rest)  # noqa: E731
    found = []
    for id, arm, budgets in (
        ("matches_specialists", "hierarchical", specialists),
        ("matches_specialists_full", "hierarchical_full", specialists[1:]),
    ):
        gaps = {k: _gaps(cells, arm, k) for k in budgets}
        seeds = sorted({seed for by in gaps.values() for seed in by})
        # a specialist with one seed stands for every seed
        worst = [max(abs(_of_seed(by, seed)) for by in gaps.values() if by) for seed in seeds]
        told = "; ".join(f"k = {k}: {', '.join(f'{by[s]:+.4f}' for s in sorted(by))}" for k, by in gaps.items())
        found.append(
            claim(
                id,
                statement=f"One {arm} autoencoder explains as much as each specialist at that one's own k (k = "
                f"{', '.join(map(str, budgets))}).",
                statistic="largest |difference of ev_global| over these k, by seed",
                found=statistics.mean_interval(worst) if worst else None,
                threshold=match,
                side="below",
                note=f"Hierarchical minus specialist by seed: {told}. Student's t, n = {len(worst)}; a specialist of "
                "one seed is compared with its own seed's, and stands for the other seeds.",
            )
        )
    ours, theirs = _paired(cells, f"ev_global_at_{low}", "hierarchical", f"topk_{most}")
    found.append(
        claim(
            "beats_truncated",
            statement=f"At k' = {low} it explains far more than the specialist for k = {most}, truncated.",
            statistic=f"ev_global_at_{low} of hierarchical minus topk_{most}, paired by seed",
            found=statistics.paired_interval(ours, theirs) if ours else None,
            threshold=truncated,
            side="above",
            note=f"Student's t, n = {len(ours)}.",
        )
    )
    rises = {arm: [_least_rise(cell) for cell in _done(cells, arm)] for arm in ("hierarchical", "hierarchical_full")}
    least = rises["hierarchical"]
    found.append(
        claim(
            "monotone",
            statement="Each further latent of a token explains more.",
            statistic=f"least ev_global(k' + 1) - ev_global(k') over k' = 1..{most - 1} of hierarchical, by seed",
            found=statistics.mean_interval(least) if least else None,
            threshold=0.0,
            side="above",
            note=f"Student's t, n = {len(least)}. Of hierarchical_full: "
            f"{', '.join(f'{value:.2g}' for value in rises['hierarchical_full'])}.",
        )
    )
    scores = {k: _paired(cells, f"detection_at_{k}", "hierarchical", f"topk_{k}") for k in (low, most)}
    ours, theirs = scores[most]
    told = "; ".join(
        f"k' = {k}: {', '.join(f'{a:.3f} against {b:.3f}' for a, b in zip(*pair, strict=True))}"
        for k, pair in scores.items()
    )
    found.append(
        claim(
            "interpretable_at_high_k",
            statement=f"Its latents at k' = {most} can be detected as well as those of the specialist for k = {most}.",
            statistic=f"detection_at_{most} of hierarchical minus topk_{most}, paired by seed",
            found=statistics.paired_interval(ours, theirs) if ours else None,
            threshold=detection,
            side="above",
            note=f"Hierarchical against the specialist of that k, by seed: {told}. Offline score, no language model "
            f"judges. Student's t, n = {len(ours)}.",
        )
    )
    found.append(_full_against_powers(cells, claim, most))
    if _done(cells, "known_hierarchical"):
        found.append(_known(cells, claim, known, low, most))
    return found


def _full_against_powers(cells: Cells, claim: Any, most: int) -> dict[str, Any]:
    """Expected from the pilot: better near K, worse at few latents, and slower."""
    told = []
    for k in (2**i for i in range(most.bit_length())):
        ours, theirs = _paired(cells, f"ev_global_at_{k}", "hierarchical_full", "hierarchical")
        told.append(f"{k}: {', '.join(f'{a - b:+.4f}' for a, b in zip(ours, theirs, strict=True))}")
    at_most = _paired(cells, f"ev_global_at_{most}", "hierarchical_full", "hierarchical")
    speeds = [
        [cell["cost"].get("tokens_per_cpu_s", 0.0) for cell in _done(cells, arm)]
        for arm in ("hierarchical_full", "hierarchical")
    ]
    slower = sum(speeds[1]) / len(speeds[1]) / (sum(speeds[0]) / len(speeds[0])) if all(map(any, speeds)) else 0.0
    return claim(
        "full_better_near_k",
        statement=f"Budgets 1..{most} explain more at k' = {most} than powers of two.",
        statistic=f"ev_global_at_{most} of hierarchical_full minus hierarchical, paired by seed",
        found=statistics.paired_interval(*at_most) if at_most[0] else None,
        threshold=0.0,
        side="above",
        note=f"Full minus powers of two at each k', by seed: {'; '.join(told)}. A step costs {slower:.1f} times as "
        "much.",
    )


def _known(cells: Cells, claim: Any, threshold: float, low: int, most: int) -> dict[str, Any]:
    told = []
    for k in (low, most):
        for kind in ("", *(f"{latent}_" for latent in LATENTS)):
            metric = f"f1_{kind}at_{k}"
            arms = ("known_hierarchical", f"known_topk_{k}")
            if all(metric in cell["metrics"] for arm in arms for cell in _done(cells, arm)):
                pair = [sum(values) / max(len(values), 1) for values in _paired(cells, metric, *arms)]
                told.append(f"{kind.rstrip('_') or 'all'} at {k}: {pair[0]:.3f} against {pair[1]:.3f}")
    ours, theirs = _paired(cells, f"f1_at_{low}", "known_hierarchical", f"known_topk_{low}")
    return claim(
        "known_latents",
        statement=f"On a model whose latents are known, its latents at k' = {low} mark them as well as those of the "
        f"specialist for k = {low}.",
        statistic=f"f1_at_{low} of known_hierarchical minus known_topk_{low}, paired by seed",
        found=statistics.paired_interval(ours, theirs) if ours else None,
        threshold=threshold,
        side="above",
        note=f"Mean F1 of the best latent, hierarchical against the specialist of that k: {'; '.join(told)}. "
        f"Student's t, n = {len(ours)}.",
    )


def _gaps(cells: Cells, arm: str, k: int) -> dict[int, float]:
    """Seed -> ev_global at k of `arm` minus that of the specialist, over seeds that both have."""
    metric = f"ev_global_at_{k}"
    ours, theirs = ({c["seed"]: c["metrics"][metric] for c in _done(cells, name)} for name in (arm, f"topk_{k}"))
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def _of_seed(by: dict[int, float], seed: int) -> float:
    return by.get(seed, sum(by.values()) / len(by))


def _paired(cells: Cells, metric: str, *arms: str) -> list[list[float]]:
    """As `statistics.by_seed`, over the cells that have the metric: at smoke few latents have contexts to score."""
    return statistics.by_seed([cell for cell in cells if metric in cell["metrics"]], metric, *arms)


def _least_rise(cell: dict[str, Any]) -> float:
    curve = cell["series"]["curve"]
    return min(b - a for a, b in zip(curve, curve[1:], strict=False))


def _done(cells: Cells, arm: str) -> Cells:
    return [cell for cell in cells if cell["arm"] == arm and cell["status"] == "done"]
