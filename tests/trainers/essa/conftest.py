import random

import numpy as np
import pytest
import torch


@pytest.fixture
def lora():
    """`make(**options)`: a tiny Llama with a trained-like LoRA (B is not 0), in evaluation mode."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed=0, r=4, targets=("q_proj", "k_proj", "v_proj", "o_proj"), zero_b=False, vocab_size=64, **options):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=vocab_size, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=128,
            initializer_range=0.3,
        )  # fmt: skip
        model = get_peft_model(
            LlamaForCausalLM(config), LoraConfig(r=r, lora_alpha=8, target_modules=list(targets), **options)
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name and not zero_b:
                torch.nn.init.normal_(weight, std=0.2)
        return model.eval()

    return make


@pytest.fixture
def prompts():
    """`make(count)`: rows with a prompt of 2 to 9 characters and a column `wanted`."""

    def make(count=12, seed=0):
        rng = random.Random(seed)
        return [
            {"prompt": "".join(rng.choices("ABCDEFGH", k=rng.randint(2, 9))), "wanted": rng.choice("ABCDEFGH")}
            for _ in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def run():
    """`run(strategy, generations)`: with ties, lost candidates, generations that say nothing; gives the strategy."""

    def go(strategy, generations):
        """Noisy fitness with ties and lost candidates, and generations that say nothing; returns the strategy."""
        for _ in range(generations):
            rng = np.random.default_rng(strategy.generation)
            costs = (np.logspace(0, 2, strategy.dim) * (strategy.ask() - 1) ** 2).sum(-1)
            fitness = -np.round(costs + rng.normal(size=strategy.population_size))
            if strategy.generation % 3 == 1:
                fitness[rng.integers(strategy.population_size)] = np.nan
            strategy.tell(np.zeros_like(fitness) if strategy.generation % 4 == 2 else fitness)
        return strategy

    return go


@pytest.fixture(scope="session")
def assert_same():
    """`assert_same(a, b, ignore=())`: two strategies are in one state, to the bit."""

    def check(a, b, ignore=()):
        (settings_a, arrays_a), (settings_b, arrays_b) = a.state_dict(), b.state_dict()
        assert settings_a == settings_b
        assert arrays_a.keys() == arrays_b.keys()
        for key in arrays_a.keys() - set(ignore):
            assert np.array_equal(arrays_a[key], arrays_b[key], equal_nan=True), key

    return check
