"""What a user may get wrong with the adapter: refused with a sentence, before anything is changed or computed."""

import copy
import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_ext import SteeringConfig


IDS = torch.randint(2, 61, (2, 6), generator=torch.Generator().manual_seed(1))


def refuses(error, *parts):
    """The parts of a message, in this order."""
    return pytest.raises(error, match=".*".join(map(re.escape, parts)))


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"positions": "last"}, ValueError, ["`positions` must be one of all, first, completion, got 'last'"]),
        ({"placement": ""}, ValueError, ["`placement` must be", "got ''"]),
        ({"placement": None}, ValueError, ["`placement` must be", "got None"]),
        ({"scale": "2"}, TypeError, ["`scale` must be a number, got '2'"]),
        ({"scale": float("nan")}, ValueError, ["`scale` must be finite, got nan"]),
        ({"scale": True}, TypeError, ["`scale` must be a number, got True"]),
        ({"layers_to_transform": 1.0}, TypeError, ["`layers_to_transform` must hold integers, got 1.0"]),
        ({"layers_to_transform": ["1"]}, TypeError, ["`layers_to_transform` must hold integers, got '1'"]),
        ({"layers_to_transform": []}, ValueError, ["`layers_to_transform` must name a layer or be None for all"]),
        (
            {"placement": "mlp", "target_modules": ["mlp"]},
            ValueError,
            ["`target_modules` and `placement` must not both be given"],
        ),
        ({"task_type": "LM"}, ValueError, ["Invalid task type: 'LM'"]),
        ({"placment": "residual"}, TypeError, ["placment"]),
    ],
)
def test_options_without_a_meaning_are_refused(options, error, parts):
    with refuses(error, *parts):
        SteeringConfig(**options)


@pytest.mark.parametrize(
    ("model_type", "options", "parts"),
    [
        ("llama", {"layers_to_transform": 3}, ["must hold numbers in [-3, 2], got [3]", "The model has 3 layers"]),
        ("llama", {"layers_to_transform": [0, -4]}, ["got [-4]"]),
        ("llama", {"placement": "mlp.donw_proj"}, ["there is no model.layers.0.mlp.donw_proj", "mlp.down_proj"]),
        ("gpt2", {"placement": "down_proj"}, ["no transformer.h.0.mlp.down_proj", 'placement="residual" is']),
        ("mixtral", {"placement": "down_proj"}, ["no model.layers.0.mlp.down_proj"]),
        ("llama", {"target_modules": ["nothing"]}, ["`target_modules` must match a module, got ['nothing']"]),
        (
            "llama",
            {"placement": "model.layers.1.mlp", "layers_to_transform": 2},
            ["`layers_to_transform` must be None where `placement` names one module"],
        ),
    ],
)
def test_places_that_the_model_lacks_are_refused_and_it_stays_as_it_was(model_type, options, parts, tiny_model):
    model = tiny_model(model_type)
    before = list(model.state_dict())
    with refuses(ValueError, *parts):
        get_peft_model(model, SteeringConfig(**options))
    assert list(model.state_dict()) == before
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_family_outside_the_table_is_told_to_name_a_path():
    import transformers

    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2))
    with refuses(ValueError, "`placement` must be the path of a module", "'bloom'", "mlp.down_proj"):
        get_peft_model(model, SteeringConfig())
    with refuses(ValueError, "`placement` must be the path of a module, got 'mlp.dense_4h_to_d'", "dense_4h_to_h"):
        get_peft_model(model, SteeringConfig(placement="mlp.dense_4h_to_d"))


def test_a_place_of_another_width_is_named_in_the_forward(tiny_model):
    model = get_peft_model(tiny_model("llama"), SteeringConfig(placement="mlp.act_fn"))
    with refuses(ValueError, "`placement` must be a module whose output has the model's width, 32, got 48"):
        model(IDS)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"hidden_size": 64}, ["`hidden_size` of the adapter must be the base model's, 64, got 32"]),
        ({"num_hidden_layers": 2}, ["`num_hidden_layers` of the adapter must be the base model's, 2, got 3"]),
        ({"num_hidden_layers": 4}, ["base model's, 4, got 3", "made for a llama with 3 layers of width 32"]),
    ],
)
def test_an_adapter_of_another_width_or_depth_is_refused(options, parts, steer, tiny_model, tmp_path):
    _, model, _ = steer()
    model.save_pretrained(tmp_path)
    with refuses(ValueError, *parts):
        PeftModel.from_pretrained(tiny_model("llama", **options), tmp_path)
    # transformers' own way in is guarded too
    with refuses(ValueError, *parts):
        tiny_model("llama", **options).load_adapter(tmp_path)


def test_an_adapter_of_another_model_type_is_refused(steer, tiny_model, tmp_path):
    _, model, _ = steer()
    model.save_pretrained(tmp_path)
    with refuses(ValueError, "`model_type` of the adapter must be the base model's, 'mistral', got 'llama'"):
        PeftModel.from_pretrained(tiny_model("mistral"), tmp_path)
    with refuses(ValueError, "'mistral', got 'llama'"):
        get_peft_model(tiny_model("mistral"), model.peft_config["default"])


