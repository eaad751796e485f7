"""The logit lens: what a causal LM would say if it stopped after each layer.

- Every residual stream goes through the model's own final norm and head: no probe is trained, nothing is estimated.
- One row (one depth) is decoded at a time, so `(rows, batch, seq, vocab)` never exists; only summaries are kept.
- The last row repeats the model's own computation on the same shapes, so it is the model's output to the last bit.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from hf_ext.record import record
from hf_ext.sites import Hook, anatomy, resolve, unwrap


@dataclass
class LensOutput:
    """
    What the lens shows. R rows, one for each depth asked for; B batch, T tokens, k guesses. All on the model's device.

    Attributes:
        layers (`list[int]`, R numbers): Layers passed: 0 is the embeddings, L (all layers) the model's own output.
        top_ids (`torch.LongTensor` of shape `(R, B, T, k)`): The likeliest next tokens, likeliest first.
        top_probs (`torch.Tensor` of shape `(R, B, T, k)`, float32): Their probabilities.
        target_ids (`torch.LongTensor` of shape `(B, T)`): The next token that the model itself finds likeliest.
        target_prob (`torch.Tensor` of shape `(R, B, T)`, float32): The probability of `target_ids`.
        target_rank (`torch.LongTensor` of shape `(R, B, T)`): How many tokens beat `target_ids`; 0 is best.
        entropy (`torch.Tensor` of shape `(R, B, T)`, float32): Of the row's distribution, in nats, in [0, ln V].
        kl (`torch.Tensor` of shape `(R, B, T)`, float32): KL(model's output || row) in nats, >= 0; 0 in row L.
    """

    layers: list[int]
    top_ids: torch.Tensor
    top_probs: torch.Tensor
    target_ids: torch.Tensor
    target_prob: torch.Tensor
    target_rank: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor


def logit_lens(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    top_k: int = 5,
) -> LensOutput:
    """
    Decode the residual stream after every layer, at every position, with the model's final norm and head.

    p_l = softmax(W_U norm(h_l)), h_l the residual stream after l layers. One forward pass without gradient, in the
    model's present mode: call `model.eval()` first unless dropout is wanted.

    Args:
        model (`torch.nn.Module`): A causal LM of a family in `hf_ext.sites.FAMILIES`, plain or inside a PEFT wrapper.
        input_ids (`torch.LongTensor` of shape `(batch, seq)`): Tokens.
        attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*, defaults to all ones): 0 marks padding, on
            either side. Positions count from a row's first token, as in `generate`. Values at padding mean nothing.
        layers (`Sequence[int]`, *optional*, defaults to all, `0..L`): Rows wanted, in layers passed; negative numbers
            count from the end, so `-1` is the model's own output.
        top_k (`int`, *optional*, defaults to 5): Guesses kept, in [1, vocabulary].

    Returns:
        [`LensOutput`]

    Raises:
        TypeError: if `input_ids` is no tensor of integers, or `layers` or `top_k` no integers.
        ValueError: if the family is unknown, the model has no head, or a shape, layer or `top_k` is out of range.

    Example:

        out = logit_lens(model, tokenizer("The capital of France is", return_tensors="pt").input_ids)
        tokenizer.decode(out.top_ids[12, 0, -1])  # the five guesses after 12 layers, last position

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """
    family, prefix, num_layers = anatomy(model)
    head = unwrap(model).get_output_embeddings()
    if head is None:
        raise ValueError(
            f"`model` must have a language-modelling head, got {type(model).__name__}. "
            "Load it with AutoModelForCausalLM."
        )
    _check_tokens(input_ids, attention_mask)
    rows = _check_rows(layers, num_layers)
    top_k = _check_top_k(top_k, head.weight.shape[0])
    norm = model.get_submodule(prefix + family.final_norm)

    hooks = {str(row): _depth(model, row, num_layers) for row in rows}
    with torch.no_grad():
        with record(model, hooks) as streams:
            logits = model(**_inputs(input_ids, attention_mask), use_cache=False).logits.float()
        final, target = _Final(logits.log_softmax(-1), logits.softmax(-1)), logits.argmax(-1)
        views = [_view(_logits(model, head, norm(streams[str(row)][0])), final, target, top_k) for row in rows]
    columns = (torch.stack(column) for column in zip(*views, strict=True))
    return LensOutput(rows, target_ids=target, **dict(zip(_View._fields, columns, strict=True)))


def _logits(model: nn.Module, head: nn.Module, normed: torch.Tensor) -> torch.Tensor:
    """The head, and Gemma's cap on what it says: cap * tanh(logits / cap), in the model's own steps."""
    logits = head(normed)
    cap = getattr(unwrap(model).config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


class _View(NamedTuple):
    top_ids: torch.Tensor
    top_probs: torch.Tensor
    target_prob: torch.Tensor
    target_rank: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor


class _Final(NamedTuple):
    logprobs: torch.Tensor
    probs: torch.Tensor


def _view(logits: torch.Tensor, final: _Final, target: torch.Tensor, top_k: int) -> _View:
    """One row's summaries from its logits and the model's own distribution, all [B, T, V]."""
    logits = logits.float()
    # softmax again, since exp of very negative numbers is several times slower on a CPU
    logprobs, probs = logits.log_softmax(-1), logits.softmax(-1)
    top_logprobs, top_ids = logprobs.topk(top_k, dim=-1)
    target_logprob = logprobs.gather(-1, target[..., None])
    return _View(
        top_ids=top_ids,
        top_probs=top_logprobs.exp(),
        target_prob=target_logprob[..., 0].exp(),
        target_rank=(logprobs > target_logprob).sum(-1),
        entropy=-(probs * logprobs).sum(-1),
        # rounding may push a sum of nearly equal terms below zero
        kl=(final.probs * (final.logprobs - logprobs)).sum(-1).clamp_min(0),
    )


def _depth(model: nn.Module, row: int, num_layers: int) -> Hook:
    return resolve(model, "resid_pre", row) if row < num_layers else resolve(model, "resid_post", num_layers - 1)


def _inputs(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if attention_mask is None:
        return {"input_ids": input_ids}
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def _check_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.long, torch.int):
        kind = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise TypeError(f"`input_ids` must be a tensor of integers, got {kind}. Tokenise with return_tensors='pt'.")
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"`input_ids` must have shape (batch, seq) with a token, got {shape}. Add a batch: ids[None]."
        )
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {shape}, got {tuple(attention_mask.shape)}. "
            "Pass the tokenizer's own."
        )


def _check_rows(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    if layers is None:
        return list(range(num_layers + 1))
    try:
        rows = [operator.index(row) for row in layers]
    except TypeError:
        raise TypeError(f"`layers` must be a sequence of integers, got {layers!r}. Pass [0, 6, -1].") from None
    if not rows or any(not -num_layers - 1 <= row <= num_layers for row in rows):
        raise ValueError(
            f"`layers` must be one or more numbers in [{-num_layers - 1}, {num_layers}] (layers passed; "
            f"{num_layers} is the output), got {rows}. Pass None for all."
        )
    return [row % (num_layers + 1) for row in rows]


def _check_top_k(top_k: int, vocab_size: int) -> int:
    try:
        top_k = operator.index(top_k)
    except TypeError:
        raise TypeError(f"`top_k` must be an integer, got {top_k!r}. The default is 5.") from None
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"`top_k` must be in [1, vocabulary = {vocab_size}], got {top_k}. The default is 5.")
    return top_k
