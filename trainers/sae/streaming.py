"""Activations of a language model, without end: texts -> rows of tokens -> hidden states -> a shuffled stream.

- The model runs only as far as the last hook. All places that are asked for share one forward pass and one shuffle.
- Every stage knows its position, so that a stopped run goes on bit for bit: `state` gives tensors and plain data,
  `load` takes them back.
- In several processes each reads a part of the rows and all keep the same buffer, so that a step sees the tokens that
  one process with the whole batch would see.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from hf_ext.record import record
from hf_ext.sites import Hook


State = tuple[dict[str, torch.Tensor], dict[str, Any]]
# rows whose median norm says what a normal token is, however many rows a forward pass takes
NORM_ROWS = 16
DOCUMENTS_AT_ONCE = 32


class Chunk(NamedTuple):
    """Some tokens: place -> activations (n, D), and their ids (n,)."""

    activations: dict[str, torch.Tensor]
    token_ids: torch.Tensor


class TokenRows:
    """
    Rows of `context_size` token ids: documents end to end, an end token between them, cut where a row is full.

    After the last document the first comes again. The order is the dataset's: shuffle it beforehand.

    Args:
        dataset: A `datasets` `Dataset` or `IterableDataset`, or anything that can be iterated more than once; rows are
            dicts with `text_field` (a text) or `input_ids` (then no tokenizer is needed).
        tokenizer (`PreTrainedTokenizerBase` or `None`): Adds the special tokens that it adds by itself.
        context_size (`int`): Tokens a row.
        text_field (`str`): Column of texts.

    Raises:
        TypeError, ValueError: for a dataset that is empty, can be read only once, or whose rows lack the column.
    """

    def __init__(self, dataset: Any, tokenizer: Any, context_size: int, text_field: str) -> None:
        if isinstance(dataset, str | bytes | dict) or not hasattr(dataset, "__iter__"):
            raise TypeError(f"`train_dataset` must be a dataset of rows, got {type(dataset).__name__}.")
        if iter(dataset) is dataset:
            raise TypeError(
                "`train_dataset` must be readable more than once, got an iterator. Pass a list, a datasets.Dataset, "
                "or datasets.IterableDataset.from_generator(function)."
            )
        self.dataset, self.tokenizer, self.context_size = dataset, tokenizer, context_size
        self.text_field = text_field
        self.epoch, self.row = 0, 0
        self.left: list[int] = []
        self._rows: Iterator[Any] | None = None
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError("`train_dataset` must hold at least one row, got none.")
        self._ids([first])

    def take(self, count: int) -> torch.Tensor:
        """The next `count` rows, `(count, context_size)`."""
        wanted = count * self.context_size
        epoch = self.epoch
        while len(self.left) < wanted:
            documents = list(itertools.islice(self._documents(), DOCUMENTS_AT_ONCE))
            if documents:
                self.row += len(documents)
                for ids in self._ids(documents):
                    self.left.extend(ids)
            else:
                if self.epoch > epoch and not self.left:
                    raise ValueError("`train_dataset` must hold tokens, got rows that are all empty.")
                self.epoch, self.row, self._rows = self.epoch + 1, 0, None
        rows, self.left = self.left[:wanted], self.left[wanted:]
        return torch.tensor(rows).view(count, self.context_size)

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "row": self.row, "left": self.left}

    def load(self, state: dict[str, Any]) -> None:
        self.epoch, self.row, self.left, self._rows = state["epoch"], state["row"], list(state["left"]), None

    def _documents(self) -> Iterator[Any]:
        if self._rows is None:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(self.epoch)
            if hasattr(self.dataset, "__getitem__") and hasattr(self.dataset, "__len__"):
                self._rows = (self.dataset[i] for i in range(self.row, len(self.dataset)))
            else:
                self._rows = itertools.islice(iter(self.dataset), self.row, None)
        return self._rows

    def _ids(self, documents: list[Any]) -> list[list[int]]:
        if isinstance(documents[0], dict) and "input_ids" in documents[0]:
            return [[int(i) for i in document["input_ids"]] for document in documents]
        for document in documents:
            if not isinstance(document, dict) or not isinstance(document.get(self.text_field), str):
                has = ", ".join(document) if isinstance(document, dict) else type(document).__name__
                raise ValueError(
                    f"Rows of `train_dataset` must have a text {self.text_field!r} (dataset_text_field) or input_ids, "
                    f"got {has}."
                )
        if self.tokenizer is None:
            raise ValueError("`processing_class` must be given: `train_dataset` holds texts, not input_ids.")
        ids = self.tokenizer([document[self.text_field] for document in documents]).input_ids
        end = self.tokenizer.eos_token_id
        return [row if end is None or (row and row[-1] == end) else [*row, end] for row in ids]


class ModelSource:
    """
    Chunks of activations at `hooks`, in the order of the texts.

    Args:
        model (`torch.nn.Module`): The language model, in evaluation mode.
        hooks (`dict[str, Hook]`): Place -> hook.
        rows ([`TokenRows`]): What it reads.
        rows_at_once (`int`): Rows of one forward pass, of each process.
        skip_positions (`int`): First positions of each row that are left out: many models park huge norms there.
        special_ids (`set[int]`): Tokens that are left out.
        max_norm_ratio (`float`, *optional*): Leave out tokens whose norm is beyond so many medians at any hook.
        dtype (`torch.dtype`, *optional*): Of the activations; by default the model's.
        rank, world (`int`), gather (`Callable`): For several processes.

    Raises:
        FloatingPointError: where the model gives NaN or infinity, with the hook and the number of tokens.
        ValueError: where a pass over all data leaves no token.
    """

    def __init__(
        self,
        model: Any,
        hooks: dict[str, Hook],
        rows: TokenRows,
        *,
        rows_at_once: int,
        skip_positions: int,
        special_ids: set[int],
        max_norm_ratio: float | None,
        dtype: torch.dtype | None = None,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> None:
        self.model, self.hooks, self.rows, self.dtype = model, hooks, rows, dtype
        self.rows_at_once, self.skip_positions, self.max_norm_ratio = rows_at_once, skip_positions, max_norm_ratio
        self.rank, self.world, self.gather = rank, world, gather
        self.special_ids = torch.tensor(sorted(special_ids), dtype=torch.long)
        self.medians: dict[str, float] | None = None
        inner = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in inner else {}

    def next(self) -> Chunk:
        """The tokens of the next rows that are kept, at least one."""
        if self.max_norm_ratio is not None and self.medians is None:
            before = self.rows.state()
            ids = self.rows.take(NORM_ROWS)
            hidden, mask = self._hidden(ids), self._mask(ids)
            self.medians = {name: float(h[mask].float().norm(dim=1).median()) for name, h in hidden.items()}
            self.rows.load(before)
        epoch = self.rows.epoch
        while True:
            ids = self.rows.take(self.rows_at_once * self.world)
            part = ids.chunk(self.world)[self.rank]
            hidden = {name: self.gather(h) for name, h in self._hidden(part).items()}
            mask = self._mask(ids)
            for name, median in (self.medians or {}).items():
                mask &= (hidden[name].float().norm(dim=2) <= median * (self.max_norm_ratio or 1)).to(mask.device)
            if mask.any():
                return Chunk({name: h[mask.to(h.device)] for name, h in hidden.items()}, ids[mask])
            if self.rows.epoch > epoch + 1:
                raise ValueError(
                    "`train_dataset` must leave tokens to train on, got only special tokens, skipped positions or "
                    "outliers in a pass over all rows. Check `drop_special_tokens`, `skip_positions` and "
                    "`max_norm_ratio`."
                )

    @torch.no_grad()
    def _hidden(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        device = next(self.model.parameters()).device
        with record(self.model, self.hooks, stop=True) as seen:
            self.model(input_ids=ids.to(device), **self._options)
        found = {}
        for name, (hidden, *_) in seen.items():
            if not torch.isfinite(hidden.sum(dtype=torch.float32)):
                bad = int((~torch.isfinite(hidden)).any(-1).sum())
                if bad:
                    raise FloatingPointError(
                        f"Activations must be finite, got NaN or infinity in {bad} of {ids.numel()} tokens at hook "
                        f"{self.hooks[name].path!r} ({self.hooks[name].io}). Load the model in bfloat16 or float32."
                    )
            found[name] = hidden if self.dtype is None else hidden.to(self.dtype)
        return found

    def _mask(self, ids: torch.Tensor) -> torch.Tensor:
        mask = ~torch.isin(ids, self.special_ids)
        mask[:, : self.skip_positions] = False
        return mask

    def state(self) -> dict[str, Any]:
        return {"rows": self.rows.state(), "medians": self.medians}

    def load(self, state: dict[str, Any]) -> None:
        self.rows.load(state["rows"])
        self.medians = state["medians"]


class ShuffledStream:
    """
    Batches from a buffer of `capacity` tokens: it is filled and permuted, a part is served, the rest stays, and so on.

    Args:
        source ([`ModelSource`]): What fills it.
        batch (`int`): Tokens of a batch, of all processes together.
        capacity (`int`): Tokens in the buffer, at least `batch`.
        mix (`float`): Share of the buffer that stays at each refill, in [0, 1).
        seed (`int`): Of the order.
        rank, world (`int`): This process takes its part of each batch.
    """

    def __init__(
        self, source: ModelSource, batch: int, capacity: int, mix: float, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.source, self.batch, self.capacity, self.mix = source, batch, capacity, mix
        self.rank, self.world = rank, world
        self.generator = torch.Generator().manual_seed(seed)
        self.store: dict[str, torch.Tensor] = {}
        self.order = torch.empty(0, dtype=torch.long)
        self.cursor, self.end = 0, 0
        self.pending: dict[str, torch.Tensor] = {}

    def next(self) -> dict[str, torch.Tensor]:
        """Place -> activations (batch / world, D)."""
        if self.cursor == self.end:
            self._refill()
        chosen = self.order[self.cursor : self.cursor + self.batch].chunk(self.world)[self.rank]
        self.cursor += self.batch
        return {name: store[chosen.to(store.device)] for name, store in self.store.items()}

    def _refill(self) -> None:
        slots = self.order[: self.cursor] if self.store else torch.arange(self.capacity)
        filled = 0
        while filled < len(slots):
            if not self.pending or not len(next(iter(self.pending.values()))):
                self.pending = self.source.next().activations
            if not self.store:
                self.store = {
                    name: part.new_empty(self.capacity, part.shape[1]) for name, part in self.pending.items()
                }
            count = min(len(slots) - filled, len(next(iter(self.pending.values()))))
            for name, part in self.pending.items():
                self.store[name][slots[filled : filled + count].to(part.device)] = part[:count]
                self.pending[name] = part[count:]
            filled += count
        self.order = torch.randperm(self.capacity, generator=self.generator)
        self.cursor = 0
        self.end = max(1, int(self.capacity * (1 - self.mix)) // self.batch) * self.batch

    def state(self) -> State:
        """Buffer, order and position: what a stopped run needs to go on."""
        tensors = {"order": self.order, "generator": self.generator.get_state()}
        tensors |= {f"buffer.{name}": store for name, store in self.store.items()}
        # a view into the last chunk would be saved with all of it
        tensors |= {f"pending.{name}": part.clone() for name, part in self.pending.items()}
        facts = {"cursor": self.cursor, "end": self.end, "capacity": self.capacity, "batch": self.batch}
        return tensors, {**facts, "source": self.source.state()}

    def load(self, state: State) -> None:
        tensors, facts = state
        for name, now in (("capacity", self.capacity), ("batch", self.batch)):
            if facts[name] != now:
                raise ValueError(
                    f"`resume_from_checkpoint` must be of a run with the same {name} in tokens, got {facts[name]} "
                    f"there and {now} here. Keep batch size, number of processes and `buffer_tokens`."
                )
        device = next(self.source.model.parameters()).device
        self.order = tensors["order"]
        self.generator.set_state(tensors["generator"])
        self.store = {n.partition(".")[2]: t.to(device) for n, t in tensors.items() if n.startswith("buffer.")}
        self.pending = {n.partition(".")[2]: t.to(device) for n, t in tensors.items() if n.startswith("pending.")}
        self.cursor, self.end = facts["cursor"], facts["end"]
        self.source.load(facts["source"])
