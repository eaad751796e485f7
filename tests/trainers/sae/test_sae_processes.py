"""Two processes learn what one with twice the batch does, and a killed run goes on: all in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file


# the same tiny model, SAEs and texts in any process, in float64; argv: a JSON of options
SCRIPT = """
import json, sys, torch
asked = json.loads(sys.argv[1])
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from hf_ext import SAEConfig, SAEModel
from trainers.sae import SAETrainer, SAETrainingArguments

torch.manual_seed(0)
shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
lm = LlamaForCausalLM(LlamaConfig(vocab_size=60, initializer_range=0.3, **shape)).double()
options = dict(topk=dict(k=4), jump=dict(activation="jumprelu", jump_threshold=0.1, jump_bandwidth=0.1))
saes = {
    name: SAEModel(SAEConfig(d_in=16, d_sae=48, hook_name="model.layers.0", **own)).double()
    for name, own in options.items()
}
texts = [{"input_ids": torch.randint(1, 60, (50,)).tolist()} for _ in range(30)]
args = dict(max_steps=12, context_size=16, rows_at_once=2, buffer_tokens=256, learning_rate=3e-3, logging_steps=4,
            seed=1, sparsity_coefficient=0.01, dead_after_tokens=64, save_steps=4, use_cpu=True, disable_tqdm=True,
            report_to="none")
SAETrainer(lm, saes, SAETrainingArguments(**(args | asked["args"])), texts).train(
    resume_from_checkpoint=asked.get("resume"))
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "run.py"
    file.write_text(SCRIPT, encoding="utf-8")
    return file


def command(script, output_dir, launcher=(), resume=None, **args):
    asked = json.dumps({"args": {"output_dir": str(output_dir), **args}, "resume": resume})
    return [*(launcher or [sys.executable]), str(script), asked]


def run(asked):
    done = subprocess.run(asked, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def result(folder):
    weights = {name: load_file(folder / name / "model.safetensors") for name in ("topk", "jump")}
    state = load_file(folder / "sae_state.safetensors")
    since = {name: tensor for name, tensor in state.items() if name.startswith("since.")}
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return weights, since, [{k: v for k, v in e.items() if "fvu" in k or k == "loss"} for e in log]


def test_two_processes_learn_what_one_with_twice_the_batch_does(script, tmp_path):
    two = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
           "--main_process_port", "0", "--mixed_precision", "no"]  # fmt: skip
    run(command(script, tmp_path / "one", per_device_train_batch_size=64))
    run(command(script, tmp_path / "two", two, per_device_train_batch_size=32))
    one, since, log = result(tmp_path / "one" / "checkpoint-12")
    other, other_since, other_log = result(tmp_path / "two" / "checkpoint-12")
    for name, weights in one.items():
        for key, tensor in weights.items():
            # float64: sums over the batch in two halves, through 12 steps of Adam
            torch.testing.assert_close(other[name][key], tensor, rtol=1e-7, atol=1e-9)
    for name, tensor in since.items():
        assert torch.equal(other_since[name], tensor)
    assert len(log) == len(other_log) == 3
    for mine, theirs in zip(log, other_log, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)  # losses are summed in float32 for the log


def test_a_run_that_is_killed_goes_on_to_the_same_bits(script, tmp_path):
    options = {"per_device_train_batch_size": 64, "max_steps": 200}
    run(command(script, tmp_path / "straight", **options))
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(script, killed, **options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not (killed / "checkpoint-8").is_dir():
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-200").exists()
    run(command(script, killed, resume=True, **options))
    one, since, _ = result(tmp_path / "straight" / "checkpoint-200")
    other, other_since, _ = result(killed / "checkpoint-200")
    for name, weights in one.items():
        for key, tensor in weights.items():
            assert torch.equal(other[name][key], tensor), (name, key)
    for name, tensor in since.items():
        assert torch.equal(other_since[name], tensor)
    assert not list(killed.glob(".*part"))
