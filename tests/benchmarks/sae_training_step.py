"""A training step of a TopK autoencoder beside SAELens': time and memory, on real activations and on noise.

    python -m tests.benchmarks sae_training_step               # all rows, about 15 minutes on one core
    python -m tests.benchmarks sae_training_step --pairs 2     # a quick look

- `smollm2`: the residual stream of SmolLM2 after layer 15 (d = 576; micro-stories, first positions and massive norms
  left out). `gaussian`: noise of d = 288. Batches of 4096 tokens, K = 32, float32, one thread.
- Both sides are the libraries' own trainers, given the same tensors in the same order, with the same 10 % of latents
  marked dead before every step. Inside both timings: the loss, AuxK over the dead (d / 2 of them a token), what keeps
  decoder norms out of the loss, clipping at 1, Adam, and the accounting of what fired. Outside: fetching a batch.
- SAELens (extra `peers`) runs with its defaults, `rescale_acts_by_decoder_norm` among them; with
  `use_sparse_activations` it fails in the backward pass on a CPU (6.54.12).
- Memory is the peak of resident memory above what the process held after its imports and a step of a toy.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path


# row -> data, latents, goal of the time, goal of the memory
ROWS = {
    "sae_training_step-smollm2-16384": ("smollm2", 16384, 4.0, 2.0),
    "sae_training_step-smollm2-4096": ("smollm2", 4096, 3.5, None),
    "sae_training_step-gaussian-16384": ("gaussian", 16384, 4.0, 2.0),
    "sae_training_step-gaussian-4096": ("gaussian", 4096, 3.5, None),
}
TOKENS, BATCHES, K, LR = 4096, 4, 32, 3e-4
DEAD_SHARE, LONG_AGO = 0.1, 10**9


def dead_latents(d_sae: int):
    """The same 10 % for both sides."""
    import torch

    return torch.rand(d_sae, generator=torch.Generator().manual_seed(1)) < DEAD_SHARE


def wait() -> None:
    """For the other side's turn; the end of the input ends the process."""
    if not sys.stdin.readline():
        raise SystemExit


