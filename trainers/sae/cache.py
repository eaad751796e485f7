"""Activations that are at hand: tensors, or a folder of safetensors shards that several runs share.

    cache/  index.json                what they are of (model, hooks, rows) and how far the harvest has come
            shard-00000.safetensors   place -> activations [n, D], and token_ids [n]

Shards are read as mapped files: a run holds in memory what the system keeps of them. Each is written under another
name and renamed when whole; a harvest that was stopped goes on after its last one, and so does one that shall be
longer.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from trainers.sae.streaming import ModelSource, State


INDEX, TOKEN_IDS = "index.json", "token_ids"
SHARD_TOKENS = 2**18


class TensorRows:
    """Activations in memory: place -> (N, D), all of as many rows."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or not tensor.is_floating_point():
                kind = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise TypeError(f"Ready activations must be tensors (N, d_in) of floats, got {kind} for {name!r}.")
            bad = int((~torch.isfinite(tensor)).any(1).sum())
            if bad:
                raise FloatingPointError(
                    f"Activations must be finite, got NaN or infinity in {bad} of {len(tensor)} tokens of {name!r}."
                )
        sizes = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"Ready activations must have as many rows for every SAE, got {sizes}.")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def widths(self) -> dict[str, int]:
        return {name: tensor.shape[1] for name, tensor in self.tensors.items()}

    def gather(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: tensor[indices.to(tensor.device)] for name, tensor in self.tensors.items()}


class ActivationCache:
    """
    A folder of activations, open for reading.

    Args:
        folder (`str` or `os.PathLike`): What [`harvest`] wrote.
        places (list of `str`, *optional*): Which of its places to read; by default all.
        tokens (`int`, *optional*): How many of its tokens, the first ones; by default all.

    Attributes:
        info (`dict`): What the activations are of.

    Raises:
        ValueError: where the folder is no cache, or lacks a place.
    """

    def __init__(
        self, folder: str | os.PathLike[str], places: list[str] | None = None, tokens: int | None = None
    ) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None or not index["shards"]:
            raise ValueError(
                f"`folder` must be a cache of activations, got {str(folder)!r} without {INDEX} or shards."
            )
        self.info = index["info"]
        self.places = list(self.info["hooks"]) if places is None else places
        check_places(self.folder, self.info, self.places)
        self.shards = [load_file(self.folder / shard["file"]) for shard in index["shards"]]
        ends = torch.tensor([shard["tokens"] for shard in index["shards"]]).cumsum(0)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), ends])
        self.tokens = int(ends[-1]) if tokens is None else min(tokens, int(ends[-1]))

    def __len__(self) -> int:
        return self.tokens

    def widths(self) -> dict[str, int]:
        return {place: self.shards[0][place].shape[1] for place in self.places}

    def gather(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Place -> activations of the tokens `indices` (n,), in their order."""
        owners = torch.bucketize(indices, self.starts[1:], right=True)
        found = {}
        for place in self.places:
            out = self.shards[0][place].new_empty(len(indices), self.shards[0][place].shape[1])
            for owner in owners.unique().tolist():
                mine = owners == owner
                out[mine] = self.shards[owner][place][indices[mine] - self.starts[owner]]
            found[place] = out
        return found

    def token_ids(self) -> torch.Tensor:
        """`(N,)`: the token of each row."""
        return torch.cat([shard[TOKEN_IDS] for shard in self.shards])[: self.tokens].long()


class RowBatches:
    """
    Batches of ready rows: each pass over them in a new order, drawn from `seed`; what is left of a pass is dropped.

    Args:
        rows ([`TensorRows`] or [`ActivationCache`]): What is served.
        batch (`int`): Tokens of a batch, of all processes together.
        seed (`int`): Of the orders.
        rank, world (`int`): This process takes its part of each batch.

    Raises:
        ValueError: for fewer rows than a batch.
    """

    def __init__(
        self, rows: TensorRows | ActivationCache, batch: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if len(rows) < batch:
            raise ValueError(
                f"`train_dataset` must hold at least one batch of {batch} tokens, got {len(rows)}. Lower "
                "per_device_train_batch_size or harvest more."
            )
        self.rows, self.batch, self.seed, self.rank, self.world = rows, batch, seed, rank, world
        self.epoch, self.cursor = 0, 0
        self._order = self._permutation()

    @property
    def batches_an_epoch(self) -> int:
        return len(self.rows) // self.batch

    def next(self) -> dict[str, torch.Tensor]:
        """Place -> activations (batch / world, D)."""
        if self.cursor == self.batches_an_epoch:
            self.epoch, self.cursor = self.epoch + 1, 0
            self._order = self._permutation()
        first = self.cursor * self.batch
        self.cursor += 1
        return self.rows.gather(self._order[first : first + self.batch].chunk(self.world)[self.rank])

    def _permutation(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.rows), generator=generator)

    def state(self) -> State:
        return {}, {"epoch": self.epoch, "cursor": self.cursor, "batch": self.batch, "rows": len(self.rows)}

    def load(self, state: State) -> None:
        facts = state[1]
        for name, now in (("batch", self.batch), ("rows", len(self.rows))):
            if facts[name] != now:
                raise ValueError(
                    f"`resume_from_checkpoint` must be of a run with the same number of {name}, got {facts[name]} "
                    f"there and {now} here. Keep data, batch size and number of processes."
                )
        self.epoch, self.cursor = facts["epoch"], facts["cursor"]
        self._order = self._permutation()


def harvest(
    folder: str | os.PathLike[str],
    source: ModelSource,
    info: dict[str, Any],
    tokens: int,
    *,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """
    Fill a cache up to `tokens` tokens; nothing is done where it has as many already.

    Args:
        folder (`str` or `os.PathLike`): The cache, new or begun.
        source ([`ModelSource`]): Where activations come from.
        info (`dict`): What they are of, see [`describe`]; that of a cache that was begun must be the same.
        tokens (`int`): How many.

    Raises:
        ValueError: where the folder holds activations of something else, with what differs.
        OSError: where the disk is too small, before anything is written.
    """
    from filelock import FileLock

    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(str(root / ".lock")):
        index = read_index(root)
        if index is not None:
            check_same(root, index["info"], info)
        else:
            index = {"info": info, "shards": [], "source": None}
        have = sum(shard["tokens"] for shard in index["shards"])
        if have >= tokens:
            return
        check_room(root, info, tokens - have)
        if index["source"] is not None:
            source.load(index["source"])
        with tqdm(total=tokens, initial=have, unit="tok", desc="activations", disable=not progress) as bar:
            while have < tokens:
                parts: dict[str, list[torch.Tensor]] = {}
                count = 0
                while count < min(shard_tokens, tokens - have):
                    chunk = source.next()
                    for name, part in {**chunk.activations, TOKEN_IDS: chunk.token_ids.to(torch.int32)}.items():
                        parts.setdefault(name, []).append(part.cpu())
                    count += len(chunk.token_ids)
                    bar.update(len(chunk.token_ids))
                name = f"shard-{len(index['shards']):05d}.safetensors"
                save_file({key: torch.cat(list_of) for key, list_of in parts.items()}, root / f".{name}.part")
                os.replace(root / f".{name}.part", root / name)
                index["shards"].append({"file": name, "tokens": count})
                index["source"] = source.state()
                part_of_index = root / f".{INDEX}.part"
                part_of_index.write_text(json.dumps(index), encoding="utf-8")
                os.replace(part_of_index, root / INDEX)
                have += count


def describe(
    model: Any, source: ModelSource, widths: dict[str, int], dtype: torch.dtype, dataset: Any
) -> dict[str, Any]:
    """What activations are of: all that must be the same for two runs to share them."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return {
        "model": {"name": Path(name).name, "fingerprint": fingerprint(model)},
        "hooks": widths,
        "dtype": str(dtype).removeprefix("torch."),
        "context_size": source.rows.context_size,
        "skip_positions": source.skip_positions,
        "special_ids": source.special_ids.tolist(),
        "max_norm_ratio": source.max_norm_ratio,
        "dataset": getattr(dataset, "_fingerprint", None) or _hash(repr(next(iter(dataset)))),
    }


