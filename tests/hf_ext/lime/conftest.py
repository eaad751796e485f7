"""Tiny LIMe models for the tests of this folder."""

from collections.abc import Callable

import pytest
import torch

from hf_ext.lime import LimeConfig, LimeForCausalLM


SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # large enough that attention matters and greedy choices have no ties
}


@pytest.fixture
def shape() -> dict[str, float]:
    """Options of a tiny configuration."""
    return dict(SHAPE)


@pytest.fixture
def lime() -> Callable[..., LimeForCausalLM]:
    """`lime(seed=0, attn="sdpa", **options)`: a tiny model in eval mode, the same for the same arguments."""

    def build(seed=0, attn="sdpa", **options):
        torch.manual_seed(seed)
        return LimeForCausalLM._from_config(LimeConfig(**{**SHAPE, **options}), attn_implementation=attn).eval()

    return build


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """`tokens(batch=2, length=9, seed=1)`: ids without special ones."""

    def draw(batch=2, length=9, seed=1):
        return torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))

    return draw
