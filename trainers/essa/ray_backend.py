"""Candidates on many machines: a queue of (generation, candidate), and Ray workers that come and go.

- Each worker holds the model once. What travels is a candidate (dim floats), its rows, and their values back.
- Workers are counted anew before every generation: nodes that joined the cluster are used, lost workers replaced. A
  worker is given rows once it is up, so those that wait for resources hold up nobody.
- A part of the queue whose worker is lost goes back to it. One that is out for long is given to an idle worker too
  (hedging): results are keyed by part, the first counts, and one that comes twice does no harm.
- No value is ever made up. What a candidate scores does not depend on who computed it.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from trainers.essa.backends import Scored, chunks
from trainers.essa.rollout import Prompts
from trainers.essa.scorer import FUNCTIONS, Row, Scorer, Scores


logger = logging.getLogger(__name__)
# what a worker may be at beside a part of the queue: its start, or a part that nobody waits for any more
STARTING, STALE = -1, -2
LATE = 2.0  # times the median seconds of the parts that came back: a part out for longer is hedged
MOST_LOSSES = 4  # workers lost over the same rows: more would only kill the next
SLOW_START = 60  # seconds without any worker, after which the user is told


class _Worker:
    """Runs in a process of its own, with its own copy of the model."""

    def __init__(self, scorer: Scorer) -> None:
        import torch

        torch.set_num_threads(1)
        self.scorer = scorer

    def score(self, X: np.ndarray, rows: list[Row], prompts: Prompts, generation: int, state: Any) -> Scores:
        return self.scorer.score(X, rows, prompts, generation, state)


class _Call(NamedTuple):
    part: int
    worker: Any
    started: float


class _Generation(NamedTuple):
    """What is to be scored, and how far it is."""

    generation: int
    parts: list[range]
    rows: Sequence[Row]
    X: np.ndarray
    others: tuple  # further arguments of `_Worker.score`
    waiting: deque[int]
    done: dict[int, Scores]
    seconds: list[float]  # that parts took
    lost: Counter[int]  # workers, by what they were at


class RayBackend:
    """
    Args:
        scorer ([`Scorer`]): Copied to each worker when it starts.
        num_workers (`int`, *optional*): As many workers as this, or, by default, as the cluster has GPUs where the
            model is on one here, else CPUs. Each takes one CPU and computes with one thread; on a GPU, takes one too.

    A running cluster is used where `RAY_ADDRESS` names one or `ray.init` was called; else one is started here, and
    ends with this process. So do workers, at the latest.

    Raises:
        ImportError: without ray.
    """

    def __init__(self, scorer: Scorer, num_workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('candidate_backend="ray" needs Ray: pip install "hf_ext[ray]".') from error
        self.ray, self.scorer, self.num_workers = ray, scorer, num_workers
        self._put: dict[str, Any] = {}  # the scorer, and prompts by their fingerprint, in Ray's object store
        self._workers: list[Any] = []
        self._busy: dict[Any, _Call] = {}
        self._began = 0.0  # the generation that is scored, or was last

    def score(
        self, X: np.ndarray, rows: Sequence[Row], prompts: Prompts, generation: int, state: Any = None
    ) -> Scored:
        """
        Values of all rows, as `ProcessBackend.score` gives them with the same `max_concurrent_sequences`; without it a
        part of the queue is as long as the prompts of a candidate.

        Raises:
            RewardError: as `Scorer.score`, and any other error of a worker by its own type.
            RuntimeError: where workers die over the same rows, or at their start, again and again.
        """
        if not self.ray.is_initialized():
            self.ray.init(include_dashboard=False, log_to_driver=False)
        args = self.scorer.args
        parts = chunks(len(rows), args.max_concurrent_sequences or args.batch_size_per_candidate, 1)
        others = self._stored(prompts.fingerprint, prompts), generation, self.ray.put(state)
        now = _Generation(generation, parts, rows, X, others, deque(range(len(parts))), {}, [], Counter())
        self._muster()
        told = False
        while len(now.done) < len(parts):
            self._hand_out(now)
            ready, _ = self.ray.wait(list(self._busy), timeout=1)
            for call in ready:
                self._take_back(call, now)
            up = any(call.part != STARTING for call in self._busy.values())
            if not ready and not up and not told and time.monotonic() - self._began > SLOW_START:
                told = True
                logger.warning(
                    "No Ray worker came up in %d seconds. The cluster has %s, free are %s; a worker needs %s.",
                    SLOW_START, self.ray.cluster_resources(), self.ray.available_resources(), self._needs,
                )  # fmt: skip
        values = np.full((len(rows), FUNCTIONS + len(self.scorer.rewards.names)), np.nan)
        texts: list[str | None] = [None] * len(rows)
        metrics: dict[str, list[float]] = {}
        for part, found in sorted(now.done.items()):
            where = slice(parts[part].start, parts[part].stop)
            values[where], texts[where] = found.values, found.texts
            for name, logged in found.metrics.items():
                metrics.setdefault(name, []).extend(logged)
        return Scored(values, texts, metrics)

    @property
    def _needs(self) -> dict[str, int]:
        """Resources of a worker. The scorer's tensors arrive on the kind of device that they left."""
        return {"num_cpus": 1, "num_gpus": int(self.scorer.model.device.type == "cuda")}

    def _stored(self, name: str, value: Any) -> Any:
        if name not in self._put:
            self._put[name] = self.ray.put(value)
        return self._put[name]

    def _muster(self) -> None:
        """Begin a generation: see which workers are there, and start those that are missing."""
        for call, (part, worker, started) in list(self._busy.items()):
            if part == STALE and started < self._began:
                self._dismiss(worker)  # it slept through a whole generation; its call fails, and it is replaced
            elif part != STARTING:
                self._busy[call] = _Call(STALE, worker, started)
        self._began = time.monotonic()
        for worker in self._idle():
            self._busy[worker.__ray_ready__.remote()] = _Call(STARTING, worker, self._began)
        self._hire()

    def _idle(self) -> list[Any]:
        busy = [call.worker for call in self._busy.values()]
        return [worker for worker in self._workers if worker not in busy]

    def _hire(self) -> None:
        """Start workers up to what was asked for, or to what the cluster has now."""
        cluster = self.ray.cluster_resources()
        wanted = self.num_workers or max(1, int(cluster.get("GPU" if self._needs["num_gpus"] else "CPU", 1)))
        remote = self.ray.remote(_Worker).options(**self._needs, scheduling_strategy="SPREAD")
        while len(self._workers) < wanted:
            worker: Any = remote.remote(self._stored("scorer", self.scorer))
            self._workers.append(worker)
            self._busy[worker.__ray_ready__.remote()] = _Call(STARTING, worker, time.monotonic())

    def _hand_out(self, now: _Generation) -> None:
        """Give every idle worker a part of the queue; when it is empty, one that another has been at for long."""
        out = Counter(call.part for call in self._busy.values())
        since = time.monotonic() - (LATE * median(now.seconds) if now.seconds else float("inf"))
        late = [part for part, _, started in self._busy.values() if started < since and out[part] == 1]
        todo = [*now.waiting, *(part for part in late if part >= 0 and part not in now.done)]
        for worker, part in zip(self._idle(), todo, strict=False):
            if now.waiting:
                now.waiting.popleft()
            own = [now.rows[i] for i in now.parts[part]]
            used = sorted({row.candidate for row in own})
            renamed = [Row(used.index(row.candidate), row.prompt) for row in own]
            call = worker.score.remote(now.X[used], renamed, *now.others)
            self._busy[call] = _Call(part, worker, time.monotonic())

    def _take_back(self, call: Any, now: _Generation) -> None:
        """What a call gave; where its worker is lost, its part to the queue and another worker in its place."""
        part, worker, started = self._busy.pop(call)
        try:
            found = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            if part >= 0 and part not in now.done:
                raise error.cause from error
        except self.ray.exceptions.RayError as error:  # the worker, its node or its memory is gone
            logger.warning("A Ray worker was lost (%s); another takes its place.", type(error).__name__)
            self._dismiss(worker)  # one that was only out of reach is not to come back
            self._workers.remove(worker)
            now.lost[part] += 1
            self._stop_if_hopeless(part, now, error)
            if part >= 0 and part not in now.done and part not in [other.part for other in self._busy.values()]:
                now.waiting.appendleft(part)
            self._hire()
        else:
            if part == STARTING:
                now.lost.pop(STARTING, None)
            elif part >= 0 and part not in now.done:
                now.done[part] = found
                now.seconds.append(time.monotonic() - started)

    def _stop_if_hopeless(self, part: int, now: _Generation, error: Exception) -> None:
        lost, over = now.lost[part], "at their start"
        most = MOST_LOSSES * (len(self._workers) + 1)  # a node that dies takes many that start with it
        if part >= 0:
            most, over = MOST_LOSSES, f"over rows {now.parts[part].start} to {now.parts[part].stop - 1}"
        if part != STALE and lost >= most:
            raise RuntimeError(
                f"{lost} Ray workers were lost {over} in generation {now.generation}, one after the other. See the "
                "error above and Ray's logs, and check their memory. The search is as after the last whole generation."
            ) from error

    def _dismiss(self, worker: Any) -> None:
        try:
            self.ray.kill(worker)
        except self.ray.exceptions.RaySystemError as error:  # raised where it was not up yet, whose start is cancelled
            logger.debug("A Ray worker ended before it was up: %s", error)

    def check_agreement(self, fingerprint: str, generation: int) -> None:
        """There is one search state, here."""

    def close(self) -> None:
        """Let the workers go. Scoring again starts new ones, with the scorer as it then is."""
        if self.ray.is_initialized():
            for worker in self._workers:
                self._dismiss(worker)
        self._workers, self._busy, self._put = [], {}, {}
