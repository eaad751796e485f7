"""A LIMe training step beside Llama's, and beside the authors' algorithm: time and memory.

    python -m tests.benchmarks lime_training_step               # both rows, about 12 minutes on one core
    python -m tests.benchmarks lime_training_step --pairs 2     # a quick look

- L12 D512 G8 (of 8 heads) MLP 1408 vocabulary 8192, T512 B4, float32, one thread, AdamW: forward, backward, update.
- Each side is a process of its own, started once; the two take turns step by step (machines are noisy, and a slow
  spell then falls on both). The ratio is the median over pairs of peer time / our time: above 1 ours wins.
- Peer `concat` keeps one growing buffer and multiplies it at each layer, as the published implementation does: every
  concatenation is kept for the backward pass, so its memory grows with the square of the depth.
- Extra memory is what autograd saves beyond Llama (bytes of distinct storages), the same on every machine.
"""

import argparse
import os
import subprocess
import sys
import time


SHAPE = {"layers": 12, "width": 512, "heads": 8, "mlp": 1408, "vocab": 8192, "tokens": 512, "batch": 4}
ROWS = {"lime_training_step-llama": ("llama", 0.95), "lime_training_step-concat": ("concat", 1.03)}

NOTES = {
    "lime_training_step-llama": "Missed. The extra time is the products of routing, copies, and page faults, since "
    "the shared buffer and its gradient are mapped anew at every step; how it divides was estimated. Blocks of at "
    "most 24 MiB instead of one buffer had more page faults and no clear gain in time."
}


def build(kind: str):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_ext.lime import LimeConfig, LimeForCausalLM

    shared = {
        "vocab_size": SHAPE["vocab"],
        "hidden_size": SHAPE["width"],
        "intermediate_size": SHAPE["mlp"],
        "num_hidden_layers": SHAPE["layers"],
        "num_attention_heads": SHAPE["heads"],
        "num_key_value_heads": SHAPE["heads"],
    }
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared))
    model = LimeForCausalLM(LimeConfig(**shared))
    if kind == "concat":
        for layer in model.model.layers:
            layer.self_attn.mix = concat_mix.__get__(layer.self_attn)
    return model


def concat_mix(self, key, value, *memory):
    """The published algorithm: append this layer's raw heads to the buffer, then multiply the whole of it."""
    import torch

    batch, tokens, heads, dim = key.shape
    raw = torch.cat((key, value), dim=-1).permute(2, 0, 1, 3).reshape(heads, -1)
    buffer = torch.cat((*memory, raw), dim=0)
    routed = buffer[:heads] if self.router is None else self.router.weight.flatten(1) @ buffer
    kv = routed.view(heads, batch, tokens, 2 * dim).transpose(0, 1)
    return kv[..., :dim], kv[..., dim:], buffer


def saved_bytes(model, ids) -> int:
    """Bytes of the distinct storages that autograd saves in one forward, parameters left out."""
    import torch

    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            seen[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # a freed storage's address would be used again
        return tensor

    kept: list = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(ids, labels=ids, use_cache=False).loss.detach()
    return sum(seen.values())


def worker(kind: str) -> None:
    """Answer each line of standard input by the seconds of one training step; the first answer is the memory."""
    import torch

    torch.set_num_threads(1)
    model = build(kind)
    model.train()
    ids = torch.randint(0, SHAPE["vocab"], (SHAPE["batch"], SHAPE["tokens"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    print(saved_bytes(model, ids), flush=True)

    def step() -> float:
        start = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step()
    for _ in sys.stdin:
        print(step(), flush=True)


def measure(kinds: tuple[str, str], pairs: int) -> dict[str, dict]:
    from tqdm import tqdm

    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = [sys.executable, __file__, "--worker"]
    sides = {
        kind: subprocess.Popen([*run, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for kind in kinds
    }
    out = {kind: {"saved": int(side.stdout.readline()), "seconds": []} for kind, side in sides.items()}
    for i in tqdm(range(pairs), desc=" against ".join(kinds)):
        for kind in kinds if i % 2 else kinds[::-1]:
            sides[kind].stdin.write("step\n")
            sides[kind].stdin.flush()
            out[kind]["seconds"].append(float(sides[kind].stdout.readline()))
    for side in sides.values():
        side.stdin.close()
        side.wait()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=16, help="steps of each side (default 16)")
    parser.add_argument("--worker", choices=["lime", "llama", "concat"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    import rows
    import transformers

    buffer = 2 * SHAPE["layers"] * SHAPE["batch"] * SHAPE["tokens"] * SHAPE["width"] * 4
    llama_saved = 0
    for name, (peer, goal) in ROWS.items():
        got = measure(("lime", peer), args.pairs)
        ours, theirs = got["lime"], got[peer]
        llama_saved = theirs["saved"] if peer == "llama" else llama_saved
        extra = {"extra_saved_kv_buffers": round((ours["saved"] - llama_saved) / buffer, 3)}
        if peer == "concat":
            extra["peer_extra_saved_kv_buffers"] = round((theirs["saved"] - llama_saved) / buffer, 3)
        rows.write(
            name,
            f"python -m tests.benchmarks lime_training_step --pairs {args.pairs}",
            "seconds per step",
            ours["seconds"],
            (peer, f"transformers {transformers.__version__}", theirs["seconds"]),
            goal,
            shape=SHAPE,
            note=NOTES.get(name, ""),
            **extra,
        )


if __name__ == "__main__":
    main()
