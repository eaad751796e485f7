"""Calling rewards: what a reward function returns is checked before anything is learned from it.

- A reward function is a function, an async function, or a sequence classification model with one label. All become
  one form inside: TRL's call. `Rewards` combines them as TRL does: a weighted sum over those that gave a number.
- TRL takes NaN for None and lets infinity through; here both, a raised error and a missed time limit are a
  `RewardError`, which names function and row, and the trainer decides. Nothing is kept from a failed call.
- Async functions run at the same time in an event loop of their own thread: a loop may be running here already.
- torch and transformers are imported only where there is a reward model.
"""

import asyncio
import inspect
import itertools
import logging
import math
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REWARD_MODEL_BATCH = 16
# columns of the data set that TRL does not pass on, and keywords of the call
_NOT_PASSED = ("prompt", "completion", "completion_ids")
_RESERVED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


class RewardError(ValueError):
    """
    A reward function gave NaN or infinity, raised an error, or did not answer in time.

    Attributes:
        function (`str`): Its name in `Rewards.names`.
        row (`int | None`): The first completion concerned, where it is one.
        value (`Any`): What it returned there.
    """

    def __init__(self, message: str, function: str = "", row: int | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.function, self.row, self.value = function, row, value


class RewardBatch(NamedTuple):
    """
    The rewards of N completions by F functions.

    Attributes:
        rewards (`np.ndarray`): `(N,)`, float64: the weighted sums; NaN where every function gave None.
        by_function (`np.ndarray`): `(N, F)`, float64, without weights; NaN where a function gave None.
        extra (`dict[str, list]`): Column -> N values, from `log_extra`.
        metrics (`dict[str, list[float]]`): Name -> values, from `log_metric`.
    """

    rewards: np.ndarray
    by_function: np.ndarray
    extra: dict[str, list]
    metrics: dict[str, list[float]]


class Rewards:
    """
    Reward functions with weights, called and checked.

    The reward of row i is sum_f w_f r_if over the functions f that gave a number. Functions are called one after
    another, async ones together after them.

    Args:
        reward_funcs (callable, `str`, `PreTrainedModel`, or a list of these): Functions in TRL's call, async or not;
            Hub ids or folders of sequence classification models; such models. A model is put into evaluation mode and
            takes its tokenizer's pad token.
        weights (`list[float]`, *optional*): One per function; 1 each by default.
        processing_classes (tokenizer or list, *optional*): One per function, None for those that are no model. A
            model without one takes the tokenizer of its own id or folder.
        time_limit (`float`, *optional*): Seconds that a function may take for a batch; for all async ones together.
            A thread cannot be killed: a function that does not answer is left running in a daemon thread.
        device (`str` or `torch.device`, *optional*): Where reward models go; they stay where they are by default.

    Attributes:
        names (`list[str]`): Of the functions; a second one of the same name ends in `_2`.

    Raises:
        TypeError: if a function is no callable, text or model, or a weight or `time_limit` no number.
        ValueError: without functions; for weights that are not finite; if lengths differ; for a model that is no
            sequence classification model with one label, or a tokenizer without a pad token.

    Example:

        >>> def brevity(completions, **kwargs):
        ...     return [1 / len(text) for text in completions]
        >>> def digits(completions, **kwargs):
        ...     return [None if text.isalpha() else 1.0 for text in completions]
        >>> rewards = Rewards([brevity, digits], weights=[2, 0.5])
        >>> batch = rewards(["4 + 4?"] * 2, ["eight", "8"], completion_ids=[[7, 3], [8]], columns={})
        >>> batch.rewards.tolist()
        [0.4, 2.5]
        >>> rewards.names, batch.by_function.tolist()
        (['brevity', 'digits'], [[0.2, nan], [1.0, 1.0]])
    """

    def __init__(
        self,
        reward_funcs: Any,
        weights: Sequence[float] | None = None,
        processing_classes: Any = None,
        *,
        time_limit: float | None = None,
        device: "str | torch.device | None" = None,
    ) -> None:
        functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not functions:
            raise ValueError("`reward_funcs` must hold at least one function, got none.")
        for function in functions:
            if _is_module(function):
                _check_model(function)
            elif not isinstance(function, str) and not callable(function):
                raise TypeError(
                    "`reward_funcs` must hold functions, models, and ids or folders of models, got "
                    f"{function!r} ({type(function).__name__})."
                )
        self.weights = _weights(weights, len(functions))
        if time_limit is not None:
            if isinstance(time_limit, bool) or not isinstance(time_limit, Real):
                raise TypeError(f"`time_limit` must be a number of seconds or None, got {time_limit!r}.")
            if not 0 < time_limit < math.inf:
                raise ValueError(f"`time_limit` must be a positive number of seconds or None, got {time_limit}.")
        self.time_limit = None if time_limit is None else float(time_limit)
        tokenizers = list(processing_classes) if isinstance(processing_classes, list | tuple) else [processing_classes]
        if processing_classes is None:
            tokenizers *= len(functions)
        if len(tokenizers) != len(functions):
            raise ValueError(
                f"`processing_classes` must have {len(functions)} entries, one per function, got {len(tokenizers)}."
            )
        self.names = _unique([_name(function) for function in functions])
        is_model = [isinstance(function, str) or _is_module(function) for function in functions]
        self._functions: list[Callable[..., Any]] = list(functions)
        # last, since it takes time: what is wrong above is said at once
        for i in sorted(np.flatnonzero(is_model).tolist(), key=lambda i: isinstance(functions[i], str)):
            self._functions[i] = _RewardModel(functions[i], tokenizers[i], device)
        self._loop: _LoopThread | None = None
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loop": None}  # a thread stays in its process

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, Any],
        *,
        trainer_state: Any = None,
    ) -> RewardBatch:
        """
        The rewards of a batch of N completions.

        Args:
            prompts, completions (`list`): N texts, or N lists of messages.
            completion_ids (`list[list[int]]`): The tokens of each completion.
            columns (`dict[str, list]`): The data set's other columns, N values each. As in TRL, `prompt`,
                `completion` and `completion_ids` are not passed on.
            trainer_state (`TrainerState`, *optional*): Passed on.

        Returns:
            `RewardBatch`

        Raises:
            RewardError: if a function raises, gives NaN or infinity, or does not answer within `time_limit`.
            TypeError: if a function returns no list, or a list with anything but numbers and None.
            ValueError: if a function returns too many or too few; if the arguments differ in length, or a column has
                the name of another keyword.
        """
        count, given = len(prompts), {"completions": completions, "completion_ids": completion_ids, **columns}
        for name, values in given.items():
            if len(values) != count:
                raise ValueError(f"`{name}` must have {count} rows, as `prompts`, got {len(values)}.")
        if taken := [name for name in columns if name in _RESERVED]:
            raise ValueError(
                f"`columns` must not hold {taken[0]!r}, which rewards get as a keyword. Rename the column."
            )
        extra: dict[str, list] = {}
        metrics: dict[str, list[float]] = {}

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != count:
                raise ValueError(f"`values` of {column!r} must have {count} entries, one per row, got {len(values)}.")
            extra[column] = list(values)

        def log_metric(name: str, value: float) -> None:
            metrics.setdefault(name, []).append(float(value))

        keywords = {name: values for name, values in columns.items() if name not in _NOT_PASSED}
        keywords |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        keywords |= {"trainer_state": trainer_state, "log_extra": log_extra, "log_metric": log_metric}
        calls = [partial(function, **keywords) for function in self._functions]
        by_function = np.full((count, len(calls)), np.nan)
        if count:
            for i, output in [*self._sync(calls), *self._async(calls)]:
                by_function[:, i] = _numbers(output, self.names[i], count)
        return RewardBatch(self._combine(by_function), by_function, extra, metrics)

    def _sync(self, calls: list[partial]) -> list[tuple[int, Any]]:
        outputs = []
        for i, call in enumerate(calls):
            if _is_async(call):
                continue
            if self.time_limit is None:
                try:
                    outputs.append((i, call()))
                except Exception as error:
                    raise self._raised(i, error) from error
            else:
                outputs += self._collect({_in_daemon_thread(call): i})
        return outputs

    def _async(self, calls: list[partial]) -> list[tuple[int, Any]]:
        waiting = {i: call for i, call in enumerate(calls) if _is_async(call)}
        if not waiting:
            return []
        if self._loop is None or not self._loop.thread.is_alive():  # a forked child has no thread of its parent
            self._loop = _LoopThread()
            weakref.finalize(self, self._loop.close)
        futures = {self._loop.submit(call()): i for i, call in waiting.items()}
        try:
            return self._collect(futures)
        finally:
            for future in futures:
                future.cancel()
            if not self._loop.answers():  # a function that never awaits holds it up
                self._loop.close()
                self._loop = None

    def _collect(self, futures: dict[Future, int]) -> list[tuple[int, Any]]:
        wait(futures, self.time_limit, FIRST_EXCEPTION)
        for future, i in futures.items():
            if future.done() and (error := future.exception()):
                if not isinstance(error, Exception):
                    raise error
                raise self._raised(i, error) from error
        late = [self.names[i] for future, i in futures.items() if not future.done()]
        if late:
            names = ", ".join(late)
            raise RewardError(
                f"`{names}` did not answer within {self.time_limit:g} seconds. Mend it, or raise `time_limit`.", names
            )
        return [(i, future.result()) for future, i in futures.items()]

    def _raised(self, i: int, error: Exception) -> RewardError:
        name = self.names[i]
        return RewardError(f"`{name}` raised {type(error).__name__}: {error}. See the error above.", name)

    def _combine(self, by_function: np.ndarray) -> np.ndarray:
        is_none = np.isnan(by_function)
        with np.errstate(over="ignore", invalid="ignore"):
            rewards = np.nansum(by_function * self.weights, axis=1)
        if not np.isfinite(rewards).all():
            row = int(np.flatnonzero(~np.isfinite(rewards))[0])
            names = ", ".join(self.names)
            raise RewardError(
                f"The weighted sum of {names} must be finite, got {rewards[row]} for row {row}.", names, row
            )
        rewards[is_none.all(axis=1)] = np.nan
        if len(rewards) and is_none.all() and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "All reward functions (%s) returned None for every row, so there is nothing to learn from. "
                "Check the columns that they read. This is said once.",
                ", ".join(self.names),
            )
        return rewards


