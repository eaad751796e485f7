"""Sparse codes, and their products with dense rows: all that an autoencoder with few active latents computes.

- Three products carry encode, decode and their gradients: `bag` (codes x rows), `dots` (dense x rows, only where the
  codes are) and `segments` (codes^T x dense). Each has a plain reference in `REFERENCE`, which a fast implementation
  must equal. `choose` is the one place that picks; `implementation("reference")` forces.
- `SPARSE` is plain torch for any device. `bag` and `segments` are both an embedding bag: over the latents of a token,
  and, once the entries are sorted by latent, over the tokens of a latent. Nothing of shape [B, F] is made: where codes
  are so dense (1 in 32) that matrix products are cheaper, a chunk of tokens at a time is.
- The sort is made once for each set of codes, and shared by every gradient that needs it.
- This file travels to the Hub with the models that import it; it imports torch alone.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


logger = logging.getLogger(__name__)
# what one temporary may take: a cache-sized piece on a CPU, a GEMM of full speed on a GPU
CHUNK_BYTES = {"cpu": 64 * 2**20}
CHUNK_BYTES_ELSEWHERE = 2**30
# one entry costs a sparse product about as much as 32 multiplications cost a matrix product
# (d = 576, F = 16384, float32, one CPU core: see tests/benchmarks/sae_training_step.py)
DENSE_BELOW = 32


class Pattern:
    """
    Where the entries of some sparse rows are: R rows, N entries, row after row, of F latents.

    Args:
        indices (`torch.LongTensor` of shape `(N,)`): Latent of each entry; one may occur twice in a row.
        offsets (`torch.LongTensor` of shape `(R + 1,)`): Row r has the entries offsets[r] .. offsets[r + 1].
        num_latents (`int`): F.
    """

    def __init__(self, indices: torch.Tensor, offsets: torch.Tensor, num_latents: int) -> None:
        # the column of one budget is a view with gaps, which an embedding bag refuses
        self.indices, self.offsets, self.num_latents = indices.contiguous(), offsets, num_latents
        self._coarser: Pattern | None = None

    @classmethod
    def of_rows(cls, indices: torch.Tensor, num_latents: int) -> "Pattern":
        """The pattern of `indices` (R, K), each row of which has K entries."""
        rows, width = indices.shape
        offsets = torch.arange(0, rows * width + 1, max(width, 1), device=indices.device)[: rows + 1]
        if width == 0:
            offsets = offsets.new_zeros(rows + 1)
        return cls(indices.reshape(-1), offsets, num_latents)

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> torch.Tensor:
        """Row of each entry, (N,)."""
        return torch.arange(self.num_rows, device=self.offsets.device).repeat_interleave(
            self.offsets.diff(), output_size=len(self.indices)
        )

    def split(self, lengths: list[int]) -> "Pattern":
        """Each row of K entries as len(lengths) rows of so many entries, which sum to K; the sort is shared."""
        ends = torch.tensor(lengths, device=self.offsets.device).cumsum(0)
        offsets = torch.cat([self.offsets[:1], (self.offsets[:-1, None] + ends).reshape(-1)])
        finer = Pattern(self.indices, offsets, self.num_latents)
        finer._coarser = self
        return finer

    @cached_property
    def sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the entries sorted by latent, (N,), and where each latent's begin, (F + 1,)."""
        if self._coarser is not None:
            return self._coarser.sorted
        keys, places = torch.sort(self.indices, stable=True)
        return places, torch.searchsorted(keys, torch.arange(self.num_latents + 1, device=keys.device))

    @property
    def is_dense(self) -> bool:
        return len(self.indices) * DENSE_BELOW > self.num_rows * self.num_latents

    def row_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
        """Slices of rows, and of their entries, whose dense form [rows, F] fits in a chunk."""
        rows = chunk_rows(self.num_latents, dtype, self.indices.device)
        for first in range(0, self.num_rows, rows):
            last = min(first + rows, self.num_rows)
            yield slice(first, last), slice(int(self.offsets[first]), int(self.offsets[last]))


