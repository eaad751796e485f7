"""Capture hidden states and edit them, at any `Hook`, in a plain forward or inside `generate`.

- Both are torch module hooks, checked before the first one is placed and removed however the block ends.
- Edits run before everything else at their place, whichever was entered first: a record, and transformers'
  `output_hidden_states`, show what the model went on computing with. Of two edits at one place the inner runs first.
- Recorded tensors keep their graph, as tensors do: use `torch.no_grad()` where no gradient is wanted.
- Compiled code never calls hooks placed later, so it is refused rather than missed in silence; inside a block
  `generate` compiles nothing.
- Hooks belong to the module: a block sees every forward of the model, from other threads too.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_ext.sites import Hook, base_model, reads_stream, unwrap


class Step(NamedTuple):
    """
    Which tokens an edit looks at: B rows (beams counted), T tokens of the current forward call.

    Attributes:
        attention_mask (`torch.BoolTensor` of shape `(B, T)` or `None`): False marks padding. None if no mask was
            given, so that every token counts (`generate` drops a mask without padding), or one of no known form.
        position_ids (`torch.LongTensor` of shape `(B, T)`): Each token's position, past tokens counted: the model's
            own where it was given any (of shape `(axes, B, T)` where they have several axes).
        is_prefill (`bool`): No token was in the cache before this call, or there is no cache.
    """

    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    is_prefill: bool


EditFunction = Callable[[str, torch.Tensor, Step], torch.Tensor]


@contextmanager
def record(model: nn.Module, hooks: dict[str, Hook], *, stop: bool = False) -> Iterator[dict[str, list[torch.Tensor]]]:
    """
    Collect hidden states while the block runs.

    Each forward call of a hooked module appends one tensor `(batch, seq, width)`: in `generate` the prompt first, then
    every decoding step. What gradient checkpointing computes again during backward is not recorded again. The tensors
    are not copied, and keep their graph if gradients are enabled.

    Args:
        model (`torch.nn.Module`): Any module; not compiled.
        hooks (`dict[str, Hook]`): Name -> place; see `hf_ext.sites.resolve`, or write a `Hook` yourself.
        stop (`bool`, *optional*, defaults to `False`): End the forward as soon as each hook has fired, and with it the
            block: nothing after the model's call in the block runs. Later layers cost nothing; a cache is then left
            half filled.

    Yields:
        `dict[str, list[torch.Tensor]]`, with the names of `hooks`; still there after the block.

    Raises:
        TypeError, ValueError: before any forward, for a path that is no module (with the nearest names), an `io` that
            is neither "input" nor "output", or a compiled module; in the forward, where no tensor is found.

    Example:

        with torch.no_grad(), record(model, {"mid": resolve(model, "resid_post", 6)}, stop=True) as acts:
            model(input_ids)
        acts["mid"][0]  # [B, T, D]
    """
    modules = _check_hooks(model, hooks)
    store: dict[str, list[torch.Tensor]] = {name: [] for name in hooks}

    def keep(name: str, hidden: torch.Tensor) -> None:
        # checkpointing runs forwards again during backward
        if torch._C._current_graph_task_id() == -1:
            store[name].append(hidden)
            if stop and all(store.values()):
                raise _Stop(store)

    with ExitStack() as stack:
        stack.enter_context(_no_compilation(model))
        for name, hook in hooks.items():
            stack.callback(_place(modules[name], name, hook.io, keep, prepend=False).remove)
        try:
            yield store
        except _Stop as signal:
            if signal.args[0] is not store:
                raise


@contextmanager
def edit(model: nn.Module, hooks: dict[str, Hook], fn: EditFunction) -> Iterator[None]:
    """
    Replace hidden states while the block runs: `hidden <- fn(name, hidden, step)`.

    Works in every forward, `generate` with any cache, beam search and padding included. An edit of `resid_mid` in a
    known family changes the residual stream itself; another input edit changes what that module reads, so for
    `resid_pre` all of the layer. Gradients flow through `fn`; with gradient checkpointing call backward inside the
    block, after each forward, since checkpointing computes the edit again.

    Args:
        model (`torch.nn.Module`): Any module; not compiled.
        hooks (`dict[str, Hook]`): Name -> place; see `hf_ext.sites.resolve`, or write a `Hook` yourself.
        fn (`Callable`): `fn(name, hidden, step) -> hidden`; `hidden` is a tensor `(batch, seq, width)`, `step` a
            [`Step`]. It returns a finite tensor of the same shape, dtype and device: `hidden` itself to change
            nothing, better a new one than `hidden` changed in place.

    Raises:
        TypeError, ValueError: as `record`; and in the forward, naming the hook, for what `fn` may not return.

    Example:

        def steer(name, hidden, step):
            return hidden + 4 * direction

        with edit(model, {"steer": resolve(model, "resid_post", 6)}, steer):
            model.generate(**inputs)
    """
    modules = _check_hooks(model, hooks)
    if not callable(fn):
        raise TypeError(f"`fn` must be a function of (name, hidden, step), got {type(fn).__name__}.")
    call = _Call(base_model(model)[1])
    in_place = {name: reads_stream(model, hook) for name, hook in hooks.items()}

    def change(name: str, hidden: torch.Tensor) -> torch.Tensor | None:
        if hidden.dim() != 3:
            raise ValueError(
                f"Hook {name!r} must point at hidden states of shape (batch, seq, width), got {tuple(hidden.shape)}. "
                "Choose another module."
            )
        step = call.step(hidden)
        if not in_place[name]:
            return _check_edit(name, hidden, fn(name, hidden, step))
        # the residual path holds this very tensor, so it is overwritten; `fn` may have saved what it was given
        hidden.copy_(_check_edit(name, hidden, fn(name, hidden.clone(), step)))
        return None

    with ExitStack() as stack:
        stack.enter_context(_no_compilation(model))
        handle = call.owner.register_forward_pre_hook(call.begin, with_kwargs=True)
        stack.callback(handle.remove)
        # each goes to the front, so the last one placed runs first
        for name, hook in reversed(hooks.items()):
            stack.callback(_place(modules[name], name, hook.io, change, prepend=True).remove)
        yield


class _Stop(Exception):
    """Ends a forward for the `record` whose store it carries."""


class _Call:
    """What the base model was called with, noted before any layer adds to the cache."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.names = list(inspect.signature(owner.forward).parameters)
        self.mask: Any = None
        self.positions: torch.Tensor | None = None
        self.past = 0

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        self.mask, self.positions = given.get("attention_mask"), given.get("position_ids")
        cache = given.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())

    def step(self, hidden: torch.Tensor) -> Step:
        batch, tokens = hidden.shape[:2]
        if self.positions is None:
            positions = torch.arange(self.past, self.past + tokens, device=hidden.device)[None]
        else:
            positions = self.positions[..., -tokens:].to(hidden.device)
        if positions.dim() == 2:
            positions = positions.expand(batch, tokens)
        mask = _token_mask(self.mask, self.past, tokens)
        return Step(None if mask is None else mask.to(hidden.device), positions, self.past == 0)


