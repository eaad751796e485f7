"""Building a feature index, in two steps that a stop does not undo.

- Codes of some rows at a time are written to `<folder>/parts`; what is there is not computed again.
- Then all of them are sorted by latent, once, and every figure is exact: contexts, histograms, neighbours.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from hf_ext.record import record
from hf_ext.sae.feature_index import SCHEMA, FeatureIndex
from hf_ext.sites import Hook, anatomy, unwrap


EDGES = [2.0**power for power in range(-6, 11)]
ROWS_AT_ONCE, LATENTS_AT_ONCE = 8, 64
# the peak has so many tokens after it, where the row has them
AFTER = 4


@torch.no_grad()
def build_feature_index(
    sae: Any,
    model: Any,
    rows: torch.Tensor,
    folder: str | os.PathLike[str],
    *,
    contexts: int = 8,
    length: int = 21,
    tokens: int = 8,
    k: int | None = None,
    skip_positions: int = 1,
    skip_ids: Sequence[int] = (),
    rows_per_part: int = 64,
    info: dict[str, Any] | None = None,
    progress: bool = True,
) -> FeatureIndex:
    """
    Build an index, or go on with one that was stopped.

    Args:
        sae ([`SAEModel`]): With `hook_name`, in evaluation mode.
        model (`PreTrainedModel`): Its causal LM.
        rows (`torch.LongTensor` of shape `(R, T)`): Token ids, without padding.
        folder (`str` or path): Where to; an index of the same SAE, settings and rows is kept as it is.
        contexts (`int`, *optional*, defaults to 8): N.
        length (`int`, *optional*, defaults to 21): W, at most T.
        tokens (`int`, *optional*, defaults to 8): M, tokens at each end of logit effects, and neighbours.
        k (`int`, *optional*): Budget, as in `sae.encode`.
        skip_positions (`int`, *optional*, defaults to 1): First positions of a row that are left out.
        skip_ids (sequence of `int`, *optional*): Tokens that are left out (special ones).
        rows_per_part (`int`, *optional*, defaults to 64): Rows whose codes are written at once. All codes lie in
            memory at the end, 6 bytes for each active latent of each token.
        info (`dict`, *optional*): More to keep in index.json, such as `{"data": "tasks:stories"}`.
        progress (`bool`, *optional*, defaults to `True`): A bar on stderr.

    Raises:
        ValueError: for rows that do not fit, an SAE without a place, or a folder with an index of something else.
    """
    if rows.dim() != 2 or not 1 < length <= rows.shape[1] or len(rows) < 1:
        raise ValueError(
            f"`rows` must be token ids (R, T) with T >= length={length}, got shape {tuple(rows.shape)}. Give longer "
            "rows or a smaller `length`."
        )
    if sae.config.hook_name is None:
        raise ValueError("`hook_name` of the SAE must be a module path of the model, got None.")
    if contexts < 1 or tokens < 1 or rows_per_part < 1:
        raise ValueError(
            f"`contexts`, `tokens`, `rows_per_part` must be at least 1, got {contexts}, {tokens}, {rows_per_part}."
        )
    root = Path(folder)
    settings = {
        "schema": SCHEMA,
        "hook_name": sae.config.hook_name,
        "hook_io": sae.config.hook_io,
        "d_sae": sae.config.d_sae,
        "contexts": contexts,
        "length": length,
        "k": k,
        "skip_positions": skip_positions,
        "skip_ids": sorted(skip_ids),
        "rows": len(rows),
        "row_tokens": rows.shape[1],
        "edges": EDGES,
        "of": _digest(sae, rows, rows_per_part, tokens),
    }
    _claim(root, settings)
    if not (root / "index.safetensors").is_file():
        _write_parts(
            sae, model, rows, root / "parts", k, skip_positions, settings["skip_ids"], rows_per_part, progress
        )
        found = _collect(root / "parts", rows, sae.config.d_sae, contexts, length, tokens, progress)
        alive = (found["slot"] >= 0).nonzero().squeeze(1)
        found |= _effects(sae, model, alive, tokens)
        kept = int(found.pop("tokens"))
        names = {"model": getattr(model, "name_or_path", ""), "sae": sae.config.name_or_path, **(info or {})}
        # a folder by its bare name: where it lies is nobody's business
        shown = {name: Path(v).name if isinstance(v, str) and os.path.exists(v) else v for name, v in names.items()}
        part = root / "index.safetensors.part"
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, part, {"format": "pt"})
        _write_json(root / "index.json", {**settings, **shown, "tokens": kept, "alive": len(alive)})
        os.replace(part, root / "index.safetensors")
    shutil.rmtree(root / "parts", ignore_errors=True)
    return FeatureIndex(root)


def _digest(sae: Any, rows: torch.Tensor, *others: Any) -> str:
    """What a stopped build must have in common with this one."""
    digest = hashlib.sha256(repr(others).encode())
    digest.update(rows.to(torch.int32).contiguous().numpy().tobytes())
    for name, tensor in sorted(sae.state_dict().items()):
        some = tensor.reshape(-1)[:: max(tensor.numel() // 1024, 1)]
        digest.update(f"{name} {tuple(tensor.shape)} {some.double().tolist()}".encode())
    return digest.hexdigest()[:16]


def _claim(root: Path, settings: dict[str, Any]) -> None:
    """The folder is new, or of this very build."""
    for name in ("index.json", "parts/settings.json"):
        if (root / name).is_file():
            before = json.loads((root / name).read_text(encoding="utf-8"))
            odd = [key for key, value in settings.items() if before.get(key) != value]
            if odd:
                what = "its SAE, rows or sizes" if odd == ["of"] else ", ".join(key for key in odd if key != "of")
                raise ValueError(
                    f"`folder` must be new, or of the same build, got {str(root)!r}, which differs in {what}. Name "
                    "another one, or delete it."
                )
            return
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"`folder` must be new or empty, got {str(root)!r}, which holds other files.")
    (root / "parts").mkdir(parents=True, exist_ok=True)
    _write_json(root / "parts" / "settings.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _write_parts(
    sae: Any,
    model: Any,
    rows: torch.Tensor,
    folder: Path,
    k: int | None,
    skip_positions: int,
    skip_ids: list[int],
    rows_per_part: int,
    progress: bool,
) -> None:
    """Codes of all rows, a file for some; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    hook = Hook(sae.config.hook_name, sae.config.hook_io)
    device = next(model.parameters()).device
    parts = range(0, len(rows), rows_per_part)
    for first in tqdm(parts, desc="codes", unit="part", disable=not progress):
        target = folder / f"{first:09d}.safetensors"
        if target.is_file():
            continue
        values, indices, count = [], [], 0
        for part in rows[first : first + rows_per_part].split(ROWS_AT_ONCE):
            with record(model, {"x": hook}, stop=True) as seen:
                model(input_ids=part.to(device), use_cache=False)
            hidden = seen["x"][0]
            kept = ~torch.isin(part, torch.tensor(skip_ids, dtype=part.dtype))
            kept[:, :skip_positions] = False
            at = kept.reshape(-1).nonzero().squeeze(1)
            count += len(at)
            codes = sae.encode(hidden.reshape(-1, hidden.shape[-1])[at.to(hidden.device)].to(sae.W_dec.device), k)
            wide = (part.numel(), codes.k)
            small = codes.values.cpu().clamp(max=torch.finfo(torch.half).max).half()
            values.append(torch.zeros(wide, dtype=torch.half).index_copy(0, at, small))
            indices.append(torch.zeros(wide, dtype=torch.int32).index_copy(0, at, codes.indices.cpu().int()))
        width = max(value.shape[1] for value in values)
        found = {"values": _stacked(values, width), "indices": _stacked(indices, width)}
        found["kept"] = torch.tensor([count])
        save_file(found, target.with_suffix(".part"))
        os.replace(target.with_suffix(".part"), target)


