import json
from pathlib import Path

import pytest
import torch

from trainers.__main__ import main


CONFIGS = sorted((Path(__file__).resolve().parents[3] / "trainers" / "steering_rl" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_ready_files_hold_options_that_exist_and_names_that_are_known(config):
    from trl import ModelConfig, TrlParser

    from trainers.script import ScriptArguments, reward_function
    from trainers.steering_rl import SteeringRLConfig
    from trainers.steering_rl.cli import SteeringArguments

    parser = TrlParser((ScriptArguments, SteeringArguments, SteeringRLConfig, ModelConfig))
    script, _, args, named = parser.parse_args_and_config(
        ["--config", str(config), "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    )
    assert all(callable(reward_function(name)) for name in script.reward_funcs)
    assert args.generation_batch_size % args.num_generations == 0
    assert named.model_name_or_path and not named.use_peft


@pytest.fixture
def model(letters, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "model"
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=63,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            max_position_embeddings=64,
            initializer_range=0.3,
        )  # fmt: skip
    ).save_pretrained(folder)
    letters.save_pretrained(folder)
    return folder


def test_a_command_trains_vectors_of_chosen_layers_and_goes_on(model, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"{i:02d}", "answer": "A"}) for i in range(8)))
    run = ["steering_rl", "--dataset_name", str(data), "--prompt_column", "question", "--chat", "true",
           "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--disable_tqdm", "true",
           "--model_name_or_path", str(model), "--reward_funcs", "exact_reward", "--output_dir", "steered",
           "--layers_to_transform", "0", "2", "--num_generations", "4", "--per_device_train_batch_size", "4",
           "--max_completion_length", "3", "--save_steps", "1", "--logging_steps", "1"]  # fmt: skip
    assert main([*run, "--max_steps", "2"]) == 0
    assert main([*run, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((tmp_path / "steered" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2, 3]
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "steered")
    assert list(found.get_vectors("default")) == [0, 2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset_name", "tasks:capitals"], "`reward_funcs` must be given"),
        (["--dataset_name", "tasks:capitals", "--reward_funcs", "capitals", "--use_peft", "true"], "`use_peft` makes"),
        (["--dataset_name", "tasks:capitals", "--reward_funcs", "capitals", "--positions", "last"], "`positions`"),
    ],
)
def test_bad_commands_are_answered_by_a_sentence(argv, message, capsys, tmp_path):
    options = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--model_name_or_path", "x"]
    assert main(["steering_rl", *argv, *options]) == 1
    assert message in capsys.readouterr().err
