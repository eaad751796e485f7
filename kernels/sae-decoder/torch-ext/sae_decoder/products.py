"""Decode and the gradient of its values: one program for a token, rows of the decoder read as they lie.

- Letters: N entries, R rows (tokens), F latents, D width. Prefixes: i_ program ids, o_ offsets, b_ blocks, m_ masks.
- Accumulated in float32, in float64 for float64 weights. No atomics, so results repeat to the bit.
- Loads are cast right away: Triton's interpreter cannot compute in bfloat16.
"""

import torch
import triton
import triton.language as tl


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WIDEST_BLOCK = 4096


@triton.jit
def _decode_kernel(values, indices, offsets, weight, out, D, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    start, end = tl.load(offsets + i_r), tl.load(offsets + i_r + 1)
    b_out = tl.zeros([BLOCK_D], dtype=ACC)
    for p in range(start, end):
        b_value = tl.load(values + p).to(ACC)
        if b_value != 0:
            i_f = tl.load(indices + p).to(tl.int64)
            b_out += b_value * tl.load(weight + i_f * D + o_d, mask=m_d, other=0.0).to(ACC)
    tl.store(out + i_r * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def _values_gradient_kernel(
    grad, indices, offsets, weight, out, D, ACC: tl.constexpr, BLOCK_D: tl.constexpr, ONE_BLOCK: tl.constexpr
):
    i_r = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + i_r), tl.load(offsets + i_r + 1)
    o_d = tl.arange(0, BLOCK_D)
    # a row of the usual width is held in registers for all entries of its token
    b_grad = tl.load(grad + i_r * D + o_d, mask=o_d < D, other=0.0).to(ACC)
    for p in range(start, end):
        i_f = tl.load(indices + p).to(tl.int64)
        b_row = tl.load(weight + i_f * D + o_d, mask=o_d < D, other=0.0).to(ACC)
        b_dot = tl.sum(b_grad * b_row)
        if not ONE_BLOCK:
            for d in range(BLOCK_D, D, BLOCK_D):
                m_d = d + o_d < D
                b_more = tl.load(grad + i_r * D + d + o_d, mask=m_d, other=0.0).to(ACC)
                b_row = tl.load(weight + i_f * D + d + o_d, mask=m_d, other=0.0).to(ACC)
                b_dot += tl.sum(b_more * b_row)
        tl.store(out + p, b_dot.to(out.dtype.element_ty))


def decode(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    check: bool = True,
) -> torch.Tensor:
    """
    `out[b] = sum over the entries of row b of value * weight[index]`. An index may occur twice in a row.

    Args:
        values (`torch.Tensor` of shape `(R, K)`, or `(N,)` with `offsets`): Activations; 0 is padding.
        indices (`torch.Tensor` of the same shape, int32 or int64): Latents, in [0, F).
        weight (`torch.Tensor` of shape `(F, D)`): Decoder rows.
        offsets (`torch.LongTensor` of shape `(R + 1,)`, *optional*): Row b: entries offsets[b] .. offsets[b + 1].
        check (`bool`, *optional*, defaults to `True`): Look for indices outside of [0, F), which waits for the GPU.

    Returns:
        `torch.Tensor` of shape `(R, D)` in the dtype of `weight`.

    Raises:
        TypeError, ValueError: for dtypes, shapes and devices that do not fit together, and indices outside.
    """
    values, indices, offsets = _flat(values, indices, weight, offsets, check, "values")
    out = weight.new_empty(len(offsets) - 1, weight.shape[1])
    width = weight.shape[1]
    if out.numel():
        block = min(triton.next_power_of_2(width), 512)
        grid = (len(out), triton.cdiv(width, block))
        _decode_kernel[grid](values, indices, offsets, weight.contiguous(), out, width, _accumulator(weight), block)
    return out


def values_gradient(
    grad: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    check: bool = True,
) -> torch.Tensor:
    """
    `dv = <grad[row], weight[index]>` for each entry: the gradient of `decode` with respect to its values.

    Args:
        grad (`torch.Tensor` of shape `(R, D)`): Gradient of the output of `decode`.
        indices, weight, offsets, check: As in `decode`.

    Returns:
        `torch.Tensor` of the shape of `indices`, in the dtype of `weight`. Padding gets its product too.

    Raises:
        TypeError, ValueError: as `decode`.
    """
    shape = indices.shape
    if grad.dim() != 2 or grad.shape[1:] != weight.shape[1:] or grad.dtype != weight.dtype:
        raise ValueError(
            f"`grad` must be (R, D={weight.shape[-1]}) of {weight.dtype}, got {tuple(grad.shape)} of {grad.dtype}."
        )
    if grad.device != weight.device:
        raise ValueError(f"`grad` must be on {weight.device} as `weight` is, got {grad.device}.")
    out = weight.new_empty(shape)
    _, indices, offsets = _flat(out, indices, weight, offsets, check, "indices")
    if len(offsets) - 1 != len(grad):
        raise ValueError(f"`grad` must have the {len(offsets) - 1} rows of `indices`, got {len(grad)}.")
    width = weight.shape[1]
    if out.numel():
        block = min(triton.next_power_of_2(width), _WIDEST_BLOCK)
        _values_gradient_kernel[(len(grad),)](
            grad.contiguous(),
            indices,
            offsets,
            weight.contiguous(),
            out,
            width,
            _accumulator(weight),
            block,
            block >= width,
        )
    return out


def _accumulator(weight: torch.Tensor) -> tl.dtype:
    return tl.float64 if weight.dtype == torch.float64 else tl.float32


def _flat(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None,
    check: bool,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat values and indices, and offsets; after checks that need no GPU, and one that does."""
    if weight.dim() != 2 or weight.dtype not in _DTYPES:
        raise ValueError(f"`weight` must be a matrix (F, D) of floats, got {tuple(weight.shape)} of {weight.dtype}.")
    if values.dtype not in _DTYPES:
        raise TypeError(f"`values` must be floats, got {values.dtype}.")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`indices` must be int32 or int64, got {indices.dtype}.")
    rank = 2 if offsets is None else 1
    if values.shape != indices.shape or indices.dim() != rank:
        form = "(R, K)" if offsets is None else "(N,), with `offsets`"
        raise ValueError(
            f"`{name}` and `indices` must both have shape {form}, got {tuple(values.shape)} and "
            f"{tuple(indices.shape)}."
        )
    if offsets is None:
        rows, k = indices.shape
        offsets = torch.arange(rows + 1, device=indices.device) * k
    elif offsets.dim() != 1 or len(offsets) == 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`offsets` must be integers of shape (R + 1,), got {tuple(offsets.shape)} of {offsets.dtype}."
        )
    devices = {tensor.device for tensor in (values, indices, weight, offsets)}
    if len(devices) > 1:
        raise ValueError(f"All tensors must be on one device, got {', '.join(sorted(map(str, devices)))}.")
    if check:
        if indices.numel():
            least, most = (int(end) for end in torch.aminmax(indices))
            if least < 0 or most >= len(weight):
                raise ValueError(f"`indices` must be in [0, F={len(weight)}), got {least} to {most}.")
        if int(offsets[0]) != 0 or int(offsets[-1]) != indices.numel() or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"`offsets` must rise from 0 to the {indices.numel()} entries, got {offsets.tolist()[:20]}."
            )
    return values.reshape(-1).contiguous(), indices.reshape(-1).contiguous(), offsets.contiguous()
