"""How LIMe's heads look into earlier layers: v2's routers over keys and values, and v1's over hidden states.

- v2 (`router_type="kv"`): `route` is the plain reference; `_RouteShared`, what runs eagerly, mixes a shared buffer.
- v1 (`"static"`, `"static_top_p"`, `"dynamic"`): every head has a softmax over the normed inputs of the layers so far,
  and projects its own mixture [B, H, T, D] to its key and value. Sources are normed once, without weight, since the
  weight of a layer's norm is the same for all sources and can be applied to the mixture.
- Routers are kept in float32 whatever the model's dtype (sums over sources * G terms), and used in the model's dtype.
- This file travels to the Hub beside modeling_lime.py and imports nothing of ours but the configuration.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .configuration_lime import LimeConfig


def route(weight: torch.Tensor, raws: list[torch.Tensor]) -> torch.Tensor:
    """
    Mix raw keys and values of several layers, plainly: out[h] = sum_j sum_h' R[h, j, h'] raws[j][h'].

    Keeps nothing for backward but its inputs, so memory grows with the number of layers and not with its square.

    Args:
        weight (`torch.Tensor` of shape `(G, S, G)`): R_l, from source j, head h' to head h.
        raws (`list[torch.Tensor]`, S tensors of shape `(G, N)`): Raw keys and values of the sources, side by side.

    Returns:
        `torch.Tensor` of shape `(G, N)`.

    Source: arXiv 2502.09245 v2, section 3.
    """
    weight = weight.to(raws[0].dtype)
    out = weight[:, 0] @ raws[0]
    for j in range(1, len(raws)):
        out = torch.addmm(out, weight[:, j], raws[j])
    return out


class _RouteShared(torch.autograd.Function):
    """`route` over one buffer [2, L, G, B T d] that all layers share, its planes keys and values: layer l writes row
    l, then mixes its source rows by one GEMM a plane.

    The buffer is passed from layer to layer, in forward as values and in backward as one gradient to which every layer
    adds in place: each raw tensor has a single consumer, so autograd sums nothing. Rows are written through `.data`,
    outside autograd's version counting: no layer reads a row before the layer that owns it has written it, and a
    checkpoint's second forward writes the same values again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        memory: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        weight: torch.Tensor | None,
        layer_idx: int,
        runs: list[tuple[int, int, int]],
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layer_idx, ctx.runs, ctx.shape = layer_idx, runs, key.shape
        ctx.save_for_backward(memory, weight)
        routed = []
        for rows, raw in zip(memory.data, (key, value), strict=True):
            tokens_first(rows[layer_idx], key.shape).copy_(raw)
            out = rows[layer_idx].clone() if weight is None else None
            for column, start, stop in runs:
                mixer = weight[:, column : column + stop - start].flatten(1).to(rows.dtype)
                source = rows[start:stop].flatten(0, 1)
                out = mixer @ source if out is None else out.addmm_(mixer, source)
            routed.append(tokens_first(out, key.shape))
        return *routed, memory.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        memory, weight = ctx.saved_tensors
        *grads_routed, grad_memory = grads
        grad_weight = None if weight is None else torch.zeros_like(weight)
        fresh = grad_memory is None  # the newest layer: no other has written yet
        if fresh:
            covered = sum(stop - start for _, start, stop in ctx.runs) == memory.shape[1] and None not in grads_routed
            grad_memory = torch.empty_like(memory) if covered else torch.zeros_like(memory)
        for rows, grad_rows, grad in zip(memory, grad_memory, grads_routed, strict=True):
            if grad is None:
                continue
            if weight is None:
                tokens_first(grad_rows[ctx.layer_idx], ctx.shape).add_(grad)
                continue
            grad = grad.permute(2, 0, 1, 3).reshape(grad.shape[2], -1)
            for column, start, stop in ctx.runs:
                columns = slice(column, column + stop - start)
                mixer = weight[:, columns].flatten(1).to(memory.dtype)
                into = grad_rows[start:stop].flatten(0, 1)
                torch.addmm(into, mixer.t(), grad, beta=0 if fresh else 1, out=into)
                if ctx.needs_input_grad[3]:
                    gram = rows[start:stop].flatten(0, 1) @ grad.t()  # on a CPU twice as fast as its transpose
                    grad_weight[:, columns] += gram.t().view_as(grad_weight[:, columns])
        grad_key, grad_value = (tokens_first(rows[ctx.layer_idx], ctx.shape) for rows in grad_memory)
        return grad_memory if ctx.needs_input_grad[0] else None, grad_key, grad_value, grad_weight, None, None


def tokens_first(row: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """One row [G, B T d] seen as [B, T, G, d]."""
    batch, tokens, heads, dim = shape
    return row.view(heads, batch, tokens, dim).permute(1, 2, 0, 3)


class _Float32Module(nn.Module):
    """Keeps its parameters in float32 where a model is cast to fewer bits."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "_Float32Module":
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            narrower = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
            return tensor.to(moved.device) if narrower else moved

        return super()._apply(keep_float32, recurse)


class LimeRouter(_Float32Module):
    """
    R_l of one layer: which heads of which layers make its keys and values. No softmax, no sign constraint.

    Attributes:
        weight (`torch.nn.Parameter` of shape `(G, S, G)`, float32): (head, source, source head).
        sources (`list[int]`): The S layers (0-based, its own last) that it reads.
    """

    def __init__(self, config: LimeConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.sources = config.sources(layer_idx)
        heads = config.num_key_value_heads
        self.weight = nn.Parameter(torch.empty(heads, len(self.sources), heads, dtype=torch.float32))
        # maximal runs of neighbouring layers as (first column, first layer, end): one GEMM each
        self.runs: list[tuple[int, int, int]] = []
        for column, source in enumerate(self.sources):
            if self.runs and self.runs[-1][2] == source:
                self.runs[-1] = (*self.runs[-1][:2], source + 1)
            else:
                self.runs.append((column, source, source + 1))

    def initial_weight(self, noise: bool) -> torch.Tensor:
        """Own layer and head 1; elsewhere U(-b, b), b = sqrt(3 / (S G)), with `noise`, else 0 (paper, section 3)."""
        weight = torch.zeros_like(self.weight)
        if noise:
            bound = (3 / (weight.shape[1] * weight.shape[2])) ** 0.5
            weight.uniform_(-bound, bound)
        weight[:, -1] = torch.eye(weight.shape[0], device=weight.device)
        return weight

    def extra_repr(self) -> str:
        return f"heads={self.weight.shape[0]}, sources={self.sources}"


class LimeHiddenRouter(_Float32Module):
    """
    v1's lookup in one layer: which earlier hidden states each head's key and value are made of.

    With sources S_j, the normed inputs of the layers so far (S_0 the embeddings), head h reads sum_j w[h, j] S_j, with
    w = softmax over j of `weight` (static), of `weight` cut to the fewest sources whose mass exceeds `router_top_p`
    and normalised again (static_top_p), or of a linear function of the newest S (dynamic: new for every token).

    Attributes:
        weight (`torch.nn.Parameter`, float32): `(H, S)` logits, or for dynamic `(H * S, D)`.
        sources (`list[int]`): The S layers (0-based, its own last) whose inputs it reads.

    Source: arXiv 2502.09245 v1.
    """

    def __init__(self, config: LimeConfig, layer_idx: int) -> None:
        super().__init__()
        self.sources = config.sources(layer_idx)
        self.heads, self.is_dynamic = config.num_attention_heads, config.router_type == "dynamic"
        self.top_p = config.router_top_p if config.router_type == "static_top_p" else None
        shape = (self.heads, len(self.sources))
        if self.is_dynamic:
            shape = (self.heads * len(self.sources), config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def initial_weight(self, std: float) -> torch.Tensor:
        """0.1 * N(0, 1) for static logits, as published; the model's own `std` for the dynamic projection."""
        return torch.randn_like(self.weight) * (std if self.is_dynamic else 0.1)

    def mixture(self, newest: torch.Tensor) -> torch.Tensor:
        """w in float32: `(H, S)`, or `(B, T, H, S)` for dynamic; sums to 1 over the sources."""
        if self.is_dynamic:
            logits = nn.functional.linear(newest.to(self.weight.dtype), self.weight)
            return logits.view(*newest.shape[:-1], self.heads, -1).softmax(-1)
        weight = self.weight.softmax(-1)
        if self.top_p is None:
            return weight
        with torch.no_grad():  # what is kept is chosen outside the graph
            mass, order = weight.sort(dim=-1, descending=True)
            keep = torch.zeros_like(weight).scatter(-1, order, (mass.cumsum(-1) - mass <= self.top_p).to(weight.dtype))
        weight = weight * keep
        return weight / weight.sum(-1, keepdim=True)

    def forward(self, sources: list[torch.Tensor]) -> torch.Tensor:
        """S tensors [B, T, D] -> what each head reads, [H, B T, D]."""
        weight = self.mixture(sources[-1]).to(sources[0].dtype)
        batch, tokens, width = sources[0].shape
        if self.is_dynamic:
            mixed = weight.flatten(0, 1) @ torch.stack(sources, dim=2).flatten(0, 1)
            return mixed.transpose(0, 1)
        return (weight @ torch.stack(sources).flatten(1)).view(-1, batch * tokens, width)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, sources={self.sources}, dynamic={self.is_dynamic}, top_p={self.top_p}"


def unit_rms(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm without a weight, computed in float32 as Llama's."""
    hidden = hidden_states.float()
    return (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)).to(hidden_states.dtype)


__all__ = ["LimeHiddenRouter", "LimeRouter", "route"]
