"""Two commands make a masked diffusion model and its predictor; ready files hold options that exist."""

import json
from pathlib import Path

import pytest
import yaml

from hf_ext import ErrorPredictor, GStarPipeline, MDLMForMaskedLM, StarShapedScheduler
from trainers.__main__ import main


ROOT = Path(__file__).resolve().parents[3] / "trainers"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16}
COMMON = {
    "dataset_name": "data.jsonl",
    "max_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "eval_strategy": "steps",
    "eval_steps": 1,
}


def run(method, **options):
    Path("run.yaml").write_text(yaml.safe_dump({**COMMON, "eval_dataset_name": "data.jsonl", **options}))
    return main([method, "--config", "run.yaml"])


def test_ready_files_hold_options_that_exist():
    from trl import TrlParser

    from trainers.error_predictor.cli import ErrorPredictorScriptArguments
    from trainers.error_predictor.error_predictor_config import ErrorPredictorTrainingArguments
    from trainers.mdlm.cli import MDLMScriptArguments
    from trainers.mdlm.mdlm_config import MDLMTrainingArguments

    parsers = {
        "mdlm": TrlParser((MDLMScriptArguments, MDLMTrainingArguments)),
        "error_predictor": TrlParser((ErrorPredictorScriptArguments, ErrorPredictorTrainingArguments)),
    }
    for method, parser in parsers.items():
        for path in sorted((ROOT / method / "configs").glob("*.yaml")):
            script, args = parser.parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
            assert script.dataset_name == "tasks:stories" and args.max_steps > 0


def test_two_commands_make_a_pipeline(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("words")
    Path("data.jsonl").write_text("\n".join(json.dumps({"text": "a b c d e"}) for _ in range(16)))
    assert run("mdlm", tokenizer_name_or_path="words", model=SHAPE, output_dir="lm") == 0
    model = MDLMForMaskedLM.from_pretrained("lm")
    assert model.config.mask_token_id == 2 and model.config.vocab_size == 13 and Path("lm/README.md").is_file()
    assert run("error_predictor", denoiser_name_or_path="lm", num_layers=1, output_dir="predictor") == 0
    predictor = ErrorPredictor.from_pretrained("predictor")
    assert predictor.config.base_config["num_hidden_layers"] == 1
    said = capsys.readouterr().out
    assert "eval_perplexity" in said and "eval_auc" in said
    pipe = GStarPipeline(model, StarShapedScheduler(), tokenizer, predictor)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(gen_length=5, num_inference_steps=4).sequences.shape == (1, 5)


def test_what_is_wrong_is_one_sentence(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("words")
    Path("data.jsonl").write_text(json.dumps({"words": "a b c d e"}))
    assert run("mdlm", tokenizer_name_or_path="words", output_dir="lm") == 1
    assert "Give either `model`, options of a new one, or `model_name_or_path`" in capsys.readouterr().err
    assert run("mdlm", tokenizer_name_or_path="words", model=SHAPE, output_dir="lm") == 1
    assert (
        "`dataset_text_field` must be one of words, the columns of data.jsonl, got 'text'" in capsys.readouterr().err
    )


@pytest.mark.parametrize("mask_token", ["<mask>", None])
def test_a_tokenizer_without_a_mask_gets_one_more_token(mask_token, tokenizer):
    from trainers.mdlm.cli import vocabulary

    if mask_token is None:
        tokenizer.mask_token = None
    found = vocabulary(tokenizer)
    assert (found["vocab_size"], found["mask_token_id"]) == ((13, 2) if mask_token else (14, 13))