@pytest.mark.parametrize("fewer", [True, False])
def test_a_file_with_other_layers_than_the_model_is_refused(fewer, steer, tmp_path):
    # what PEFT warns of, or drops without a word
    base, model, _ = steer()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = next(key for key in state if "layers.2" in key)
    vector = state.pop(name)
    if not fewer:
        state |= {name: vector, name.replace("layers.2", "layers.3"): vector.clone()}
    save_file(state, path)
    expected = "missing: ['" if fewer else "without a place: ['"
    with refuses(ValueError, "must hold one vector for each place in the model", expected):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_vector_that_is_not_finite_is_refused_at_load(bad, steer, tiny_model, tmp_path):
    base, model, _ = steer()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    next(tensor for key, tensor in state.items() if "layers.1" in key)[5] = bad
    save_file(state, path)
    with refuses(ValueError, "layers.1.mlp.down_proj.steering_bias", "must be finite, got NaN or infinity"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    # transformers fills the adapter by itself: the first forward looks
    plain = tiny_model("llama")
    plain.load_adapter(tmp_path)
    with refuses(ValueError, "adapter 'default' must be finite", "model.layers.1.mlp.down_proj"):
        plain(IDS)


def test_a_vector_of_another_width_in_the_file_is_refused(steer, tmp_path):
    base, model, _ = steer()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor[:16].clone() for key, tensor in load_file(path).items()}, path)
    with refuses(ValueError, "must have the shape (32,), the model's width, got (16,)"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize(
    ("names", "error", "parts"),
    [
        (["default"], ValueError, ["`adapter_names` must have one name for each row, got 1 names for 2 rows"]),
        (["default"] * 3, ValueError, ["got 3 names for 2 rows"]),
        (["default", "defualt"], ValueError, ["`adapter_names` must be among default, __base__, got defualt"]),
        ("default", TypeError, ["`adapter_names` must be a list of strings", "got 'default'"]),
        ([0, 1], TypeError, ["`adapter_names` must be a list of strings", "got [0, 1]"]),
    ],
)
def test_adapter_names_must_fit_the_batch(names, error, parts, steer):
    _, model, _ = steer()
    with refuses(error, *parts):
        model(input_ids=IDS, adapter_names=names)
    with refuses(error, *parts):
        model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=2)
    # nothing is left of the call that was refused
    assert "generate" not in model.get_base_model().__dict__
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_adapter_names_are_for_evaluation_and_unmerged_adapters(steer):
    _, model, _ = steer()
    model.train()
    with refuses(ValueError, "`adapter_names` must not be given in training mode"):
        model(input_ids=IDS, adapter_names=["default"] * 2)
    model.eval()
    model.merge_adapter()
    with refuses(ValueError, "`adapter_names` needs unmerged adapters"):
        model(input_ids=IDS, adapter_names=["default"] * 2)


def test_an_adapter_of_some_tokens_cannot_be_a_bias(steer):
    _, model, _ = steer(positions="first")
    with refuses(ValueError, "must steer all tokens to be merged, got positions='first' of 'default'"):
        model.merge_adapter()


def test_set_vectors_writes_all_or_nothing(steer, vectors_like):
    _, model, vectors = steer(layers_to_transform=[0, 2])
    good = torch.ones(32)
    for wrong, error, part in [
        ({0: good, 1: good}, ValueError, "`vectors` must be for layers [0, 2] of 'default', got 1"),
        ({0: good, 2: good[:5]}, ValueError, "`vectors[2]` must have the shape (32,)"),
        ({0: good, 2: good / 0}, ValueError, "`vectors[2]` must be finite"),
        ({0: good, 2: [1.0] * 32}, TypeError, "`vectors[2]` must be a tensor of floats, got list"),
        ({0: good, 2: good.long()}, TypeError, "got torch.int64"),
    ]:
        with refuses(error, part):
            model.set_vectors("default", wrong)
    with refuses(ValueError, "`adapter_name` must be one of default, got 'math'"):
        model.set_vectors("math", {0: good})
    assert all(torch.equal(model.get_vectors()[layer], vectors[layer]) for layer in vectors)


def test_weighted_sums_that_are_none_are_refused(steer):
    _, model, _ = steer()
    model.add_adapter("end", SteeringConfig(positions="first"))
    for arguments, part in [
        ((["default", "math"], [1, 1], "new"), "`adapter_name` must be one of default, end, got 'math'"),
        ((["default"], [1, 1], "new"), "`weights` must have one number for each adapter, got 2 for 1"),
        ((["default"], [1], "end"), "`adapter_name` must be a new name, got 'end'"),
        ((["default", "end"], [1, 1], "new"), "`adapters` must have one placement and positions"),
        (([], [], "new"), "got 0 for 0"),
    ]:
        with refuses(ValueError, part):
            model.add_weighted_adapter(*arguments)
    with refuses(ValueError, "`scale` must be finite, got inf"):
        model.set_scale("default", float("inf"))
    model.merge_adapter(["default"])
    with refuses(ValueError, "'default' must not be merged while its scale is set"):
        model.set_scale("default", 2.0)


def test_adapters_of_other_types_cannot_be_mixed_in(steer):
    from peft import LoraConfig

    _, model, _ = steer()
    with refuses(ValueError, "Cannot combine adapters with different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


def test_a_configuration_of_no_steering_adapter_is_not_taken_for_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    assert type(SteeringConfig.from_pretrained(tmp_path)) is not SteeringConfig
