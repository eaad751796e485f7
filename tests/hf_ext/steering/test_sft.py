"""Plain TRL: `SFTTrainer(peft_config=SteeringConfig())` trains vectors, saves the same format, and resumes."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from hf_ext import SteeringConfig
from hf_ext.steering import read_vectors


@pytest.fixture(scope="module")
def rows():
    """Tokens with a pattern: after an even one comes the next."""
    generator = torch.Generator().manual_seed(1)
    starts = 2 * torch.randint(1, 29, (16, 6), generator=generator)
    ids = torch.stack((starts, starts + 1), -1).flatten(1)
    return Dataset.from_list([{"input_ids": row.tolist(), "completion_mask": [0] * 4 + [1] * 8} for row in ids])


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(61)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), pad_token="w0", eos_token="w1"
    )


def trainer(model, rows, tokenizer, folder, config, **options):
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "completion_only_loss": True,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **{**settings, **options}),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=config,
    )


@pytest.mark.parametrize("positions", ["all", "completion"])
def test_sft_trains_the_vectors_alone_and_saves_the_format_of_the_adapter(
    positions, tiny_model, rows, tokenizer, tmp_path
):
    base = tiny_model("llama")
    config = SteeringConfig(task_type="CAUSAL_LM", positions=positions)
    # gradient checkpointing is TRL's default
    run = trainer(copy.deepcopy(base), rows, tokenizer, tmp_path / "run", config)
    assert run.args.gradient_checkpointing
    frozen = {name: p.clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = dict(run.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    run.save_model(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 3 and all(tensor.shape == (32,) and tensor.abs().min() > 0 for tensor in saved.values())
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    trained = run.model.get_vectors()
    assert all(torch.equal(again.get_vectors()[layer], vector) for layer, vector in trained.items())
    # no twin in a checkpoint, where Trainer would take it for a second adapter of the model
    assert (tmp_path / "adapter" / "beft").is_dir() == (positions == "all")
    assert not (tmp_path / "run" / "checkpoint-3" / "beft").exists()
    found = read_vectors(tmp_path / "adapter")
    assert all(torch.equal(found[layer], trained[layer]) for layer in trained)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tiny_model, rows, tokenizer, tmp_path):
    def vectors(folder, **options):
        run = trainer(tiny_model("llama"), rows, tokenizer, folder, SteeringConfig(task_type="CAUSAL_LM"))
        run.train(**options)
        return run.model.get_vectors()

    whole = vectors(tmp_path / "run")
    resumed = vectors(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert all(torch.equal(resumed[layer], whole[layer]) for layer in whole)
