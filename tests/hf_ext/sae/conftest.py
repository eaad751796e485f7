"""Tiny sparse autoencoders in float64, and what they compute written without any sparse product."""

from collections.abc import Callable

import pytest
import torch

from hf_ext.sae import SAEConfig, SAEModel


SHAPE = {"d_in": 12, "d_sae": 40}
BUDGET = {"topk": 5, "batchtopk": 4.5, "jumprelu": None, "relu": None}


@pytest.fixture
def sae() -> Callable[..., SAEModel]:
    """`sae("topk", seed=0, **options)`: in float64 and train mode, with biases and thresholds that matter."""

    def build(activation="topk", seed=0, **options):
        torch.manual_seed(seed)
        wide = {"jump_threshold": 0.3, "jump_bandwidth": 0.5} if activation == "jumprelu" else {}
        config = {**SHAPE, "k": BUDGET[activation], "activation": activation, **wide, **options}
        model = SAEModel(SAEConfig(**config)).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # unlike each other, so that a gradient in the wrong place shows
                parameter.add_(0.1 * torch.randn_like(parameter)) if name != "threshold" else parameter.add_(
                    0.2 * torch.rand_like(parameter)
                )
        return model.train()

    return build


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """`tokens(3, 7, width=12, seed=1)`: activations of that shape."""

    def draw(*shape, width=SHAPE["d_in"], seed=1):
        return torch.randn(*(shape or (9,)), width, dtype=torch.double, generator=torch.Generator().manual_seed(seed))

    return draw