def ours(batches, d_sae: int, folder: str, on_begin, on_end) -> None:
    """Train by SAETrainer; `on_begin` and `on_end` are called around each step."""
    from transformers import PrinterCallback, TrainerCallback

    from hf_ext import SAEConfig
    from trainers.sae import SAETrainer, SAETrainingArguments

    class Given:
        """The batches in their order, instead of a shuffled pass."""

        at = 0

        def next(self):
            self.at += 1
            return {"activations": batches[(self.at - 1) % len(batches)]}

        def state(self):
            return self.at

        def load(self, at):
            self.at = at

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            on_begin(trainer.tokens_since_fired["sae"])

        def on_step_end(self, args, state, control, **kwargs):
            if on_end():
                control.should_training_stop = True

    trainer = SAETrainer(
        sae=SAEConfig(d_in=batches[0].shape[1], d_sae=d_sae, k=min(K, d_sae)),
        args=SAETrainingArguments(
            folder,
            max_steps=10**6,
            per_device_train_batch_size=len(batches[0]),
            learning_rate=LR,
            lr_scheduler_type="constant",
            logging_steps=10**6,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=batches[0],
        callbacks=[Turns()],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for the seconds
    trainer.batches = Given()
    trainer.train()


def saelens(batches, d_sae: int, folder: str, on_begin, on_end) -> None:
    """Train by SAELens' SAETrainer."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    size, width = batches[0].shape
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**6 * size,
            train_batch_size_samples=size,
            lr=LR,
            lr_end=LR,
            device="cpu",
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=TopKTrainingSAE(
            TopKTrainingSAEConfig(d_in=width, d_sae=d_sae, k=min(K, d_sae), device="cpu", dtype="float32")
        ),
        data_provider=iter(batches),
    )
    while True:
        on_begin(trainer.n_forward_passes_since_fired)
        trainer.step(batches[trainer.n_training_steps % len(batches)])
        trainer.n_training_steps += 1
        if on_end():
            return


SIDES = {"ours": ours, "saelens": saelens}


def worker(side: str, file: str, d_sae: int) -> None:
    """Print the bytes of memory that two steps take above the imports, then the seconds of a step for each line."""
    import torch
    from safetensors.torch import load_file

    from trainers.recipes.process import forget_peak_rss, peak_rss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        # what is imported late is imported here
        SIDES[side]([torch.randn(32, 8)], 16, folder, lambda ages: ages.fill_(0), lambda: True)
        forget_peak_rss()
        before = peak_rss()
        batches = list(load_file(file)["activations"].split(TOKENS))
        dead = dead_latents(d_sae)
        steps, start = 0, 0.0

        def on_begin(ages) -> None:
            nonlocal start
            if steps >= 2:
                wait()
            ages.copy_(torch.where(dead, LONG_AGO, 0))
            start = time.perf_counter()

        def on_end() -> bool:
            nonlocal steps
            seconds, steps = time.perf_counter() - start, steps + 1
            if steps == 2:
                print(peak_rss() - before, flush=True)
            elif steps > 2:
                print(seconds, flush=True)
            return False

        SIDES[side](batches, d_sae, folder, on_begin, on_end)


def write_activations(kind: str, file: str) -> None:
    """Four batches of tokens."""
    import torch
    from safetensors.torch import save_file

    count = TOKENS * BATCHES
    if kind == "gaussian":
        found = torch.randn(count, 288, generator=torch.Generator().manual_seed(0))
    else:
        import random

        from hf_ext import tiny
        from hf_ext.sites import resolve
        from hf_ext.tasks import stories
        from trainers.sae.streaming import ModelSource, TokenRows

        torch.set_num_threads(1)
        model, tokenizer = tiny.load("smollm2")
        rng = random.Random(0)
        texts = [{"text": stories.sample(rng).text} for _ in range(count // 30)]
        source = ModelSource(
            model,
            {"x": resolve(model, "resid_post", 15)},
            TokenRows(texts, tokenizer, 256, "text"),
            rows_at_once=8,
            skip_positions=1,
            special_ids=set(tokenizer.all_special_ids),
            max_norm_ratio=10.0,
            dtype=torch.float32,
        )
        parts, have = [], 0
        while have < count:
            parts.append(source.next().activations["x"])
            have += len(parts[-1])
        found = torch.cat(parts)[:count]
    save_file({"activations": found.contiguous()}, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="steps of each side (default 9)")
    parser.add_argument("--row", choices=list(ROWS), help="measure this row alone, and its memory")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--activations", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, file, d_sae = args.worker
        worker(side, file, int(d_sae))
        return
    if args.activations:
        write_activations(*args.activations)
        return
    import subprocess
    from importlib import metadata

    import rows

    try:
        version = metadata.version("sae-lens")
    except metadata.PackageNotFoundError as error:
        raise SystemExit('The peer is missing: pip install "hf_ext[peers]"') from error
    command = f"python -m tests.benchmarks sae_training_step --pairs {args.pairs}"
    chosen = {row: spec for row, spec in ROWS.items() if args.row in (None, row)}
    with tempfile.TemporaryDirectory() as folder:
        for kind in dict.fromkeys(kind for kind, *_ in chosen.values()):
            # in a process of its own, whose memory is then nobody's
            file = str(Path(folder) / f"{kind}.safetensors")
            subprocess.run([sys.executable, __file__, "--activations", kind, file], check=True)
        for row, (kind, d_sae, goal, memory_goal) in chosen.items():
            file = str(Path(folder) / f"{kind}.safetensors")
            sides = {side: [side, file, str(d_sae)] for side in SIDES}
            first: dict[str, str] = {}
            got = rows.take_turns(__file__, sides, args.pairs, same=False, first=first)
            peer = ("SAELens TopK", version)
            unit = f"seconds per step of {TOKENS} tokens"
            rows.write(row, command, unit, got["ours"], (*peer, got["saelens"]), goal)
            if memory_goal is not None:
                used = {side: [int(line) / 2**30] for side, line in first.items()}
                rows.write(
                    f"{row}-memory",
                    command,
                    "GiB above imports",
                    used["ours"],
                    (*peer, used["saelens"]),
                    memory_goal,
                )


if __name__ == "__main__":
    main()
