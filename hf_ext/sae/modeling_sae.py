"""A sparse autoencoder of activations: TopK, BatchTopK, JumpReLU, ReLU; at any sparsity k' <= K.

- `encode` gives [`SparseCodes`], sorted by value, so that a smaller budget is a cut of the same codes. Which latents
  are active is found without gradient, a chunk of tokens at a time; gradients then flow through these entries alone,
  which is exact, since every other latent's is 0.
- Matrices are stored as rows of latents, [F, D], so that a latent is one contiguous piece.
- `normalize`, `remove_parallel_gradient_` and `constrain_` are what a training loop needs besides.
- This file travels to the Hub with configuration_sae.py and sparse_ops.py, and imports nothing else of ours.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_sae import SAEConfig
from .sparse_ops import Pattern, SparseCodes, bag, linear_at, linear_chunks, pattern_of


# rate of the running mean that estimates the threshold of BatchTopK, as in SAELens
THRESHOLD_RATE = 0.01
# what stands for "no threshold yet" in a checkpoint, as in dictionary_learning
UNSET = -1.0


@dataclass
class SAEOutput(ModelOutput):
    """
    Attributes:
        reconstruction (`torch.Tensor` of shape `(..., d_in)`): x^, in the dtype of x.
        codes ([`SparseCodes`]): The active latents that it is made of.
    """

    reconstruction: torch.Tensor | None = None
    codes: SparseCodes | None = None


class SAEModel(PreTrainedModel):
    """
    A sparse autoencoder; see [`SAEConfig`] for its function, its activations and their sources. Trained with
    `hierarchical_loss` (HierarchicalTopK, arXiv 2505.24473), one model serves every budget k' <= K.

    On disk: `encoder.weight` (F, D), `encoder.bias` (F,), `W_dec` (F, D), whose row f is the direction of latent f,
    `b_dec` (D,); and `threshold`, (F,) of a JumpReLU or a scalar of BatchTopK (-1: not estimated yet).

    Example:

    ```python
    >>> from hf_ext import SAEConfig, SAEModel

    >>> sae = SAEModel(SAEConfig(d_in=64, d_sae=512, k=16))
    >>> output = sae(torch.randn(10, 64), k=4)
    >>> output.reconstruction.shape, output.codes.values.shape
    (torch.Size([10, 64]), torch.Size([10, 4]))

    ```"""

    config_class = SAEConfig
    base_model_prefix = "sae"
    main_input_name = "x"
    _auto_class = "AutoModel"

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.encoder = nn.Linear(config.d_in, config.d_sae)
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        if config.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.full((config.d_sae,), float(config.jump_threshold)))
        elif config.activation == "batchtopk":
            self.register_buffer("threshold", torch.tensor(UNSET))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Decoder rows are random directions, encoder rows the same ones; biases are 0 (a trainer sets b_dec)."""
        if module is not self:
            return
        init.normal_(self.W_dec)
        init.copy_(self.W_dec, nn.functional.normalize(self.W_dec, dim=1))
        init.copy_(self.encoder.weight, self.W_dec)
        init.zeros_(self.encoder.bias)
        init.zeros_(self.b_dec)
        if self.config.activation == "jumprelu":
            init.constant_(self.threshold, float(self.config.jump_threshold))
        elif self.config.activation == "batchtopk":
            init.constant_(self.threshold, UNSET)

    def forward(self, x: torch.Tensor, k: int | None = None) -> SAEOutput:
        """
        Encode and decode.

        Args:
            x (`torch.Tensor` of shape `(..., d_in)`): Activations.
            k (`int`, *optional*): At most so many active latents for each token; see [`encode`].
        """
        codes = self.encode(x, k)
        return SAEOutput(reconstruction=self.decode(codes, x), codes=codes)

    def encode(self, x: torch.Tensor, k: int | None = None, latents: torch.Tensor | None = None) -> SparseCodes:
        """
        The active latents of each token.

        Args:
            x (`torch.Tensor` of shape `(..., d_in)`): Activations, finite.
            k (`int`, *optional*):
                k': at most so many active latents for each token, the largest of those that the activation lets
                through. In [1, K] for `topk`, whose default is K; in [1, d_sae] for the others.
            latents (`torch.LongTensor` of shape `(n,)`, *optional*):
                Let only these compete, by their u, for the `k` places of each token (the auxiliary loss of dead
                latents needs that). The codes then count within `latents`: their `d_sae` is n.

        Returns:
            [`SparseCodes`] of shape `(..., k')`, or as wide as the token with the most active latents needs.

        Raises:
            ValueError: for a shape, a dtype or a `k` that does not fit; and for BatchTopK in evaluation mode before
                its threshold was estimated, unless `k` is given.
            FloatingPointError: where `x` holds NaN or infinity, with the hook and the number of tokens.
        """
        self._check_input(x)
        k = self._check_k(k, latents)
        inputs, shift = self.normalize(x).reshape(-1, self.config.d_in), None
        if self.config.apply_b_dec_to_input:
            # activations that need no gradient, as in training, spare the product that would give them one
            shift = None if inputs.requires_grad else self.b_dec
            inputs = inputs - (self.b_dec if shift is None else shift.detach())
        weight, bias = self.encoder.weight, self.encoder.bias
        theta = getattr(self, "threshold", None)
        kind = self.config.activation
        if latents is not None:
            weight, bias, kind = weight[latents], bias[latents], "topk"
        detached = (inputs.detach(), weight.detach(), bias.detach())
        if kind == "topk":
            found, indices = _largest(*detached, k, ordered=latents is None)
        elif kind == "batchtopk" and self.training and k is None:
            found, indices = _largest_of_batch(*detached, self.config.k)
            self._update_threshold(found)
        elif kind == "jumprelu":
            below = self.config.jump_bandwidth / 2 if self.training and torch.is_grad_enabled() else 0.0
            found, indices = _above(*detached, theta.detach(), below, k)
        else:
            least = 0.0 if kind == "relu" else self._inference_threshold(k)
            found, indices = _above(*detached, bias.new_full((), least), 0.0, k)

        pattern = Pattern.of_rows(indices, len(weight))
        u = linear_at(pattern, inputs, weight, bias, found.reshape(-1), shift).view_as(found)
        gates = None
        if kind == "jumprelu":
            values, gates = _JumpReLU.apply(u, theta[indices], float(self.config.jump_bandwidth))
        else:
            values = torch.relu(u)
        shape = (*x.shape[:-1], indices.shape[-1])
        codes = SparseCodes(values.view(shape), indices.view(shape), len(weight))
        if gates is not None and self.training:
            codes.gates = gates.view(shape)
        codes.pattern = pattern
        return codes

    def decode(self, codes: SparseCodes, x: torch.Tensor | None = None) -> torch.Tensor:
        """
        The reconstruction of `codes`.

        Args:
            codes ([`SparseCodes`] of shape `(..., K)`): What `encode` gave, or `codes.first(k)`.
            x (`torch.Tensor` of shape `(..., d_in)`, *optional*):
                The activations they came from: `input_norm="layer_norm"` needs their mean and deviation. The result
                takes its dtype.

        Returns:
            `torch.Tensor` of shape `(..., d_in)`.
        """
        if codes.d_sae != self.config.d_sae:
            raise ValueError(
                f"`codes` must be of d_sae={self.config.d_sae} latents, got {codes.d_sae}. They are of another SAE."
            )
        rows = bag(pattern_of(codes), codes.values.reshape(-1), self.W_dec) + self.b_dec
        rows = rows.view(*codes.values.shape[:-1], self.config.d_in)
        if self.config.input_norm == "scalar":
            rows = rows / self.config.input_scale
        elif self.config.input_norm == "layer_norm":
            if x is None:
                raise ValueError(
                    '`x` must be given to decode with input_norm="layer_norm": its mean and deviation are put back.'
                )
            mean, deviation = _moments(x.to(rows.dtype))
            rows = rows * deviation + mean
        return rows if x is None else rows.to(x.dtype)

    def change(self, delta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """
        What a change of the latents is to the activations themselves.

        Args:
            delta (`torch.Tensor` of shape `(..., d_in)`): Sum over latents of (new - old activation) * `W_dec` row.
            x (`torch.Tensor` of shape `(..., d_in)`): The activations, whose norm is undone as `decode` undoes it.

        Returns:
            `torch.Tensor` of shape `(..., d_in)`, in the dtype of `delta`.
        """
        if self.config.input_norm == "scalar":
            return delta / self.config.input_scale
        if self.config.input_norm == "layer_norm":
            return delta * _moments(x.to(delta.dtype))[1]
        return delta

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x' = norm(x) in the dtype of the weights: what the encoder reads, and what losses compare with."""
        x = x.to(self.W_dec.dtype)
        if self.config.input_norm == "scalar":
            return x * self.config.input_scale
        if self.config.input_norm == "layer_norm":
            mean, deviation = _moments(x)
            return (x - mean) / (deviation + 1e-5)
        return x

    def decoder_rows(self) -> torch.Tensor:
        """`(d_sae, d_in)`: the direction of each latent."""
        return self.W_dec

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Before an optimiser's step: drop what would only change the norms of decoder rows."""
        grad = self.W_dec.grad
        if grad is not None and self.config.normalize_decoder:
            along = (grad * self.W_dec).sum(1, keepdim=True)
            grad.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def constrain_(self) -> None:
        """After an optimiser's step: decoder rows have norm 1 again, and no threshold of a JumpReLU is negative."""
        if self.config.normalize_decoder:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(self.W_dec.dtype).tiny))
        if self.config.activation == "jumprelu":
            self.threshold.clamp_min_(0)

    def _check_input(self, x: torch.Tensor) -> None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"`x` must be a tensor of floats, got {kind}.")
        if x.dim() == 0 or x.shape[-1] != self.config.d_in:
            raise ValueError(
                f"`x` must have shape (..., d_in={self.config.d_in}), got {tuple(x.shape)}. The SAE belongs to "
                f"{self._where()}: check model and hook."
            )
        if torch.compiler.is_compiling() or x.device.type == "meta":
            return
        total = x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
        if not torch.isfinite(total):
            tokens = x.reshape(-1, self.config.d_in)
            bad = int((~torch.isfinite(tokens)).any(1).sum())
            if bad:
                raise FloatingPointError(
                    f"`x` must be finite, got NaN or infinity in {bad} of {len(tokens)} tokens at {self._where()}. "
                    "Run the model in bfloat16 or float32 where float16 overflows."
                )

    def _where(self) -> str:
        name = self.config.hook_name
        return "no hook in particular" if name is None else f"hook {name!r} ({self.config.hook_io})"

    def _check_k(self, k: int | None, latents: torch.Tensor | None) -> int | None:
        if latents is not None:
            most, k = len(latents), len(latents) if k is None else k
        elif self.config.activation == "topk":
            most, k = int(self.config.k), int(self.config.k) if k is None else k
        elif k is None:
            return None
        else:
            most = self.config.d_sae
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= most:
            what = "latents given" if latents is not None else "k" if self.config.activation == "topk" else "d_sae"
            raise ValueError(f"`k` must be a whole number in [1, {most}] ({what}), got {k!r}.")
        return k

    def _inference_threshold(self, k: int | None) -> float:
        theta = float(self.threshold)
        if theta >= 0:
            return theta
        if k is None:
            raise ValueError(
                "`threshold` must be estimated before a BatchTopK SAE is evaluated, got -1 (unset). Train it in "
                "train mode first, set sae.threshold, or ask for a budget: sae.encode(x, k=...)."
            )
        return 0.0

    @torch.no_grad()
    def _update_threshold(self, values: torch.Tensor) -> None:
        positive = values[values > 0]
        if len(positive):
            least = positive.min()
            self.threshold.copy_(
                torch.where(self.threshold < 0, least, torch.lerp(self.threshold, least, THRESHOLD_RATE))
            )


