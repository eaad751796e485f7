"""A population in one `generate` call beside what PEFT offers: adapter switching, and mixed batches by adapter name.

    python -m tests.benchmarks essa_population               # all rows, about 15 minutes on one core
    python -m tests.benchmarks essa_population --pairs 1     # a quick look

- Rows: candidates x prompts, 48-token prompts, 24 new tokens, greedy, float32, one thread, LoRA of rank 8 on q, k, v
  and o. `stories` is the bundled model, `smollm2` SmolLM2-135M-Instruct.
- `switch`: each candidate is its own adapter, made beforehand; set_adapter and one generate call for each. `mixed`:
  one call with `adapter_names`. Ours counts everything from the vectors on: bases are there, the table is made anew.
- All sides must write the same tokens. They alternate in one process each; the ratio is peer / ours.
- `optimizer`: ask + tell of sep-CMA-ES at d = 10,000, 64 candidates, against a generation of SmolLM2 at 64 rows: the
  ratio is 1 % of the generation / ask + tell, so 1 and above is within 1 %.
"""

import argparse
import sys
import time


ROWS = {
    "essa_population-stories-16x4-switch": ("stories", 16, 4, "switch", 5.0),
    "essa_population-stories-16x4-mixed": ("stories", 16, 4, "mixed", 1.0),
    "essa_population-smollm2-16x1-switch": ("smollm2", 16, 1, "switch", 4.0),
    "essa_population-smollm2-16x4-switch": ("smollm2", 16, 4, "switch", 2.2),
    "essa_population-smollm2-16x4-mixed": ("smollm2", 16, 4, "mixed", 1.0),
}
PROMPT, NEW, RANK, SIGMA = 48, 24, 8, 0.1
OPTIMIZER = ("essa_population-optimizer", 10_000, 64, 1.0)


def build(name: str, candidates: int):
    """The model with a LoRA whose B is not 0, its search space, and candidates."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model

    from hf_ext import tiny
    from trainers.essa import SvdLora

    torch.manual_seed(0)
    base = tiny.load(name, dtype="float32")[0]
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(base, config).eval()
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.02)
    space = SvdLora(model)
    return model, space, SIGMA * np.random.default_rng(0).normal(size=(candidates, space.dim))


def add_adapters(model, space, X):
    """Each candidate as an adapter of its own, named c0, c1, ..."""
    import copy

    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = model.peft_config["default"]
    for k, x in enumerate(X):
        space.write(x)
        state = {name: weight.clone() for name, weight in get_peft_model_state_dict(model).items()}
        model.add_adapter(f"c{k}", copy.deepcopy(config))
        set_peft_model_state_dict(model, state, adapter_name=f"c{k}")
    space.write(0 * X[0])


def worker(side: str, name: str, candidates: int, prompts: int) -> None:
    """Answer each line of standard input by the seconds of one generation; the first is a hash of its tokens."""
    import hashlib

    import torch

    torch.set_num_threads(1)
    model, space, X = build(name, candidates)
    ids = torch.randint(5, model.config.vocab_size, (prompts, PROMPT), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    every = ids.repeat(candidates, 1)
    owners = [k for k in range(candidates) for _ in range(prompts)]
    if side != "ours":
        add_adapters(model, space, X)
        model.eval()

    def generate(rows, **more):
        return model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options, **more)

    @torch.inference_mode()
    def run():
        if side == "ours":
            with space.candidates(X, owners):
                return generate(every)
        if side == "mixed":
            return generate(every, adapter_names=[f"c{k}" for k in owners])
        parts = []
        for k in range(candidates):
            model.set_adapter(f"c{k}")
            parts.append(generate(ids))
        return torch.cat(parts)

    print(hashlib.sha256(run().numpy().tobytes()).hexdigest(), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def optimizer_worker(dim: int, population: int) -> None:
    """Answer each line of standard input by the seconds of one ask and tell."""
    import numpy as np

    from trainers.essa import make_strategy

    strategy = make_strategy("sep-cma", dim, population, 0.1, 0)
    rng = np.random.default_rng(0)
    print("none", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        strategy.ask()
        strategy.tell(rng.normal(size=population))
        print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="generations of each side (default 5)")
    parser.add_argument("--row", choices=[*ROWS, OPTIMIZER[0]], help="measure this row alone")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, name, candidates, prompts = args.worker
        if side == "optimizer":
            optimizer_worker(int(candidates), int(prompts))
        else:
            worker(side, name, int(candidates), int(prompts))
        return
    import peft
    import rows

    command = f"python -m tests.benchmarks essa_population --pairs {args.pairs}"
    for row, (name, candidates, prompts, peer, goal) in ROWS.items():
        if args.row not in (None, row):
            continue
        shape = [name, str(candidates), str(prompts)]
        got = rows.take_turns(__file__, {"ours": ["ours", *shape], peer: [peer, *shape]}, args.pairs, same=True)
        version = f"peft {peft.__version__}"
        rows.write(row, command, "seconds per generation", got["ours"], (peer, version, got[peer]), goal)
    row, dim, population, goal = OPTIMIZER
    if args.row in (None, row):
        sides = {"optimizer": ["optimizer", "-", str(dim), str(population)], "ours": ["ours", "smollm2", "16", "4"]}
        got = rows.take_turns(__file__, sides, args.pairs, same=False)
        hundredth = [seconds / 100 for seconds in got["ours"]]
        peer = ("1 % of a generation of 64 rows", "SmolLM2", hundredth)
        rows.write(row, command, "seconds of ask and tell", got["optimizer"], peer, goal)


if __name__ == "__main__":
    main()
