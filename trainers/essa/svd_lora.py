"""The search space of ESSA: singular values of a trained LoRA, the vectors held fixed (arXiv 2507.04453, section 3).

    A = U_A diag(s_A) V_A^T     [r, n]        B = U_B diag(s_B) V_B^T     [m, r]      each factor by itself
    A' = U_A diag(s_A + x_A) V_A^T            B' = U_B diag(s_B + x_B) V_B^T          W' = W + c B' A'

- x has one number for each searched value: the largest floor(alpha r) of each factor, layer by layer, A before B.
- A batch whose rows belong to different candidates needs no adapter of its own for each: with M = V_B^T U_A [r, r]

      y = W h + c U_B (s_B' o (M (s_A' o (V_A^T h))))        o: elementwise, s' of the row's candidate

  costs two thin products that all rows share. It equals the merged weights up to rounding; tests compare.
- Writing back adds U diag(x) V^T to the factors as they were, so x = 0 gives the adapter bit for bit. The bases belong
  to the state: a singular value decomposition is not the same on every machine.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch


class SearchSpace(Protocol):
    """What [`ESSATrainer`] searches: vectors x of `dim` numbers, 0 being the model as it was given."""

    dim: int
    scale: np.ndarray  # [dim], x in units of the searched parameters is scale * x

    @property
    def fingerprint(self) -> str:
        """Differs where x means something else: a run is resumed in the same space alone."""

    def candidates(self, X: np.ndarray, row_ids: Any) -> Any:
        """A context in which row i of every batch is computed with candidate X[row_ids[i]]."""

    def write(self, x: np.ndarray) -> None:
        """Put x into the model's own parameters, from which saving goes on."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None: ...


class _Factor(NamedTuple):
    """The decomposition of one factor, and where its searched values lie among all."""

    weight: torch.nn.Parameter
    original: torch.Tensor
    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor
    searched: int  # the first `searched` of s, which descend


class _Layer(NamedTuple):
    """A LoRA layer: both factors, scaling, and the columns of its values in the table [candidates, all values]."""

    name: str
    module: Any
    A: _Factor
    B: _Factor
    scaling: float
    columns: tuple[slice, ...]


