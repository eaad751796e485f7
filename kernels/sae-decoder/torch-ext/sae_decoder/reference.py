"""What the kernels compute, in plain PyTorch: the definition that they are tested against."""

import torch


def decode(
    values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None = None
) -> torch.Tensor:
    """`out[b] = sum over the entries of row b of value * weight[index]`; arguments as in `sae_decoder.decode`."""
    if offsets is None:
        return (values[..., None] * weight[indices.long()]).sum(1)
    terms = values[:, None] * weight[indices.long()]
    return weight.new_zeros(len(offsets) - 1, weight.shape[1]).index_add(0, _rows(offsets), terms)


def values_gradient(
    grad: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None = None
) -> torch.Tensor:
    """`dv = <grad[row], weight[index]>` for each entry; arguments as in `sae_decoder.values_gradient`."""
    if offsets is None:
        return (grad[:, None] * weight[indices.long()]).sum(-1)
    return (grad[_rows(offsets)] * weight[indices.long()]).sum(-1)


def _rows(offsets: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
