"""Generations of ESSA on two processes beside one, at equal `max_concurrent_sequences`.

    python -m tests.benchmarks essa_processes               # about 8 minutes on two idle cores
    python -m tests.benchmarks essa_processes --pairs 1     # a quick look

- The bundled story model, 32 candidates x 16 prompts, at most 128 rows a call, 48 new tokens, one thread a process,
  started by `accelerate launch`; rewards are floats, and nothing else is gathered.
- A run's figure is the median of its generations but the first. Runs take turns; both find the same adapter.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


GOAL, GENERATIONS = 1.6, 4
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--main_process_port", "0"]


def words(completions, **columns):
    """As many words as there are."""
    return [float(len(completion[0]["content"].split())) for completion in completions]


def worker(folder: str) -> None:
    """One run; writes the seconds of its generations and a hash of what it found."""
    import hashlib
    import time

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback

    from hf_ext import tiny
    from hf_ext.tasks import stories
    from trainers.essa import ESSAConfig, ESSATrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, tokenizer = tiny.load("stories", dtype="float32")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.perf_counter() - self.start)

    args = ESSAConfig(
        output_dir=folder,
        population_size=32,
        batch_size_per_candidate=16,
        max_concurrent_sequences=128,
        max_completion_length=48,
        max_steps=GENERATIONS,
        sigma=0.1,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    prompts = [{"prompt": row["prompt"]} for row in stories.dataset(64, seed=0)]
    trainer = ESSATrainer(model, words, args, prompts, processing_class=tokenizer, callbacks=[Clock])
    trainer.train()
    if trainer.is_world_process_zero():
        found = hashlib.sha256(trainer.strategy.mean.tobytes()).hexdigest()
        Path(folder, "clock.json").write_text(json.dumps({"seconds": Clock.seconds, "found": found}))


def measure(processes: int) -> tuple[float, str]:
    """Seconds of a generation, and the hash of the mean."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    many = ["--multi_gpu"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [*LAUNCH, *many, "--num_processes", str(processes), __file__, "--worker", folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        clock = json.loads(Path(folder, "clock.json").read_text())
    return statistics.median(clock["seconds"][1:]), clock["found"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    import rows
    from tqdm import tqdm

    seconds: dict[int, list[float]] = {1: [], 2: []}
    found = set()
    for i in tqdm(range(args.pairs), desc="one process against two"):
        for processes in (1, 2) if i % 2 else (2, 1):
            taken, mean = measure(processes)
            seconds[processes].append(taken)
            found.add(mean)
    if len(found) > 1:
        raise SystemExit("One process and two must find the same mean, but they do not.")
    command = f"python -m tests.benchmarks essa_processes --pairs {args.pairs}"
    rows.write("essa_processes-2", command, "seconds per generation", seconds[2], ("1 process", "", seconds[1]), GOAL)


if __name__ == "__main__":
    main()
