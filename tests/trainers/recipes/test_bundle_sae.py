"""A run of the command line on two kinds of texts, bundled with its index, log and card."""

import json
import random
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.sae import FeatureIndex, SAEModel
from hf_ext.tasks import stories
from trainers.__main__ import main as train
from trainers.recipes import bundle_sae
from trainers.recipes import stories as stories_recipe
from trainers.recipes.runner import Options
from trainers.sae.cli import SAEScriptArguments, read


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model, stories, and fewer lines about sums."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "lm").mkdir()
    stories_recipe.prepare(Options("smoke"), folder / "lm")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=stories_recipe.VOCABULARY, **shape)).save_pretrained(folder / "lm")
    rng = random.Random(0)
    texts = [{"text": stories.sample(rng).text, "book": "none"} for _ in range(60)]
    (folder / "stories.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (folder / "sums.jsonl").write_text("\n".join(json.dumps({"text": f"{i} + 2 = {i + 2}"}) for i in range(20)))
    return folder


@pytest.fixture(scope="module")
def both(root):
    return f"{root / 'stories.jsonl'},{root / 'sums.jsonl'}"


@pytest.fixture(scope="module")
def trained(root, both):
    options = {
        "--model_name_or_path": root / "lm", "--dataset_name": both, "--layer": 0, "--d_sae": 64, "--k": 8,
        "--loss": "hierarchical", "--budgets": "powers_of_two", "--output_dir": root / "run", "--max_steps": 4,
        "--per_device_train_batch_size": 256, "--buffer_tokens": 1024, "--context_size": 64,
        "--eval_strategy": "steps", "--eval_steps": 2, "--eval_dataset_name": both, "--eval_tokens": 512,
        "--save_steps": 2, "--use_cpu": "true", "--disable_tqdm": "true", "--report_to": "none",
    }  # fmt: skip
    assert train(["sae", *(str(part) for pair in options.items() for part in pair)]) == 0
    return root / "run"


def test_data_sets_named_together_take_turns(both):
    script = SAEScriptArguments(model_name_or_path="lm", dataset_name=both)
    rows = read(script, both, "train", "text")
    kinds = ["=" in row["text"] for row in rows]
    assert kinds == [False, True] * 60  # the shorter one again and again
    assert len({row["text"] for row in rows}) == 60 + 20
    script = SAEScriptArguments(model_name_or_path="lm", dataset_name=both, streaming=True)
    with pytest.raises(ValueError, match="`dataset_name` must be of data sets with 'text' .* that are not streamed"):
        read(script, both, "train", "text")


def test_a_run_is_bundled_with_index_log_and_card(root, both, trained, capsys):
    with pytest.raises(SystemExit) as ended:
        bundle_sae.main(
            [str(trained), str(root / "tiny"), "--model", str(root / "lm"), "--data", both, "--rows", "12"]
        )
    assert ended.value.code == 0
    folder = root / "tiny" / "smollm2_sae"
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "config.json", "index", "model.safetensors", "training.json",
    }  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    sae = SAEModel.from_pretrained(folder, dtype="float32")
    own = load_file(trained / "model.safetensors")["W_dec"]
    assert torch.equal(sae.W_dec, own.to(torch.bfloat16).float())
    index = FeatureIndex(folder / "index")
    assert index.tensors["ids"].shape == (index.info["alive"], 8, 21)
    assert index.tensors["density"].sum().item() == pytest.approx(8, rel=1e-3)
    made_by = json.loads((folder / "training.json").read_text())
    assert [entry["step"] for entry in made_by["log"]] == [2, 4] and made_by["index_tokens"] == 12 * 256
    text = (folder / "README.md").read_text()
    assert "ev_global_at_8" in text and "raises" in text and str(root) not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('Path(tiny.__file__).with_name("smollm2_sae")', repr(folder)).replace("PosixPath", "Path")
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.startswith("[(")


def test_a_folder_without_an_sae_and_too_few_texts_are_refused(root, trained, both, tmp_path):
    with pytest.raises(ValueError, match="`run` must hold a trained SAE, got .* Train it first"):
        bundle_sae.bundle(tmp_path, tmp_path / "tiny", str(root / "lm"), ["Hello."])
    with pytest.raises(ValueError, match="`texts` must hold at least 2048 tokens, got"):
        bundle_sae.bundle(trained, tmp_path / "tiny", str(root / "lm"), ["Hello."])
    assert not (tmp_path / "tiny").exists()


def test_the_ready_file_is_what_the_issue_asks_for():
    from pathlib import Path

    import trainers.sae

    file = Path(trainers.sae.__file__).parent / "configs" / "smollm2_bundled.yaml"
    options = yaml.safe_load(file.read_text())
    wanted = {"d_sae": 4096, "k": 64, "layer": 15, "loss": "hierarchical", "model_name_or_path": "smollm2"}
    assert {name: options[name] for name in wanted} == wanted
    assert len(options["dataset_name"].split(",")) == 2
    # the trainer takes every option
    from trl import TrlParser

    from trainers.sae import SAETrainingArguments

    parsed = TrlParser((SAEScriptArguments, SAETrainingArguments)).parse_args_and_config(["--config", str(file)])
    assert parsed[1].train_tokens == options["train_tokens"] and parsed[1].budgets == "powers_of_two"
