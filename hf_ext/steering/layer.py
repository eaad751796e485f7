"""A module whose output gets a vector: one for each adapter, stacked for batches whose rows have different ones.

- The parameters are PEFT's: `steering_bias[adapter]`, a vector [d]. For a batch with `adapter_names` they become views
  of one stack [A + 1, d], row 0 zero, so that writing a vector is writing its row and a row is found by its index.
- The vector is cast to the activation's dtype, never the activation to the vector's.
- Merged is a bias: of a linear map (made where there is none), or of GPT-2's Conv1D. What has no place for one, a norm
  or a mixture of experts, is not merged; `hf_ext.steering.export_model` gives a model that saves it.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ext.steering.context import ForwardContext


class SteeringLayer(nn.Module, BaseTunerLayer):
    """
    Any module plus vectors (arXiv 2505.18706): y = module(x) + sum over the active adapters of c s.

    Args:
        base_layer (`torch.nn.Module`): Its output is a tensor `(..., d)`, or a tuple that starts with one.
        name (`str`): Its path in the model, for messages.
        width (`int`): d, for a module that does not tell its own.
        context (`ForwardContext`): What all steering layers of a model share.
    """

    adapter_layer_names = ("steering_bias",)

    def __init__(self, base_layer: nn.Module, name: str, width: int | None, context: ForwardContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.width = _width(self.get_base_layer(), width, name)
        self.context = context
        self.steering_bias = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._own_bias: nn.Parameter | None = None  # the base layer's, while vectors are merged into another
        self._stack: torch.Tensor | None = None
        self._stacked: list[str] | None = None
        context.layers.append(self)

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def update_layer(self, adapter_name: str, inference_mode: bool) -> None:
        """Give the layer a vector for `adapter_name`, zero."""
        self.steering_bias[adapter_name] = nn.Parameter(torch.zeros(self.width))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.context.forget(adapter_name)

    def stack(self, names: list[str], rows: set[int]) -> torch.Tensor | None:
        """
        The vectors of `names` as rows 1.. of one tensor [A + 1, d], of which `rows` are about to be read. Row 0, and
        those of adapters that the layer lacks, are zero. None if it lacks them all.

        Parameters become views of their rows, so a stack is made once for each list of names: again only if a
        parameter was put elsewhere since (`.to`, FSDP).
        """
        fresh = self._stacked is names and all(self._is_row(names[row - 1], row) for row in rows)
        if not fresh:
            vectors = {row: self.steering_bias[n] for row, n in enumerate(names, 1) if n in self.steering_bias}
            self._stack, self._stacked = None, names
            if vectors:
                self._stack = self._tie(vectors, len(names))
        return self._stack

    def _is_row(self, name: str, row: int) -> bool:
        if self._stack is None or name not in self.steering_bias:
            return name not in self.steering_bias
        start = self._stack.data_ptr() + row * self.width * self._stack.element_size()
        vector = self.steering_bias[name]
        return vector.data_ptr() == start and vector.dtype == self._stack.dtype

    def _tie(self, vectors: dict[int, nn.Parameter], count: int) -> torch.Tensor:
        dtype = functools.reduce(torch.promote_types, (vector.dtype for vector in vectors.values()))
        # a tensor of inference mode could not be trained again
        with torch.inference_mode(False), torch.no_grad():
            stack = torch.zeros((count + 1, self.width), dtype=dtype, device=next(iter(vectors.values())).device)
            for row, vector in vectors.items():
                stack[row] = vector
                if vector.dtype == dtype:
                    vector.data = stack[row]
        return stack

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        shift = self._shift(hidden) if self.context.ids is None else self._row_shift(hidden)
        if shift is None:
            return output
        if shift.shape[-1] != hidden.shape[-1]:
            raise ValueError(
                f"`placement` must be a module whose output has the model's width, {shift.shape[-1]}, got "
                f"{hidden.shape[-1]} at {self.name}. Choose another module."
            )
        hidden = hidden + (shift if shift.dtype == hidden.dtype else shift.to(hidden.dtype))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _shift(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Sum of the active adapters, [d], or [B, T, d] where tokens differ."""
        total = None
        # a decoded token feels the microseconds of ParameterDict's own look-up
        vectors = self.steering_bias._parameters
        for name in self.active_adapters:
            vector = vectors.get(name)
            if vector is None:
                continue
            scale, kind = self.context.scaling[name], self.context.positions[name]
            if scale != 1:
                vector = vector * scale
            if kind != "all":
                vector = self._gate(self.context.gates.get(kind), hidden) * vector
            total = vector if total is None else total + vector
        return total

    def _row_shift(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Each row's own vector, [B, 1, d], or [B, T, d] where tokens differ."""
        context = self.context
        if self._stack is None:
            return None
        if hidden.dim() != 3:
            raise ValueError(
                f"`adapter_names` needs activations of shape (batch, seq, width), got {tuple(hidden.shape)} at "
                f"{self.name}. Choose another `placement`."
            )
        assert context.ids is not None
        rows = self._stack[context.ids.to(hidden.device)]
        if context.row_scale is not None:
            rows = rows * context.row_scale.to(hidden.device)[:, None]
        rows = rows[:, None]
        return rows if context.row_gate is None else self._gate(context.row_gate, hidden) * rows

    def _gate(self, mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        if mask is None or mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"`positions` needs to know where the completion begins, which nothing told {self.name}: call the "
                'model itself, not a part of it, with activations (batch, seq, width); or use positions="all".'
            )
        return mask[..., None].to(hidden.device)

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """ValueError if the adapters cannot be merged into the base layer."""
        cure = "hf_ext.steering.export_model makes a model that saves and loads with the vectors in it."
        base = self.get_base_layer()
        for name in adapter_names:
            if name in self.steering_bias and self.context.positions[name] != "all":
                raise ValueError(
                    f"An adapter must steer all tokens to be merged, got positions={self.context.positions[name]!r} "
                    f"of {name!r}: a bias knows no position."
                )
            # a bias of a subclass (4 or 8 bits) may be used in other ways
            if name in self.steering_bias and type(base) not in (nn.Linear, Conv1D):
                raise ValueError(
                    f"The module must be a Linear or Conv1D for {name!r} to be merged, got a {type(base).__name__} at "
                    f"{self.name}, which has no bias to take the vector. {cure}"
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add vectors to the base layer's bias, or make one.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Raise ValueError where the result is not finite.
            adapter_names (`list[str]`, *optional*): The active ones if not given.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.steering_bias]
        self.check_mergeable(names)
        if not names:
            return
        base = self.get_base_layer()
        own = self._own_bias if self.merged else base.bias
        # from the bias as it was, so that the order of merges does not matter
        every = [*self.merged_adapters, *names]
        total = sum(self.context.scaling[name] * self.steering_bias[name].detach().float() for name in every)
        bias = (total if own is None else own.detach().float() + total).to(base.weight.dtype)
        if safe_merge and not torch.isfinite(bias).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems to be broken")
        self._own_bias, self.merged_adapters = own, every
        base.bias = nn.Parameter(bias, requires_grad=False)

    def unmerge(self) -> None:
        """Put back the base layer's own bias, or none: to the last bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.get_base_layer().bias = self._own_bias
        self._own_bias, self.merged_adapters = None, []

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """A module without a weight of its own (a mixture of experts) is where its parameters are."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        inner = next(base_layer.parameters(), None)
        return (device, dtype) if device is not None or inner is None else (inner.device, inner.dtype)


def _width(base: nn.Module, width: int | None, name: str) -> int:
    own = getattr(base, "out_features", getattr(base, "nf", width))
    if own is None:
        raise ValueError(
            f"`placement` must be a Linear or Conv1D in a model without a configuration, got a {type(base).__name__} "
            f"at {name}."
        )
    return int(own)
