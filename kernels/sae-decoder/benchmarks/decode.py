"""Milliseconds of decode and its values gradient, beside the reference and torch's embedding bag, on this GPU.

python benchmarks/decode.py --width 2304 --latents 65536 --tokens 8192
"""

import argparse

import torch
import triton
from sae_decoder import decode, reference, values_gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--latents", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed; the interpreter's speed says nothing")
    dtype = getattr(torch, args.dtype)
    weight = torch.randn(args.latents, args.width, device="cuda", dtype=dtype)
    grad = torch.randn(args.tokens, args.width, device="cuda", dtype=dtype)
    print(f"{torch.cuda.get_device_name()}, {args.dtype}, D={args.width}, F={args.latents}, B={args.tokens}; ms")
    for k in (32, 64, 128):
        values = torch.rand(args.tokens, k, device="cuda", dtype=dtype)
        indices = torch.randint(args.latents, (args.tokens, k), device="cuda")
        offsets = torch.arange(0, args.tokens * k, k, device="cuda")

        def bag(indices=indices, offsets=offsets, values=values):  # noqa: ANN001, ANN202
            flat = indices.view(-1), weight, offsets
            return torch.nn.functional.embedding_bag(*flat, mode="sum", per_sample_weights=values.view(-1))

        cases = {
            "decode": lambda v=values, i=indices: decode(v, i, weight, check=False),
            "embedding_bag": bag,
            "reference": lambda v=values, i=indices: reference.decode(v, i, weight),
            "values_gradient": lambda i=indices: values_gradient(grad, i, weight, check=False),
        }
        times = {name: triton.testing.do_bench(case) for name, case in cases.items()}
        print(f"K={k}: " + ", ".join(f"{name} {ms:.3f}" for name, ms in times.items()))


if __name__ == "__main__":
    main()
