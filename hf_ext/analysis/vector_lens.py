"""What a steering vector says: its own logit lens, and the lens of what it does at the last layer.

    dot_v = W_U[v] . s        cos_v = dot_v / (|W_U[v]| |s|)

- Rows of the unembedding as they are, without the final norm; `fold_norm=True` takes W_U diag(gamma) instead.
- A vector of an early layer is read by its mean effect at the last one, on texts that the steered model wrote:

      e_l = mean over tokens of [ H_{L-1}(s_l added after layer l) - H_{L-1}(nothing added) ]

Source: "Small Vectors, Big Effects", arXiv 2509.06608, section 5 and figures of the logit lens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_ext.record import edit, record
from hf_ext.sites import anatomy, resolve, unwrap


@dataclass
class VectorLens:
    """
    How a direction lies to every token's row of the unembedding. On the CPU, float32; k tokens at each end.

    Attributes:
        cosines (`torch.Tensor` of shape `(V,)`): Of all tokens of the tokenizer; 0 for a vector or row of zeros.
        dots (`torch.Tensor` of shape `(V,)`): Dot products: what is added to logits where no norm stands between.
        top_ids, bottom_ids (`torch.LongTensor` of shape `(k,)`): By cosine: the largest first, the smallest first.
    """

    cosines: torch.Tensor
    dots: torch.Tensor
    top_ids: torch.Tensor
    bottom_ids: torch.Tensor

    def table(self, tokenizer: Any) -> list[dict[str, Any]]:
        """Rows `end` ("top" or "bottom"), `rank` from 1, `id`, `token`, `cos`, `dot`: what a CSV or page shows."""
        return [
            {
                "end": end,
                "rank": rank,
                "id": token,
                "token": token_text(tokenizer, token),
                "cos": float(self.cosines[token]),
                "dot": float(self.dots[token]),
            }
            for end, ids in (("top", self.top_ids), ("bottom", self.bottom_ids))
            for rank, token in enumerate(ids.tolist(), start=1)
        ]


def vector_lens(
    model: nn.Module, vector: torch.Tensor, *, top_k: int = 50, fold_norm: bool = False, vocabulary: int | None = None
) -> VectorLens:
    """
    Compare a direction of the residual stream with the model's unembedding.

    Args:
        model (`torch.nn.Module`): A causal LM of a family in `hf_ext.sites.FAMILIES`, plain or inside a PEFT wrapper.
        vector (`torch.Tensor` of shape `(width,)`): A steering vector, or a mean effect of [`mean_effects`].
        top_k (`int`, *optional*, defaults to 50): Tokens at each end.
        fold_norm (`bool`, *optional*, defaults to `False`): Multiply rows by the weight of the final norm.
        vocabulary (`int`, *optional*): `len(tokenizer)`, where the model's vocabulary is padded beyond it.

    Returns:
        [`VectorLens`]

    Raises:
        ValueError: for a vector of another width, or with NaN or infinity, a model without a head, or a `top_k` or
            `vocabulary` out of range.

    Example:

        lens = vector_lens(model, peft_model.get_vectors("default")[29], vocabulary=len(tokenizer))
        for row in lens.table(tokenizer)[:10]:
            print(row["token"], round(row["cos"], 3))
    """
    family, prefix, _ = anatomy(model)
    head = unwrap(model).get_output_embeddings()
    if head is None:
        raise ValueError(f"`model` must have a language-modelling head, got {type(model).__name__}.")
    rows = head.weight.detach().float()
    size = rows.shape[0] if vocabulary is None else vocabulary
    if not 1 <= size <= rows.shape[0]:
        raise ValueError(f"`vocabulary` must be in [1, {rows.shape[0]}], got {vocabulary}.")
    if not 1 <= top_k <= size:
        raise ValueError(f"`top_k` must be in [1, {size}], got {top_k}.")
    _check(vector, rows.shape[1], "vector")
    if fold_norm:
        norm: Any = model.get_submodule(prefix + family.final_norm)
        rows = rows * norm.weight.detach().float()
    direction = vector.detach().to(rows.device, torch.float32)
    dots = rows[:size] @ direction
    lengths = rows[:size].norm(dim=1) * direction.norm()
    cosines = torch.where(lengths > 0, dots / lengths.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    return VectorLens(
        cosines.cpu(), dots.cpu(), cosines.topk(top_k).indices.cpu(), cosines.topk(top_k, largest=False).indices.cpu()
    )


def mean_effects(
    model: nn.Module,
    vectors: Mapping[int, torch.Tensor],
    prompts: Sequence[torch.Tensor],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[int, torch.Tensor]:
    """
    What each vector, alone, changes in the last layer's residual stream: e_l of the module's head.

    Each prompt is continued by the model with the one vector; the text is then read with and without it, and the
    difference averaged over all its tokens but the last, which predicts nothing that was written.

    Args:
        model (`torch.nn.Module`): The base model: vectors of an adapter in it are added to what is measured here.
        vectors (`Mapping[int, torch.Tensor]`): Layer -> `(width,)`, added to the stream after that layer.
        prompts (`Sequence[torch.Tensor]`): Token ids `(1, T)` or `(T,)` each.
        max_new_tokens (`int`, *optional*, defaults to 64): Of a continuation.
        temperature (`float`, *optional*, defaults to 1.0): 0 is greedy.
        seed (`int`, *optional*, defaults to 0): Of the sampling; the state of torch's generator is left as it was.

    Returns:
        `dict[int, torch.Tensor]`: Layer -> `(width,)`, float32, on the CPU.

    Raises:
        ValueError: without prompts, for a layer that is not there, or a vector of another width, or not finite.
    """
    num_layers = anatomy(model).num_layers
    width = unwrap(model).config.get_text_config().hidden_size
    if not prompts:
        raise ValueError("`prompts` must hold one row of token ids at least, got none.")
    for layer, vector in vectors.items():
        if not 0 <= layer < num_layers:
            raise ValueError(f"`vectors` must be for layers 0 to {num_layers - 1}, got {layer}.")
        _check(vector, width, f"vectors[{layer}]")
    last = {"last": resolve(model, "resid_post", num_layers - 1)}
    device = next(model.parameters()).device
    options: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    found = {}
    for layer, vector in vectors.items():
        total, count = torch.zeros(width, dtype=torch.float64), 0
        added = vector.to(device)
        place = {"steer": resolve(model, "resid_post", layer)}

        def steer(name: str, hidden: torch.Tensor, step: Any, added: torch.Tensor = added) -> torch.Tensor:
            return hidden + added.to(hidden.dtype)

        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for prompt in prompts:
                ids = prompt.reshape(1, -1).to(device)
                with edit(model, place, steer):
                    text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
                    with record(model, last) as steered:
                        model(text, use_cache=False)
                with record(model, last) as plain:
                    model(text, use_cache=False)
                change = steered["last"][0][0, :-1].double() - plain["last"][0][0, :-1].double()
                total += change.sum(0).cpu()
                count += len(change)
        found[layer] = (total / count).float()
    return found


def plot_cosines(lenses: Mapping[str, VectorLens], figure: Any) -> None:
    """Histograms of all cosines, 50 bins, log counts, one panel for each lens, on a matplotlib figure."""
    columns = min(4, len(lenses))
    axes = figure.subplots(-(-len(lenses) // columns), columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(lenses) :]:
        axis.set_visible(False)
    for axis, (name, lens) in zip(axes.flat, lenses.items(), strict=False):
        axis.hist(lens.cosines.numpy(), bins=50, log=True, color="#1d63c4")
        axis.set(title=name, xlabel="cosine", ylabel="tokens")


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it reads; one that is no text alone (a part of a character) as the tokenizer writes it."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text or not text else text


def _check(vector: Any, width: int, name: str) -> None:
    if not isinstance(vector, torch.Tensor) or tuple(vector.shape) != (width,):
        got = tuple(vector.shape) if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise ValueError(f"`{name}` must be a tensor of shape ({width},), the model's width, got {got}.")
    if not torch.isfinite(vector).all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
