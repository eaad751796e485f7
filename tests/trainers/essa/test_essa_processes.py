"""Kills, several processes, the Hub, and loading where hf_ext is absent: all in processes of their own."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file


# builds the same tiny model and run in any process; argv: a JSON of ESSAConfig options and of what else to do
SCRIPT = """
import json, sys, torch
asked = json.loads(sys.argv[1])
torch.set_num_threads(1)
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trainers.essa import ESSAConfig, ESSATrainer

letters = {t: i for i, t in enumerate(["<pad>", "<end>", *map(chr, range(48, 108)), "<unk>"])}
raw = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=0,
    eos_token_id=1, bos_token_id=None, max_position_embeddings=64, initializer_range=0.3))
if asked.get("base"):
    base.save_pretrained(asked["base"])
    base = LlamaForCausalLM.from_pretrained(asked["base"])
model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
for name, weight in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight, std=0.3)

def share_of_capitals(completions, **columns):
    return [sum("A" <= letter <= "Z" for letter in text) / 5 for text in completions]

rows = [{"prompt": f"{i:02d}"} for i in range(40)]
args = {"population_size": 8, "batch_size_per_candidate": 5, "sigma": 0.3, "max_completion_length": 5, "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1, "temperature": 1.0, "report_to": "none"}
trainer = ESSATrainer(model, share_of_capitals, ESSAConfig(**args | asked["args"]), rows, processing_class=tokenizer)
trainer.train(resume_from_checkpoint=asked.get("resume"))
if asked.get("push"):
    trainer.push_to_hub(dataset_name="numbers")
    print(trainer.hub_model_id)
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "run.py"
    file.write_text(SCRIPT, encoding="utf-8")
    return file


def command(script, output_dir, max_steps=6, resume=None, launcher=(), **more):
    args = {"output_dir": str(output_dir), "max_steps": max_steps, **more.pop("args", {})}
    asked = json.dumps({"args": args, "resume": resume, **more})
    return [*(launcher or [sys.executable]), str(script), asked]


def result(output_dir, step):
    folder = output_dir / f"checkpoint-{step}"
    state = json.loads((folder / "trainer_state.json").read_text())
    kept = [
        {key: value for key, value in entry.items() if "second" not in key and "runtime" not in key}
        for entry in state["log_history"]
    ]
    return load_file(folder / "strategy.safetensors"), load_file(folder / "adapter_model.safetensors"), kept


def equal(one, other):
    assert one[2] == other[2]
    for mine, theirs in zip(one[:2], other[:2], strict=True):
        assert mine.keys() == theirs.keys()
        for name, array in mine.items():
            assert np.array_equal(array, theirs[name]), name


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_a_random_moment_ends_as_one_that_was_not(script, tmp_path, seed):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(script, whole, 12), check=True, capture_output=True, timeout=120)
    # saves take most of these short generations, so about half of the kills fall into one
    process = subprocess.Popen(command(script, killed, 12), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (killed / "checkpoint-2").is_dir() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-12").is_dir(), "the run had ended before it was killed"
    resumed = subprocess.run(command(script, killed, 12, resume=True), capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    equal(result(whole, 12), result(killed, 12))
    assert not list(killed.glob(".checkpoint-*"))


def test_a_half_written_checkpoint_is_not_taken_for_one(script, tmp_path):
    subprocess.run(command(script, tmp_path / "run", 2), check=True, capture_output=True, timeout=120)
    part = tmp_path / "run" / ".checkpoint-9.part"
    part.mkdir()
    (part / "trainer_state.json").write_text("{")
    done = subprocess.run(
        command(script, tmp_path / "run", 3, resume=True), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not part.exists() and (tmp_path / "run" / "checkpoint-3").is_dir()


def test_two_processes_compute_what_one_does(script, tmp_path):
    together = {"args": {"max_concurrent_sequences": 10}}
    subprocess.run(command(script, tmp_path / "one", 4, **together), check=True, capture_output=True, timeout=120)
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--main_process_port", "0", "--mixed_precision", "no",
    ]  # fmt: skip
    together = {"args": {"max_concurrent_sequences": 10}}
    done = subprocess.run(
        command(script, tmp_path / "two", 4, launcher=launcher, **together),
        capture_output=True, text=True, timeout=240, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    equal(result(tmp_path / "one", 4), result(tmp_path / "two", 4))


def test_the_pushed_adapter_has_its_card_and_loads_in_plain_peft(script, tmp_path, loopback_hub, run_python):
    env = {name: value for name, value in {**os.environ, **loopback_hub.env}.items() if value is not None}
    asked = command(
        script, tmp_path / "essa-capitals", 2, base=str(tmp_path / "base"), push=True,
        args={"push_to_hub": True, "hub_model_id": "tester/essa-capitals", "hub_strategy": "end"},
    )  # fmt: skip
    done = subprocess.run(
        asked, capture_output=True, text=True, timeout=120, env={**env, "HF_HOME": str(tmp_path / "home")}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = run_python(
        f"""
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained({str(tmp_path / "base")!r}), "tester/essa-capitals")
AutoTokenizer.from_pretrained("tester/essa-capitals")
card = ModelCard.load("tester/essa-capitals")
print(card.data.library_name, "essa" in card.data.tags, "numbers" in card.text, "population_size | 8" in card.text)
print(float(model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.sum()))
""",
        env=loopback_hub.env,
    ).splitlines()
    assert seen[-2] == "peft True True True"
    saved = load_file(tmp_path / "essa-capitals" / "adapter_model.safetensors")
    name = next(name for name in saved if "layers.0" in name and "q_proj.lora_A" in name)
    assert float(seen[-1]) == pytest.approx(float(saved[name].sum()), rel=1e-5)
