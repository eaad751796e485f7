"""What an SAE of 4,096 latents that observes costs a forward of SmolLM2.

    python -m tests.benchmarks augmented_observe

Forwards of one augmented model (TopK 32 after layer 15, random weights: the cost is theirs too) with the SAE off and
observing take turns in one process of one thread (two rows of 128 tokens). CPU seconds, so that others on the machine
count less; the ratio is the median over pairs of off / observing. Goal: 1 / 1.1, that is at most 10 % more.
"""

import time

import rows
import torch
from tqdm import tqdm

from hf_ext import SAEAugmentedModelForCausalLM, SAEConfig, SAEModel, tiny


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, tokenizer = tiny.load("smollm2", dtype="float32")
    sae = SAEModel(SAEConfig(d_in=base.config.hidden_size, d_sae=4096, k=32, hook_name="model.layers.15"))
    model = SAEAugmentedModelForCausalLM.from_base(base, sae)
    ids = torch.randint(3, tokenizer.vocab_size, (2, 128))

    def run(mode: str) -> float:
        with model.sae_mode(mode):
            start = time.process_time()
            model(input_ids=ids, use_cache=False)
            return time.process_time() - start

    times: dict[str, list[float]] = {"off": [], "observe": []}
    with torch.no_grad():
        run("off"), run("observe")
        for i in tqdm(range(12), desc="pairs"):
            for mode in ("off", "observe")[:: 1 if i % 2 else -1]:
                times[mode].append(run(mode))

    rows.write(
        "augmented_observe-smollm2",
        "python -m tests.benchmarks augmented_observe",
        "CPU seconds per forward of 256 tokens, SmolLM2-135M float32, F = 4096, K = 32",
        times["observe"],
        ("the same model with its SAE off", f"torch {torch.__version__}", times["off"]),
        goal=0.909,
    )


if __name__ == "__main__":
    main()
