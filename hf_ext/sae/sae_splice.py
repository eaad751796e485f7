"""What an SAE does to hidden states inside a forward call: which tokens, which latents, and the hook itself.

- Tokens are chosen before anything is encoded, so that padding and first positions with their huge norms never are.
- An edit is h + (z_edit - z) W_dec: the error of the SAE stays.
- Hooks read the same places as `hf_ext.record`, which a test compares; this file travels without it.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .sparse_ops import SparseCodes


class State(NamedTuple):
    """
    What one SAE does now.

    Attributes:
        mode (`str`): One of `MODES`.
        edits (`tuple[dict, ...]`): Of this SAE, in order.
        tokens (`str` or `torch.BoolTensor` of shape `(B, S)`): Where; columns of a mask count from the row's start.
        k (`int`, *optional*): Budget, as in `sae.encode`.
        mean (`torch.Tensor` of shape `(D,)`, *optional*): Of mode "mean".
    """

    mode: str = "observe"
    edits: tuple[dict[str, Any], ...] = ()
    tokens: Any = "all"
    k: int | None = None
    mean: torch.Tensor | None = None


class Call:
    """
    The forward call that runs: its tokens, noted before any layer adds to the cache, and what the SAEs saw in it.

    Args:
        model (`torch.nn.Module`): The causal LM.
        skip_positions (`int`), special_ids (`list[int]`): Tokens that no SAE reads.
    """

    def __init__(self, model: nn.Module, skip_positions: int, special_ids: list[int]) -> None:
        self.names = list(inspect.signature(model.forward).parameters)
        self.skip_positions, self.special_ids = skip_positions, special_ids
        self.prompt: int | None = None  # columns of the prompt, within `generate`
        self.collect = True
        self.columns = torch.zeros(0, dtype=torch.long)
        self.readable = torch.zeros(0, 0, dtype=torch.bool)
        self.codes: dict[str, SparseCodes] = {}
        self.fired: set[str] = set()
        self.active: dict[tuple[str, int], int] = {}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tokens of the call."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens: Any = ids if ids is not None else embeds
        rows, length = tokens.shape[:2]
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self.columns = torch.arange(past, past + length, device=tokens.device)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        own = token_mask(mask, past, length)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            positions = (mask != 0).long().cumsum(1)[:, -length:] - 1
        elif not isinstance(positions, torch.Tensor) or positions.dim() != 2:
            positions = self.columns[None]
        readable = (positions.to(tokens.device) >= self.skip_positions).expand(rows, length)
        if own is not None:
            readable = readable & own.to(tokens.device)
        if ids is not None and self.special_ids:
            readable = readable & ~torch.isin(ids, torch.tensor(self.special_ids, device=ids.device))
        self.readable, self.codes, self.fired = readable, {}, set()
        if self.prompt is None:
            self.active = {}

    def chosen(self, tokens: Any, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """Numbers of the rows of hidden.reshape(-1, D) that SAE `name` reads."""
        if hidden.dim() != 3 or hidden.shape[:2] != self.readable.shape:
            raise ValueError(
                f"The hook of SAE {name!r} must give hidden states of shape (batch, seq, width) for the "
                f"{tuple(self.readable.shape)} tokens of the call, got {tuple(hidden.shape)}. Choose another module."
            )
        where = self.readable
        if isinstance(tokens, torch.Tensor):
            where = where & self._cut(tokens.to(where.device))
        elif tokens != "all":
            if self.prompt is None:
                raise ValueError(
                    f'`tokens` must be "all" or a mask outside of `generate`, got {tokens!r}: nothing else says where '
                    "the prompt ends. Pass a mask (batch, seq)."
                )
            where = where & ((self.columns < self.prompt) == (tokens == "prompt"))
        return where.reshape(-1).nonzero().squeeze(1).to(hidden.device)

    def _cut(self, mask: torch.Tensor) -> torch.Tensor:
        """The columns of the call in a mask of the whole text; beyond it nothing is meant. Beams share a row."""
        rows, copies = len(self.readable), len(self.readable) // max(len(mask), 1)
        if mask.dim() != 2 or copies * len(mask) != rows:
            raise ValueError(
                f"`tokens` must be a mask (batch, seq) for {rows} rows, or one for each prompt of a beam search, got "
                f"shape {tuple(mask.shape)}."
            )
        wide = mask.bool().repeat_interleave(copies, 0)
        wide = nn.functional.pad(wide, (0, max(int(self.columns[-1]) + 1 - wide.shape[1], 0)))
        return wide[:, self.columns]


def token_mask(mask: Any, past: int, tokens: int) -> torch.Tensor | None:
    """The call's columns of a mask [B, S], or whether each token sees itself in one [B, 1, T, S]; True = token."""
    if isinstance(mask, dict):  # one mask for each type of layer, made by `generate` for a static cache
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -tokens:] != 0
    # a static cache has columns for tokens to come, a sliding one has dropped the oldest
    start = min(past, mask.shape[-1] - tokens)
    own = mask[:, 0, :, start : start + tokens].diagonal(dim1=1, dim2=2)
    return own if own.dtype == torch.bool else own == 0