@dataclass(eq=False)
class SparseCodes:
    """
    The few active latents of each token, sorted, so that each budget k' <= K is a cut (arXiv 2505.24473).

    Attributes:
        values (`torch.Tensor` of shape `(..., K)`): Activations, sorted in descending order; 0 is padding, which is
            never decoded or counted.
        indices (`torch.LongTensor` of shape `(..., K)`): Their latents, in [0, `d_sae`).
        d_sae (`int`): Number F of latents in the dictionary.
        gates (`torch.Tensor` of shape `(..., K)`, *optional*): 1 where a latent is active. Only while a JumpReLU is
            trained, whose L0 has a (straight-through) gradient.
    """

    values: torch.Tensor
    indices: torch.Tensor
    d_sae: int
    gates: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape or self.values.dim() == 0:
            raise ValueError(
                "`indices` must have the shape of `values`, (..., K), got "
                f"{tuple(self.indices.shape)} and {tuple(self.values.shape)}."
            )
        if self.indices.dtype not in (torch.int32, torch.int64):
            self.indices = self.indices.to(torch.int64)

    @property
    def k(self) -> int:
        """Width K."""
        return self.values.shape[-1]

    @cached_property
    def pattern(self) -> Pattern:
        """Where the entries are, all leading dimensions as one. What it sorts is sorted once."""
        return Pattern.of_rows(self.indices.reshape(-1, self.k), self.d_sae)

    def dense(self) -> torch.Tensor:
        """`(..., d_sae)`: every latent's activation. For a look at few tokens: it is mostly zeros."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter_add(-1, self.indices.long(), self.values)

    def first(self, k: int) -> "SparseCodes":
        """The codes cut to the `k` largest activations of each token, in [0, K]."""
        if not 0 <= k <= self.k:
            raise ValueError(f"`k` must be in [0, {self.k}], the width of these codes, got {k}.")
        gates = None if self.gates is None else self.gates[..., :k]
        return SparseCodes(self.values[..., :k], self.indices[..., :k], self.d_sae, gates)

    def l0(self) -> torch.Tensor:
        """`(...)`: active latents of each token, as a float; differentiable while a JumpReLU is trained."""
        gates = (self.values > 0) if self.gates is None else self.gates
        return gates.sum(-1, dtype=torch.float32)


def pattern_of(codes: Any) -> Pattern:
    """The pattern of `codes`: ours, a remote copy's, or anything with `values`, `indices` and `d_sae`; checked."""
    found = getattr(codes, "pattern", None)
    pattern = found if found is not None else SparseCodes(codes.values, codes.indices, codes.d_sae).pattern
    # a GPU is not waited for; its own kernels check
    if len(pattern.indices) and pattern.indices.device.type == "cpu":
        least, most = (int(end) for end in torch.aminmax(pattern.indices))
        if least < 0 or most >= pattern.num_latents:
            raise ValueError(f"`indices` must be in [0, d_sae={pattern.num_latents}), got {least} to {most}.")
    return pattern


