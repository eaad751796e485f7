"""Steering vectors without training, from pairs of prompts that differ in what is wanted.

- Read at the last token of each prompt, where a causal LM has read it all.
- `"mean_difference"`: v_l = mean_i (h_l(positive_i) - h_l(negative_i)), as in CAA (Rimsky et al., arXiv 2312.06681).
- `"pca"`: the direction u_l that holds most of the differences' squared length, as in RepE (Zou et al., arXiv
  2310.01405), with the sign and the length of their mean along it: v_l = mean_i (u_l . d_il) u_l.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_ext.record import record
from hf_ext.sites import anatomy, resolve


METHODS = ("mean_difference", "pca")
Prompt = str | list[dict[str, Any]]


def contrastive_vectors(
    model: nn.Module,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    method: str = "mean_difference",
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
) -> dict[int, torch.Tensor]:
    """
    Vectors that move a model from what `negative` prompts have in common to what `positive` ones have.

    Args:
        model (`torch.nn.Module`): A language model of a family in `hf_ext.sites.FAMILIES`; run in its present mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a pad token.
        positive, negative (`Sequence`): Prompts, pairs by their order: texts, or lists of chat messages, which get the
            tokenizer's template.
        method (`str`, *optional*, defaults to `"mean_difference"`): `"mean_difference"` or `"pca"`, which needs two
            pairs.
        layers (`Sequence[int]`, *optional*): Layers, counted from 0, negative ones from the end; all if not given.
        batch_size (`int`, *optional*, defaults to 8): Prompts in one forward.

    Returns:
        `dict[int, torch.Tensor]`: Layer -> `(hidden_size,)`, float32, on the CPU: for [`add_vectors`].

    Raises:
        TypeError, ValueError: before any forward, for prompts that are none, another number of either, an unknown
            method or family, and a layer out of range; after it, where activations are not finite.

    Example:

    ```python
    >>> vectors = contrastive_vectors(model, tokenizer, ["I love this!"], ["I hate this!"], layers=[10, 11, 12])
    >>> model = add_vectors(model, vectors, scale=2.0)
    ```"""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    least = 2 if method == "pca" else 1
    if len(positive) != len(negative) or len(positive) < least:
        raise ValueError(
            f"`positive` and `negative` must be as many, and at least {least} for {method!r}, got {len(positive)} and "
            f"{len(negative)}."
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    count = anatomy(model).num_layers
    chosen = range(count) if layers is None else layers
    hooks = {str(layer % count): resolve(model, "resid_post", layer) for layer in chosen}
    texts = [_text(tokenizer, prompt) for pair in zip(positive, negative, strict=True) for prompt in pair]
    streams = _last_tokens(model, tokenizer, texts, hooks, batch_size)
    found = {}
    for name, stream in streams.items():
        differences = stream[0::2] - stream[1::2]
        if not torch.isfinite(differences).all():
            raise ValueError(f"The activations of layer {name} must be finite, got NaN or infinity. Use float32.")
        found[int(name)] = _direction(differences, method)
    return dict(sorted(found.items()))


def _direction(differences: torch.Tensor, method: str) -> torch.Tensor:
    """One vector [d] from differences [N, d]."""
    mean = differences.mean(0)
    if method == "mean_difference":
        return mean
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return (mean @ direction) * direction


def _text(tokenizer: Any, prompt: Prompt) -> str:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        answers = prompt[-1].get("role") == "assistant"
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=not answers)
    raise TypeError(f"`positive` and `negative` must hold texts or lists of messages, none empty, got {prompt!r}.")


@torch.no_grad()
def _last_tokens(
    model: nn.Module, tokenizer: Any, texts: list[str], hooks: dict[str, Any], batch_size: int
) -> dict[str, torch.Tensor]:
    """Name -> activations of the last token of each text, [N, d], float32."""
    device = next(model.parameters()).device
    read: dict[str, list[torch.Tensor]] = {name: [] for name in hooks}
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True).to(device)
        mask = batch["attention_mask"]
        if (mask.sum(1) == 0).any():
            raise ValueError("`positive` and `negative` must hold prompts of at least one token, got an empty one.")
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        # the last token that is none of padding, on whichever side that is
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=device)).argmax(1)
        with record(model, hooks, stop=True) as seen:
            model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False)
        for name in hooks:
            read[name].append(seen[name][0][torch.arange(len(mask), device=device), last].float().cpu())
    return {name: torch.cat(parts) for name, parts in read.items()}