def _stacked(pieces: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat([torch.nn.functional.pad(piece, (0, width - piece.shape[1])) for piece in pieces])


def _collect(
    folder: Path, rows: torch.Tensor, d_sae: int, contexts: int, length: int, tokens: int, progress: bool
) -> dict[str, Any]:
    """Everything that codes tell, exactly: entries sorted by latent, some latents at a time."""
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    width = max(part["values"].shape[1] for part in parts)
    values = _stacked([part["values"] for part in parts], width)
    indices = _stacked([part["indices"] for part in parts], width)
    kept = sum(int(part["kept"]) for part in parts)
    entry = (values > 0).reshape(-1).nonzero().squeeze(1)
    latent, order = indices.reshape(-1)[entry].long().sort(stable=True)
    place, amount = entry[order] // width, values.reshape(-1)[entry[order]].float()
    counts = torch.bincount(latent, minlength=d_sae)
    alive = (counts > 0).nonzero().squeeze(1)
    slot = torch.full((d_sae,), -1, dtype=torch.int32)
    slot[alive] = torch.arange(len(alive), dtype=torch.int32)
    sums = torch.zeros(d_sae).index_add(0, latent, amount)
    most = torch.zeros(d_sae).scatter_reduce(0, latent, amount, "amax")
    bins = len(EDGES) + 1
    binned = torch.bucketize(amount, torch.tensor(EDGES), right=True)
    histogram = torch.bincount(slot[latent].long() * bins + binned, minlength=len(alive) * bins).view(-1, bins)
    starts = torch.searchsorted(latent, torch.arange(d_sae + 1))
    pieces: dict[str, list[torch.Tensor]] = {}
    for some in tqdm(alive.split(LATENTS_AT_ONCE), desc="latents", unit="batch", disable=not progress):
        span = torch.cat([torch.arange(int(starts[f]), int(starts[f + 1])) for f in some.tolist()])
        own = torch.searchsorted(some, latent[span])
        found = _contexts(own, place[span], amount[span], some, rows, values, indices, contexts, length)
        found |= _neighbours(own, place[span], some, values, indices, d_sae, counts, tokens)
        for name, tensor in found.items():
            pieces.setdefault(name, []).append(tensor)
    found = {name: torch.cat(tensors) for name, tensors in pieces.items()}
    density = counts.double() / max(kept, 1)
    figures = {"density": density.float(), "mean": sums / counts.clamp_min(1), "most": most}
    return {**found, **figures, "slot": slot, "histogram": histogram.int(), "tokens": kept}


def _contexts(
    own: torch.Tensor,
    place: torch.Tensor,
    amount: torch.Tensor,
    latents: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    contexts: int,
    length: int,
) -> dict[str, torch.Tensor]:
    """The strongest rows of some latents, and a window around the strongest token of each."""
    size, total = rows.shape[1], len(rows)
    row = place // size
    best = torch.zeros(len(latents), total).index_put((own, row), torch.zeros(()))
    best.view(-1).scatter_reduce_(0, own * total + row, amount, "amax")
    top = best.topk(min(contexts, total), dim=1)
    strongest = amount == best[own, row]
    at = torch.full((len(latents) * total,), size)
    at.scatter_reduce_(0, (own * total + row)[strongest], (place % size)[strongest], "amin")
    peak = at.view(len(latents), total).gather(1, top.indices)
    lacks = top.values <= 0
    start = (peak.masked_fill(lacks, 0) - (length - 1 - AFTER)).clamp(0, size - length)
    columns = start[:, :, None] + torch.arange(length)
    ids = rows[top.indices[:, :, None], columns]
    there = top.indices[:, :, None] * size + columns
    same = indices[there] == latents[:, None, None, None]
    activations = (values[there] * same).sum(-1).masked_fill(lacks[:, :, None], 0)
    found = {
        "ids": ids.to(torch.int32).masked_fill(lacks[:, :, None], 0),
        "activations": activations.half(),
        "peaks": torch.where(lacks, -1, peak - start).to(torch.int16),
        "rows": torch.where(lacks, -1, top.indices).to(torch.int32),
    }
    short = contexts - top.values.shape[1]
    for name, tensor in found.items():
        if short:
            fill = -1 if name in ("peaks", "rows") else 0
            found[name] = torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.dim() - 2), 0, short), value=fill)
    if int(rows.max()) < 2**16:
        found["ids"] = found["ids"].to(torch.uint16)
    return found


