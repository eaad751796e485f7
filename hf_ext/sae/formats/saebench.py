"""An SAE as SAEBench's evaluations expect one."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hf_ext.sae.formats.layout import layer_of


def to_saebench(sae: Any, model_name: str | None = None, hook_layer: int | None = None) -> "SAEBenchSAE":
    """
    What SAEBench takes for an SAE: `W_enc` (D, F), `W_dec` (F, D), `b_enc`, `b_dec`, dense `encode`, `decode`, `cfg`.

    Args:
        sae ([`SAEModel`]): In evaluation mode, its decoder rows of norm 1 (to 1e-5), as SAEBench demands.
        model_name (`str`, *optional*, defaults to the SAE's `base_model_name_or_path`): As SAEBench calls the model.
        hook_layer (`int`, *optional*): By default the number in the SAE's hook.

    Raises:
        ValueError: for rows that are not of norm 1, a layer-normalised input (whose `decode` needs more than codes),
            or a model or layer that nobody names.
    """
    config = sae.config
    name = model_name or config.base_model_name_or_path
    layer = layer_of(config.hook_name) if hook_layer is None else hook_layer
    if name is None or layer is None:
        lacking = "model_name" if name is None else "hook_layer"
        raise ValueError(f"`{lacking}` must be given, since the SAE's configuration does not tell it.")
    if config.input_norm == "layer_norm":
        raise ValueError('`sae` must have input_norm="none" or "scalar" for SAEBench, got "layer_norm".')
    odd = int(((sae.W_dec.detach().double().norm(dim=1) - 1).abs() > 1e-5).sum())
    if odd:
        raise ValueError(
            f"`sae` must have decoder rows of norm 1 (to 1e-5) for SAEBench, got {odd} others. Fold their norms: "
            "convert it to dictionary_learning and back."
        )
    return SAEBenchSAE(sae, name, layer)


class SAEBenchSAE(nn.Module):
    """See [`to_saebench`]."""

    def __init__(self, sae: Any, model_name: str, hook_layer: int) -> None:
        super().__init__()
        self.sae = sae
        config = sae.config
        self.cfg = SimpleNamespace(
            model_name=model_name,
            d_in=config.d_in,
            d_sae=config.d_sae,
            hook_name=f"blocks.{hook_layer}.hook_resid_post",
            hook_layer=hook_layer,
            hook_head_index=None,
            prepend_bos=True,
            normalize_activations="none",
            dtype=str(sae.W_dec.dtype).removeprefix("torch."),
            architecture=config.activation,
        )

    @property
    def W_enc(self) -> torch.Tensor:
        return self.sae.encoder.weight.T

    @property
    def W_dec(self) -> torch.Tensor:
        return self.sae.W_dec

    @property
    def b_enc(self) -> torch.Tensor:
        return self.sae.encoder.bias

    @property
    def b_dec(self) -> torch.Tensor:
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.W_dec.dtype

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., F)`: every latent's activation."""
        return self.sae.encode(x).dense()

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """`(..., D)`: the reconstruction of dense activations."""
        rows = feature_acts.to(self.dtype) @ self.sae.W_dec + self.sae.b_dec
        return rows / self.sae.config.input_scale if self.sae.config.input_norm == "scalar" else rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x)).to(x.dtype)
