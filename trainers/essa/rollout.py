"""Prompts in, completions out: what a candidate is scored on.

- Greedy by default: fitness is then a function of candidate and prompts alone.
- Sampling adds Gumbel noise to the scaled logits and takes the largest, which draws from the same distribution. The
  noise is a function of seed, generation, prompt and place, not of the candidate or of the batch: candidates of a
  generation are compared on common random numbers, and any worker draws the same completion.
- A row whose logits are NaN or infinite is ended and marked as failed; the others go on.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


# arguments of generate that this module sets
RESERVED = (
    "input_ids", "attention_mask", "inputs", "inputs_embeds", "generation_config", "max_new_tokens", "max_length",
    "do_sample", "temperature", "top_k", "top_p", "num_return_sequences", "logits_processor", "pad_token_id",
    "return_dict_in_generate", "streamer",
)  # fmt: skip


class Rollouts(NamedTuple):
    """
    Completions of a batch of rows.

    Attributes:
        completion_ids (`list[list[int]]`): Without padding, the end of turn included.
        finished (`np.ndarray` [rows] bool): Whether the completion ended by itself.
        failed (`np.ndarray` [rows] bool): Whether the logits became NaN or infinite.
    """

    completion_ids: list[list[int]]
    finished: np.ndarray
    failed: np.ndarray


class Prompts:
    """
    A dataset as the search sees it: tokens of each prompt, and what its reward functions get.

    Args:
        dataset (`Dataset` or list of dict): Rows with `prompt`, a text or a list of messages.
        tokenizer (`PreTrainedTokenizerBase`): With a chat template where prompts are messages.
        room (`int`): Most tokens that a prompt may have.
        template_kwargs (`dict`, *optional*): More arguments of `apply_chat_template`.
        name (`str`): What errors call it.

    Raises:
        ValueError: where there are no rows or no `prompt`, a prompt is empty, of another kind or longer than `room`.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        room: int,
        template_kwargs: Mapping[str, Any] | None = None,
        name: str = "train_dataset",
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"`{name}` must have a length and rows by index (a Dataset or a list), got {type(dataset).__name__}. "
                "Of a stream, take what the run needs: list(stream.take(1000))."
            )
        if not len(dataset):
            raise ValueError(f"`{name}` must have rows, got none.")
        self.rows: list[dict[str, Any]] = [dict(dataset[i]) for i in range(len(dataset))]
        self.ids: list[list[int]] = []
        for i, row in enumerate(self.rows):
            prompt = row.get("prompt")
            if not isinstance(prompt, str | list) or not prompt:
                raise ValueError(
                    f'`{name}` must have a column "prompt" of texts or lists of messages, got {prompt!r} in row {i}, '
                    f"whose columns are {', '.join(row)}."
                )
            if isinstance(prompt, str):
                ids = tokenizer(prompt)["input_ids"]
            else:
                ids = tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, return_dict=True, **(template_kwargs or {})
                )["input_ids"]
            if not 0 < len(ids) <= room:
                raise ValueError(
                    f"Every prompt of `{name}` must have from 1 to {room} tokens, so that a completion fits into the "
                    f"model's context, got {len(ids)} in row {i}. Filter the dataset, or lower max_completion_length."
                )
            self.ids.append(ids)
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(sorted(row.items())).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: int, size: int, seed: int) -> list[int]:
        """Batch `index` of an endless sequence of epochs, each a permutation of the rows drawn from (seed, epoch)."""
        found: list[int] = []
        while len(found) < size:
            epoch, at = divmod(index * size + len(found), len(self))
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
            found += order[at : at + size - len(found)].tolist()
        return found

    def columns(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """The other columns of these rows, as reward functions get them."""
        names = [name for name in self.rows[0] if name not in ("prompt", "completion", "completion_ids")]
        return {name: [self.rows[i].get(name) for i in indices] for name in names}


def generate_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    noise_keys: Sequence[tuple[int, ...]] = (),
    options: Mapping[str, Any] | None = None,
) -> Rollouts:
    """
    One completion of each prompt, in one call of `generate`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): In evaluation mode.
        prompts (list of lists of int): Tokens of each row; padded on the left here.
        pad_token_id (`int`), eos_token_ids (list of int): Padding, and what ends a completion.
        max_new_tokens (`int`): Longest completion.
        temperature, top_k, top_p: As in `ESSAConfig`.
        noise_keys (list of tuples of int): With temperature > 0, what the noise of each row depends on.
        options (`dict`, *optional*): More arguments of `generate`; those in `RESERVED` are set here.
    """
    device = model.device
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(prompts):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    finite = _EndNonFinite(eos_token_ids[0], len(prompts))
    processors: list[LogitsProcessor] = [finite]
    if temperature:
        processors.append(TemperatureLogitsWarper(temperature))
        processors += [TopKLogitsWarper(top_k)] if top_k else []
        processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        processors.append(_Gumbel(noise_keys, width))
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # a model's own sampling settings would only be warned about
            temperature=None,
            top_k=None,
            top_p=None,
            pad_token_id=pad_token_id,
            eos_token_id=list(eos_token_ids),
            logits_processor=LogitsProcessorList(processors),
            **(options or {}),
        )
    completions, finished = [], np.zeros(len(prompts), dtype=bool)
    for i, row in enumerate(out[:, width:].tolist()):
        end = next((at for at, token in enumerate(row) if token in eos_token_ids), None)
        finished[i] = end is not None
        completions.append(row if end is None else row[: end + 1])
    return Rollouts(completions, finished & ~finite.failed, finite.failed)


class _EndNonFinite(LogitsProcessor):
    """Ends rows whose logits are NaN or +infinite, and remembers them."""

    def __init__(self, eos_token_id: int, rows: int) -> None:
        self.eos_token_id, self.failed = eos_token_id, np.zeros(rows, dtype=bool)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        total = scores.sum(-1)  # one pass over the vocabulary; -inf alone is what other processors write
        bad = total.isnan() | (total == float("inf"))
        if bad.any():
            self.failed |= bad.view(len(self.failed), -1).any(-1).cpu().numpy()
            scores = scores.masked_fill(bad[:, None], float("-inf"))
            scores[bad, self.eos_token_id] = 0.0
        return scores


class _Gumbel(LogitsProcessor):
    """Noise under which the largest logit is a sample; rows of equal keys have the same."""

    def __init__(self, keys: Sequence[tuple[int, ...]], width: int) -> None:
        self.keys, self.width = list(keys), width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.keys) != len(scores):
            raise ValueError(f"Sampling must have one key a row, got {len(self.keys)} for {len(scores)} rows.")
        at = input_ids.shape[1] - self.width
        drawn: dict[tuple[int, ...], torch.Tensor] = {}
        for key in self.keys:
            if key not in drawn:
                digest = hashlib.blake2b(repr((*key, at)).encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
                drawn[key] = -torch.empty(scores.shape[1]).exponential_(generator=generator).log()
        return scores + torch.stack([drawn[key] for key in self.keys]).to(scores.device)