class _JumpReLU(torch.autograd.Function):
    """z = u [u > theta] and gate = [u > theta], with the straight-through gradients of arXiv 2407.14435 in theta:

    dz/dtheta = -(theta / epsilon) R((u - theta) / epsilon), dgate/dtheta = -(1 / epsilon) R(.), where R is 1 on
    (-1/2, 1/2) and 0 elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, theta: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        active = u > theta
        ctx.save_for_backward(u, theta, active)
        ctx.epsilon = epsilon
        return torch.where(active, u, 0), active.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, of_z: torch.Tensor, of_gate: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, theta, active = ctx.saved_tensors
        in_band = (u - theta).abs() < ctx.epsilon / 2
        return of_z * active, -(theta * of_z + of_gate) / ctx.epsilon * in_band, None


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)


def _largest(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, ordered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest pre-activations of each token, (B, k), and their latents."""
    values = weight.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.long, device=x.device)
    for rows, u in linear_chunks(x, weight, bias):
        top = u.topk(k, dim=1, sorted=ordered)
        values[rows], indices[rows] = top.values, top.indices
    return values, indices


def _above(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, theta: torch.Tensor, below: float, k: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations above the thresholds, (B, K), sorted, at most `k`; then those less than `below` under them."""
    parts = []
    for _, u in linear_chunks(x, weight, bias):
        key = torch.where(u > theta, u, 0)
        if below:
            # a latent in the band counts as not active, but its threshold has a gradient
            key = torch.where((u > theta - below) & (key == 0), torch.finfo(u.dtype).tiny, key)
        key.clamp_min_(0)
        width = max(int((key > 0).sum(1).max()), 1)
        top = key.topk(width if k is None else min(width, k), dim=1)
        parts.append((u.gather(1, top.indices) if below else top.values, top.indices))
    width = max((part[0].shape[1] for part in parts), default=1)
    values = weight.new_zeros(len(x), width)
    indices = torch.zeros(len(x), width, dtype=torch.long, device=x.device)
    first = 0
    for value, index in parts:
        values[first : first + len(value), : value.shape[1]] = value
        indices[first : first + len(value), : value.shape[1]] = index
        first += len(value)
    return values, indices


def _largest_of_batch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k * B largest positive pre-activations of a batch of B tokens, as rows (B, K), sorted and padded by 0."""
    total, latents = int(k * len(x)), len(weight)
    values = weight.new_empty(0)
    places = torch.empty(0, dtype=torch.long, device=x.device)
    for rows, u in linear_chunks(x, weight, bias):
        top = u.flatten().topk(min(total, u.numel()), sorted=False)
        values = torch.cat([values, top.values.to(values.dtype)])
        places = torch.cat([places, top.indices + rows.start * latents])
        kept = values.topk(min(total, len(values)))
        values, places = kept.values, places[kept.indices]
    values, places = values[values > 0], places[values > 0]
    owners, order = torch.sort(places // latents, stable=True)  # within a row still by value
    counts = torch.bincount(owners, minlength=len(x))
    columns = torch.arange(len(owners), device=x.device) - (counts.cumsum(0) - counts)[owners]
    width = max(int(counts.max()), 1) if len(counts) else 1
    found = weight.new_zeros(len(x), width)
    indices = torch.zeros(len(x), width, dtype=torch.long, device=x.device)
    found[owners, columns], indices[owners, columns] = values[order], places[order] % latents
    return found, indices


__all__ = ["SAEModel", "SAEOutput", "SparseCodes"]
