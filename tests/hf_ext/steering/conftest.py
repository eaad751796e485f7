"""A tiny base model, itself inside a PeftModel, and vectors of a size that every layer feels."""

import copy
from typing import NamedTuple

import pytest


class Steered(NamedTuple):
    """`model` is a PeftModel around a copy of `base`; `vectors` are those of its adapter "default"."""

    base: object
    model: object
    vectors: dict


@pytest.fixture(scope="session")
def vectors_like():
    """`vectors_like(layers, seed)`: layer -> 32 numbers of standard deviation 1, as large as a tiny model's stream."""
    import torch

    def make(layers=(0, 1, 2), seed=1, width=32):
        generator = torch.Generator().manual_seed(seed)
        return {layer: torch.randn(width, generator=generator) for layer in layers}

    return make


@pytest.fixture(scope="session")
def steer(tiny_model, vectors_like):
    """`steer(model_type, **options of SteeringConfig)` -> [`Steered`] in evaluation mode."""
    from peft import get_peft_model

    from hf_ext import SteeringConfig

    def make(model_type="llama", vectors=None, base=None, **options):
        base = tiny_model(model_type) if base is None else base
        model = get_peft_model(copy.deepcopy(base), SteeringConfig(**options)).eval()
        vectors = vectors_like(model.get_vectors("default")) if vectors is None else vectors
        model.set_vectors("default", vectors)
        return Steered(base, model, vectors)

    return make