def splice(name: str, sae: Any, state: State, call: Call, hidden: torch.Tensor) -> torch.Tensor | None:
    """
    What the model goes on with in place of `hidden` (B, T, D); None where that is `hidden` itself.

    | mode | a chosen token's x becomes |
    |---|---|
    | observe | x |
    | replace | x^ + d |
    | replace+error | x + d, with the gradient of x^ alone: stop(x) + (x^ - stop(x^)) + d |
    | steer, ablate | x + d |
    | zero, mean | 0, the mean |

    where d = sum over edited latents of (z_edit - z) W_dec, in the units of x.
    """
    again = torch._C._current_graph_task_id() != -1  # gradient checkpointing computes the forward a second time
    collect = call.collect and not again
    if state.mode == "off" or (state.mode == "observe" and not collect):
        return None
    if name in call.fired and not again:
        raise ValueError(
            f"The module of SAE {name!r} must be called once in a forward, got a second call. Hook a module inside "
            "one layer."
        )
    call.fired.add(name)
    if hidden.shape[-1] != sae.config.d_in:
        raise ValueError(
            f"The hook of SAE {name!r}, {sae.config.hook_name!r} ({sae.config.hook_io}), must give hidden states of "
            f"width d_in={sae.config.d_in}, got {hidden.shape[-1]}. The SAE is of another model or place."
        )
    index = call.chosen(state.tokens, hidden, name)
    flat = hidden.reshape(-1, hidden.shape[-1])
    x = flat[index]
    with_gradient = state.mode == "replace+error" and torch.is_grad_enabled()
    codes = shown = delta = None
    if collect or with_gradient or state.mode == "replace" or any(edit["op"] != "add" for edit in state.edits):
        codes = shown = sae.encode(x, state.k)
    if state.edits:
        shown, delta = _edit(name, sae, state.edits, codes, x, call)
    if collect:
        call.codes[name] = _placed(shown, index, hidden.shape[:2])
    if state.mode == "replace":
        new = sae.decode(codes, x)
    elif with_gradient:
        found = sae.decode(codes, x)
        new = x.detach() + (found - found.detach())
    elif state.mode == "zero":
        new = torch.zeros_like(x)
    elif state.mode == "mean":
        new = state.mean.to(x).expand_as(x)
    elif delta is None:
        return None
    else:
        new = x
    if delta is not None:
        new = (new.to(delta.dtype) + delta).to(x.dtype)
    return flat.index_copy(0, index, new).view_as(hidden)


def _edit(
    name: str, sae: Any, edits: tuple[dict[str, Any], ...], codes: SparseCodes | None, x: torch.Tensor, call: Call
) -> tuple[SparseCodes | None, torch.Tensor]:
    """The codes as edited, and sum of (z_edit - z) W_dec in the units of x; edits of one latent follow each other."""
    latents = list(dict.fromkeys(edit["latent"] for edit in edits))
    columns = torch.tensor(latents, device=x.device)
    rows = sae.decoder_rows()[columns]
    if codes is None:
        old = rows.new_zeros(len(x), len(latents))
    else:
        same = codes.indices[..., None] == columns
        old = (codes.values[..., None] * same).sum(1)
    new = list(old.unbind(1))
    for edit in edits:
        at, value = latents.index(edit["latent"]), edit["value"]
        if edit["op"] == "scale":
            key = (name, edit["latent"])
            call.active[key] = call.active.get(key, 0) + int((new[at] != 0).sum())
            new[at] = new[at] * value
        elif edit["op"] == "add":
            new[at] = new[at] + value
        else:
            new[at] = torch.full_like(new[at], value)
    edited = torch.stack(new, 1)
    delta = sae.change((edited - old) @ rows, x)
    if codes is None:
        return None, delta
    values = torch.cat([codes.values.masked_fill(same.any(-1), 0), edited.to(codes.values.dtype)], 1)
    indices = torch.cat([codes.indices, columns.expand(len(x), -1)], 1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return SparseCodes(values, indices.gather(1, order), codes.d_sae), delta


def _placed(codes: SparseCodes, index: torch.Tensor, shape: tuple[int, ...]) -> SparseCodes:
    """Codes of some tokens among all (B, T); those of the others are empty."""
    total = shape[0] * shape[1]
    values = codes.values.new_zeros(total, codes.k).index_copy(0, index, codes.values)
    indices = codes.indices.new_zeros(total, codes.k).index_copy(0, index, codes.indices)
    return SparseCodes(values.view(*shape, -1), indices.view(*shape, -1), codes.d_sae)


def place(
    module: nn.Module, io: str, visit: Callable[[torch.Tensor], torch.Tensor | None], in_place: bool
) -> RemovableHandle:
    """Hook `visit` to the output of `module` (the first of a tuple), or to its first input."""
    if io == "input":
        return module.register_forward_pre_hook(_OnInput(visit, in_place), with_kwargs=True)
    return module.register_forward_hook(_OnOutput(visit))


class _OnInput:
    """An object, since a copy of a model copies its hooks: a closure would go on calling the first model."""

    def __init__(self, visit: Callable[[torch.Tensor], torch.Tensor | None], in_place: bool) -> None:
        self.visit, self.in_place = visit, in_place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = _tensor(args[0] if args else kwargs.get("hidden_states"), module, "input")
        new = self.visit(hidden)
        if new is None:
            return None
        if self.in_place:
            hidden.copy_(new)  # the residual path holds this very tensor
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


class _OnOutput:
    """As [`_OnInput`], for the output."""

    def __init__(self, visit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        self.visit = visit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        several = isinstance(output, tuple) and len(output) > 0
        new = self.visit(_tensor(output[0] if several else output, module, "output"))
        return (new, *output[1:]) if several and new is not None else new


def _tensor(value: Any, module: nn.Module, io: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    raise TypeError(
        f"An SAE must hook a tensor; the {io} of {type(module).__name__} starts with {type(value).__name__}. Choose a "
        "module inside it or its other side."
    )


__all__ = ["Call", "State", "place", "splice", "token_mask"]
