"""What PEFT's own tests ask of every type, by their names."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_ext import SteeringConfig, SteeringLayer
from hf_ext.steering import SteeringPeftType


IDS = torch.randint(2, 61, (3, 6), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.fixture
def two(steer, vectors_like):
    """A model with adapters "default" and "other", the first active, and the logits with each."""
    base, model, vectors = steer("llama")
    model.add_adapter("other", SteeringConfig(scale=0.5))
    model.set_vectors("other", vectors_like(seed=2))
    expected = {"default": logits(model), "__base__": logits(base)}
    model.set_adapter("other")
    expected["other"] = logits(model)
    model.set_adapter("default")
    assert len({tensor.sum().item() for tensor in expected.values()}) == 3
    return base, model, expected


# configuration, saving, loading


def test_config_survives_json(tmp_path):
    config = SteeringConfig(
        placement="self_attn.o_proj",
        layers_to_transform=[0, -1],
        scale=0.5,
        positions="completion",
        modules_to_save=["lm_head"],
        task_type=TaskType.CAUSAL_LM,
    )
    config.save_pretrained(tmp_path)
    for reader in (PeftConfig, SteeringConfig):
        again = reader.from_pretrained(tmp_path)
        assert type(again) is SteeringConfig
        assert again.to_dict() == config.to_dict()
        assert again.peft_type is SteeringPeftType.STEERING and again.peft_type == "STEERING"


def test_config_from_a_newer_version_loads_with_a_warning(tmp_path):
    SteeringConfig(scale=2.0).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"rank_of_the_future": 3,', 1))
    with pytest.warns(UserWarning, match="rank_of_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).scale == 2.0


def test_from_pretrained_config_construction(steer, tmp_path):
    _, model, _ = steer(layers_to_transform=[-1, 0], scale=2.0)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    facts = (config.model_type, config.hidden_size, config.num_hidden_layers)
    assert facts == ("llama", 32, 3)
    assert config.layers_to_transform == [0, 2] and config.scale == 2.0 and config.inference_mode


def test_save_pretrained_selected_adapters(two, tmp_path):
    base, model, expected = two
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "other"]
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "other", adapter_name="another name")
    assert torch.equal(logits(again), expected["other"])


def test_load_multiple_adapters(two, tmp_path):
    base, model, expected = two
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, adapter_name="first")
    result = again.load_adapter(tmp_path / "other", "second")
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert torch.equal(logits(again), expected["default"])
    again.set_adapter("second")
    assert torch.equal(logits(again), expected["other"])


def test_auto_peft_model_loads_the_base_and_the_adapter(tiny_model, steer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    _, model, _ = steer(base=base, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


def test_low_cpu_mem_usage_loads_the_same(two, tmp_path):
    base, model, expected = two
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), expected["default"])


def test_transformers_own_adapter_methods(two, tiny_model, tmp_path):
    base, model, expected = two
    model.save_pretrained(tmp_path)
    plain = tiny_model("llama")
    plain.load_adapter(tmp_path)
    assert torch.equal(logits(plain), expected["default"])
    plain.load_adapter(tmp_path / "other", adapter_name="other")
    plain.set_adapter("other")
    assert torch.equal(logits(plain), expected["other"])
    plain.disable_adapters()
    assert torch.equal(logits(plain), expected["__base__"])
    plain.enable_adapters()
    plain.delete_adapter("default")
    assert torch.equal(logits(plain), expected["other"])
    assert len(plain.get_adapter_state_dict("other")) == 3
    # the scale is in the configuration, so a second model continues where this one is
    plain.save_pretrained(tmp_path / "again")
    other = tiny_model("llama")
    other.load_adapter(tmp_path / "again")
    assert torch.equal(logits(other), expected["other"])


def test_inject_adapter_in_model(tiny_model):
    model = inject_adapter_in_model(SteeringConfig(), tiny_model("llama"))
    assert sum(isinstance(module, SteeringLayer) for module in model.modules()) == 3
    assert torch.equal(logits(model), logits(tiny_model("llama")))


# merging


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_layers_in_half_precision_restores_every_bit(dtype, tiny_model, steer):
    # gpt2's layers have a bias already: subtracting again would not restore it
    base = tiny_model("gpt2").to(dtype)
    _, model, _ = steer(base=base)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert logits(model).dtype == dtype
    expected = logits(model).float()
    biases = [block.mlp.c_proj.bias for block in model.base_model.model.transformer.h]
    before = [bias.clone() for bias in biases]
    model.merge_adapter()
    # one rounding of the bias instead of one of the sum: some ulp of activations of about 10
    torch.testing.assert_close(logits(model).float(), expected, rtol=0, atol=0.25)
    model.unmerge_adapter()
    after = [block.mlp.c_proj.bias for block in model.base_model.model.transformer.h]
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(after, biases, before, strict=True))


def test_merge_layers_nan(two):
    _, model, expected = two
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1" in n and "steering_bias.default" in n)[3] = torch.nan
    with pytest.raises(ValueError, match=re.escape("NaNs detected in the merged weights. The adapter ['default']")):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


def test_merge_layers_multi(two, steer):
    base, model, _ = two
    sums = {layer: model.get_vectors("default")[layer] + model.get_vectors("other")[layer] for layer in range(3)}
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["other"])
    assert model.get_model_status().merged_adapters == ["default", "other"]
    expected = logits(steer(base=base, vectors=sums).model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []
    assert all(block.mlp.down_proj.bias is None for block in model.base_model.model.model.layers)


def test_merge_layers_is_idempotent(two):
    _, model, _ = two
    model.merge_adapter()
    once = logits(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(logits(model), once)


def test_merge_and_unload_says_what_saving_would_lose(two, tmp_path):
    base, model, expected = two
    with pytest.warns(UserWarning, match="LlamaForCausalLM does not have .*export_model"):
        merged = model.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(logits(merged), expected["default"], rtol=0, atol=2e-5)
    assert not merged._forward_pre_hooks and not merged._forward_hooks and not hasattr(merged, "peft_config")
    # a family with biases keeps them
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected["__base__"])


def test_merge_and_unload_of_a_family_with_biases_saves_all(steer, tmp_path):
    _, model, _ = steer("gpt_neox")
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_and_unload().save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(saved), expected, rtol=0, atol=2e-5)


def test_unload_adapter(two):
    base, model, expected = two
    plain = model.unload()
    assert torch.equal(logits(plain), expected["__base__"])
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert not plain._forward_pre_hooks and not plain._forward_hooks


def test_disable_adapter(two):
    _, model, expected = two
    with model.disable_adapter():
        assert torch.equal(logits(model), expected["__base__"])
        assert model.get_model_status().enabled is False
    assert torch.equal(logits(model), expected["default"])
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected["__base__"])


# several adapters


def test_active_adapters_add_up(two, steer):
    base, model, _ = two
    model.base_model.set_adapter(["default", "other"])
    sums = {layer: model.get_vectors("default")[layer] + model.get_vectors("other")[layer] for layer in range(3)}
    torch.testing.assert_close(logits(model), logits(steer(base=base, vectors=sums).model), rtol=0, atol=2e-5)


def test_weighted_combination_of_adapters(two, steer):
    base, model, expected = two
    model.add_weighted_adapter(["default", "other"], [0.25, -2.0], "mix")
    assert torch.equal(logits(model), expected["default"]), "a new adapter is not active"
    one, two_ = model.get_vectors("default"), model.get_vectors("other")
    mix = model.get_vectors("mix")
    assert all(torch.equal(mix[layer], 0.25 * one[layer] - 2 * two_[layer]) for layer in range(3))
    model.set_adapter("mix")
    assert torch.equal(logits(model), logits(steer(base=base, vectors=mix).model))
    assert model.peft_config["mix"].scale == 1.0


def test_a_weighted_sum_of_adapters_in_different_layers_has_them_all(steer, vectors_like):
    _, model, vectors = steer(layers_to_transform=[0])
    model.add_adapter("late", SteeringConfig(layers_to_transform=[1, 2], scale=3.0))
    late = vectors_like([1, 2], seed=3)
    model.set_vectors("late", late)
    model.add_weighted_adapter(["default", "late"], [1.0, 1.0], "both")
    both = model.get_vectors("both")
    assert both.keys() == {0, 1, 2}
    assert torch.equal(both[0], vectors[0]) and torch.equal(both[2], 3.0 * late[2])


def test_mixed_adapter_batches(two):
    _, model, expected = two
    names = ["other", "__base__", "default"]
    got = logits(model, adapter_names=names)
    assert all(torch.equal(got[row], expected[name][row]) for row, name in enumerate(names))
    assert torch.equal(logits(model), expected["default"]), "the active adapter is as before"


def test_rows_are_swapped_by_writing_a_row(two, vectors_like, steer):
    base, model, expected = two
    logits(model, adapter_names=["other", "default", "__base__"])
    layers = [module for module in model.modules() if isinstance(module, SteeringLayer)]
    stacks = [layer._stack for layer in layers]
    # parameters are rows of the stack: all ways of writing one are seen, and no stack is made anew
    model.set_vectors("other", vectors_like(seed=5))
    for layer in layers:
        layer.steering_bias["default"].data.mul_(2)
    got = logits(model, adapter_names=["other", "default", "__base__"])
    assert all(layer._stack is stack for layer, stack in zip(layers, stacks, strict=True))
    other = steer(base=base, vectors=vectors_like(seed=5), scale=0.5).model
    double = steer(base=base, vectors={k: 2 * v for k, v in vectors_like(seed=1).items()}).model
    assert torch.equal(got[0], logits(other)[0]) and torch.equal(got[1], logits(double)[1])
    # a parameter that was put elsewhere is found again
    for layer in layers:
        layer.steering_bias["default"].data = torch.zeros(32)
    got = logits(model, adapter_names=["default", "default", "other"])
    assert torch.equal(got[:2], expected["__base__"][:2]) and torch.equal(got[2], logits(other)[2])


def test_mixed_batches_in_generate_with_beams_and_several_samples(two):
    _, model, _ = two
    names = ["other", "__base__", "default"]
    for settings in (GREEDY, GREEDY | {"num_beams": 3}, GREEDY | {"num_beams": 4, "num_return_sequences": 2}):
        mixed = model.generate(input_ids=IDS, adapter_names=names, **settings)
        copies = settings.get("num_return_sequences", 1)
        for row, name in enumerate(names):
            one = IDS[row : row + 1]
            if name == "__base__":
                with model.disable_adapter():
                    alone = model.generate(input_ids=one, **settings)
            else:
                model.set_adapter(name)
                alone = model.generate(input_ids=one, **settings)
            assert torch.equal(mixed[row * copies : (row + 1) * copies], alone)


def test_mixed_batches_on_the_left_of_which_is_padding(two):
    _, model, expected = two
    padded = torch.cat((torch.zeros(3, 2, dtype=torch.long), IDS), 1)
    mask = (torch.arange(8) >= 2).long().expand(3, -1)
    names = ["other", "__base__", "default"]
    got = model.generate(input_ids=padded, attention_mask=mask, adapter_names=names, **GREEDY)
    assert torch.equal(got[:, 8:], model.generate(input_ids=IDS, adapter_names=names, **GREEDY)[:, 6:])


def test_adapters_in_different_layers_share_a_batch(steer, vectors_like):
    base, model, _ = steer(layers_to_transform=[0])
    model.add_adapter("late", SteeringConfig(layers_to_transform=[2]))
    late = vectors_like([2], seed=3)
    model.set_vectors("late", late)
    got = logits(model, adapter_names=["late", "default", "__base__"])
    assert torch.equal(got[0], logits(steer(base=base, layers_to_transform=[2], vectors=late).model)[0])
    assert torch.equal(got[1], logits(model)[1])
    assert torch.equal(got[2], logits(base)[2])


def test_delete_adapter(two):
    _, model, expected = two
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model), expected["other"])
    assert not any("steering_bias.default" in name for name in model.state_dict())
    with pytest.raises(ValueError, match=r"`adapter_names` must be among other, __base__, got default\."):
        logits(model, adapter_names=["default"] * 3)


def test_delete_inactive_adapter(two):
    _, model, expected = two
    logits(model, adapter_names=["other", "default", "default"])
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected["default"])
    got = logits(model, adapter_names=["__base__", "default", "default"])
    assert torch.equal(got[0], expected["__base__"][0]) and torch.equal(got[1], expected["default"][1])


def test_delete_unknown_adapter_raises(two):
    _, model, _ = two
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")


def test_a_name_may_come_again_with_other_vectors(two, vectors_like, steer):
    base, model, _ = two
    logits(model, adapter_names=["other", "default", "default"])
    model.delete_adapter("other")
    model.add_adapter("other", SteeringConfig())
    model.set_vectors("other", vectors_like(seed=7))
    got = logits(model, adapter_names=["other", "default", "default"])
    assert torch.equal(got[0], logits(steer(base=base, vectors=vectors_like(seed=7)).model)[0])


def test_layer_and_model_status(two):
    _, model, _ = two
    status = model.get_model_status()
    assert status.peft_types == {"default": "STEERING", "other": "STEERING"}
    assert status.adapter_model_type == "SteeringModel" and status.num_adapter_layers == 3
    assert status.available_adapters == ["default", "other"] and status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "other": False}
    layers = model.get_layer_status()
    assert [layer.name for layer in layers] == [f"model.model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert {layer.module_type for layer in layers} == {"SteeringLayer"}


# generating and training


def test_generate_pos_args(two):
    _, model, _ = two
    assert torch.equal(model.generate(IDS, **GREEDY), model.generate(input_ids=IDS, **GREEDY))
    names = ["other", "__base__", "default"]
    by_position = model.generate(IDS, adapter_names=names, **GREEDY)
    assert torch.equal(by_position, model.generate(input_ids=IDS, adapter_names=names, **GREEDY))


def test_generate_half_prec(tiny_model, steer):
    _, model, _ = steer(base=tiny_model("llama").to(torch.bfloat16))
    assert model.generate(input_ids=IDS, **GREEDY).shape == (3, 11)


def test_static_cache_writes_the_same_tokens(two):
    _, model, _ = two
    names = ["other", "__base__", "default"]
    expected = model.generate(input_ids=IDS, adapter_names=names, **GREEDY)
    got = model.generate(input_ids=IDS, adapter_names=names, cache_implementation="static", **GREEDY)
    assert torch.equal(got, expected)


def test_the_adapter_is_float32_unless_asked_otherwise(tiny_model):
    def dtypes(**kwargs):
        model = get_peft_model(tiny_model("llama").to(torch.bfloat16), SteeringConfig(), **kwargs)
        return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}

    assert dtypes() == {torch.float32}
    assert dtypes(autocast_adapter_dtype=False) == {torch.bfloat16}


def test_training_moves_the_vectors_and_nothing_else(tiny_model, tmp_path):
    base = tiny_model("llama")
    model = get_peft_model(copy.deepcopy(base), SteeringConfig(layers_to_transform=[1, 2]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.get_vectors().keys() == {1, 2}
    assert all(vector.abs().min() > 0 for vector in model.get_vectors().values())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model.unload()), logits(base))
    trained = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert trained.get_nb_trainable_parameters()[0] == 64


def test_the_gradient_of_a_vector_is_that_of_the_stream_summed_over_tokens(tiny_model):
    base = tiny_model("llama")
    model = get_peft_model(copy.deepcopy(base), SteeringConfig(scale=3.0))
    model(input_ids=IDS, labels=IDS).loss.backward()
    grabbed = []
    layer = base.model.layers[1]
    layer.register_forward_hook(lambda m, a, output: (output.retain_grad(), grabbed.append(output))[0])
    base(input_ids=IDS, labels=IDS).loss.backward()
    vector = model.base_model.model.model.layers[1].mlp.down_proj.steering_bias["default"]
    torch.testing.assert_close(vector.grad, 3.0 * grabbed[0].grad.sum((0, 1)), rtol=1e-4, atol=1e-6)


def test_a_compiled_model_says_the_same(two, vectors_like, steer):
    base, model, expected = two
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled), expected["default"])
    # a vector that is written is read, though nothing is compiled again
    model.set_vectors("default", vectors_like(seed=9))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(logits(compiled), logits(steer(base=base, vectors=vectors_like(seed=9)).model))
    inner = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    assert torch.equal(logits(inner), logits(model))
    torch.compiler.reset()


def test_copies_and_pickles_are_models_of_their_own(two, tmp_path):
    _, model, expected = two
    names = ["other", "__base__", "default"]
    logits(model, adapter_names=names)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    model.set_vectors("default", {0: torch.zeros(32)})
    model.set_scale("other", 0.0)
    for again in (copied, pickled):
        assert torch.equal(logits(again), expected["default"])
        got = logits(again, adapter_names=names)
        assert all(torch.equal(got[row], expected[name][row]) for row, name in enumerate(names))


def test_scale_is_set_in_the_model_and_in_what_is_saved(two, tmp_path):
    base, model, expected = two
    model.set_scale("default", 0.0)
    assert torch.equal(logits(model), expected["__base__"])
    model.set_scale("default", 1.0)
    assert torch.equal(logits(model), expected["default"])
    model.set_scale("default", 2.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), logits(model))


def test_full_state_dict_with_tied_rows_can_be_saved_as_safetensors(two, tmp_path):
    _, model, _ = two
    logits(model, adapter_names=["other", "__base__", "default"])
    save_file({k: v for k, v in model.state_dict().items() if "steering" in k}, tmp_path / "all.safetensors")
    assert len(load_file(tmp_path / "all.safetensors")) == 6


def test_target_modules_are_pefts_own(steer):
    _, by_ending, vectors = steer(target_modules=["self_attn.o_proj"], layers_to_transform=[1])
    _, by_pattern, _ = steer(target_modules=r"model\.layers\.1\.self_attn\.o_proj")
    _, by_place, _ = steer(placement="self_attn.o_proj", layers_to_transform=1)
    _, by_path, _ = steer(placement="model.layers.1.self_attn.o_proj")
    models = [by_ending, by_pattern, by_place, by_path]
    assert all(model.get_vectors().keys() == {1} for model in models)
    assert all(torch.equal(logits(model), logits(by_ending)) for model in models)


def test_a_module_without_parameters_is_steered(steer):
    _, model, vectors = steer("gpt_neox", placement="post_mlp_dropout")
    _, same, _ = steer("gpt_neox", vectors=vectors)
    torch.testing.assert_close(logits(model), logits(same), rtol=0, atol=2e-5)


def test_a_family_outside_the_table_is_steered_by_path(tiny_model, steer):
    import transformers

    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=3, n_head=2)
    base = transformers.BloomForCausalLM(config).eval()
    _, model, vectors = steer(base=base, placement="mlp.dense_4h_to_h", layers_to_transform=[1])
    biased = copy.deepcopy(base)
    biased.transformer.h[1].mlp.dense_4h_to_h.bias.data += vectors[1]
    torch.testing.assert_close(logits(model), logits(biased), rtol=0, atol=2e-5)
