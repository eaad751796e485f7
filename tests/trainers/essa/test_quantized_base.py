"""A base of 8 bits under a LoRA in full precision: the extra `quant` (torchao), which the other tests do without."""

import importlib.util
import warnings

import numpy as np
import pytest
import torch


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install hf_ext[quant]"
)


@pytest.fixture
def adapter(lora, letters, tmp_path):
    """A folder with an adapter whose base lies in another one."""
    lora(vocab_size=len(letters)).unload().save_pretrained(tmp_path / "base")
    letters.save_pretrained(tmp_path / "base")
    model = lora(vocab_size=len(letters))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    letters.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_search_runs_on_a_base_of_8_bits_and_saves_an_ordinary_adapter(adapter, prompts, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    from trainers.essa import ESSAConfig, ESSATrainer

    def wanted_first(completions, wanted, **columns):
        return [float(text[:1] == letter) for text, letter in zip(completions, wanted, strict=True)]

    args = ESSAConfig(
        output_dir=str(tmp_path / "out"),
        population_size=6,
        batch_size_per_candidate=4,
        max_steps=2,
        max_completion_length=3,
        sigma=0.3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    config = TorchAoConfig(Int8WeightOnlyConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own
        trainer = ESSATrainer(
            str(adapter), wanted_first, args, prompts(), processing_class=None, quantization_config=config
        )
    assert "Int8" in type(next(p for n, p in trainer.model.named_parameters() if "base_layer" in n)).__name__
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = trainer.model(ids).logits
        with trainer.space.candidates(np.zeros((1, trainer.space.dim)), [0]):
            spread = trainer.model(ids).logits
    torch.testing.assert_close(spread, plain, rtol=0, atol=1e-4)  # two orders of the same float32 sums
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if "lora_" in n)
    trainer.save_model(tmp_path / "found")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "found")  # on the base in full precision
    saved = {n: p for n, p in found.named_parameters() if "lora_" in n}
    for name, weight in trainer.model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(saved[name], weight, rtol=0, atol=0)
