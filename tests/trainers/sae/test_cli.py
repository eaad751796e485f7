"""One command trains, resumes and saves; a ready file holds options that exist; what is wrong is one sentence."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from hf_ext import SAEModel
from trainers.__main__ import main


CONFIGS = sorted((Path(__file__).resolve().parents[3] / "trainers" / "sae" / "configs").glob("*.yaml"))


@pytest.fixture
def place(lm, tokenizer, texts, tmp_path, monkeypatch):
    """A working folder with a model and data."""
    monkeypatch.chdir(tmp_path)
    lm.save_pretrained("lm"), tokenizer.save_pretrained("lm")
    Path("data.jsonl").write_text("\n".join(json.dumps(row) for row in texts))
    Path("texts").mkdir()
    for i, row in enumerate(texts[:8]):
        Path("texts", f"{i}.txt").write_text(row["text"])
    return tmp_path


COMMON = {
    "model_name_or_path": "lm",
    "dataset_name": "data.jsonl",
    "output_dir": "out",
    "max_steps": 4,
    "per_device_train_batch_size": 64,
    "buffer_tokens": 128,
    "context_size": 32,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def run(*more, **options):
    Path("run.yaml").write_text(yaml.safe_dump({**COMMON, **options}))
    return main(["sae", "--config", "run.yaml", *more])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_ready_files_hold_options_that_exist(config):
    from trl import TrlParser

    from trainers.sae import SAETrainingArguments
    from trainers.sae.cli import SAEScriptArguments

    script, args = TrlParser((SAEScriptArguments, SAETrainingArguments)).parse_args_and_config(
        ["--config", str(config)]
    )
    assert script.layer is not None and args.train_tokens


def test_a_command_trains_goes_on_and_saves_what_loads(place):
    options = {"layer": 1, "d_sae": 48, "k": 4, "loss": "hierarchical"}
    assert run(**options, save_steps=2, save_strategy="steps") == 0
    first = SAEModel.from_pretrained("out/checkpoint-4")
    assert (first.config.d_in, first.config.k, first.config.hook_name) == (16, 4, "model.layers.1")
    assert (
        run("--max_steps", "6", "--resume_from_checkpoint", "true", layer=1, d_sae=48, k=4, loss="hierarchical") == 0
    )
    again = SAEModel.from_pretrained("out")
    assert not torch.equal(again.W_dec, first.W_dec)
    assert "| sae | model.layers.1 (output) | topk | 16 | 48 | 4 |" in Path("out/README.md").read_text()


def test_a_file_describes_several_saes_by_layer_site_or_path(place):
    saes = {
        "mlp": {"layer": -1, "site": "mlp_out", "k": 2},
        "batch": {"hook_name": "model.layers.0", "activation": "batchtopk", "k": 3.5},
    }
    options = {"saes": saes, "d_sae": 40, "eval_strategy": "steps", "eval_steps": 4, "dataset_name": "texts"}
    assert run(**options, eval_dataset_name="data.jsonl") == 0
    mlp, batch = (SAEModel.from_pretrained("out", subfolder=name) for name in ("mlp", "batch"))
    assert (mlp.config.hook_name, mlp.config.k, mlp.config.d_sae) == ("model.layers.2.mlp", 2, 40)
    assert (batch.config.activation, batch.config.k) == ("batchtopk", 3.5)
    assert batch.threshold > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`layer` or `hook_name` must be given for 'sae', and not both, got None and None"),
        ({"layer": 1, "hook_name": "model.layers.1"}, "and not both, got 1"),
        ({"layer": 9}, r"`layer` must be in \[-3, 2\], got 9"),
        ({"layer": 1, "site": "middle"}, "`site` must be one of resid_pre"),
        ({"layer": 1, "dataset_name": "run.yaml"}, "`dataset_name` must hold files of one kind of .txt"),
        ({"layer": 1, "dataset_text_field": "body"}, "`dataset_text_field` must be one of text.*got 'body'"),
        ({"layer": 1, "saes": {"a": 3}}, "`saes` must map names to options"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(options, message, place, capsys):
    import re

    assert run(**options) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said


def test_stories_are_texts_of_their_own_for_training_and_evaluation():
    from trainers.sae.cli import SAEScriptArguments, read

    script = SAEScriptArguments(model_name_or_path="lm", dataset_name="tasks:stories")
    held_out = read(script, "tasks:stories", "test", "text")
    assert len(held_out) == 500
    assert len(held_out[0]["text"].split()) > 20
    # a story is drawn from so many that two seeds share none
    assert not {row["text"] for row in held_out} & {
        row["text"] for row in read(script, "tasks:stories", "train", "text")
    }