def chunk_rows(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of `width` numbers fit in a chunk, at least 1."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE) // (max(width, 1) * dtype.itemsize))


class Ops(NamedTuple):
    """
    The three products, of codes at a [`Pattern`] with R rows, N entries, F latents; D is the width.

    Attributes:
        bag: (pattern, values (N,), weight (F, D)) -> (R, D), sum over the entries of each row of value * weight row.
        dots: (pattern, dense (R, D), weight (F, D)) -> (N,), product of the entry's row and its latent's row.
        segments: (pattern, values (N,), dense (R, D)) -> (F, D), sum over the entries of each latent of value * row.
    """

    bag: Callable[[Pattern, torch.Tensor, torch.Tensor], torch.Tensor]
    dots: Callable[[Pattern, torch.Tensor, torch.Tensor], torch.Tensor]
    segments: Callable[[Pattern, torch.Tensor, torch.Tensor], torch.Tensor]


def _reference_bag(pattern: Pattern, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    terms = values[:, None] * weight[pattern.indices]
    return weight.new_zeros(pattern.num_rows, weight.shape[1]).index_add(0, pattern.rows, terms)


def _reference_dots(pattern: Pattern, dense: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (dense[pattern.rows] * weight[pattern.indices]).sum(-1)


def _reference_segments(pattern: Pattern, values: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    terms = values[:, None] * dense[pattern.rows]
    return dense.new_zeros(pattern.num_latents, dense.shape[1]).index_add(0, pattern.indices, terms)


def _sparse_bag(pattern: Pattern, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not pattern.is_dense:
        return embedding_bag(pattern.indices, pattern.offsets, values, weight)
    out = weight.new_empty(pattern.num_rows, weight.shape[1])
    for rows, entries in pattern.row_chunks(weight.dtype):
        torch.mm(_dense_rows(pattern, values, rows, entries), weight, out=out[rows])
    return out


def _sparse_dots(pattern: Pattern, dense: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not pattern.is_dense:
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            dense.contiguous(), weight, pattern.indices, pattern.offsets[:-1], pattern.rows, 0
        )
    out = dense.new_empty(len(pattern.indices))
    for rows, entries in pattern.row_chunks(dense.dtype):
        product = dense[rows] @ weight.T
        torch.take(product, _flat_places(pattern, rows, entries), out=out[entries])
    return out


def _sparse_segments(pattern: Pattern, values: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    if not pattern.is_dense:
        places, starts = pattern.sorted
        return embedding_bag(pattern.rows[places], starts, values[places], dense)
    out = dense.new_zeros(pattern.num_latents, dense.shape[1])
    for rows, entries in pattern.row_chunks(dense.dtype):
        out.addmm_(_dense_rows(pattern, values, rows, entries).T, dense[rows])
    return out


def embedding_bag(
    indices: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Sum over the bag of value * weight[index]."""
    return torch.nn.functional.embedding_bag(
        indices,
        weight.contiguous(),
        offsets.to(indices.dtype),
        mode="sum",
        per_sample_weights=values.to(weight.dtype),
        include_last_offset=True,
    )


def _flat_places(pattern: Pattern, rows: slice, entries: slice) -> torch.Tensor:
    return (pattern.rows[entries] - rows.start) * pattern.num_latents + pattern.indices[entries]


def _dense_rows(pattern: Pattern, values: torch.Tensor, rows: slice, entries: slice) -> torch.Tensor:
    dense = values.new_zeros((rows.stop - rows.start) * pattern.num_latents)
    dense.index_add_(0, _flat_places(pattern, rows, entries), values[entries])  # a latent may occur twice in a row
    return dense.view(rows.stop - rows.start, pattern.num_latents)


REFERENCE = Ops(_reference_bag, _reference_dots, _reference_segments)
SPARSE = Ops(_sparse_bag, _sparse_dots, _sparse_segments)
_IMPLEMENTATIONS = {"reference": REFERENCE, "sparse": SPARSE}
_PREFERRED: dict[str, str] = {}
_forced: list[str] = []
_logged: set[tuple[str, str]] = set()


def register(name: str, ops: Ops, device_type: str) -> None:
    """Add an implementation, which `choose` then prefers on devices of `device_type` ("cuda", ...)."""
    _IMPLEMENTATIONS[name] = ops
    _PREFERRED[device_type] = name


def choose(device: torch.device) -> Ops:
    """The implementation for tensors on `device`: the forced one, the registered one, or plain torch."""
    name = _forced[-1] if _forced else _PREFERRED.get(device.type, "sparse")
    if (name, device.type) not in _logged:
        _logged.add((name, device.type))
        logger.info("Sparse products on %s are computed by the implementation %r.", device.type, name)
    return _IMPLEMENTATIONS[name]


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Force an implementation of the products while the block runs: "reference", "sparse" or a registered one."""
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"`name` must be one of {', '.join(_IMPLEMENTATIONS)}, got {name!r}.")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pattern: Pattern, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.pattern, ctx.ops = pattern, choose(weight.device)
        ctx.save_for_backward(values, weight)
        return ctx.ops.bag(pattern, values, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        of_values = ctx.ops.dots(ctx.pattern, grad, weight) if ctx.needs_input_grad[1] else None
        of_weight = ctx.ops.segments(ctx.pattern, values, grad) if ctx.needs_input_grad[2] else None
        return None, of_values, of_weight


class _LinearAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pattern: Pattern,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        found: torch.Tensor,
        shift: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.pattern, ctx.ops = pattern, choose(weight.device)
        ctx.save_for_backward(x, weight)
        return found.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, _, needs_shift = ctx.needs_input_grad
        grad = grad.to(weight.dtype)
        of_bias = None
        if needs_bias or needs_shift:
            of_bias = grad.new_zeros(len(weight)).index_add_(0, ctx.pattern.indices, grad)
        of_x = ctx.ops.bag(ctx.pattern, grad, weight) if needs_x else None
        of_weight = ctx.ops.segments(ctx.pattern, grad, x) if needs_weight else None
        of_shift = -(of_bias @ weight) if of_bias is not None and needs_shift else None
        return None, of_x, of_weight, of_bias if needs_bias else None, None, of_shift


def bag(pattern: Pattern, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    Decode: the sum over the entries of each row of value * weight[latent].

    Args:
        pattern ([`Pattern`]): R rows, N entries.
        values (`torch.Tensor` of shape `(N,)`): Of the entries.
        weight (`torch.Tensor` of shape `(F, D)`): Decoder rows.

    Returns:
        `torch.Tensor` of shape `(R, D)`, differentiable in `values` and `weight`.
    """
    return _Bag.apply(pattern, values.to(weight.dtype), weight)


def linear_at(
    pattern: Pattern,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    found: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Pre-activations u = x W^T + b at the entries alone, where they are `found` already; with a sparse gradient.

    Args:
        pattern ([`Pattern`]): R rows, N entries.
        x (`torch.Tensor` of shape `(R, D)`): Inputs.
        weight, bias (`torch.Tensor` of shapes `(F, D)`, `(F,)`): Encoder.
        found (`torch.Tensor` of shape `(N,)`): The pre-activations, as computed without gradient.
        shift (`torch.Tensor` of shape `(D,)`, *optional*):
            What has been subtracted from every row of x, where x itself needs no gradient: its own is then one product
            with the gradient of the bias.

    Returns:
        `torch.Tensor` of shape `(N,)`: equal to `found`, differentiable in `x`, `weight`, `bias` and `shift`.
    """
    return _LinearAt.apply(pattern, x, weight, bias, found, shift)


@torch.no_grad()
def linear_chunks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """
    u = x W^T + b for some tokens at a time: slices of rows and `(rows, F)`, which the next chunk overwrites.

    Computed in autocast's dtype where it is enabled, for GPUs; yielded in it too.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    x, transposed, bias = x.to(dtype), weight.to(dtype).T, bias.to(dtype)
    rows = min(chunk_rows(weight.shape[0], dtype, x.device), max(len(x), 1))
    buffer = x.new_empty(rows, weight.shape[0])
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        yield slice(first, first + len(part)), torch.addmm(bias, part, transposed, out=buffer[: len(part)])