def _token_mask(mask: Any, past: int, tokens: int) -> torch.Tensor | None:
    """The current tokens' columns of a mask [B, S], or whether each sees itself in one [B, 1, T, S]; True = token."""
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


def _place(
    module: nn.Module,
    name: str,
    io: str,
    visit: Callable[[str, torch.Tensor], torch.Tensor | None],
    *,
    prepend: bool,
) -> RemovableHandle:
    """Hook `visit` to one side of `module`; what it returns, unless None, takes the tensor's place."""

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = visit(name, _tensor(args[0] if args else kwargs.get("hidden_states"), name, "input", module))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        several = isinstance(output, tuple) and len(output) > 0
        new = visit(name, _tensor(output[0] if several else output, name, "output", module))
        return (new, *output[1:]) if several and new is not None else new

    if io == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=prepend)
    return module.register_forward_hook(on_output, prepend=prepend)


def _tensor(value: Any, name: str, io: str, module: nn.Module) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    raise TypeError(
        f"Hook {name!r} must point at a tensor; the {io} of {type(module).__name__} starts with "
        f"{type(value).__name__}. Choose a module inside it or its other side."
    )


def _check_edit(name: str, hidden: torch.Tensor, new: Any) -> torch.Tensor:
    if not isinstance(new, torch.Tensor):
        raise TypeError(
            f"`fn` must return a tensor, got {type(new).__name__} for hook {name!r}. "
            "Return `hidden` where nothing is to change."
        )
    expected, found = ((tuple(x.shape), x.dtype, x.device) for x in (hidden, new))
    if found != expected:
        raise ValueError(
            f"`fn` must return shape, dtype and device of `hidden`, {_words(expected)}, got {_words(found)} for hook "
            f"{name!r}. Use .to(hidden) on what you add."
        )
    # what was not finite before is not the edit's doing
    if not torch.isfinite(new).all() and (~torch.isfinite(new) & torch.isfinite(hidden)).any():
        raise ValueError(f"`fn` must return finite values, got NaN or infinity for hook {name!r}. Lower its strength.")
    return new


def _words(properties: tuple[Any, ...]) -> str:
    return ", ".join(str(value) for value in properties)


def _check_hooks(model: nn.Module, hooks: dict[str, Hook]) -> dict[str, nn.Module]:
    if not isinstance(hooks, dict):
        raise TypeError(f'`hooks` must be a dict of names and hooks, got {type(hooks).__name__}. Use {{"mid": hook}}.')
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, hook in hooks.items():
        if not isinstance(hook, Hook):
            raise TypeError(f"`hooks[{name!r}]` must be a Hook, got {type(hook).__name__}. Use Hook(path, io).")
        if hook.io not in ("input", "output"):
            raise ValueError(f'`io` of hook {name!r} must be "input" or "output", got {hook.io!r}.')
        _check_not_compiled(modules, hook.path)
        if hook.path not in modules:
            near = get_close_matches(hook.path, modules, n=3)
            hint = f"The nearest are {', '.join(near)}." if near else "model.named_modules() lists them."
            raise ValueError(f"`path` of hook {name!r} must be a module of the model, got {hook.path!r}. {hint}")
    return {name: modules[hook.path] for name, hook in hooks.items()}


def _check_not_compiled(modules: dict[str, nn.Module], path: str) -> None:
    parts = path.split(".")
    for above in ("", *(".".join(parts[: i + 1]) for i in range(len(parts)))):
        module = modules.get(above)
        where = f"`{above}` in the model" if above else "`model`"
        if module is not None and "_orig_mod" in module._modules:
            raise ValueError(
                f"{where} must not be compiled, got a module from torch.compile, which calls no hooks placed later. "
                "Pass the original, model._orig_mod."
            )
        if module is not None and module._compiled_call_impl is not None:
            raise ValueError(
                f"{where} must not be compiled, got one after .compile(), which calls no hooks placed later. "
                "Load the model again, or use torch.compile(model) and pass the original model here."
            )


@contextmanager
def _no_compilation(model: nn.Module) -> Iterator[None]:
    """On accelerators `generate` compiles by itself with a static cache, and would then skip the hooks."""
    config = getattr(unwrap(model), "generation_config", None)
    if config is None:
        yield
        return
    before, config.disable_compile = config.disable_compile, True
    try:
        yield
    finally:
        config.disable_compile = before
