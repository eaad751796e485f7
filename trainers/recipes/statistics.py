"""Intervals and verdicts; each states what it assumes. Every interval is two-sided, at 95 %."""

from collections.abc import Sequence
from typing import Any, Literal


Verdict = Literal["holds", "fails", "inconclusive"]


def mean_interval(values: Sequence[float]) -> tuple[float, list[float | None]]:
    """
    Mean of few independent runs and its interval by Student's t (normal errors); no interval from a single run.

    Args:
        values (sequence of `float`): One figure for each seed, all finite.

    Returns:
        `(mean, [low, high])`; `[None, None]` for one value.

    Raises:
        ValueError: if there is no value, or one that is not finite.
    """
    import numpy as np
    from scipy import stats

    data = _checked(values)
    mean = float(data.mean())
    if len(data) == 1:
        return mean, [None, None]
    half = float(stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / np.sqrt(len(data)))
    return mean, [mean - half, mean + half]


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, list[float | None]]:
    """`mean_interval` of ours - theirs, seed by seed: what the two arms of a seed share cancels out."""
    if len(ours) != len(theirs):
        raise ValueError(f"`ours` and `theirs` must pair up, got {len(ours)} and {len(theirs)} values.")
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def bootstrap(
    ours: Sequence[float], theirs: Sequence[float] | None = None, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, list[float | None]]:
    """
    Mean over many items, or of the paired difference ours - theirs, with the percentile bootstrap's interval.

    For items (held-out rows, questions), of which there are dozens; for a handful of seeds it is far too narrow, and
    `mean_interval` is right.

    Args:
        ours, theirs (sequences of `float`): One figure an item; items in the same order.
        resamples (`int`, *optional*, defaults to 10000): Bootstrap samples.
        seed (`int`, *optional*, defaults to 0): Of the resampling, so that an interval can be had again.
    """
    import numpy as np
    from scipy import stats

    if theirs is not None and len(ours) != len(theirs):
        raise ValueError(f"`ours` and `theirs` must pair up, got {len(ours)} and {len(theirs)} values.")
    data = _checked(ours) - (0 if theirs is None else _checked(theirs))
    mean = float(data.mean())
    if len(data) == 1 or np.ptp(data) == 0:
        return mean, [None, None] if len(data) == 1 else [mean, mean]
    interval = stats.bootstrap(
        (data,), np.mean, n_resamples=resamples, method="percentile", batch=100, rng=np.random.default_rng(seed)
    ).confidence_interval
    return mean, [float(interval.low), float(interval.high)]


def verdict(interval: Sequence[float | None], threshold: float, side: Literal["above", "below"]) -> Verdict:
    """`holds` where the whole interval lies on the claimed side of the threshold, `fails` where on the other."""
    low, high = interval
    if low is None or high is None:
        return "inconclusive"
    if side == "below":
        low, high, threshold = -high, -low, -threshold
    return "holds" if low > threshold else "fails" if high < threshold else "inconclusive"


def claim(
    id: str,
    *,
    paper: str,
    statement: str,
    statistic: str,
    found: tuple[float, list[float | None]] | None,
    threshold: float,
    side: Literal["above", "below"],
    note: str = "",
) -> dict[str, Any]:
    """A claim as the result's JSON holds it; `found` is (estimate, interval), None where no cell could tell."""
    estimate, interval = found or (None, [None, None])
    return {
        "id": id,
        "paper": paper,
        "statement": statement,
        "statistic": statistic,
        "estimate": estimate if estimate is None else round(estimate, 5),
        "ci95": [x if x is None else round(x, 5) for x in interval],
        "threshold": threshold,
        "side": side,
        "verdict": verdict(interval, threshold, side),
        "note": note,
    }


def by_seed(cells: Sequence[dict[str, Any]], metric: str, *arms: str) -> list[list[float]]:
    """`metric` of each arm, over the seeds for which all of `arms` are done, in the same order."""
    done = [cell for cell in cells if cell["status"] == "done"]
    found = [{cell["seed"]: cell["metrics"][metric] for cell in done if cell["arm"] == arm} for arm in arms]
    seeds = sorted(set.intersection(*(set(values) for values in found)))
    return [[values[seed] for seed in seeds] for values in found]


def _checked(values: Sequence[float]) -> Any:
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0 or not np.isfinite(data).all():
        raise ValueError(f"`values` must be finite numbers, at least one, got {list(values)[:5]}.")
    return data
