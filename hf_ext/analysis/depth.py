"""How a model uses its depth: entropy and separability of values and hidden states, layer by layer; LIMe's routers.

- Values are what attention reads, taken from the cache: for a Llama v_proj's output, for LIMe the routed values.
- Everything is computed in float64 from vectors of at most a few thousand tokens; nothing is plotted here.

Source: arXiv 2502.09245 v2, sections 5 and 6.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class Layers(NamedTuple):
    """A figure for each layer, float64: `values` [L] of what attention reads, `hidden` [L] of the stream after it."""

    values: torch.Tensor
    hidden: torch.Tensor


def renyi_entropy(z: torch.Tensor, alpha: float = 0.5) -> float:
    """
    Matrix-based Renyi entropy of a cloud of vectors, in nats: S_alpha = log(sum p^alpha) / (1 - alpha), where p are
    the eigenvalues of Z Z^T divided by their sum and Z is standardised per feature.

    Args:
        z (`torch.Tensor` of shape `(t, dim)`): t >= 2 vectors. A feature that never varies counts for nothing.
        alpha (`float`, *optional*, defaults to 0.5): Order, > 0; 1 is Shannon's limit.

    Returns:
        `float` in [0, log(min(t, dim))].

    Raises:
        ValueError: for fewer than 2 vectors, values that are not finite, alpha <= 0, or vectors that are all alike.
    """
    if z.dim() != 2 or z.shape[0] < 2:
        raise ValueError(f"`z` must be at least 2 vectors (t, dim), got shape {tuple(z.shape)}.")
    if not alpha > 0:
        raise ValueError(f"`alpha` must be above 0, got {alpha}.")
    if not torch.isfinite(z).all():
        raise ValueError("`z` must be finite, got NaN or infinity. Look for the layer where it arises.")
    z = z.double()
    spread = z.std(0, correction=0)
    # a constant feature has a spread of rounding errors only
    varies = spread > 1e-12 * z.abs().amax(0).clamp(min=1e-300)
    z = (z - z.mean(0))[:, varies] / spread[varies]
    if z.shape[1] == 0:
        raise ValueError("`z` must hold vectors that differ, got one vector many times.")
    gram = z @ z.t() if z.shape[0] <= z.shape[1] else z.t() @ z
    p = torch.linalg.eigvalsh(gram).clamp(min=0)
    p = p / p.sum()
    if alpha == 1:
        return float(-(p * p.clamp(min=1e-300).log()).sum())
    return float(p[p > 0].pow(alpha).sum().log() / (1 - alpha))


@torch.no_grad()
def layer_entropies(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    alpha: float = 0.5,
    attention_mask: torch.Tensor | None = None,
    max_tokens: int = 2048,
    batch_size: int = 8,
) -> Layers:
    """
    [`renyi_entropy`] of values and hidden states in each layer.

    Args:
        model (`nn.Module`): A causal LM of transformers with an ordinary cache.
        input_ids (`torch.Tensor` of shape `(N, T)`): Token ids.
        alpha (`float`, *optional*, defaults to 0.5): Order of the entropy.
        attention_mask (`torch.Tensor` of shape `(N, T)`, *optional*): 0 marks padding, which is left out.
        max_tokens (`int`, *optional*, defaults to 2048): The first so many tokens are used. Entropies of different
            numbers of tokens cannot be compared.
        batch_size (`int`, *optional*, defaults to 8): Rows a forward.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    chosen = mask.bool() & (mask.flatten().cumsum(0).view_as(mask) <= max_tokens)
    values, hidden = _collect(model, input_ids, mask, chosen, batch_size)
    return Layers(*(torch.tensor([renyi_entropy(z, alpha) for z in side]).double() for side in (values, hidden)))


