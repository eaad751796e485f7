"""The sparse products on a GPU by Triton, from the kernel project `kernels/sae-decoder`.

`modeling_sae.py` travels to the Hub and must not need a kernel, so a process that wants them says so: `register()`.
"""

import importlib.util
from typing import Any

import torch

from hf_ext.sae.sparse_ops import SPARSE, Ops, Pattern
from hf_ext.sae.sparse_ops import register as register_ops


def register(device_type: str = "cuda") -> bool:
    """
    Compute sparse products by Triton on devices of `device_type` from now on, where that is possible.

    Returns:
        `bool`: False where triton or the kernels are not installed (extra `kernels`); plain torch stays in place.
    """
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("sae_decoder") is None:
        return False
    register_ops("triton", triton_ops(), device_type)
    return True


def triton_ops() -> Ops:
    """Decode and the gradient of its values by Triton; the gradient of the rows is still torch's embedding bag."""
    import sae_decoder

    def bag(pattern: Pattern, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return sae_decoder.decode(values.to(weight.dtype), pattern.indices, weight, pattern.offsets, check=False)

    def dots(pattern: Pattern, dense: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows: Any = dense.to(weight.dtype)
        return sae_decoder.values_gradient(rows, pattern.indices, weight, pattern.offsets, check=False)

    return Ops(bag, dots, SPARSE.segments)
