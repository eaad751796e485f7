"""Can it be told from outside when a latent fires? Detection and fuzzing without a language model; its tokens; F1.

- *Detection*: an explanation of the latent is made from half of its contexts; with it, a judge says of the others, and
  of as many in which the latent is silent, whether it fires there. *Fuzzing*: contexts with marked tokens; the judge
  says whether the marks are where the latent fires. The score of both is (TP / P + TN / N) / 2: 0.5 is a coin.
- The explanation is a set of tokens and pairs of tokens, and the judge looks for them: cheap, repeatable, and blind to
  whatever a latent means beyond that. A language model takes the same two places (`explain`, `judge`).
- The procedure and its sizes (contexts of 31 tokens, 64 + 64, activations above the median) are those of automated
  interpretation as KronSAE (arXiv 2505.22255) and HierarchicalTopK (arXiv 2505.24473) use it.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


LENGTH = 31
MOST_ITEMS, MOST_CANDIDATES = 16, 32
CONTEXTS_PER_CALL = 8
LATENTS_AT_ONCE = 64


class Context(NamedTuple):
    """
    Some tokens in a row.

    Attributes:
        ids (`tuple[int, ...]`): Their ids.
        activations (`tuple[float, ...]`): Of the latent, where an explanation is made; empty where a judge decides.
        marks (`tuple[bool, ...]`): For fuzzing: which tokens are marked; empty for detection.
    """

    ids: tuple[int, ...]
    activations: tuple[float, ...] = ()
    marks: tuple[bool, ...] = ()


# contexts where the latent fires, contexts where it does not -> an explanation of any kind
Explain = Callable[[list[Context], list[Context]], Any]
# explanation, at most `CONTEXTS_PER_CALL` contexts -> whether each fits
Judge = Callable[[Any, list[Context]], Sequence[bool]]


@dataclass(frozen=True)
class LatentScore:
    """
    Attributes:
        latent (`int`): Which.
        detection (`float`): In [0, 1]; 0.5 is a coin.
        fuzzing (`float`): In [0, 1]; 0.5 is a coin.
        contexts (`int`): Activating contexts that were judged (and as many others).
        explanation: What `explain` returned.
    """

    latent: int
    detection: float
    fuzzing: float
    contexts: int
    explanation: Any


def score_latents(
    codes: Any,
    input_ids: torch.Tensor,
    latents: Sequence[int] | None = None,
    *,
    most: int = 100,
    contexts: int = 64,
    least: int = 16,
    length: int = LENGTH,
    explain: Explain | None = None,
    judge: Judge | None = None,
    seed: int = 0,
) -> list[LatentScore]:
    """
    Detection and fuzzing scores of some latents.

    Args:
        codes ([`SparseCodes`] of shape `(rows, T, K)`): Of the tokens; cut them (`codes.first(k)`) for a budget.
        input_ids (`torch.LongTensor` of shape `(rows, T)`): The tokens. Where codes are all 0 (left-out positions) a
            latent counts as silent.
        latents (sequence of `int`, *optional*): Which; by default all, in an order drawn from `seed`.
        most (`int`, *optional*, defaults to 100): Stop when so many are scored.
        contexts (`int`, *optional*, defaults to 64): Activating contexts to judge, and as many silent ones.
        least (`int`, *optional*, defaults to 16): A latent with fewer contexts to judge is passed over: its contexts
            are those above the median of its activations, half of which the explanation takes.
        length (`int`, *optional*, defaults to 31): Tokens of a context.
        explain (`Callable`, *optional*, defaults to [`common_tokens`]):
            `(active, silent) -> explanation`, from contexts with activations.
        judge (`Callable`, *optional*, defaults to [`contains`]): `(explanation, contexts) -> bools`, for at most 8
            contexts a call; those with `marks` are asked whether the marks are right.
        seed (`int`, *optional*, defaults to 0): Of all draws.

    Returns:
        `list[LatentScore]`, in the order of `latents`.

    Raises:
        ValueError: for shapes that do not fit, rows shorter than a context, and latents out of range.

    Example:

        scores = score_latents(sae.encode(hidden).first(8), input_ids, most=200)
        mean = sum(score.detection for score in scores) / len(scores)
    """
    rows, size = _checked(codes, input_ids, length)
    if latents is None:
        latents = torch.randperm(codes.d_sae, generator=torch.Generator().manual_seed(seed)).tolist()
    bad = [latent for latent in latents if not 0 <= latent < codes.d_sae]
    if bad:
        raise ValueError(f"`latents` must be in [0, d_sae={codes.d_sae}), got {bad[:5]}.")
    if not 0 < least <= contexts:
        raise ValueError(f"`least` must be in [1, contexts={contexts}], got {least}.")
    explain, judge = explain or common_tokens, judge or contains
    pieces = size // length
    windows = input_ids[:, : pieces * length].reshape(rows * pieces, length)
    found: list[LatentScore] = []
    for first in range(0, len(latents), LATENTS_AT_ONCE):
        part = latents[first : first + LATENTS_AT_ONCE]
        dense = activations_of(codes, part)[:, : pieces * length].reshape(len(windows), length, len(part))
        for at, latent in enumerate(part):
            score = _score(latent, dense[:, :, at], windows, contexts, least, explain, judge, seed)
            if score is not None:
                found.append(score)
            if len(found) == most:
                return found
    return found


def activations_of(codes: Any, latents: Sequence[int]) -> torch.Tensor:
    """`(..., len(latents))`: activations of a few latents, from codes (..., K)."""
    places = torch.full((codes.d_sae,), -1, dtype=torch.long, device=codes.indices.device)
    places[torch.tensor(latents, device=places.device)] = torch.arange(len(latents), device=places.device)
    indices = codes.indices.reshape(-1, codes.indices.shape[-1]).long()
    column = places[indices]
    row, entry = (column >= 0).nonzero(as_tuple=True)
    dense = codes.values.new_zeros(len(indices), len(latents))
    dense.index_put_(
        (row, column[row, entry]), codes.values.detach().reshape(indices.shape)[row, entry], accumulate=True
    )
    return dense.view(*codes.indices.shape[:-1], len(latents))


def common_tokens(active: list[Context], silent: list[Context]) -> frozenset[tuple[int, ...]]:
    """
    The tokens and pairs of neighbours at whose end a latent fires: at most 16, added as long as they tell more of the
    contexts apart. Candidates are the 32 tokens and the 32 pairs with most activation.
    """
    mass: dict[int, Counter[tuple[int, ...]]] = {1: Counter(), 2: Counter()}
    for context in active:
        for at, amount in enumerate(context.activations):
            if amount > 0:
                for size in (1, 2):
                    if at + 1 >= size:
                        mass[size][context.ids[at + 1 - size : at + 1]] += amount
    candidates = [item for size in (1, 2) for item, _ in mass[size].most_common(MOST_CANDIDATES)]
    if not candidates:
        return frozenset()
    has = torch.tensor([[item in found for item in candidates] for found in map(_items, active)])
    lacks = torch.tensor([[item in found for item in candidates] for found in map(_items, silent)])
    lacks = lacks.view(len(silent), len(candidates))
    hit, wrong = torch.zeros(len(active), dtype=torch.bool), torch.zeros(len(silent), dtype=torch.bool)
    chosen: list[int] = []
    best = 0.5
    while len(chosen) < MOST_ITEMS:
        hits = (has | hit[:, None]).float().mean(0)
        wrongs = (lacks | wrong[:, None]).float().mean(0) if len(silent) else torch.zeros(len(candidates))
        quality = (hits + 1 - wrongs) / 2
        at = int(quality.argmax())
        if float(quality[at]) <= best:
            break
        best = float(quality[at])
        chosen.append(at)
        hit |= has[:, at]
        wrong |= lacks[:, at]
    return frozenset(candidates[at] for at in chosen)


def contains(explanation: frozenset[tuple[int, ...]], contexts: list[Context]) -> list[bool]:
    """Whether any of the items is there; of marked contexts, whether one ends at half of the marked tokens or more."""
    found = []
    for context in contexts:
        if not context.marks:
            found.append(bool(_items(context) & explanation))
            continue
        ends = [
            (context.ids[at],) in explanation or (at > 0 and context.ids[at - 1 : at + 1] in explanation)
            for at, mark in enumerate(context.marks)
            if mark
        ]
        found.append(bool(ends) and 2 * sum(ends) >= len(ends))
    return found


def token_entropy(codes: Any, input_ids: torch.Tensor, latents: Sequence[int]) -> list[float]:
    """
    Entropy in nats of each latent's activation over the ids of the tokens where it fires: 0 for a latent of one token.
    The best cheap predictor of interpretability in KronSAE (arXiv 2505.22255). NaN for a latent that never fires.

    Args:
        codes ([`SparseCodes`] of shape `(..., K)`), input_ids (`torch.LongTensor` of shape `(...)`): The tokens.
        latents (sequence of `int`): Which.
    """
    ids, places = input_ids.reshape(-1).unique(return_inverse=True)
    dense = activations_of(codes, latents).reshape(-1, len(latents)).double()
    mass = dense.new_zeros(len(ids), len(latents)).index_add_(0, places.reshape(-1), dense)
    share = mass / mass.sum(0)
    return [float(value) for value in -torch.special.xlogy(share, share).sum(0)]


def multitoken_ratio(codes: Any, latents: Sequence[int]) -> list[float]:
    """The share of its row on which each latent fires, in rows where it does; codes are (rows, T, K). NaN for none."""
    fires = activations_of(codes, latents) > 0
    share = fires.double().mean(1)
    return [float(one[one > 0].mean()) for one in share.unbind(1)]


def best_f1(codes: Any, labels: torch.Tensor, chosen_on: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For each known property of tokens the latent that marks it best, and how well.

    A latent marks a token where it fires: F1 = 2 TP / (2 TP + FP + FN). The latent is chosen on one part of the tokens
    and its F1 measured on the other, so that the best of many is not flattered.

    Args:
        codes ([`SparseCodes`] of shape `(N, K)`): Of N tokens.
        labels (`torch.BoolTensor` of shape `(N, L)`): Whether each property holds.
        chosen_on (`torch.BoolTensor` of shape `(N,)`): The tokens to choose on.

    Returns:
        `(f1, latents)`, each `(L,)`; F1 is NaN where the property never holds on the other tokens.
    """
    if labels.shape[:1] != codes.values.shape[:1] or chosen_on.shape != labels.shape[:1]:
        raise ValueError(
            "`codes`, `labels` and `chosen_on` must be of the same tokens, (N, K), (N, L) and (N,), got "
            f"{tuple(codes.values.shape)}, {tuple(labels.shape)} and {tuple(chosen_on.shape)}."
        )
    scores = [_f1(codes, labels, part) for part in (chosen_on, ~chosen_on)]
    latents = scores[0].nan_to_num(-1.0).argmax(1)
    return scores[1].gather(1, latents[:, None]).squeeze(1), latents