def _neighbours(
    own: torch.Tensor,
    place: torch.Tensor,
    latents: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    d_sae: int,
    counts: torch.Tensor,
    tokens: int,
) -> dict[str, torch.Tensor]:
    """Latents that most often fire on the tokens of each of `latents`."""
    together = (indices[place].long() + own[:, None] * d_sae)[values[place] > 0]
    pairs, times = together.unique(return_counts=True)
    other = pairs % d_sae != latents[pairs // d_sae]
    pairs, times = pairs[other], times[other]
    times, order = times.sort(descending=True, stable=True)
    owner, again = (pairs[order] // d_sae).sort(stable=True)  # of each latent still by number
    numbers = torch.bincount(owner, minlength=len(latents))
    rank = torch.arange(len(owner)) - (numbers.cumsum(0) - numbers)[owner]
    first = rank < tokens
    near = torch.full((len(latents), tokens), -1, dtype=torch.int32)
    share = torch.zeros(len(latents), tokens)
    near[owner[first], rank[first]] = (pairs[order][again] % d_sae)[first].int()
    share[owner[first], rank[first]] = (times[again] / counts[latents][owner])[first]
    return {"near": near, "near_share": share.half()}


def _effects(sae: Any, model: Any, latents: torch.Tensor, tokens: int) -> dict[str, torch.Tensor]:
    """Tokens that each row raises and lowers most; none where the SAE does not stand in the residual stream."""
    head = unwrap(model).get_output_embeddings()
    width = sae.config.d_in
    if head is None or head.weight.shape[1] != width:
        empty = torch.zeros(len(latents), 0)
        return {name: empty.to(torch.half if name.endswith("by") else torch.int32) for name in _EFFECTS}
    unembedding = head.weight.detach().float()
    try:
        family, prefix, _ = anatomy(model)
        norm: Any = model.get_submodule(prefix + family.final_norm)
        unembedding = unembedding * norm.weight.detach().float()
    except ValueError:
        pass  # of a family that sites does not know: without the norm's weight
    found = []
    rows = sae.decoder_rows().detach().float()[latents.to(sae.W_dec.device)].to(unembedding.device)
    for some in rows.split(4 * LATENTS_AT_ONCE):
        effect = some @ unembedding.T
        raised, lowered = effect.topk(tokens, dim=1), effect.topk(tokens, dim=1, largest=False)
        found.append((raised.indices.int(), raised.values.half(), lowered.indices.int(), lowered.values.half()))
    columns = [torch.cat(column).cpu() for column in zip(*found, strict=True)]
    return dict(zip(_EFFECTS, columns, strict=True))


_EFFECTS = ("raised", "raised_by", "lowered", "lowered_by")

__all__ = ["build_feature_index"]
