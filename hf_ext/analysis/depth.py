"""How a model uses its depth: entropy and separability of values and hidden states layer by layer, and LIMe's routers.

- Values are what attention reads, taken from a plain growing cache: v_proj's output in a Llama, the routed values in a
  LIMe. Hidden states are the residual stream after a layer, before any final norm.
- Vectors are kept in the model's dtype and only at the positions wanted; every figure is computed in float64.
- The model runs without its head, without gradient and in its present mode: call `model.eval()` first.

Source: arXiv 2502.09245 v2, sections 5 and 6; depthwise circuits are those of v1.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from hf_ext.record import record
from hf_ext.sites import anatomy, base_model, resolve, unwrap


class Entropies(NamedTuple):
    """In nats, for each layer: `values` [L] and `hidden` [L], float64, both of `tokens` vectors."""

    values: torch.Tensor
    hidden: torch.Tensor
    tokens: int


class Separability(NamedTuple):
    """Held-out accuracy for each layer: `values` [L] and `hidden` [L], float64; `counts`: vectors found of a class."""

    values: torch.Tensor
    hidden: torch.Tensor
    counts: dict[int, int]


class Circuit(NamedTuple):
    """
    A kv head that fetches something from an earlier layer. Layers and heads count from 0.

    Attributes:
        layer, head (`int`): The kv head that reads.
        source_layer (`int`): The layer read, below `layer`.
        source_head (`int`): The head of `source_layer` that gives most.
        strength (`float`): Mean over tokens of |fetched from this layer| / |routed value of the head|.
        tokens (`list[int]`): Distinct token ids on which the fetched part is largest on average, largest first.
    """

    layer: int
    head: int
    source_layer: int
    source_head: int
    strength: float
    tokens: list[int]


def renyi_entropy(z: torch.Tensor, alpha: float = 0.5) -> float:
    """
    Matrix-based Renyi entropy of a cloud of vectors: S_alpha = log(sum p^alpha) / (1 - alpha), p the eigenvalues of
    Z Z^T over their sum, Z standardised per feature over the vectors.

    Args:
        z (`torch.Tensor` of shape `(t, dim)`): t >= 2 vectors. A feature that never varies counts for nothing.
        alpha (`float`, *optional*, defaults to 0.5): Order, above 0; 1 is Shannon's limit.

    Returns:
        `float` in [0, log(min(t - 1, dim))], in nats; 0 where all vectors are alike.

    Raises:
        TypeError: if `z` is no tensor of floating-point numbers.
        ValueError: for fewer than 2 vectors, values that are not finite, or an `alpha` not above 0.

    Source: arXiv 2502.09245 v2, section 5.
    """
    if not isinstance(z, torch.Tensor) or not z.is_floating_point():
        kind = z.dtype if isinstance(z, torch.Tensor) else type(z).__name__
        raise TypeError(f"`z` must be a tensor of floating-point numbers, got {kind}. Pass vectors (t, dim).")
    if z.dim() != 2 or z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(f"`z` must be at least 2 vectors (t, dim), got shape {tuple(z.shape)}. Give more tokens.")
    _check_alpha(alpha)
    if not torch.isfinite(z).all():
        raise ValueError("`z` must be finite, got NaN or infinity. Look for the layer where it arises.")
    (z,) = _standardise(z.double())
    gram = z @ z.t() if z.shape[0] <= z.shape[1] else z.t() @ z
    p = torch.linalg.eigvalsh(gram).clamp(min=0)
    p = p[p > 0] / p.sum()
    if not len(p):
        return 0.0
    entropy = -(p * p.log()).sum() if alpha == 1 else p.pow(alpha).sum().log() / (1 - alpha)
    return max(0.0, float(entropy))


def layer_entropies(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    alpha: float = 0.5,
    attention_mask: torch.Tensor | None = None,
    max_tokens: int = 2048,
    batch_size: int = 8,
) -> Entropies:
    """
    [`renyi_entropy`] of what attention reads (all kv heads side by side), and of the stream after each layer.

    Args:
        model (`torch.nn.Module`): A causal LM of a family in `hf_ext.sites.FAMILIES`, or its base model.
        input_ids (`torch.LongTensor` of shape `(N, T)`): Tokens.
        alpha (`float`, *optional*, defaults to 0.5): Order of the entropy.
        attention_mask (`torch.Tensor` of shape `(N, T)`, *optional*, defaults to all ones): 0 marks padding, which is
            left out.
        max_tokens (`int`, *optional*, defaults to 2048): Only the first so many tokens count, which bounds memory.
            Figures of different numbers of tokens cannot be compared.
        batch_size (`int`, *optional*, defaults to 8): Rows a forward.

    Returns:
        [`Entropies`]

    Raises:
        TypeError, ValueError: for tokens of a wrong type or shape, an unknown family, fewer than 2 tokens, or values
            and hidden states that are not finite.

    Example:

        layer_entropies(model, tokenizer(text, return_tensors="pt").input_ids).values  # [L]
    """
    mask = _check_tokens(input_ids, attention_mask)
    _check_alpha(alpha)
    _check_at_least("max_tokens", max_tokens, 2)
    chosen = mask & (mask.flatten().cumsum(0).view_as(mask) <= max_tokens)
    if chosen.sum() < 2:
        raise ValueError(f"`input_ids` must hold at least 2 tokens, got {int(chosen.sum())}. Give more text.")
    values, hidden = _collect(model, input_ids, mask, chosen, batch_size)
    in_values, in_hidden = (
        torch.tensor([renyi_entropy(z, alpha) for z in side], dtype=torch.float64) for side in (values, hidden)
    )
    return Entropies(in_values, in_hidden, int(chosen.sum()))


def separability(
    model: nn.Module,
    input_ids: torch.Tensor,
    classes: Sequence[int],
    *,
    attention_mask: torch.Tensor | None = None,
    folds: int = 5,
    per_class: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> Separability:
    """
    How well a linear classifier tells close tokens apart by their values, and by the stream after each layer.

    The vectors at the places of each token of `classes` are cut to the rarest class, split into `folds` parts with as
    many of each class, and standardised by mean and spread of the parts trained on. A linear softmax classifier that
    starts at 0 is trained for one epoch in batches of 64 by Adam at 1e-2, as in the paper, and tested on the part left
    out. The choice of places, parts and batches depends on `seed` and the tokens alone, so models can be paired.

    Args:
        model, attention_mask, batch_size: As in [`layer_entropies`].
        input_ids (`torch.LongTensor` of shape `(N, T)`): Tokens; each class is among them at least 2 * folds times.
        classes (`Sequence[int]`): Two or more token ids; the paper's are " is", " are", " was", " were".
        folds (`int`, *optional*, defaults to 5): Parts of the cross-validation, at least 2.
        per_class (`int`, *optional*): At most so many vectors of a class, at least 2 * folds; all if not given.
        seed (`int`, *optional*, defaults to 0): Of all choices.

    Returns:
        [`Separability`]; chance is 1 / len(classes).

    Raises:
        TypeError, ValueError: as [`layer_entropies`]; ValueError also for fewer than 2 classes, or tokens too rare.
    """
    mask = _check_tokens(input_ids, attention_mask)
    _check_at_least("folds", folds, 2)
    classes = [int(token) for token in classes]
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"`classes` must be two or more different token ids, got {classes}. Name each token once.")
    if per_class is not None:
        _check_at_least("per_class", per_class, 2 * folds)
    places = [((input_ids == token) & mask).flatten().nonzero()[:, 0].cpu() for token in classes]
    counts = {token: len(found) for token, found in zip(classes, places, strict=True)}
    if rare := {token: count for token, count in counts.items() if count < 2 * folds}:
        raise ValueError(
            f"`input_ids` must hold each token of `classes` at least 2 * folds = {2 * folds} times, got "
            f"{', '.join(f'{token}: {count}' for token, count in rare.items())}. Give more text or fewer `folds`."
        )
    generator = torch.Generator().manual_seed(seed)
    count = min(*counts.values(), per_class or input_ids.numel())
    drawn = torch.cat([found[torch.randperm(len(found), generator=generator)[:count]] for found in places])
    # vectors come back in the order of the text
    places_in_order, order = drawn.sort()
    labels = torch.arange(len(classes)).repeat_interleave(count)[order]
    part = (torch.arange(count) % folds).repeat(len(classes))[order]
    chosen = torch.zeros_like(mask)
    chosen.view(-1)[places_in_order.to(mask.device)] = True
    values, hidden = _collect(model, input_ids, mask, chosen, batch_size)
    by_values, by_hidden = (
        torch.tensor([_accuracy(z.double().cpu(), labels, part, seed) for z in side], dtype=torch.float64)
        for side in (values, hidden)
    )
    return Separability(by_values, by_hidden, counts)


def router_map(model: nn.Module, reduce: Literal["max", "sum"] = "max") -> torch.Tensor:
    """
    How strongly each layer of a LIMe reads each layer: |R| over the pairs of heads; with the routers of v1, the
    softmax weights over the heads. A layer without a router reads itself alone.

    Args:
        model (`torch.nn.Module`): A LIMe, with a head or without.
        reduce (`str`, *optional*, defaults to `"max"`): `"max"` or `"sum"` over heads.

    Returns:
        `torch.Tensor` of shape `(L, L)`, float32: the row reads the column; NaN where it cannot.

    Raises:
        ValueError: for another model, dynamic routers (their weights change with every token), or another `reduce`.
    """
    if reduce not in ("max", "sum"):
        raise ValueError(f'`reduce` must be "max" or "sum", got {reduce!r}. "max" is the strongest pair of heads.')
    owner = _lime(model, ("kv", "static", "static_top_p"))
    layers = owner.layers
    found = torch.full((len(layers), len(layers)), torch.nan)
    for at, layer in enumerate(layers):
        attention: Any = layer.self_attn
        if attention.router is None:
            found[at, at] = 1.0 if reduce == "max" else float(owner.config.num_key_value_heads)
            continue
        weight = attention.router.weight.detach().float().cpu().abs()
        if owner.config.router_type != "kv":
            with torch.no_grad():
                weight = attention.router.mixture(None).float().cpu()[..., None]
        found[at, attention.router.sources] = weight.amax((0, 2)) if reduce == "max" else weight.sum((0, 2))
    return found


def depthwise_circuits(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    top: int = 20,
    tokens: int = 8,
    batch_size: int = 8,
) -> list[Circuit]:
    """
    Which kv head fetches what from which earlier layer, by the values that a text brings up.

    Head h of layer l fetches F = sum_h' R_l[h, j, h'] V_j[h'] from layer j; its strength is the mean over tokens of
    |F| / |routed V_l[h]|, which may exceed 1 where parts cancel.

    Args:
        model (`torch.nn.Module`): A LIMe whose routers mix keys and values, with a head or without.
        input_ids, attention_mask, batch_size: As in [`layer_entropies`].
        top (`int`, *optional*, defaults to 20): The strongest so many (l, h, j) with j < l.
        tokens (`int`, *optional*, defaults to 8): Token ids of each at most.

    Returns:
        `list[Circuit]`, strongest first. A head that fetches nothing is left out.

    Raises:
        TypeError, ValueError: as [`layer_entropies`]; ValueError also for another model or router type.

    Example:

        for circuit in depthwise_circuits(lime, ids, top=5):
            print(circuit.layer, circuit.source_layer, tokenizer.convert_ids_to_tokens(circuit.tokens))
    """
    owner = _lime(model, ("kv",))
    mask = _check_tokens(input_ids, attention_mask)
    _check_at_least("top", top, 1)
    _check_at_least("tokens", tokens, 1)
    raw = _raw_values(owner, input_ids, mask, batch_size)
    size = [v.norm(dim=-1).mean(0) for v in raw]  # of each source head
    circuits: list[tuple[Circuit, torch.Tensor]] = []
    for at, layer in enumerate(owner.layers):
        attention: Any = layer.self_attn
        if attention.router is None:
            continue
        weight, sources = attention.router.weight.detach().double(), attention.router.sources
        parts = [torch.einsum("hg,ngd->nhd", weight[:, i], raw[j]) for i, j in enumerate(sources)]
        routed = torch.stack(parts).sum(0).norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
        for i, source in enumerate(sources[:-1]):
            fetched = parts[i].norm(dim=-1)
            strength = (fetched / routed).mean(0)
            best = (weight[:, i].abs() * size[source]).argmax(-1)
            circuits += [
                (Circuit(at, head, source, int(best[head]), float(strength[head]), []), fetched[:, head])
                for head in range(len(strength))
                if strength[head] > 0
            ]
        # no more than `top` vectors of sizes are held
        circuits = sorted(circuits, key=lambda circuit: -circuit[0].strength)[:top]
    ids, at_token = input_ids[mask].unique(return_inverse=True)
    often = at_token.bincount()
    found = []
    for circuit, fetched in circuits:
        mean = torch.zeros(len(ids), dtype=fetched.dtype, device=ids.device).index_add_(0, at_token, fetched) / often
        found.append(circuit._replace(tokens=ids[mean.argsort(descending=True)[:tokens]].tolist()))
    return found


@torch.no_grad()
def _collect(
    model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor, batch_size: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Vectors at the chosen positions, in the order of the text: values and hidden states of each layer."""
    owner = base_model(model)[1]
    layers = range(anatomy(owner).num_layers)
    values: list[list[torch.Tensor]] = [[] for _ in layers]
    hidden: list[list[torch.Tensor]] = [[] for _ in layers]
    for inputs, here in _batches(input_ids, mask, chosen, batch_size):
        cache = DynamicCache()  # without a configuration it keeps whole rows, also where attention has a window
        with record(owner, {str(layer): resolve(owner, "resid_post", layer) for layer in layers}) as streams:
            owner(**inputs, past_key_values=cache, use_cache=True)
        for layer in layers:
            values[layer].append(cache.layers[layer].values.transpose(1, 2).flatten(2)[here])
            hidden[layer].append(streams[str(layer)][0][here])
    return [torch.cat(parts) for parts in values], [torch.cat(parts) for parts in hidden]


@torch.no_grad()
def _raw_values(owner: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """v_proj's output of each layer at the tokens, [tokens, G, d] in float64."""
    hooks = {str(layer): resolve(owner, "v", layer) for layer in range(anatomy(owner).num_layers)}
    parts: list[list[torch.Tensor]] = [[] for _ in hooks]
    for inputs, here in _batches(input_ids, mask, mask, batch_size):
        with record(owner, hooks) as found:
            owner(**inputs, use_cache=False)
        for part, value in zip(parts, found.values(), strict=True):
            part.append(value[0][here].double())
    heads = owner.config.num_key_value_heads  # type: ignore[union-attr]
    return [torch.cat(part).unflatten(-1, (heads, -1)) for part in parts]


def _batches(
    input_ids: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor, batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The model's inputs and the positions wanted [B, T], for each batch that has any."""
    _check_at_least("batch_size", batch_size, 1)
    for ids, kept, here in zip(*(x.split(batch_size) for x in (input_ids, mask, chosen)), strict=True):
        if here.any():
            inputs = {"input_ids": ids}
            if not kept.all():
                # positions count from a row's first token, as in generate
                positions = (kept.long().cumsum(-1) - 1).clamp_min(0)
                inputs |= {"attention_mask": kept.long(), "position_ids": positions}
            yield inputs, here


def _standardise(train: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """By mean and spread of `train`'s features; those that never vary in it (but for rounding) are left out."""
    mean, spread = train.mean(0), train.std(0, correction=0)
    varies = spread > 1e-12 * train.abs().amax(0)
    return [(z - mean)[:, varies] / spread[varies] for z in (train, *others)]


def _accuracy(z: torch.Tensor, labels: torch.Tensor, part: torch.Tensor, seed: int) -> float:
    """Share of vectors that a linear softmax classifier trained on the other parts puts in their class."""
    generator = torch.Generator().manual_seed(seed)
    classes, right = int(labels.max()) + 1, 0
    for held_out in range(int(part.max()) + 1):
        train, test = _standardise(z[part != held_out], z[part == held_out])
        known = labels[part != held_out]
        weight = torch.zeros(classes, train.shape[1], dtype=z.dtype, requires_grad=True)
        bias = torch.zeros(classes, dtype=z.dtype, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=1e-2)
        with torch.enable_grad():
            for batch in torch.randperm(len(train), generator=generator).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(nn.functional.linear(train[batch], weight, bias), known[batch]).backward()
                optimizer.step()
        right += int(((test @ weight.t() + bias).argmax(1) == labels[part == held_out]).sum())
    return right / len(labels)


def _lime(model: nn.Module, kinds: tuple[str, ...]) -> Any:
    """The base model of a LIMe whose router type is among `kinds`."""
    config: Any = getattr(unwrap(model), "config", None)
    if getattr(config, "model_type", None) != "lime":
        raise ValueError(
            f"`model` must be a LIMe, got {type(model).__name__}. Convert it: LimeForCausalLM.from_llama."
        )
    if config.router_type not in kinds:
        raise ValueError(
            f"`model` must have a router_type among {', '.join(kinds)}, got {config.router_type!r}. "
            "What it reads is no fixed weight between heads and layers."
        )
    return base_model(model)[1]


def _check_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The mask as booleans [N, T]."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.long, torch.int):
        kind = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise TypeError(f"`input_ids` must be a tensor of integers, got {kind}. Tokenise with return_tensors='pt'.")
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"`input_ids` must have shape (N, T) with a token, got {shape}. Add a batch: ids[None].")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {shape}, got {tuple(attention_mask.shape)}. "
            "Pass the tokenizer's own."
        )
    if not attention_mask.any():
        raise ValueError("`attention_mask` must keep a token, got only zeros. Pass the tokenizer's own.")
    return attention_mask.to(input_ids.device).bool()


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` must be above 0 and finite, got {alpha}. The default is 0.5.")


def _check_at_least(name: str, value: int, least: int) -> None:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, got {value!r}. Give {least} or more.") from None
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}. Give {least} or more.")
