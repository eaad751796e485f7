"""Tiny models of every family that hf_ext.sites knows, with random weights: the real classes, a millisecond's work."""

import pytest


SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2_SHAPE = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
QWEN_VL_TEXT = SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "window_size": 8,
    "fullatt_block_indexes": [0],
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
OPTIONS = {
    "gemma2": SHAPE | {"head_dim": 8},
    "gemma3": {"text_config": SHAPE | {"head_dim": 8}, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
    "gemma3_text": SHAPE | {"head_dim": 8},
    "gpt2": GPT2_SHAPE | {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
    "mixtral": SHAPE | MOE,
    "qwen2_5_vl": {"text_config": QWEN_VL_TEXT, "vision_config": QWEN_VISION},
    "qwen2_5_vl_text": QWEN_VL_TEXT,
    "qwen3": SHAPE | {"head_dim": 16},
    "qwen3_moe": SHAPE | {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="session")
def tiny_model():
    """`tiny_model(model_type, **options)`: a model in evaluation mode, every parameter random; 3 layers of 32.

    A new one at each call, with the same numbers.
    """
    import torch
    import transformers

    import hf_ext  # noqa: F401  registers "lime"

    autos = {"qwen2_5_vl": transformers.AutoModelForImageTextToText, "qwen2_5_vl_text": transformers.AutoModel}

    def make(model_type, **options):
        config = transformers.AutoConfig.for_model(model_type, **{**OPTIONS.get(model_type, SHAPE), **options})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = autos.get(model_type, transformers.AutoModelForCausalLM).from_config(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            # biases and norms too, which start as constants
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return make