class SvdLora:
    """
    The singular values of a LoRA as a [`SearchSpace`].

    Args:
        model (`PeftModel`): With one active LoRA, trained: at B = 0 there is no subspace to search (a warning).
        fraction (`float`, *optional*, defaults to 1.0): alpha, the share of each factor's values that is searched.
        mode (`str`, *optional*, defaults to `"absolute"`): `"absolute"`, x is the offset itself, as in the paper;
            `"relative"`, x counts in mean singular values of its factor.
        clamp_min (`float`, *optional*): Least value of s + x. Without it a value may change its sign.

    Attributes:
        dim (`int`): Sum over factors of floor(alpha r).
        scale (`np.ndarray` [dim]): Offsets are scale * x.

    Raises:
        ValueError: where there is no LoRA, more than one active adapter, a kind of LoRA that is more than two factors
            (DoRA and other variants, bias, modules_to_save, embeddings, convolutions), a merged one, NaN, or where
            floor(alpha r) is 0.
    """

    def __init__(
        self, model: Any, fraction: float = 1.0, mode: str = "absolute", clamp_min: float | None = None
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"`svd_fraction` must be above 0 and at most 1, got {fraction}.")
        if mode not in ("absolute", "relative"):
            raise ValueError(f'`sigma_mode` must be "absolute" or "relative", got {mode!r}.')
        self.fraction, self.mode, self.clamp_min = fraction, mode, clamp_min
        self._layers: list[_Layer] = []
        start = 0
        for name, module, adapter in lora_layers(model):
            A, B = (_decompose(name, side[adapter].weight, fraction) for side in (module.lora_A, module.lora_B))
            columns = tuple(slice(at, at + len(A.s)) for at in (start, start + len(A.s)))
            self._layers.append(_Layer(name, module, A, B, float(module.scaling[adapter]), columns))
            start += 2 * len(A.s)
        searched = [torch.arange(len(factor.s)) < factor.searched for factor in self._factors]
        self._where = torch.cat(searched).nonzero()[:, 0]
        self.dim = len(self._where)
        if not any(layer.B.s.any() for layer in self._layers):
            warnings.warn(
                "Every B of this LoRA is 0, as before any training: its singular vectors are arbitrary, and the "
                "search reaches less than from a LoRA that was trained first (SFTTrainer, some minutes).",
                stacklevel=2,
            )
        self._measure()

    @property
    def _factors(self) -> list[_Factor]:
        return [factor for layer in self._layers for factor in (layer.A, layer.B)]

    def _measure(self) -> None:
        """What follows from the bases: all values in a row, and the scale."""
        self._s = torch.cat([factor.s.cpu() for factor in self._factors])
        self.scale = np.ones(self.dim)
        if self.mode == "relative":
            # a factor of zeros (B before any training) has no size of its own: its partner's serves
            sizes = [[float(side.s.mean()) for side in (layer.A, layer.B)] for layer in self._layers]
            flat = [size or max(pair) for pair in sizes for size in pair]
            counts = [factor.searched for factor in self._factors]
            self.scale = np.repeat(flat, counts)

    def table(self, X: np.ndarray) -> torch.Tensor:
        """All singular values of each candidate, [candidates, sum of 2 r], float32."""
        X = np.atleast_2d(X)
        if X.shape[1] != self.dim or not np.isfinite(X).all():
            raise ValueError(f"`X` must be finite numbers [candidates, {self.dim}], got an array of shape {X.shape}.")
        values = self._s.repeat(len(X), 1)
        moved = values[:, self._where] + torch.as_tensor(self.scale * X, dtype=torch.float32)
        values[:, self._where] = moved if self.clamp_min is None else moved.clamp(min=self.clamp_min)
        return values

    @contextmanager
    def candidates(self, X: np.ndarray, row_ids: Any) -> Iterator[None]:
        """
        Within this context row i of a batch is computed with candidate `X[row_ids[i]]`.

        A batch of k times as many rows, as beams and `num_return_sequences` make, has k rows for each.

        Args:
            X (`np.ndarray` [candidates, dim]): Candidates.
            row_ids (sequence of int [rows]): Which one each row of the batch has.
        """
        ids = torch.as_tensor(row_ids, dtype=torch.long)
        table = self.table(X)
        if ids.dim() != 1 or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= len(table):
            raise ValueError(f"`row_ids` must be indices of {len(table)} candidates, one for each row of the batch.")
        values = table[ids]
        try:
            for layer in self._layers:
                layer.module.forward = _row_forward(layer, values)
            yield
        finally:
            for layer in self._layers:
                layer.module.__dict__.pop("forward", None)

    def write(self, x: np.ndarray) -> None:
        """Set the adapter to A + U_A diag(x_A) V_A^T and B alike; x = 0 restores it bit for bit."""
        change = (self.table(x)[0] - self._s).split([len(factor.s) for factor in self._factors])
        with torch.no_grad():
            for factor, offset in zip(self._factors, change, strict=True):
                factor.weight.copy_(factor.original)
                if offset.any():
                    moved = (factor.U * offset.to(factor.U.device)) @ factor.V.T
                    factor.weight.copy_(factor.original.float() + moved)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The factors as they were, with their bases: what x means."""
        state = {}
        for layer in self._layers:
            for side, factor in (("A", layer.A), ("B", layer.B)):
                for part in ("original", "U", "s", "V"):
                    state[f"{layer.name}.{side}.{part}"] = getattr(factor, part).cpu().contiguous()
        return state

    @property
    def fingerprint(self) -> str:
        """A hash of the adapter as it was: names, shapes, scaling and every weight."""
        digest = hashlib.sha256()
        for layer in self._layers:
            digest.update(f"{layer.name} {layer.scaling}".encode())
            for factor in (layer.A, layer.B):
                digest.update(f"{tuple(factor.original.shape)}".encode())
                digest.update(factor.original.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over bases of a checkpoint; the adapter's modules and ranks must be the same."""
        own = self.state_dict()
        wrong = sorted(set(own) ^ set(state)) or [n for n in own if state[n].shape != own[n].shape]
        if wrong:
            raise ValueError(
                f"`state` must hold the bases of this adapter, but {len(wrong)} tensors differ, {wrong[0]} among "
                "them. Resume with the adapter that the run started from."
            )
        for layer in self._layers:
            for side, factor in (("A", layer.A), ("B", layer.B)):
                for part in ("original", "U", "s", "V"):
                    getattr(factor, part).copy_(state[f"{layer.name}.{side}.{part}"])
        self._measure()


