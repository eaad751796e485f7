import json
from pathlib import Path

import pytest
import torch

from trainers.__main__ import main


CONFIGS = sorted((Path(__file__).resolve().parents[3] / "trainers" / "essa" / "configs").glob("*.yaml"))


@pytest.fixture
def model(lora, letters, tmp_path):
    folder = tmp_path / "model"
    lora().unload().save_pretrained(folder)
    letters.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"{i:02d}", "answer": "A"}) for i in range(40)))
    return file


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_ready_files_hold_options_that_exist_and_names_that_are_known(config):
    from trl import ModelConfig, SFTConfig, TrlParser

    from trainers.essa import ESSAConfig
    from trainers.script import ScriptArguments, reward_function

    kind = SFTConfig if config.stem.endswith("_sft") else ESSAConfig
    script, args, named = TrlParser((ScriptArguments, kind, ModelConfig)).parse_args_and_config(
        ["--config", str(config), "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    )
    assert all(callable(reward_function(name)) for name in script.reward_funcs)
    assert named.use_peft == config.stem.endswith("_sft")
    # a search starts from what the file beside it leaves
    if not named.use_peft:
        before = config.with_name(config.name.replace("_essa", "_sft")).read_text()
        assert f"output_dir: {named.model_name_or_path}" in before


def test_two_commands_lead_from_a_plain_model_to_a_searched_adapter(model, data, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    shared = ["--dataset_name", str(data), "--prompt_column", "question", "--chat", "true", "--use_cpu", "true",
              "--report_to", "none", "--disable_tqdm", "true", "--bf16", "false"]  # fmt: skip
    assert main(["sft", *shared, "--model_name_or_path", str(model), "--use_peft", "true", "--lora_r", "2",
                 "--lora_target_modules", "q_proj", "v_proj", "--output_dir", "sft", "--max_steps", "2",
                 "--per_device_train_batch_size", "4", "--gradient_checkpointing", "false"]) == 0  # fmt: skip
    run = ["essa", *shared, "--model_name_or_path", "sft", "--reward_funcs", "exact_reward", "--output_dir", "essa",
           "--population_size", "4", "--batch_size_per_candidate", "5", "--max_completion_length", "3",
           "--sigma", "0.3", "--eval_strategy", "steps", "--eval_steps", "2", "--max_eval_samples", "6"]  # fmt: skip
    assert main([*run, "--max_steps", "2"]) == 0
    assert main([*run, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((tmp_path / "essa" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2, 3]
    assert "| population_size | 4 |" in (tmp_path / "essa" / "README.md").read_text()
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "essa")
    assert isinstance(found(torch.tensor([[5, 6]])).logits, torch.Tensor)


@pytest.mark.parametrize("task", ["capitals", "json_sum", "word_problems"])
def test_a_task_is_evaluated_on_questions_that_no_search_saw(task):
    from trainers.script import task_rows

    train, asked = ({row["prompt"][-1]["content"] for row in task_rows(task, side, None)} for side in (False, True))
    assert not train & asked and len(train) > 100 and len(asked) > 50
    assert len(task_rows(task, False, 7)) == len(task_rows(task, True, 7)) == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["esa"], "got esa. Did you mean essa?"),
        (["essa", "--dataset_name", "tasks:capitals"], "`reward_funcs` must be given"),
        (
            ["essa", "--dataset_name", "tasks:sums", "--reward_funcs", "capitals", "--model_name_or_path", "x"],
            "tasks:capitals",
        ),
        (["essa", "--dataset_name", "tasks:capitals", "--reward_funcs", "capitls"], "must be of capitals, json_sum"),
        (["sft", "--dataset_name", "tasks:capitals", "--model_name_or_path", "x"], "`use_peft` must be true"),
    ],
)
def test_bad_commands_are_answered_by_a_sentence(argv, message, capsys, tmp_path):
    options = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    assert main([*argv, *options] if len(argv) > 1 else argv) > 0
    assert message in capsys.readouterr().err


def test_a_column_that_is_not_there_is_named_with_those_that_are(model, data, capsys, tmp_path):
    asked = ["essa", "--dataset_name", str(data), "--reward_funcs", "exact_reward", "--model_name_or_path", str(model)]
    assert main([*asked, "--output_dir", str(tmp_path), "--use_cpu", "true"]) == 1
    assert "`prompt_column` must be one of question, answer" in capsys.readouterr().err
