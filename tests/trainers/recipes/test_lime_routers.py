"""The router recipe on a tiny Llama of the user's: two arms of as many numbers, and models that it refuses."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trainers.recipes import stories
from trainers.recipes.__main__ import main
from trainers.recipes.lime_routers import add_gains
from trainers.recipes.runner import Options


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    stories.prepare(Options("smoke"), folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=stories.VOCABULARY, **SHAPE)).save_pretrained(folder)
    return folder


def test_both_arms_train_as_many_numbers_from_the_same_start(model, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = (f"Mia had {i % 17} shells in the park and gave {i % 5} of them to Tom." for i in range(600))
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    work = tmp_path / "work"
    options = ["--budget", "smoke", "--model", str(model), "--text", str(text), str(text), "--work", str(work)]
    assert main(["lime_routers", *options]) == 0
    result = json.loads((work / "lime_routers/smoke/lime_routers.json").read_text())
    routers, gains = result["cells"]
    # G^2 (L (L + 1) / 2 - 1) with 4 heads and 3 layers
    assert routers["params_trained"] == gains["params_trained"] == 16 * 5
    assert routers["metrics"]["nll_before"] == gains["metrics"]["nll_before"]
    assert routers["metrics"]["drop"] != 0 != gains["metrics"]["drop"]
    assert result["model"] == "llama"  # a folder by its bare name
    assert str(tmp_path) not in json.dumps(result)


def test_gains_start_as_the_unchanged_model_and_scale_their_block():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **SHAPE)).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        gains = add_gains(model, 20)
        assert torch.equal(model(ids).logits, before)
        assert [len(gain) for gain in gains] == [10, 10]
        gains[0][3] = 1.0
        kept = {}
        hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: kept.update(x=a[0]))
        model(ids)
        hook.remove()
        gains[0][3] = 0.0
        hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: kept.update(y=a[0]))
        model(ids)
        hook.remove()
    ratio = (kept["x"] / kept["y"])[0].mean(0)
    # 32 channels in 10 blocks: the fourth holds channels 10 to 12
    expected = torch.ones(32)
    expected[10:13] = 2
    torch.testing.assert_close(ratio, expected)


def test_a_model_of_another_family_is_refused_before_anything_runs(tmp_path, capsys):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)).save_pretrained(tmp_path / "gpt2")
    options = ["--model", str(tmp_path / "gpt2"), "--work", str(tmp_path / "work")]
    assert main(["lime_routers", *options]) == 1
    assert "`config` must be of a Llama-like model" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
