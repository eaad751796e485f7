"""A tiny language model, texts for it, and a trainer on both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ext import SAEConfig
from trainers.sae import SAETrainer, SAETrainingArguments


D = 16
HOOK = "model.layers.1"


@pytest.fixture(scope="session")
def lm() -> LlamaForCausalLM:
    """Three layers of width 16, large enough weights that activations differ."""
    torch.manual_seed(0)
    shape = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.3, **shape)).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and an end token."""
    vocabulary = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<end>")


@pytest.fixture(scope="session")
def texts() -> list[dict[str, str]]:
    """Rows of some words each."""
    words = [
        "one",
        "two",
        "three",
        "small",
        "red",
        "bird",
        "sees",
        "the",
        "big",
        "dog",
        "run",
        "home",
        "and",
        "sleeps",
    ]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (40, 12), generator=generator).tolist()
    return [{"text": " ".join(words[i] for i in row)} for row in picks]


@pytest.fixture
def config() -> Callable[..., SAEConfig]:
    """`config(**options)`: 48 latents of which 4 are active, at the output of the second layer."""

    def build(**options: Any) -> SAEConfig:
        return SAEConfig(**{"d_in": D, "d_sae": 48, "k": 4, "hook_name": HOOK, **options})

    return build


@pytest.fixture
def arguments(tmp_path) -> Callable[..., SAETrainingArguments]:
    """`arguments(**options)`: 10 steps of 64 tokens, rows of 32, a buffer of 256."""

    def build(**options: Any) -> SAETrainingArguments:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 10,
            "per_device_train_batch_size": 64,
            "context_size": 32,
            "rows_at_once": 3,
            "buffer_tokens": 256,
            "learning_rate": 3e-3,
            "logging_steps": 5,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        if "train_tokens" in options or "num_train_epochs" in options:
            del defaults["max_steps"]
        return SAETrainingArguments(**{**defaults, **options})

    return build


@pytest.fixture
def trainer(lm, tokenizer, texts, config, arguments) -> Callable[..., SAETrainer]:
    """`trainer(sae=None, data=None, more=None, **options)`: options are those of the arguments."""

    def build(sae=None, data=None, more=None, **options):
        given = {"model": lm, "processing_class": tokenizer, "train_dataset": texts if data is None else data}
        return SAETrainer(**{**given, "sae": sae or config(), "args": arguments(**options), **(more or {})})

    return build
