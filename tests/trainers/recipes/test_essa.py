"""The recipes of ESSA at their smallest, and the parts that their figures stand on."""

import json

import pytest
import torch

from trainers.recipes import essa, essa_smollm2, stories
from trainers.recipes.__main__ import main
from trainers.recipes.runner import Options


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return lambda: essa.start(0, 2, False, folder)


def test_every_arm_of_a_seed_starts_from_the_same_lora(start):
    (one, _), (other, _) = start(), start()
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name


def test_grpo_on_singular_values_starts_as_the_lora_and_trains_what_essa_searches(start):
    from trainers.essa import SvdLora

    model, _ = start()
    searched = SvdLora(model).dim
    ids = torch.tensor([[2, 3, 12, 4, 5, 13]])
    with torch.no_grad():
        before = model(ids).logits
        essa.train_singular_values(model)
        assert torch.equal(model(ids).logits, before)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) == searched == 3 * 4 * 2 * 4
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in trained)


def test_weights_of_8_bits_are_within_half_a_step_of_their_output_channel(start):
    model = start()[0].get_base_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    essa.round_to_int8(model)
    weight, old = (found["model.layers.0.mlp.up_proj.weight"] for found in (dict(model.named_parameters()), before))
    step = old.abs().amax(1, keepdim=True) / 127
    assert ((weight - old).abs() <= step / 2 * 1.001).all()  # float32
    assert max(len(row.unique()) for row in weight) <= 255 and not torch.equal(weight, old)


def test_held_out_sums_are_never_trained_on_and_answers_are_right():
    train, held_out = (essa.problems(0, 3000, held_out=side) for side in (False, True))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    for row in train[:50] + held_out[:50]:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(row["answer"]) == int(a) + int(b) and len(row["answer"]) == 3


def test_the_recipe_runs_every_kind_of_arm_and_answers_its_claims(tmp_path):
    assert main(["essa", "--budget", "smoke", "--work", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "essa/smoke/essa.json").read_text())
    assert [cell["status"] for cell in result["cells"]] == ["done"] * 3
    assert len({cell["metrics"]["accuracy_start"] for cell in result["cells"]}) == 1
    assert all(cell["cost"]["completions"] == 1200 for cell in result["cells"])
    assert all(0 < cell["metrics"]["generated_tokens"] <= 4 * 1200 for cell in result["cells"])
    claims = {claim["id"] for claim in result["claims"]}
    assert claims == {f"essa_{name}" for name in
                      ("within_5_of_grpo", "beats_random", "int8_keeps_gain", "data_efficiency")}  # fmt: skip


def test_the_recipe_of_a_real_model_runs_on_the_users_and_shares_no_word(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "llama"
    folder.mkdir()
    stories.prepare(Options("smoke"), folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=stories.VOCABULARY, eos_token_id=2, **shape)).save_pretrained(folder)
    assert main(["essa_smollm2", "--budget", "smoke", "--model", str(folder), "--work", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "essa_smollm2/smoke/essa_smollm2.json").read_text())
    assert [cell["status"] for cell in result["cells"]] == ["done", "done"]
    known, asked = essa_smollm2.words(0, 100)
    assert not {row["answer"] for row in known} & {row["answer"] for row in asked}
