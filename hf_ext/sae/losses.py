"""Losses of sparse autoencoders, for any training loop: codes and a decoder in, a scalar with its gradient out.

    HierarchicalTopK (arXiv 2505.24473), for codes sorted by value and budgets J:
        r_j = b_dec + sum_{i<=j} v_i W_dec[s_i] - x
        L   = (1 / |J|) sum_{j in J} mean_{b,d} r_j^2

- `hierarchical_loss` and its relatives take two roads to the same number. *Segments*: for few budgets, the codes are
  cut at them, one sparse product gives all residuals, and latents of a segment share one gradient. *Prefixes*: for
  many, the closed form over the Gram matrix of each token's rows, which makes no prefix at all. Both are exact.
- A loss is a mean of squares in the space of x' = `sae.normalize(x)`. Divide it by `variance(x')` to read it as a
  fraction of variance unexplained, as `auxk_loss` expects of the loss it is added to.
- Gradients are written by hand; they cannot themselves be differentiated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_ext.sae.sparse_ops import Pattern, SparseCodes, choose, chunk_rows, embedding_bag, pattern_of


# with more budgets the closed form is cheaper than a product for each
MOST_SEGMENTS = 16
# latents whose Gram matrix is taken at once; longer lists go block after block, so that work grows with K, not K^2
BLOCK = 32


def hierarchical_loss(
    x: torch.Tensor, codes: Any, W_dec: torch.Tensor, b_dec: torch.Tensor, budgets: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    HierarchicalTopK: the mean over budgets j of the error of the j largest latents of each token.

    One autoencoder trained with it serves every budget in J by cutting its codes. The full J = 1..K is the paper's;
    powers of two, `[1, 2, 4, ..., K]`, cost about a third of it.

    Args:
        x (`torch.Tensor` of shape `(..., D)`): x', what is reconstructed (`sae.normalize(activations)`).
        codes ([`SparseCodes`] or anything with `values`, `indices` of shape `(..., K)`, and `d_sae`):
            Sorted by value in descending order. The order itself has no gradient.
        W_dec (`torch.Tensor` of shape `(F, D)`): Decoder rows.
        b_dec (`torch.Tensor` of shape `(D,)`): Decoder bias.
        budgets (`Sequence[int]`, *optional*): J, numbers in [1, K]. By default 1..K.

    Returns:
        `(loss, reconstruction)`: a scalar, differentiable in `x`, `codes.values`, `W_dec` and `b_dec`; and
        `(..., D)` at the largest budget, without gradient.

    Raises:
        ValueError: for shapes that do not fit, codes that are not sorted, and budgets outside of [1, K].

    Example:

    ```python
    >>> sae = SAEModel(SAEConfig(d_in=64, d_sae=512, k=16))
    >>> x = torch.randn(100, 64)
    >>> loss, _ = hierarchical_loss(x, sae.encode(x), sae.W_dec, sae.b_dec, budgets=[1, 2, 4, 8, 16])
    >>> loss.backward()

    ```

    In SAELens (extra `peers`) the loss takes the place of the squared error, which is summed over the width there:

    ```python
    from sae_lens import TopKTrainingSAE

    class HierarchicalTrainingSAE(TopKTrainingSAE):
        def training_forward_pass(self, step_input):
            output = super().training_forward_pass(step_input)
            values, indices = output.feature_acts.topk(self.cfg.k)
            W_dec = self.W_dec
            if self.cfg.rescale_acts_by_decoder_norm:
                W_dec = torch.nn.functional.normalize(W_dec, dim=1)
            codes = SparseCodes(values, indices, self.cfg.d_sae)
            loss, _ = hierarchical_loss(step_input.sae_in, codes, W_dec, self.b_dec)
            output.losses["mse_loss"] = loss * self.cfg.d_in
            output.loss = sum(output.losses.values())
            return output
    ```

    Source: arXiv 2505.24473, its loss; the closed form is derived in `_Prefixes`.
    """
    width = codes.values.shape[-1]
    chosen = range(1, width + 1) if budgets is None else budgets
    chosen = _checked_budgets(chosen, width)
    return _loss_at(x, codes, W_dec, b_dec, chosen, [1 / len(chosen)] * len(chosen), len(chosen) - 1)