def lora_layers(model: Any) -> Iterator[tuple[str, Any, str]]:
    """
    Name, module and active adapter of every LoRA layer of a `PeftModel`, after a check of what ESSA can search.

    Raises:
        ValueError: see [`SvdLora`].
    """
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        raise ValueError(
            f"`model` must be a PeftModel with a trained LoRA, got {type(model).__name__}. Train one with SFTTrainer "
            "and a LoraConfig, load one by PeftModel.from_pretrained, or pass `peft_config`."
        )
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"`model` must have one active adapter, got {active}. Choose with model.set_adapter(name).")
    config = model.peft_config[active[0]]
    if not isinstance(config, LoraConfig):
        raise ValueError(f"The active adapter must be a LoRA, got {config.peft_type}.")
    for field, wanted in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
        value = getattr(config, field, None)
        if value != wanted and value:
            raise ValueError(
                f"The LoRA must have {field}={wanted!r}, got {value!r}: ESSA searches singular values alone, and "
                "would leave these weights as they are. Train a LoRA without them."
            )
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    found = [(name, m) for name, m in found if active[0] in (*m.lora_A, *m.lora_embedding_A, *m.lora_magnitude_vector)]
    if not found:
        raise ValueError(f"`model` must have layers of the adapter {active[0]!r}, got none.")
    for name, module in found:
        plain = active[0] in module.lora_A and isinstance(module.lora_A[active[0]], torch.nn.Linear)
        if not plain:
            raise ValueError(
                f"Every LoRA layer must be linear, but {name} is {type(module).__name__}. Leave it out of "
                "target_modules."
            )
        if active[0] in module.lora_variant or module.lora_B[active[0]].bias is not None:
            raise ValueError(
                f"The LoRA must be two factors and no more, but {name} is of a variant (DoRA, lora_bias or another). "
                "Train a plain LoRA."
            )
        if module.merged:
            raise ValueError(f"The LoRA must not be merged, but {name} is. Call model.unmerge_adapter() first.")
    yield from ((name, module, active[0]) for name, module in found)


def _decompose(name: str, weight: torch.nn.Parameter, fraction: float) -> _Factor:
    original = weight.detach().clone()
    if not original.isfinite().all():
        raise ValueError(f"The LoRA must be finite, but {name} holds NaN or infinite weights. Train it again.")
    r = min(original.shape)
    # 0.1 * 30 is 3 and not 2.9999…: what the user wrote in decimals is meant
    searched = int(round(fraction * r, 9))
    if not searched:
        raise ValueError(
            f"floor(svd_fraction * r) must be at least 1, got {fraction} * {r} at {name}. Use a larger svd_fraction "
            f"or rank: {1 / r:.3g} and above searches one value."
        )
    # float64: the decomposition is made once, and its error is then below that of float32 weights
    U, s, Vt = torch.linalg.svd(original.double(), full_matrices=False)
    return _Factor(weight, original, U.float(), s.float(), Vt.T.float().contiguous(), searched)


def _row_forward(layer: _Layer, values: torch.Tensor) -> Any:
    """The forward of one LoRA layer in which each row has its own singular values."""
    base = layer.module.base_layer
    device, dtype = layer.A.weight.device, layer.A.weight.dtype
    V_A, U_B = layer.A.V.to(dtype), layer.B.U.to(dtype)
    middle = (layer.B.V.T @ layer.A.U).T.to(dtype)
    s_A = values[:, layer.columns[0]].to(device, dtype)
    s_B = (values[:, layer.columns[1]] * layer.scaling).to(device, dtype)

    def forward(h: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = base(h, *args, **kwargs)
        times, left = divmod(len(h), len(s_A))
        if left:
            raise ValueError(
                f"A batch must have a multiple of the {len(s_A)} rows that candidates were named for, got {len(h)}."
            )
        a, b = (s if times == 1 else s.repeat_interleave(times, 0) for s in (s_A, s_B))
        if h.dim() == 3:
            a, b = a[:, None], b[:, None]
        hidden = (((h.to(dtype) @ V_A) * a) @ middle) * b
        flat = out.reshape(-1, out.shape[-1])
        return torch.addmm(flat, hidden.reshape(-1, hidden.shape[-1]).to(flat.dtype), U_B.T.to(flat.dtype)).view_as(
            out
        )

    return forward
