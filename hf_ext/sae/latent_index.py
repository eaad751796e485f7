"""What each latent of an SAE fires on and what it writes, in one small file: for a page, a card, a quick look.

    index.safetensors   ids, activations (F, N, W)   the N contexts of strongest activation, of W tokens, each of a row
                        peaks (F, N)                 where in the context the latent is strongest; -1: no such context
                        raised, lowered (F, M)       tokens whose logits the latent's direction raises, lowers most
                        raised_by, lowered_by (F, M) by how much, for an activation of 1
                        density (F,)                 share of tokens on which it fires

Logit effects are direct: the decoder row, times the final norm's weight, on the unembedding. Layers in between, and
the norm's division by the length of the stream, are left out, so that only their order tells something.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from hf_ext.record import record
from hf_ext.sites import Hook


ROWS_AT_ONCE, LATENTS_AT_ONCE = 8, 256
# the peak has so many tokens after it, where the row has them
AFTER = 4


@dataclass
class LatentIndex:
    """See the module; token ids are uint16 where the vocabulary allows, activations and effects float16."""

    ids: torch.Tensor
    activations: torch.Tensor
    peaks: torch.Tensor
    raised: torch.Tensor
    raised_by: torch.Tensor
    lowered: torch.Tensor
    lowered_by: torch.Tensor
    density: torch.Tensor

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        target = Path(file)
        part = target.with_name(f"{target.name}.part")
        tensors = {field.name: getattr(self, field.name).contiguous() for field in fields(self)}
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, target)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "LatentIndex":
        """
        Read what `save` wrote.

        Raises:
            ValueError: where the file lacks a tensor.
        """
        names = [field.name for field in fields(cls)]
        with safe_open(file, framework="pt") as content:
            lacking = set(names) - set(content.keys())
            if lacking:
                raise ValueError(
                    f"`file` must be an index of latents, got {file} without {', '.join(sorted(lacking))}."
                )
            return cls(**{name: content.get_tensor(name) for name in names})

    def contexts(self, latent: int) -> list[tuple[list[int], list[float], int]]:
        """`(ids, activations, peak)` of each context of a latent, the strongest first."""
        self._check(latent)
        found = []
        for ids, amounts, peak in zip(self.ids[latent], self.activations[latent], self.peaks[latent], strict=True):
            if peak >= 0:
                found.append((ids.long().tolist(), amounts.float().tolist(), int(peak)))
        return found

    def effects(self, latent: int) -> dict[str, list[tuple[int, float]]]:
        """`"raised"` and `"lowered"`: token ids and by how much, the largest first."""
        self._check(latent)
        return {
            name: list(
                zip(
                    getattr(self, name)[latent].long().tolist(),
                    getattr(self, f"{name}_by")[latent].float().tolist(),
                    strict=True,
                )
            )
            for name in ("raised", "lowered")
        }

    def _check(self, latent: int) -> None:
        if not 0 <= latent < len(self.ids):
            raise ValueError(f"`latent` must be in [0, {len(self.ids)}), got {latent}.")


@torch.no_grad()
def build_index(
    sae: Any,
    model: Any,
    rows: torch.Tensor,
    *,
    contexts: int = 8,
    length: int = 21,
    tokens: int = 8,
    skip_positions: int = 1,
    skip_ids: Sequence[int] = (),
    progress: bool = True,
) -> LatentIndex:
    """
    Look at every latent of an SAE.

    Args:
        sae ([`SAEModel`]): With `hook_name`, in evaluation mode.
        model (`PreTrainedModel`): Its causal LM.
        rows (`torch.LongTensor` of shape `(R, T)`): Tokens to look at; a row gives a latent one context at most.
        contexts (`int`, *optional*, defaults to 8): N.
        length (`int`, *optional*, defaults to 21): W, at most T.
        tokens (`int`, *optional*, defaults to 8): M.
        skip_positions (`int`, *optional*, defaults to 1): First positions of a row that are left out.
        skip_ids (sequence of `int`, *optional*): Tokens that are left out (special ones).
        progress (`bool`, *optional*, defaults to `True`): A bar on stderr.

    Raises:
        ValueError: for rows that are no (R, T), shorter than `length`, or fewer than `contexts`.
    """
    if rows.dim() != 2 or len(rows) < contexts or not 1 < length <= rows.shape[1]:
        raise ValueError(
            f"`rows` must be (R, T) token ids with R >= contexts={contexts} and T >= length={length}, got "
            f"{tuple(rows.shape)}."
        )
    hook, latents = Hook(sae.config.hook_name, sae.config.hook_io), sae.config.d_sae
    best = torch.zeros(contexts, latents)
    where = torch.full((contexts, latents), -1)
    fired, seen_tokens = torch.zeros(latents), 0
    values, indices = [], []
    kept = ~torch.isin(rows, torch.tensor(list(skip_ids), dtype=rows.dtype))
    kept[:, :skip_positions] = False
    size = rows.shape[1]
    for first in tqdm(range(0, len(rows), ROWS_AT_ONCE), desc="contexts", unit="batch", disable=not progress):
        part, mask = rows[first : first + ROWS_AT_ONCE], kept[first : first + ROWS_AT_ONCE]
        with record(model, {"x": hook}, stop=True) as seen:
            model(input_ids=part, use_cache=False)
        codes = sae.encode(seen["x"][0])
        amounts = (codes.values * mask[:, :, None]).float()
        values.append(amounts.half())
        indices.append(codes.indices.int())
        fired += torch.bincount(codes.indices[amounts > 0], minlength=latents)
        seen_tokens += int(mask.sum())
        top, place = _strongest(amounts, codes.indices.long(), latents)
        place = torch.where(top > 0, place + (first + torch.arange(len(part)))[:, None] * size, -1)
        merged = torch.cat([best, top]).topk(contexts, dim=0)
        best, where = merged.values, torch.cat([where, place]).gather(0, merged.indices)
    ids, activations, peaks = _windows(where.T, best.T, rows, torch.cat(values), torch.cat(indices), length)
    density = fired / max(seen_tokens, 1)
    return LatentIndex(ids, activations, peaks, density=density, **_effects(sae, model, tokens))


def _strongest(amounts: torch.Tensor, indices: torch.Tensor, latents: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row and latent its largest activation, and the first position where it has it, both (R, F)."""
    rows, size, width = amounts.shape
    flat, keys = amounts.reshape(rows, -1), indices.reshape(rows, -1)
    top = torch.zeros(rows, latents).scatter_reduce(1, keys, flat, "amax")
    positions = torch.arange(size).repeat_interleave(width).expand(rows, -1)
    positions = torch.where(flat == top.gather(1, keys), positions, size)
    return top, torch.full((rows, latents), size).scatter_reduce(1, keys, positions, "amin")