def _f1(codes: Any, labels: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`(L, F)` in float64, of the tokens in `part`."""
    values, indices, known = codes.values[part], codes.indices[part], labels[part]
    fires = values > 0
    count = torch.bincount(indices[fires].long(), minlength=codes.d_sae).double()
    found = []
    for label in known.unbind(1):
        both = torch.bincount(indices[fires & label[:, None]].long(), minlength=codes.d_sae).double()
        total = label.sum()
        found.append(torch.where(total > 0, 2 * both / (count + total), torch.nan))
    return torch.stack(found)


def _score(
    latent: int,
    active: torch.Tensor,
    windows: torch.Tensor,
    contexts: int,
    least: int,
    explain: Explain,
    judge: Judge,
    seed: int,
) -> LatentScore | None:
    """The score of one latent with activations `active` (windows, length); None where it has too few contexts."""
    top = active.amax(1)
    fires = (top > 0).nonzero().squeeze(1)
    if len(fires) < 2 * least:
        return None
    strong = fires[top[fires] > top[fires].median()]
    silent = (top <= 0).nonzero().squeeze(1)
    rng = random.Random(f"{seed}-{latent}")
    half = min(contexts, len(strong) // 2, len(silent) // 2)
    if half < least:
        return None

    def drawn(among: torch.Tensor) -> list[Context]:
        picked = rng.sample(range(len(among)), 2 * half)
        return [
            Context(tuple(ids), tuple(amounts))
            for ids, amounts in zip(windows[among[picked]].tolist(), active[among[picked]].tolist(), strict=True)
        ]

    shown, hidden = drawn(strong), drawn(silent)
    explanation = explain(shown[:half], hidden[:half])
    judged = (shown[half:], hidden[half:])
    detected = [_decide(judge, explanation, [Context(c.ids) for c in side]) for side in judged]
    right = [Context(c.ids, marks=tuple(a > 0 for a in c.activations)) for c in judged[0]]
    wrong = [_shifted(c, rng) for c in judged[0][: half // 2]]
    wrong += [_scattered(c, like, rng) for c, like in zip(judged[1], right[half // 2 :], strict=False)]
    fuzzed = [_decide(judge, explanation, side) for side in (right, wrong)]
    return LatentScore(latent, _balanced(*detected), _balanced(*fuzzed), half, explanation)


def _decide(judge: Judge, explanation: Any, contexts: list[Context]) -> list[bool]:
    said: list[bool] = []
    for first in range(0, len(contexts), CONTEXTS_PER_CALL):
        part = contexts[first : first + CONTEXTS_PER_CALL]
        answers = list(judge(explanation, part))
        if len(answers) != len(part):
            raise ValueError(f"`judge` must answer for each of {len(part)} contexts, got {len(answers)} answers.")
        said += map(bool, answers)
    return said


def _balanced(of_positives: list[bool], of_negatives: list[bool]) -> float:
    """(TP / P + TN / N) / 2."""
    return (sum(of_positives) / len(of_positives) + 1 - sum(of_negatives) / len(of_negatives)) / 2


def _shifted(context: Context, rng: random.Random) -> Context:
    """As many marks as tokens at which the latent fires, at tokens where it does not."""
    active = [a > 0 for a in context.activations]
    others = [at for at, on in enumerate(active) if not on]
    chosen = set(rng.sample(others, min(sum(active), len(others))))
    return Context(context.ids, marks=tuple(at in chosen for at in range(len(active))))


def _scattered(context: Context, like: Context, rng: random.Random) -> Context:
    """As many marks as `like` has, anywhere."""
    chosen = set(rng.sample(range(len(context.ids)), sum(like.marks)))
    return Context(context.ids, marks=tuple(at in chosen for at in range(len(context.ids))))


def _items(context: Context) -> set[tuple[int, ...]]:
    ids = context.ids
    return {(i,) for i in ids} | set(zip(ids, ids[1:], strict=False))


def _checked(codes: Any, input_ids: torch.Tensor, length: int) -> tuple[int, int]:
    if input_ids.dim() != 2 or codes.values.shape[:-1] != input_ids.shape:
        raise ValueError(
            "`codes` and `input_ids` must be of the same rows, (rows, T, K) and (rows, T), got "
            f"{tuple(codes.values.shape)} and {tuple(input_ids.shape)}."
        )
    if length < 2 or input_ids.shape[1] < length:
        raise ValueError(f"`length` must be in [2, T={input_ids.shape[1]}], the tokens of a row, got {length}.")
    return input_ids.shape[0], input_ids.shape[1]