def separability(
    model: nn.Module,
    input_ids: torch.Tensor,
    classes: Sequence[int],
    *,
    attention_mask: torch.Tensor | None = None,
    folds: int = 5,
    seed: int = 0,
    batch_size: int = 8,
) -> Layers:
    """
    How well a linear classifier tells close tokens apart by their values, and by the stream after the layer.

    The vectors at the positions of each token of `classes` are balanced (cut to the rarest class) and standardised by
    the training folds' mean and spread. A softmax classifier is trained for one epoch of batches of 64 by Adam at
    1e-2, as in the paper, and tested on the fold left out.

    Args:
        model, attention_mask, batch_size: As in [`layer_entropies`].
        input_ids (`torch.Tensor` of shape `(N, T)`): Token ids, in which every class is frequent enough.
        classes (sequence of `int`): Ids of the tokens; the paper's are " is", " are", " was", " were".
        folds (`int`, *optional*, defaults to 5): Parts of the cross-validation.
        seed (`int`, *optional*, defaults to 0): Of the choice of positions, folds and batches.

    Returns:
        [`Layers`] of mean held-out accuracies; chance is 1 / len(classes).

    Raises:
        ValueError: for fewer than 2 classes, or a class of fewer than 2 * folds tokens.
    """
    if len(set(classes)) < 2 or len(set(classes)) != len(classes):
        raise ValueError(f"`classes` must be at least 2 different token ids, got {list(classes)}.")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    generator = torch.Generator().manual_seed(seed)
    found = [((input_ids == token) & mask.bool()).flatten().nonzero()[:, 0] for token in classes]
    count = min(len(places) for places in found)
    if count < 2 * folds:
        rare = {token: len(places) for token, places in zip(classes, found, strict=True) if len(places) < 2 * folds}
        raise ValueError(f"`input_ids` must hold each class at least {2 * folds} times, got {rare}. Give more text.")
    # sorted, since vectors come back in the order of the text
    places = [p[torch.randperm(len(p), generator=generator)[:count]] for p in found]
    order = torch.cat(places).argsort()
    labels = torch.arange(len(classes)).repeat_interleave(count)[order]
    chosen = torch.zeros_like(input_ids, dtype=torch.bool)
    chosen.view(-1)[torch.cat(places)] = True
    with torch.no_grad():
        values, hidden = _collect(model, input_ids, mask, chosen, batch_size)
    fold = torch.randperm(len(labels), generator=generator) % folds
    sides = ([_accuracy(z, labels, fold, len(classes), seed) for z in side] for side in (values, hidden))
    return Layers(*(torch.tensor(side).double() for side in sides))


def _collect(
    model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor, batch_size: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Vectors at the chosen positions, in the order of the text: values and hidden states of each layer."""
    values: list[list[torch.Tensor]] = []
    hidden: list[list[torch.Tensor]] = []
    for start in range(0, len(input_ids), batch_size):
        rows = slice(start, start + batch_size)
        if not chosen[rows].any():
            continue
        out: Any = model(
            input_ids[rows], attention_mask=mask[rows], use_cache=True, output_hidden_states=True, logits_to_keep=1
        )
        keys = [layer.values.transpose(1, 2).flatten(2) for layer in out.past_key_values.layers]
        for store, layers in ((values, keys), (hidden, out.hidden_states[1:])):
            store += [[] for _ in range(len(layers) - len(store))]
            for kept, layer in zip(store, layers, strict=True):
                kept.append(layer[chosen[rows]].double())
    return [torch.cat(parts) for parts in values], [torch.cat(parts) for parts in hidden]


def _accuracy(z: torch.Tensor, labels: torch.Tensor, fold: torch.Tensor, classes: int, seed: int) -> float:
    """Mean accuracy of a linear softmax classifier over the folds."""
    right = 0
    generator = torch.Generator().manual_seed(seed)
    for k in range(int(fold.max()) + 1):
        train, test = z[fold != k], z[fold == k]
        mean, spread = train.mean(0), train.std(0).clamp(min=1e-12)
        train, test = (train - mean) / spread, (test - mean) / spread
        linear = nn.Linear(z.shape[1], classes, dtype=torch.float64)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        optimizer = torch.optim.Adam(linear.parameters(), lr=1e-2)
        for batch in torch.randperm(len(train), generator=generator).split(64):
            loss = nn.functional.cross_entropy(linear(train[batch]), labels[fold != k][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right += int((linear(test).argmax(1) == labels[fold == k]).sum())
    return right / len(labels)