class _RewardModel:
    """A sequence classification model and its tokenizer, in the form of a reward function."""

    def __init__(self, model: "PreTrainedModel | str", tokenizer: Any, device: "str | torch.device | None") -> None:
        from transformers import AutoTokenizer

        if isinstance(model, str):
            model = _load(model)
        if tokenizer is None:
            if not model.name_or_path:
                raise ValueError("`processing_classes` must hold a tokenizer for a model without a name, got None.")
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"`processing_classes` must have a pad token, and that of {_name(model)} has none. "
                "Set `tokenizer.pad_token`, for example to `tokenizer.eos_token`."
            )
        # the model scores the last token that is not this one
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model = (model if device is None else model.to(device)).eval()
        self.tokenizer: PreTrainedTokenizerBase = tokenizer

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        import torch

        texts = [self._text(*pair) for pair in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(texts), REWARD_MODEL_BATCH):
                batch = texts[start : start + REWARD_MODEL_BATCH]
                inputs = self.tokenizer(
                    batch, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
                )
                logits = self.model(**inputs.to(self.model.device)).logits
                if logits.shape != (len(batch), 1):
                    raise ValueError(
                        f"A reward model must give one number per text, got logits {tuple(logits.shape)}."
                    )
                rewards += logits[:, 0].float().tolist()
        return rewards

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


