"""A tiny masked diffusion model, its words, and texts with a rule that is easily learnt."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ext.gstar import MDLMConfig, MDLMForMaskedLM


WORDS = ["<pad>", "<eos>", "<mask>", *"abcdefghij"]


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>")


@pytest.fixture
def mdlm():
    """`mdlm(**options)`: 2 layers of 32."""

    def build(**options):
        torch.manual_seed(0)
        shape = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = {"mask_token_id": 2, "pad_token_id": 0, "eos_token_id": 1}
        return MDLMForMaskedLM(MDLMConfig(**{**shape, **ids, "hidden_dropout": 0.0, **options}))

    return build


@pytest.fixture
def rows():
    """24 rows: a word four times, of lengths 4; the first is a prompt in every other row."""
    return [{"input_ids": [3 + i % 8] * 4, "prompt_length": i % 2} for i in range(24)]
