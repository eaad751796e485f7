"""Candidates on many machines: a queue of (generation, candidate), and Ray workers that come and go.

- Each worker holds the model once. What travels is a candidate (dim floats), its rows, and their values back.
- Results are keyed by part of the queue, so one that comes twice does no harm: idle workers repeat the parts that are
  still out (hedging), and the first answer counts.
- A part whose worker is lost goes back to the queue. Workers are counted anew before every generation: nodes that
  joined the cluster are used, lost workers replaced.
- No value is ever made up. What a candidate scores does not depend on who computed it.
"""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainers.essa.backends import Scored, chunks
from trainers.essa.rollout import Prompts
from trainers.essa.scorer import FUNCTIONS, Row, Scorer, Scores


logger = logging.getLogger(__name__)
STALE = -1
MOST_LOSSES = 20  # workers lost within one generation, after which something is wrong with all of them


class _Worker:
    """Runs in a process of its own, with its own copy of the model."""

    def __init__(self, scorer: Scorer) -> None:
        import torch

        torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
        if torch.cuda.is_available():
            scorer.model.to("cuda")
        self.scorer = scorer

    def score(self, X: np.ndarray, rows: list[Row], prompts: Prompts, generation: int, state: Any) -> Scores:
        return self.scorer.score(X, rows, prompts, generation, state)


class RayBackend:
    """
    Args:
        scorer ([`Scorer`]): Copied to each worker.
        num_workers (`int`, *optional*): As many workers as this, or, by default, as the cluster has GPUs (without any,
            CPUs).

    A running cluster is used where `RAY_ADDRESS` names one or `ray.init` was called; else one is started here.

    Raises:
        ImportError: without ray.
    """

    def __init__(self, scorer: Scorer, num_workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('candidate_backend="ray" needs Ray: pip install "hf_ext[ray]".') from error
        self.ray, self.scorer, self.num_workers = ray, scorer, num_workers
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        self._shared = ray.put(scorer)
        self._prompts: dict[str, Any] = {}
        self._workers: list[Any] = []
        self._busy: dict[Any, tuple[int, Any]] = {}  # running call -> part, worker

    def score(
        self, X: np.ndarray, rows: Sequence[Row], prompts: Prompts, generation: int, state: Any = None
    ) -> Scored:
        """Values of all rows, as `ProcessBackend.score` gives them."""
        args = self.scorer.args
        each = args.max_concurrent_sequences or max(1, len(rows) // max(1, len(X)))
        parts = chunks(len(rows), each, 1)
        if prompts.fingerprint not in self._prompts:
            self._prompts[prompts.fingerprint] = self.ray.put(prompts)
        shared = X, self._prompts[prompts.fingerprint], generation, self.ray.put(state)
        waiting, done, lost = deque(range(len(parts))), dict[int, Scores](), 0
        # hedged calls of an earlier generation may still run: they hold their worker, and nobody waits for them
        self._busy = {call: (STALE, worker) for call, (_, worker) in self._busy.items()}
        self._hire()
        while len(done) < len(parts):
            self._hand_out(waiting, done, parts, rows, shared)
            ready, _ = self.ray.wait(list(self._busy), num_returns=1, timeout=10)
            for call in ready:
                part, worker = self._busy.pop(call)
                try:
                    found = self.ray.get(call)
                except self.ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except self.ray.exceptions.RayError as error:  # the worker, its node or its memory is gone
                    lost += 1
                    logger.warning("A worker was lost (%s); its rows go back to the queue.", type(error).__name__)
                    self._workers.remove(worker)
                    if lost > MOST_LOSSES:
                        raise RuntimeError(
                            f"{lost} workers were lost in generation {generation}: see Ray's logs. The state is that "
                            "of the last generation."
                        ) from error
                    still_out = part in (other for other, _ in self._busy.values())
                    if part != STALE and part not in done and not still_out:
                        waiting.appendleft(part)
                    self._hire()
                else:
                    if part != STALE:
                        done.setdefault(part, found)
        values = np.full((len(rows), FUNCTIONS + len(self.scorer.rewards.names)), np.nan)
        texts: list[str | None] = [None] * len(rows)
        metrics: dict[str, list[float]] = {}
        for part, found in sorted(done.items()):
            where = slice(parts[part].start, parts[part].stop)
            values[where], texts[where] = found.values, found.texts
            for name, logged in found.metrics.items():
                metrics.setdefault(name, []).extend(logged)
        return Scored(values, texts, metrics)

    def _hire(self) -> None:
        """Start workers up to what was asked for, or to what the cluster has now."""
        cluster = self.ray.cluster_resources()
        kind = "GPU" if cluster.get("GPU") else "CPU"
        wanted = self.num_workers or max(1, int(cluster.get(kind, 1)))
        options = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        while len(self._workers) < wanted:
            self._workers.append(self.ray.remote(_Worker).options(**options).remote(self._shared))

    def _hand_out(
        self, waiting: deque, done: dict[int, Scores], parts: list[range], rows: Sequence[Row], shared: tuple
    ) -> None:
        """Give every idle worker a part of the queue; when it is empty, one that is still out at one worker only."""
        taken = [worker for _, worker in self._busy.values()]
        out = [part for part, _ in self._busy.values()]
        hedges = deque(part for part in out if part != STALE and out.count(part) == 1 and part not in done)
        X, prompts, generation, state = shared
        for worker in self._workers:
            if worker in taken:
                continue
            if not waiting and not hedges:
                return
            part = waiting.popleft() if waiting else hedges.popleft()
            own = [rows[i] for i in parts[part]]
            used = sorted({row.candidate for row in own})
            renamed = [Row(used.index(row.candidate), row.prompt) for row in own]
            self._busy[worker.score.remote(X[used], renamed, prompts, generation, state)] = part, worker

    def check_agreement(self, fingerprint: str, generation: int) -> None:
        """There is one search state, here."""

    def close(self) -> None:
        """Let the workers go; the cluster stays as it was found."""
        for worker in self._workers:
            self.ray.kill(worker)
        self._workers, self._busy = [], {}
