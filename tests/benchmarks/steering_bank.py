"""Many steering vectors in one batch beside as many passes of a hook-based library; and what one vector costs.

    python -m tests.benchmarks steering_bank               # all rows, about 15 minutes on one core
    python -m tests.benchmarks steering_bank --pairs 1     # a quick look

- `bank`: 16 prompts, each with an adapter of its own (a vector in every layer), in one `generate` call with
  `adapter_names`; the peer is steering-vectors (it asks for transformers 4: `pip install --no-deps steering-vectors`),
  whose vector is put in for each prompt in turn.
- `one`: a batch of 16 with one adapter; `merged`: the same, merged into biases. The peer of both is the base model.
- 48-token prompts, 24 new tokens, greedy, float32, one thread. The sides of `bank` must write the same tokens.
"""

import argparse
import sys
import time


ROWS = {
    "steering_bank-stories-16": ("stories", "bank", "hooks", 6.0),
    "steering_bank-smollm2-16": ("smollm2", "bank", "hooks", 4.0),
    "steering_bank-smollm2-one": ("smollm2", "one", "base", 0.97),
    "steering_bank-smollm2-merged": ("smollm2", "merged", "base", 0.99),
}
COUNT, PROMPT, NEW = 16, 48, 24


def worker(side: str, name: str) -> None:
    """Answer each line of standard input by the seconds of one generation; the first is a hash of its tokens."""
    import hashlib

    import torch
    from peft import get_peft_model

    from hf_ext import SteeringConfig, tiny

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = tiny.load(name, dtype="float32")[0]
    depth, width = base.config.num_hidden_layers, base.config.hidden_size
    # as long as trained ones are: about a tenth of the stream
    vectors = 0.1 * torch.randn(COUNT, depth, width)
    ids = torch.randint(5, base.config.vocab_size, (COUNT, PROMPT))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def generate(model, rows, **more):
        return model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options, **more)

    if side == "base":
        run = lambda: generate(base, ids)  # noqa: E731
    elif side == "hooks":
        try:
            from steering_vectors import SteeringVector
        except ImportError as error:
            raise SystemExit("The peer is missing: pip install --no-deps steering-vectors") from error
        bank = [SteeringVector(dict(enumerate(own))) for own in vectors]

        def run():
            parts = []
            for at, own in enumerate(bank):
                with own.apply(base):
                    parts.append(generate(base, ids[at : at + 1]))
            return torch.cat(parts)
    else:
        names = [f"v{at}" for at in range(COUNT if side == "bank" else 1)]
        model = get_peft_model(base, SteeringConfig(), adapter_name=names[0])
        for at, adapter in enumerate(names):
            if at:
                model.add_adapter(adapter, SteeringConfig())
            model.set_vectors(adapter, dict(enumerate(vectors[at])))
        model.eval()
        if side == "merged":
            model.merge_adapter()
        more = {"adapter_names": names} if side == "bank" else {}
        run = lambda: generate(model, ids, **more)  # noqa: E731

    with torch.inference_mode():
        print(hashlib.sha256(run().numpy().tobytes()).hexdigest(), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            run()
            print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="generations of each side (default 5)")
    parser.add_argument("--row", choices=list(ROWS), help="measure this row alone")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    from importlib import metadata

    import rows

    command = f"python -m tests.benchmarks steering_bank --pairs {args.pairs}"
    for row, (name, side, peer, goal) in ROWS.items():
        if args.row not in (None, row):
            continue
        sides = {side: [side, name], peer: [peer, name]}
        got = rows.take_turns(__file__, sides, args.pairs, same=peer == "hooks")
        package = "steering-vectors" if peer == "hooks" else "transformers"
        theirs = (package if peer == "hooks" else "the base model", metadata.version(package), got[peer])
        rows.write(row, command, "seconds per generation", got[side], theirs, goal)


if __name__ == "__main__":
    main()
