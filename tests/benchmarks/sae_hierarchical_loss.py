"""The hierarchical loss over every budget 1..K, with its gradients, beside autograd through all K prefixes.

    python -m tests.benchmarks sae_hierarchical_loss               # both rows, about 8 minutes on one core
    python -m tests.benchmarks sae_hierarchical_loss --pairs 2     # a quick look

- 2048 tokens, d = 288, F = 16384, float32, one thread. Forward and the gradients of values, decoder and bias.
- The peer gathers the rows of each token's latents, and takes the cumulative sum of what they add: what one writes
  without the closed form (`F.embedding`, whose gradient is faster than that of indexing).
- Both sides must find the same loss, to four digits.
"""

import argparse
import sys
import time


ROWS = {"sae_hierarchical_loss-32": (32, 2.5), "sae_hierarchical_loss-128": (128, 2.0)}
TOKENS, WIDTH, LATENTS = 2048, 288, 16384


def cumulative(x, codes, W_dec, b_dec):
    """The definition: the mean over all prefixes of their squared errors."""
    import torch

    terms = codes.values[:, :, None] * torch.nn.functional.embedding(codes.indices, W_dec)
    return (terms.cumsum(1) + (b_dec - x)[:, None]).square().mean()


def worker(side: str, k: int) -> None:
    """Print the loss, then the seconds of one forward and backward pass for each line of the input."""
    import torch

    from hf_ext.sae import SparseCodes, hierarchical_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(TOKENS, WIDTH)
    W_dec = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH), dim=1).requires_grad_()
    b_dec = torch.zeros(WIDTH, requires_grad=True)
    found = (x @ W_dec.detach().T).topk(k)  # latents as unevenly used as an encoder's
    values = (found.values / k**0.5).requires_grad_()

    def run() -> float:
        values.grad = W_dec.grad = b_dec.grad = None
        codes = SparseCodes(values, found.indices, LATENTS)
        loss = hierarchical_loss(x, codes, W_dec, b_dec)[0] if side == "ours" else cumulative(x, codes, W_dec, b_dec)
        loss.backward()
        return loss.item()

    print(f"{run():.4g}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="passes of each side (default 15)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], int(args.worker[1]))
        return
    import rows
    import torch

    command = f"python -m tests.benchmarks sae_hierarchical_loss --pairs {args.pairs}"
    for row, (k, goal) in ROWS.items():
        sides = {side: [side, str(k)] for side in ("ours", "cumulative")}
        got = rows.take_turns(__file__, sides, args.pairs, same=True)
        peer = ("autograd through cumulative sums", f"torch {torch.__version__}", got["cumulative"])
        rows.write(row, command, f"seconds for {TOKENS} tokens, forward and backward", got["ours"], peer, goal)


if __name__ == "__main__":
    main()
