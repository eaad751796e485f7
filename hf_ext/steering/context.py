"""What the steering layers of a model must know of the forward call that runs: whose vector each row gets, and where.

- One [`ForwardContext`] a model, filled by a hook before its forward: names become ids once, masks are made once.
- A vector in layer l changes keys and values of the layers after l alone. So a cache that was filled with other
  vectors must not be continued, unless they all sit in the last layer, at the end of its MLP. Each cache is marked
  with what filled it, and a mark that does not fit is refused.
- Activation checkpointing computes layers again during backward, when another forward may have run: each gated forward
  leaves its masks with its outputs, whose gradient comes first.
- One model serves one forward at a time, as any PEFT model does: no calls from several threads at once.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from hf_ext.steering.layer import SteeringLayer

BASE = "__base__"


class ForwardContext:
    """
    Shared by the steering layers of `model`.

    Attributes:
        layers (`list[SteeringLayer]`): In the order in which they were put in.
        scaling, positions (`dict`): Adapter -> its scale; adapter -> "all", "first" or "completion".
        names (`list[str]`): Adapters in the order of the stacks' rows, the first in row 1; row 0 is the base.
        ids (`torch.LongTensor` of shape `(B,)` or `None`): Each row's place in the stacks; None: the active adapters.
        row_scale, row_gate (`torch.Tensor` of shapes `(B,)`, `(B, T)`, or `None`): The same for a batch with ids.
        gates (`dict[str, torch.BoolTensor]`): "first" and "completion" -> which tokens are meant, `(B, T)`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[SteeringLayer] = []
        self.scaling: dict[str, float] = {}
        self.positions: dict[str, str] = {}
        self.names: list[str] = []
        self.ids: torch.Tensor | None = None
        self.row_scale: torch.Tensor | None = None
        self.row_gate: torch.Tensor | None = None
        self.gates: dict[str, torch.Tensor] = {}
        # adapters whose vectors no key or value depends on; and adapters whose numbers nobody has looked at yet
        self.after_all_keys: set[str] = set()
        self.unchecked: set[str] = set()
        self.versions: Counter[str] = Counter()  # how often an adapter's vectors were written since it got its name
        self._rows: list[str] | None = None
        self._row_ids: torch.Tensor | None = None
        self._prompt: int | None = None  # columns of the prompt, within `generate`
        self._copies = 1  # rows that `generate` makes of each
        self._arguments = list(inspect.signature(model.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def request(self, model: nn.Module, rows: Sequence[str] | None) -> Iterator[None]:
        """The time of one call: `rows` names each row's adapter; a `generate` in it knows where its prompt ends."""
        if rows is not None:
            self._open(list(rows))
        generate: Callable[..., Any] | None = getattr(model, "generate", None)

        def generate_with_prompt(*args: Any, **kwargs: Any) -> Any:
            prompt = next((x for x in (*args[:1], *map(kwargs.get, _PROMPTS)) if isinstance(x, torch.Tensor)), None)
            self._prompt = 1 if prompt is None else prompt.shape[1]
            self._copies = _copies(model, kwargs)
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt, self._copies = None, 1

        if generate is not None:
            model.__dict__["generate"] = generate_with_prompt
        try:
            yield
        finally:
            model.__dict__.pop("generate", None)
            self._rows = self._row_ids = self.ids = self.row_scale = self.row_gate = None

    def admit(self, name: str, scale: float, positions: str, after_all_keys: bool) -> None:
        """Take an adapter on."""
        self.scaling[name], self.positions[name] = scale, positions
        self.unchecked.add(name)
        if after_all_keys:
            self.after_all_keys.add(name)

    def forget(self, name: str) -> None:
        """Its name may come again with other vectors."""
        for table in (self.scaling, self.positions):
            table.pop(name, None)
        self.after_all_keys.discard(name)
        self.unchecked.discard(name)
        self.versions[name] += 1

    @property
    def gated(self) -> bool:
        """Whether any adapter steers some tokens alone."""
        return any(kind != "all" for kind in self.positions.values())

    def _open(self, rows: list[str]) -> None:
        if self.names != list(self.scaling):
            self.names = list(self.scaling)  # a new list tells the layers to stack anew
        place = {BASE: 0} | {name: row for row, name in enumerate(self.names, start=1)}
        self._rows = rows
        self._row_ids = torch.tensor([place[name] for name in rows], device=self.layers[0].device)
        for layer in self.layers:
            layer.stack(self.names, {place[name] for name in rows if name != BASE})

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward."""
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        if not torch.compiler.is_compiling():
            if self.unchecked:
                self._check_finite()
            self._check_cache(given.get("past_key_values"))
        if self._rows is None and not self.gated:
            return
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if not isinstance(tokens, torch.Tensor):
            raise ValueError(
                "`input_ids` or `inputs_embeds` must be given to an adapter that tells rows or tokens apart."
            )
        used = set(self.active()) if self._rows is None else set(self._rows) - {BASE}
        kinds = {self.positions[name] for name in used} - {"all"}
        self.gates = _gates(kinds, tokens, given, self._prompt) if kinds else {}
        if self._rows is not None:
            self._expand(tokens)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it: its cache is marked; the masks are gone, and come back with the gradient of the outputs."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and not torch.compiler.is_compiling():
            cache._steered_by = self._felt()
        gates, self.gates = self.gates, {}
        if not gates or not module.training or not torch.is_grad_enabled():
            return

        def again(gradient: torch.Tensor) -> None:
            self.gates = gates

        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
        for value in values:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(again)

    def active(self) -> list[str]:
        """Adapters that the present forward adds, or has merged."""
        layer = self.layers[0]
        if layer.disable_adapters:
            return []
        merged = dict.fromkeys(name for layer in self.layers for name in layer.merged_adapters)
        return list(merged) or [name for name in layer.active_adapters if name in self.scaling]

    def _expand(self, tokens: torch.Tensor) -> None:
        """Ids, scales and masks of the rows that this forward has: `generate` copies rows for beams and samples."""
        rows, ids, copies = self._rows, self._row_ids, 1
        assert rows is not None and ids is not None
        if tokens.shape[0] == len(rows) * self._copies:
            copies = self._copies
        elif tokens.shape[0] != len(rows):
            raise ValueError(
                f"`adapter_names` must have one name for each row, got {len(rows)} names for {tokens.shape[0]} rows."
            )
        scales = [1.0 if name == BASE else self.scaling[name] for name in rows]
        self.ids = ids.repeat_interleave(copies)
        self.row_scale = None
        if any(scale != 1 for scale in scales):
            self.row_scale = torch.tensor(scales, device=ids.device).repeat_interleave(copies)
        self.row_gate = None
        if self.gates:
            every = torch.ones_like(next(iter(self.gates.values()))[0])
            self.row_gate = torch.stack(
                [
                    self.gates[self.positions[name]][row] if self.positions.get(name, "all") != "all" else every
                    for row, name in enumerate(name for name in rows for _ in range(copies))
                ]
            )

    def _check_finite(self) -> None:
        for layer in self.layers:
            for name in self.unchecked & layer.steering_bias.keys():
                vector = layer.steering_bias[name]
                if vector.device.type != "meta" and not torch.isfinite(vector).all():
                    raise ValueError(
                        f"The vectors of adapter {name!r} must be finite, got NaN or infinity in {layer.name}. The "
                        "file is damaged, or its training diverged."
                    )
        self.unchecked = set()

    def _felt(self) -> tuple[str, ...]:
        """What shapes keys and values now: nothing, an adapter or several, or one for each row."""
        rows = self.active() if self._rows is None else self._rows
        if self._rows is not None and len(set(rows)) == 1:
            rows = rows[:1]
        felt = [
            "the base"
            if name == BASE or name in self.after_all_keys
            else f"{name} (scale {self.scaling[name]:g}, version {self.versions[name]})"
            for name in rows
        ]
        return () if set(felt) <= {"the base"} else tuple(felt)

    def _check_cache(self, cache: Any) -> None:
        """Refuse keys and values that other vectors have shaped."""
        if cache is None or not hasattr(cache, "get_seq_length"):
            return
        now, before = self._felt(), getattr(cache, "_steered_by", ())
        # a length may wait for the accelerator, so it is asked for only where it matters
        if now != before and int(cache.get_seq_length()) > 0:
            raise ValueError(
                f"`past_key_values` must have been filled with the same vectors, {_words(now)}, got one filled with "
                f"{_words(before)}. Start with an empty cache; only vectors of the last layer alone may share one."
            )


_PROMPTS = ("inputs", "input_ids", "inputs_embeds")


def _words(key: tuple[str, ...]) -> str:
    return ", ".join(key) or "the base"


def _copies(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How many rows `generate` makes of each prompt."""
    settings = [kwargs, vars(kwargs.get("generation_config") or object), vars(model.generation_config)]
    found = [
        next((s[name] for s in settings if s.get(name) is not None), 1)
        for name in ("num_beams", "num_return_sequences")
    ]
    return max(int(number) for number in found)


def _gates(
    kinds: set[str], tokens: torch.Tensor, given: dict[str, Any], prompt: int | None
) -> dict[str, torch.Tensor]:
    """Masks [B, T] of the tokens whose output is the first of the completion, and of the completion."""
    batch, length = tokens.shape[:2]
    columns = torch.arange(length, device=tokens.device)
    labels, keep = given.get("labels"), given.get("logits_to_keep")
    if prompt is not None:
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        completion = (columns + past >= prompt - 1).expand(batch, -1)
        first = (columns + past == prompt - 1).expand(batch, -1)
    elif isinstance(labels, torch.Tensor):
        answer = labels.to(tokens.device) != -100
        # the token before one that is learned says it; a row may hold several answers
        completion = torch.cat((answer[:, 1:], answer[:, -1:]), dim=1)
        first = completion & ~answer
    elif isinstance(keep, int) and keep > 1:
        # what GRPO asks for: the completion's logits and the one before them
        completion = (columns >= length - keep).expand(batch, -1)
        first = (columns == length - keep).expand(batch, -1)
    else:
        raise ValueError(
            f"`labels` or `logits_to_keep` (an integer above 1) must tell where the completion begins, since an "
            f"adapter steers {' and '.join(sorted(kinds))} alone, got neither. Or call `generate` of the PeftModel, "
            'or use positions="all".'
        )
    return {"first": first, "completion": completion}
