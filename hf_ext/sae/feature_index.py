"""What every latent of an SAE does on some texts: contexts, logit effects, histograms, neighbours, search by words.

    <folder>/index.json          what it is of, and its settings
    <folder>/index.safetensors   of the A latents that fire at all; slot (F,) finds a latent among them, -1: silent
        ids, activations (A, N, W)   the N contexts of strongest activation, each of another row, of W tokens
        peaks, rows (A, N)           where in the context the latent is strongest (-1: no such context), and which row
        density, mean, most (F,)     share of tokens on which it fires; mean and largest activation there
        histogram (A, H)             tokens by activation, between `edges` (powers of 2) of index.json
        near, near_share (A, M)      latents that most often fire with it, and on which share of its tokens; -1: none
        raised, raised_by, lowered, lowered_by (A, M)  tokens whose logits its row raises and lowers most

Logit effects are direct: W_dec row, times the final norm's weight, on the unembedding; layers between are left out.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file


SCHEMA = 1


class Hit(NamedTuple):
    """
    A latent whose contexts hold some words.

    Attributes:
        latent (`int`): Which.
        contexts (`int`): In how many of its contexts they are.
        share (`float`): Mean over all of its contexts of its activation on the words, as a share of that at the peak.
    """

    latent: int
    contexts: int
    share: float


class FeatureIndex:
    """
    An index that `build_feature_index` (feature_index_build.py) wrote.

    Args:
        folder (`str` or path): Its folder.

    Attributes:
        info (`dict`): What index.json holds: `sae`, `model`, `d_sae`, `tokens`, `edges`, ...
        tensors (`dict[str, torch.Tensor]`): As listed at the head of this module.

    Raises:
        ValueError: for a folder without a whole index, saying whether a build is to be continued.

    Example:

        index = FeatureIndex("saes/layer15-index")
        index.contexts(812)[0], index.search(" dragon", tokenizer)[:5]
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder)
        if not (root / "index.json").is_file() or not (root / "index.safetensors").is_file():
            begun = "Its build was stopped: start it again. " if (root / "parts").is_dir() else ""
            raise ValueError(f"`folder` must hold index.json and index.safetensors, got {str(root)!r}. {begun}")
        self.info = json.loads((root / "index.json").read_text(encoding="utf-8"))
        if self.info.get("schema") != SCHEMA:
            raise ValueError(f"The index must be of schema {SCHEMA}, got {self.info.get('schema')}. Build it again.")
        self.tensors = load_file(root / "index.safetensors")

    def __len__(self) -> int:
        return len(self.tensors["slot"])

    def density(self, latent: int) -> float:
        """Share of tokens on which it fires."""
        self._slot(latent)
        return float(self.tensors["density"][latent])

    def contexts(self, latent: int) -> list[tuple[list[int], list[float], int]]:
        """`(ids, activations, peak)` of each context, the strongest first; none of a latent that never fired."""
        slot = self._slot(latent)
        if slot < 0:
            return []
        found = zip(*(self.tensors[name][slot] for name in ("ids", "activations", "peaks")), strict=True)
        return [(ids.tolist(), amounts.float().tolist(), int(peak)) for ids, amounts, peak in found if peak >= 0]

    def effects(self, latent: int) -> dict[str, list[tuple[int, float]]]:
        """`"raised"` and `"lowered"`: token ids and by how much for an activation of 1, the largest first."""
        slot = self._slot(latent)
        names = ("raised", "lowered")
        return {name: self._pairs(name, f"{name}_by", slot) if slot >= 0 else [] for name in names}

    def near(self, latent: int) -> list[tuple[int, float]]:
        """Latents that fire with it, and on which share of its tokens, the most frequent first."""
        slot = self._slot(latent)
        return [] if slot < 0 else [pair for pair in self._pairs("near", "near_share", slot) if pair[0] >= 0]

    def histogram(self, latent: int) -> list[int]:
        """Tokens by activation: below the first of `info["edges"]`, between two, above the last."""
        slot = self._slot(latent)
        return [0] * (len(self.info["edges"]) + 1) if slot < 0 else self.tensors["histogram"][slot].tolist()

    def search(self, words: str, tokenizer: Any, most: int = 20) -> list[Hit]:
        """
        Latents whose contexts hold `words`, those first that fire on the words themselves.

        Args:
            words (`str`): One or several words in a row; found at a word's start and in any capitals.
            tokenizer: Of the model.
            most (`int`, *optional*, defaults to 20): Hits at most.

        Raises:
            ValueError: for words that are empty.
        """
        if not words.strip():
            raise ValueError("`words` must hold a word, got none.")
        plain = words.strip()
        spellings = {lead + word for word in (plain, plain.lower(), plain.capitalize()) for lead in ("", " ")}
        ids, amounts = self.tensors["ids"].long(), self.tensors["activations"].float()
        real = self.tensors["peaks"] >= 0
        on_words = torch.zeros(ids.shape, dtype=torch.bool)
        for spelling in sorted(spellings):
            pattern = tokenizer(spelling, add_special_tokens=False)["input_ids"]
            size, width = len(pattern), ids.shape[2]
            if not 0 < size <= width:
                continue
            starts = torch.ones(*ids.shape[:2], width - size + 1, dtype=torch.bool)
            for at, token in enumerate(pattern):
                starts &= ids[:, :, at : at + width - size + 1] == token
            for at in range(size):
                on_words[:, :, at : at + width - size + 1] |= starts
        on_words &= real[:, :, None]
        peak = amounts.amax(2).clamp_min(torch.finfo(torch.float32).tiny)
        share = ((amounts * on_words).amax(2) / peak).sum(1) / real.sum(1).clamp_min(1)
        counts = on_words.any(2).sum(1)
        latents = (self.tensors["slot"] >= 0).nonzero().squeeze(1)
        slots = self.tensors["slot"][latents].long()
        hits = [
            Hit(latent, int(counts[slot]), float(share[slot]))
            for latent, slot in zip(latents.tolist(), slots.tolist(), strict=True)
            if counts[slot] > 0
        ]
        return sorted(hits, key=lambda hit: (-hit.share, -hit.contexts, hit.latent))[:most]

    def neuronpedia(self, latent: int, tokenizer: Any) -> dict[str, Any]:
        """A latent as Neuronpedia writes a feature's JSON, ready for `json.dump`."""
        effects = self.effects(latent)

        def texts(ids: Sequence[int]) -> list[str]:
            return [tokenizer.decode([token]) for token in ids]

        activations = []
        for ids, amounts, peak in self.contexts(latent):
            activations.append(
                {
                    "tokens": texts(ids),
                    "values": amounts,
                    "maxValue": amounts[peak],
                    "maxValueTokenIndex": peak,
                    "minValue": min(amounts),
                }
            )
        edges = self.info["edges"]
        return {
            "modelId": self.info["model"],
            "layer": self.info["hook_name"],
            "index": str(latent),
            "maxActApprox": float(self.tensors["most"][latent]),
            "frac_nonzero": self.density(latent),
            "freq_hist_data_bar_heights": self.histogram(latent),
            "freq_hist_data_bar_values": [0.0, *edges],
            "pos_str": texts([token for token, _ in effects["raised"]]),
            "pos_values": [by for _, by in effects["raised"]],
            "neg_str": texts([token for token, _ in effects["lowered"]]),
            "neg_values": [by for _, by in effects["lowered"]],
            "activations": activations,
        }

    def _pairs(self, name: str, by: str, slot: int) -> list[tuple[int, float]]:
        numbers, amounts = self.tensors[name][slot].tolist(), self.tensors[by][slot].float().tolist()
        return list(zip(numbers, amounts, strict=True))

    def _slot(self, latent: int) -> int:
        if not isinstance(latent, int) or isinstance(latent, bool) or not 0 <= latent < len(self):
            raise ValueError(f"`latent` must be in [0, {len(self) - 1}], got {latent!r}.")
        return int(self.tensors["slot"][latent])


__all__ = ["FeatureIndex", "Hit"]