def fingerprint(model: Any) -> str:
    """A hash of a model's architecture and of some numbers of each of its weights."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        few = flat[:: max(1, len(flat) // 16)][:16].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} ".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]


def check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise where a cache is of another model, hook, or way to read; more places than are wanted are no harm."""
    check_places(folder, found, list(wanted["hooks"]))
    for name, now in wanted.items():
        if name != "hooks" and found.get(name) != now:
            raise ValueError(
                f"`activation_cache` must be of the same {name}, but {folder} has {found.get(name)!r} and this run "
                f"{now!r}. Name another folder, or delete that one."
            )


def check_room(folder: Path, info: dict[str, Any], tokens: int) -> None:
    """Raise where the disk of `folder` has no room for so many tokens."""
    size = getattr(torch, info["dtype"]).itemsize
    needed = tokens * (sum(info["hooks"].values()) * size + 4)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"`activation_cache` needs {needed / 2**30:.1f} GiB for {tokens:,} tokens at {len(info['hooks'])} hooks, "
            f"but {folder} has {free / 2**30:.1f} GiB free. Lower `cache_tokens`, or name a folder on another disk."
        )


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a cache, None where there is none yet."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return {name: index[name] for name in ("info", "shards", "source")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be the index of a cache of activations, got {error!r}. Delete the folder."
        ) from error


def check_places(folder: Path, info: dict[str, Any], places: list[str]) -> None:
    lacking = [place for place in places if place not in info["hooks"]]
    if lacking:
        raise ValueError(
            f"`activation_cache` must hold {', '.join(lacking)}, but {folder} has {', '.join(info['hooks'])}. Name "
            "another folder for other hooks."
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