class _LoopThread:
    """A running event loop in a daemon thread."""

    def __init__(self) -> None:
        running = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._live(running)), name="rewards", daemon=True)
        self.thread.start()
        running.wait()

    async def _live(self, running: threading.Event) -> None:
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        running.set()
        await self.end.wait()

    def submit(self, coroutine: Coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def answers(self) -> bool:
        return bool(wait([self.submit(asyncio.sleep(0))], timeout=1).done)

    def close(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.end.set)


def _in_daemon_thread(call: Callable[[], Any]) -> Future:
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # handed over to the thread that waits
            outcome.set_exception(error)

    threading.Thread(target=work, name="reward", daemon=True).start()
    return outcome


def _load(name: str) -> "PreTrainedModel":
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"`reward_funcs` must hold trained reward models, and {name} lacks {sorted(report['missing_keys'])[0]}, "
            "as a language model does. Train a reward model first, for example with TRL's RewardTrainer."
        )
    return model


def _is_module(function: Any) -> bool:
    torch = sys.modules.get("torch")  # without it there is no module
    return torch is not None and isinstance(function, torch.nn.Module)


def _check_model(model: Any) -> None:
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    is_generator = getattr(model, "can_generate", bool)()
    if labels != 1 or is_generator:
        raise ValueError(
            f"`reward_funcs` must hold sequence classification models with one label, got {type(model).__name__} "
            f"with num_labels={labels}. Load it by AutoModelForSequenceClassification with num_labels=1."
        )


def _weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    if weights is None:
        return np.ones(count)
    if len(weights) != count:
        raise ValueError(f"`weights` must have {count} entries, one per function, got {len(weights)}.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"`weights` must hold numbers, got {weight!r} ({type(weight).__name__}).")
        if not math.isfinite(weight):
            raise ValueError(f"`weights` must be finite, got {weight}.")
    return np.array([float(weight) for weight in weights])


def _name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, str):
        return function.rstrip("/").split("/")[-1]
    if _is_module(function):
        return (function.name_or_path or "").rstrip("/").split("/")[-1] or type(function).__name__
    return getattr(function, "__name__", type(function).__name__)


def _unique(names: list[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        numbered = (f"{name}_{i}" for i in itertools.count(2))
        unique.append(next(free for free in itertools.chain([name], numbered) if free not in unique))
    return unique


def _is_async(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _numbers(output: Any, name: str, count: int) -> list[float]:
    """The rewards that a function returned, None as NaN."""
    torch = sys.modules.get("torch")
    if isinstance(output, np.ndarray) or (torch is not None and isinstance(output, torch.Tensor)):
        output = output.tolist()
    if not isinstance(output, list | tuple):
        if inspect.iscoroutine(output):
            output.close()  # else Python warns that nobody awaited it
        raise TypeError(
            f"`{name}` must return a list with a number or None per completion, got {type(output).__name__}."
        )
    if len(output) != count:
        raise ValueError(f"`{name}` must return {count} rewards, one per completion, got {len(output)}.")
    return [_number(value, name, row) for row, value in enumerate(output)]


def _number(value: Any, name: str, row: int) -> float:
    if value is None:
        return math.nan
    scalar = value.item() if getattr(value, "shape", None) in ((), (1,)) else value  # of numpy or torch
    if not isinstance(scalar, Real):
        raise TypeError(f"`{name}` must return numbers or None, got {value!r} ({type(value).__name__}) for row {row}.")
    try:
        number = float(scalar)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"`{name}` must return finite numbers, got {value!r} for row {row}.", name, row, value)
    return number
