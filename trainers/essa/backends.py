"""Where the rows of a generation are scored: in the processes of this run, or by Ray's workers (`ray_backend`).

Rows are cut into chunks that depend on `max_concurrent_sequences` and not on the number of processes, so that one
process and eight compute the same sums in the same order. Only floats travel.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trainers.essa.rollout import Prompts
from trainers.essa.scorer import FUNCTIONS, REWARD, Row, Scorer


class Scored(NamedTuple):
    """All rows' values as in `Scores`; the texts of those that this process made (others None); logged metrics."""

    values: np.ndarray
    texts: list[str | None]
    metrics: dict[str, list[float]]


def chunks(count: int, at_once: int | None, workers: int) -> list[range]:
    """Rows 0 to `count` in parts of nearly equal size, at most `at_once`; without it one part for each worker."""
    parts = math.ceil(count / at_once) if at_once else min(workers, count)
    edges = [round(i * count / parts) for i in range(parts + 1)]
    return [range(first, last) for first, last in zip(edges, edges[1:], strict=False)]


def write_completions(file: Path, scored: Scored, rows: Sequence[Row], prompts: Prompts) -> None:
    """The completions of a generation that this process made, one JSON line each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("w", encoding="utf-8") as out:
        for row, text, values in zip(rows, scored.texts, scored.values, strict=True):
            if text is not None:
                reward = None if math.isnan(values[REWARD]) else float(values[REWARD])
                entry = {"candidate": row.candidate, "prompt": prompts.rows[row.prompt]["prompt"]}
                out.write(json.dumps(entry | {"completion": text, "reward": reward}, ensure_ascii=False) + "\n")
    part.replace(file)


class ProcessBackend:
    """
    Chunk i is scored by process i mod N; with one process, all of them here.

    Args:
        scorer ([`Scorer`]): This process's.
        accelerator (`Accelerator`): Knows the others.
    """

    def __init__(self, scorer: Scorer, accelerator: Any) -> None:
        self.scorer, self.accelerator = scorer, accelerator

    def score(
        self, X: np.ndarray, rows: Sequence[Row], prompts: Prompts, generation: int, state: Any = None
    ) -> Scored:
        """Values of all rows, the same in every process; an error of one process is raised in all."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        parts = chunks(len(rows), self.scorer.args.max_concurrent_sequences, world)
        values = np.full((len(rows), FUNCTIONS + len(self.scorer.rewards.names)), np.nan)
        texts: list[str | None] = [None] * len(rows)
        metrics: dict[str, list[float]] = {}
        error: Exception | None = None
        for part in parts[rank::world]:
            try:
                found = self.scorer.score(X, [rows[i] for i in part], prompts, generation, state)
            except Exception as reason:
                # the others wait for this process's values, so the error is raised after they have come together
                if world == 1:
                    raise
                error = reason
                break
            values[part.start : part.stop] = found.values
            texts[part.start : part.stop] = found.texts
            for name, logged in found.metrics.items():
                metrics.setdefault(name, []).extend(logged)
        if world > 1:
            values = self._together(values, parts, error)
            metrics = self._together_metrics(metrics)
        return Scored(values, texts, metrics)

    def _together(self, values: np.ndarray, parts: list[range], error: Exception | None) -> np.ndarray:
        world = self.accelerator.num_processes
        own = np.append(values.ravel(), float(error is not None))
        sent = torch.as_tensor(own, device=self.accelerator.device)[None]
        everyone = self.accelerator.gather(sent).cpu().numpy()
        if error is not None:
            raise error
        failed = np.flatnonzero(everyone[:, -1])
        if len(failed):
            raise RuntimeError(f"Scoring failed in process {failed[0]}: its own output says why.")
        for i, part in enumerate(parts):
            theirs = everyone[i % world, :-1].reshape(values.shape)
            values[part.start : part.stop] = theirs[part.start : part.stop]
        return values

    def _together_metrics(self, metrics: dict[str, list[float]]) -> dict[str, list[float]]:
        from accelerate.utils import gather_object

        found: dict[str, list[float]] = {}
        for part in gather_object([metrics]):
            for name, logged in part.items():
                found.setdefault(name, []).extend(logged)
        return found

    def check_agreement(self, fingerprint: str, generation: int) -> None:
        """Raise where another process's search is in another state, before it goes on with what nobody else has."""
        if self.accelerator.num_processes == 1:
            return
        number = int(fingerprint[:12], 16)
        sent = torch.tensor([number], device=self.accelerator.device)
        everyone = self.accelerator.gather(sent).tolist()
        if len(set(everyone)) > 1:
            raise RuntimeError(
                f"The search states of the processes differ after generation {generation}: {everyone}. Start all from "
                "the same model, data and seed, and resume from the last checkpoint."
            )

    def close(self) -> None:
        """Nothing to close."""