def _windows(
    where: torch.Tensor,
    best: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and activations (F, N, W) around the places `where` (F, N), and the peak in each (F, N)."""
    size = rows.shape[1]
    row, at = where.clamp_min(0) // size, where.clamp_min(0) % size
    start = (at - (length - 1 - AFTER)).clamp(0, size - length)
    columns = start[:, :, None] + torch.arange(length)
    ids = rows[row[:, :, None], columns]
    activations = torch.zeros(ids.shape, dtype=torch.float16)
    for latent in range(len(where)):
        there = row[latent][:, None], columns[latent]
        activations[latent] = (values[there] * (indices[there] == latent)).sum(-1)
    lacks = best <= 0
    activations[lacks] = 0
    return _small(ids), activations, torch.where(lacks, -1, at - start).to(torch.int16)


def _effects(sae: Any, model: Any, tokens: int) -> dict[str, torch.Tensor]:
    """The four tensors of logit effects, each (F, M)."""
    unembedding = model.get_output_embeddings().weight.float()
    norm = getattr(getattr(model.base_model, "norm", None), "weight", None)
    parts = []
    for rows in sae.decoder_rows().float().split(LATENTS_AT_ONCE):
        effect = (rows if norm is None else rows * norm.float()) @ unembedding.T
        raised, lowered = effect.topk(tokens, dim=1), (-effect).topk(tokens, dim=1)
        parts.append((raised.indices, raised.values, lowered.indices, -lowered.values))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return {
        "raised": _small(columns[0]),
        "raised_by": columns[1].half(),
        "lowered": _small(columns[2]),
        "lowered_by": columns[3].half(),
    }


def _small(ids: torch.Tensor) -> torch.Tensor:
    return ids.to(torch.uint16 if not ids.numel() or int(ids.max()) < 2**16 else torch.int32)