def reconstruction_loss(
    x: torch.Tensor, codes: Any, W_dec: torch.Tensor, b_dec: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain squared error of all the codes, `mean_{b,d} (x^ - x)^2`; arguments as in `hierarchical_loss`."""
    pattern, rows = _checked(x, codes, W_dec, b_dec)
    values = codes.values.reshape(-1).to(W_dec.dtype)
    loss, reconstruction = _exactly(_Segments, pattern, (1.0,), 0, values, W_dec, b_dec, rows)
    return loss, reconstruction.view(x.shape)


def multi_topk_loss(
    x: torch.Tensor, codes: Any, W_dec: torch.Tensor, b_dec: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Multi-TopK: the error of the `k` largest latents, plus an eighth of that of the 4 `k` largest.

    Args:
        x, codes, W_dec, b_dec: As in `hierarchical_loss`; the codes hold at least 4 `k` latents.
        k (`int`): The budget that matters.

    Returns:
        `(loss, reconstruction)`, the reconstruction with `k` latents.

    Source: arXiv 2406.04093 (OpenAI), appendix A.4; weights as in EleutherAI's sparsify.
    """
    budgets = _checked_budgets([k, 4 * k], codes.values.shape[-1])
    return _loss_at(x, codes, W_dec, b_dec, budgets, [1.0, 0.125], 0)


def matryoshka_loss(
    x: torch.Tensor, codes: Any, W_dec: torch.Tensor, b_dec: torch.Tensor, groups: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Matryoshka: the mean over nested prefixes of the *dictionary* of the error with the active latents in the prefix.

    HierarchicalTopK cuts each token's codes by their rank; Matryoshka cuts all tokens' by the latents' ids.

    Args:
        x, codes, W_dec, b_dec: As in `hierarchical_loss`; the codes need not be sorted.
        groups (`Sequence[int]`): Sizes of the groups of latents, which sum to F; prefix m is the first m groups.

    Returns:
        `(loss, reconstruction)`, the reconstruction with all latents.

    Source: arXiv 2503.17547, its loss as a mean over prefixes.
    """
    pattern, rows = _checked(x, codes, W_dec, b_dec)
    sizes = [int(size) for size in groups]
    if not sizes or min(sizes) < 1 or sum(sizes) != len(W_dec):
        raise ValueError(
            f"`groups` must be sizes of at least 1 that sum to d_sae={len(W_dec)}, got {sizes} with sum {sum(sizes)}."
        )
    ends = torch.tensor(sizes, device=x.device).cumsum(0)
    indices = pattern.indices.view(len(rows), codes.values.shape[-1])
    group, order = torch.bucketize(indices, ends, right=True).sort(dim=1, stable=True)
    places = group + len(sizes) * torch.arange(len(rows), device=x.device)[:, None]
    counts = torch.bincount(places.reshape(-1), minlength=len(rows) * len(sizes))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    nested = Pattern(indices.gather(1, order).reshape(-1), offsets, len(W_dec))
    values = codes.values.reshape(len(rows), -1).to(W_dec.dtype).gather(1, order).reshape(-1)
    weights = (1 / len(sizes),) * len(sizes)
    loss, reconstruction = _exactly(_Segments, nested, weights, len(sizes) - 1, values, W_dec, b_dec, rows)
    return loss, reconstruction.view(x.shape)


def auxk_loss(
    sae: Any,
    x: torch.Tensor,
    residual: torch.Tensor,
    dead: torch.Tensor,
    k_aux: int | None = None,
    spread: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    AuxK: dead latents learn to reconstruct what the living leave over.

        e = x' - x^' (no gradient), e^ = the `k_aux` largest dead latents of each token, decoded without b_dec,
        L = sum (e - e^)^2 / sum (e - mean e)^2 * min(1, number of dead latents / k_aux)

    As a fraction of variance, it belongs to a main loss that is one as well (`loss / variance(x')`), with coefficient
    1/32. Departures among implementations: OpenAI and dictionary_learning divide by the same variance but have no last
    factor; sparsify divides by the variance of the input; SAELens by nothing.

    Args:
        sae ([`SAEModel`] or one with its `encode` and `decoder_rows`): The autoencoder.
        x (`torch.Tensor` of shape `(..., D)`): Activations, as `sae.encode` takes them.
        residual (`torch.Tensor` of shape `(..., D)`): e, in the space of x'.
        dead (`torch.BoolTensor` of shape `(F,)`): Latents that have not fired for long.
        k_aux (`int`, *optional*): By default half the width of x.
        spread (`torch.Tensor`, *optional*): Variance of the residual, where it is known of more tokens than these.

    Returns:
        Scalar; 0 where no latent is dead or the residual has no variance.

    Source: arXiv 2406.04093, section 2.4.
    """
    latents = dead.nonzero().squeeze(1)
    width = residual.shape[-1]
    k_aux = max(width // 2, 1) if k_aux is None else k_aux
    if k_aux < 1:
        raise ValueError(f"`k_aux` must be at least 1, got {k_aux}.")
    if len(latents) == 0:
        return residual.new_zeros(())
    codes = sae.encode(x, k=min(k_aux, len(latents)), latents=latents)
    rows = sae.decoder_rows()[latents]
    target = residual.detach().to(rows.dtype)
    loss, _ = reconstruction_loss(target, codes, rows, torch.zeros_like(target[..., :1, :].reshape(-1, width)[0]))
    spread = variance(target) if spread is None else spread
    share = min(1.0, len(latents) / k_aux)
    return share * torch.where(spread > 0, loss / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0)


def variance(x: torch.Tensor) -> torch.Tensor:
    """`mean_{b,d} (x - mean_b x)^2`, a scalar without gradient: what a loss is divided by to be a fraction of it."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return (rows - rows.mean(0)).square().mean()


def _checked(x: torch.Tensor, codes: Any, W_dec: torch.Tensor, b_dec: torch.Tensor) -> tuple[Pattern, torch.Tensor]:
    """The codes' pattern, and x as rows (B, D) in the dtype of the decoder."""
    if W_dec.dim() != 2 or b_dec.shape != W_dec.shape[1:] or x.shape[-1:] != W_dec.shape[1:]:
        raise ValueError(
            "`x`, `W_dec` and `b_dec` must have shapes (..., D), (F, D) and (D,), got "
            f"{tuple(x.shape)}, {tuple(W_dec.shape)} and {tuple(b_dec.shape)}."
        )
    if codes.values.shape[:-1] != x.shape[:-1] or codes.d_sae != len(W_dec):
        raise ValueError(
            f"`codes` must be of the tokens of `x`, {tuple(x.shape[:-1])}, and the {len(W_dec)} rows of `W_dec`, got "
            f"{tuple(codes.values.shape[:-1])} and d_sae={codes.d_sae}."
        )
    return pattern_of(codes), x.reshape(-1, x.shape[-1]).to(W_dec.dtype)


def _checked_budgets(budgets: Sequence[int], width: int) -> list[int]:
    chosen = sorted({int(budget) for budget in budgets})
    if not chosen or chosen[0] < 1 or chosen[-1] > width:
        raise ValueError(
            f"`budgets` must be numbers in [1, {width}], the latents of each token in `codes`, got "
            f"{list(budgets)[:20]}."
        )
    return chosen


def _loss_at(
    x: torch.Tensor,
    codes: Any,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    budgets: list[int],
    weights: list[float],
    shown: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum_j weight_j mean_{b,d} r_j^2` over `budgets`, and the reconstruction at the budget of index `shown`."""
    pattern, rows = _checked(x, codes, W_dec, b_dec)
    # a GPU is not waited for
    if codes.values.device.type == "cpu" and (codes.values.detach().diff(dim=-1) > 0).any():
        raise ValueError(
            "`codes` must be sorted by value in descending order, got some that rise. Sort `values`, and gather "
            "`indices` by the same order."
        )
    most = budgets[-1]
    if most < codes.values.shape[-1]:
        codes = SparseCodes(codes.values[..., :most], codes.indices[..., :most], codes.d_sae)
        pattern = codes.pattern
    values = codes.values.reshape(-1).to(W_dec.dtype)
    if len(budgets) <= MOST_SEGMENTS:
        lengths = [end - start for start, end in zip([0, *budgets], budgets, strict=False)]
        loss, shown_rows = _exactly(
            _Segments, pattern.split(lengths), tuple(weights), shown, values, W_dec, b_dec, rows
        )
    else:
        full = torch.zeros(most, dtype=W_dec.dtype, device=W_dec.device)
        full[torch.tensor(budgets, device=W_dec.device) - 1] = torch.tensor(
            weights, dtype=full.dtype, device=full.device
        )
        loss, shown_rows = _exactly(_Prefixes, pattern, full, values, W_dec, b_dec, rows)
    return loss, shown_rows.view(x.shape)


def _exactly(function: Any, *arguments: Any) -> Any:
    """Apply an autograd function in the precision of its tensors, also where autocast would round its products."""
    with torch.autocast(arguments[-1].device.type, enabled=False):
        return function.apply(*arguments)


class _Segments(torch.autograd.Function):
    """
    sum_s w_s mean_{b,d} r_s^2, where r_s = b - x + the first s + 1 segments of a token; `pattern` has B * S rows.

    With T_s = (2 / (B D)) sum_{s'>=s} w_s' r_s', an entry in segment s has dv = <W[f], T_s> and adds v T_s to dW[f];
    db = sum_b T_0, dx = -T_0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pattern: Pattern,
        weights: tuple[float, ...],
        shown: int,
        values: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        x: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.pattern, ctx.weights, ctx.ops = pattern, weights, choose(W_dec.device)
        residuals = ctx.ops.bag(pattern, values, W_dec).view(len(x), len(weights), x.shape[1])
        residuals[:, 0] += b_dec - x
        for s in range(1, len(weights)):
            residuals[:, s] += residuals[:, s - 1]
        loss = values.new_zeros(())
        for s, weight in enumerate(weights):
            loss += weight * residuals[:, s].square().sum()
        loss /= max(x.numel(), 1)
        ctx.save_for_backward(values, W_dec, residuals)
        reconstruction = residuals[:, shown] + x
        ctx.mark_non_differentiable(reconstruction)
        return loss, reconstruction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, W_dec, residuals = ctx.saved_tensors
        tokens, segments, width = residuals.shape
        scale = 2 * grad / max(tokens * width, 1)
        sums = residuals * (scale * residuals.new_tensor(ctx.weights))[:, None]
        for s in reversed(range(segments - 1)):
            sums[:, s] += sums[:, s + 1]
        flat = sums.view(tokens * segments, width)
        _, _, _, needs_values, needs_W, needs_b, needs_x = ctx.needs_input_grad
        return (
            None,
            None,
            None,
            ctx.ops.dots(ctx.pattern, flat, W_dec) if needs_values else None,
            ctx.ops.segments(ctx.pattern, values, flat) if needs_W else None,
            sums[:, 0].sum(0) if needs_b else None,
            -sums[:, 0] if needs_x else None,
        )


class _Prefixes(torch.autograd.Function):
    """
    sum_j w_j mean_{b,d} r_j^2 over all prefixes j = 1..K, without making one.

    With suffix weights c_i = sum_{j>=i} w_j, C_ii' = min(c_i, c_i'), E the rows of a token's latents, G = E E^T and
    a = E r_0 (arXiv 2505.24473's loss, expanded):

        L B D = c_1 |r_0|^2 + sum_i v_i (((G o C) v)_i + 2 c_i a_i),   dv = 2 ((G o C) v + c o a)
        S_i   = 2 (c_i r_0 + sum_i' C_ii' v_i' E_i'),   dW[s_i] += v_i S_i,   db = sum_b 2 sum_j w_j r_j

    Lists longer than `BLOCK` go block by block: r_0 is then the residual where the block starts, and what later blocks
    want of an earlier one's latents is one vector, the sum `later` of their 2 w_j r_j. Gradients are computed in the
    forward pass, while the gathered rows are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pattern: Pattern,
        weights: torch.Tensor,
        values: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        x: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_grad = any(ctx.needs_input_grad)
        tokens, k = len(x), len(weights)
        loss = values.new_zeros(())
        of_values, of_x, last = torch.empty_like(values).view(tokens, k), torch.empty_like(x), torch.empty_like(x)
        of_W = torch.zeros_like(W_dec) if needs_grad else None
        step = chunk_rows(4 * k * x.shape[1], x.dtype, x.device)  # rows, S and two products of their size
        for first in range(0, tokens, step):
            part = slice(first, first + step)
            indices = pattern.indices[first * k : (first + step) * k]
            rows = W_dec.index_select(0, indices).view(-1, k, x.shape[1])
            added, last[part], want = _closed_form(
                rows, values.view(tokens, k)[part], weights, b_dec - x[part], needs_grad
            )
            loss += added
            if want is not None and of_W is not None:
                of_values[part], of_x[part] = want[0], -want[2]
                chunk = Pattern(indices, pattern.offsets[: rows.shape[0] + 1], pattern.num_latents)
                places, starts = chunk.sorted
                amounts = values[first * k : (first + step) * k][places]
                of_W += embedding_bag(places, starts, amounts, want[1].view(-1, x.shape[1]))
        size = max(x.numel(), 1)
        if needs_grad:
            ctx.save_for_backward(of_values.view(-1), of_W, of_x)
            ctx.size = size
        reconstruction = last + x
        ctx.mark_non_differentiable(reconstruction)
        return loss / size, reconstruction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_values, of_W, of_x = ctx.saved_tensors
        scale = grad / ctx.size
        return None, None, scale * of_values, scale * of_W, -scale * of_x.sum(0), scale * of_x


def _closed_form(
    rows: torch.Tensor, values: torch.Tensor, weights: torch.Tensor, start: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
    """
    The sum over some tokens of sum_j w_j |r_j|^2, with gathered `rows` (n, K, D), `values` (n, K), r_0 = `start`.

    Returns the sum, the last residual (n, D), and with `needs_grad` dv (n, K), S (n, K, D), 2 sum_j w_j r_j (n, D).
    """
    blocks = [slice(i, min(i + BLOCK, len(weights))) for i in range(0, len(weights), BLOCK)]
    loss, of_values, starts, residual = values.new_zeros(()), torch.empty_like(values), [], start
    for block in blocks:
        E, v, c = rows[:, block], values[:, block], weights[block].flip(0).cumsum(0).flip(0)
        C = torch.minimum(c[:, None], c[None])
        inner = (((E @ E.mT) * C) @ v[:, :, None]).squeeze(2)
        outer = c * (E @ residual[:, :, None]).squeeze(2)
        loss = loss + c[0] * residual.square().sum() + (v * (inner + 2 * outer)).sum()
        of_values[:, block] = 2 * (inner + outer)
        starts.append(residual)
        residual = residual + (v[:, None] @ E).squeeze(1)
    if not needs_grad:
        return loss, residual, None
    wants, later = torch.empty_like(rows), torch.zeros_like(start)
    for block, begin in zip(reversed(blocks), reversed(starts), strict=True):
        E, v, c = rows[:, block], values[:, block], weights[block].flip(0).cumsum(0).flip(0)
        C = torch.minimum(c[:, None], c[None])
        S = wants[:, block]
        torch.matmul(2 * C * v[:, None], E, out=S) if S.is_contiguous() else S.copy_((2 * C * v[:, None]) @ E)
        S += (2 * c[:, None]) * begin[:, None] + later[:, None]
        of_values[:, block] += (E @ later[:, :, None]).squeeze(2)
        later = S[:, 0]
    return loss, residual, (of_values, wants, later)
