"""What one `record` hook costs a forward of SmolLM2.

    python -m tests.benchmarks record_overhead

Forwards with and without the hook take turns in one process of one thread (one row of 128 tokens); the ratio is the
median over pairs of plain time / recorded time. Goal: 0.95, that is at most 5 % overhead.
"""

import time

import rows
import torch
from tqdm import tqdm

from hf_ext import tiny
from hf_ext.record import record
from hf_ext.sites import resolve


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = tiny.load("smollm2", dtype="float32")
    ids = torch.randint(0, tokenizer.vocab_size, (1, 128))
    hooks = {"middle": resolve(model, "resid_post", 15)}

    def plain() -> float:
        start = time.perf_counter()
        model(ids)
        return time.perf_counter() - start

    def recorded() -> float:
        start = time.perf_counter()
        with record(model, hooks):
            model(ids)
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"plain": [], "recorded": []}
    with torch.no_grad():
        plain(), recorded()
        for i in tqdm(range(60), desc="pairs"):
            for name, run in (("plain", plain), ("recorded", recorded))[:: 1 if i % 2 else -1]:
                times[name].append(run())

    rows.write(
        "record_overhead-plain",
        "python -m tests.benchmarks record_overhead",
        "seconds per forward of 128 tokens, SmolLM2-135M float32",
        times["recorded"],
        ("the forward without a hook", f"torch {torch.__version__}", times["plain"]),
        goal=0.95,
    )


if __name__ == "__main__":
    main()
