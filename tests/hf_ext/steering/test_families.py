"""The adapter in every family, against hooks on the residual stream of the untouched base model."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_ext import SteeringConfig
from hf_ext.record import edit, record
from hf_ext.sites import FAMILIES, resolve


IDS = torch.randint(2, 61, (2, 7), generator=torch.Generator().manual_seed(1))
# families whose layer ends in a linear map, which has or can get a bias
LINEAR_END = {name for name, family in FAMILIES.items() if "." in family.mlp_end}
each_family = pytest.mark.parametrize("model_type", FAMILIES)
each_generator = pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "qwen2_5_vl_text"])


def out(model, ids=IDS, **kwargs):
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        output = model(input_ids=ids, **kwargs)
    return output.logits if "logits" in output else output.last_hidden_state


def hooked(base, vectors):
    """The context in which `base` is steered by hooks instead of an adapter."""
    hooks = {str(layer): resolve(base, "resid_post", layer) for layer in vectors}
    return edit(base, hooks, lambda name, hidden, step: hidden + vectors[int(name)].to(hidden.dtype))


@each_family
def test_step_0_is_the_base_to_the_last_bit(model_type, tiny_model):
    base = tiny_model(model_type)
    expected = out(base)
    model = get_peft_model(base, SteeringConfig()).eval()
    assert torch.equal(out(model), expected)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 3 and all(".steering_bias." in name for name in trainable)
    assert model.get_nb_trainable_parameters()[0] == 3 * 32


@each_family
def test_the_vector_is_added_to_the_residual_stream(model_type, steer):
    base, model, vectors = steer(model_type)
    with hooked(base, vectors):
        expected = out(base)
    assert not torch.allclose(expected, out(base), atol=0.1)
    # the same sum in another order, float32, through at most two more layers
    torch.testing.assert_close(out(model), expected, rtol=0, atol=2e-5)


@each_generator
def test_every_decoded_token_is_steered_as_by_hooks(model_type, steer):
    base, model, vectors = steer(model_type)
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with hooked(base, vectors):
        expected = base.generate(IDS, **settings)
    got = model.generate(input_ids=IDS, **settings)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=2e-5)
    assert not torch.equal(got.sequences, base.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False))


@each_generator
def test_cached_steps_equal_one_uncached_forward(model_type, steer):
    _, model, _ = steer(model_type)
    whole = out(model)
    with torch.no_grad():
        start = model(input_ids=IDS[:, :4], use_cache=True)
        steps = [start.logits[:, -1]]
        cache = start.past_key_values
        for column in range(4, 7):
            step = model(input_ids=IDS[:, column : column + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 3:], rtol=0, atol=2e-5)


@each_generator
def test_rows_of_one_batch_have_their_own_adapters(model_type, steer, vectors_like):
    base, model, vectors = steer(model_type)
    model.add_adapter("last", SteeringConfig(layers_to_transform=-1, scale=0.5))
    other = vectors_like([2], seed=2)
    model.set_vectors("last", other)
    ids = IDS[:1].expand(3, -1)
    got = out(model, ids, adapter_names=["last", "__base__", "default"])
    with hooked(base, {2: 0.5 * other[2]}):
        torch.testing.assert_close(got[0], out(base, ids)[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(got[1], out(base, ids)[1], rtol=0, atol=2e-5)
    with hooked(base, vectors):
        torch.testing.assert_close(got[2], out(base, ids)[2], rtol=0, atol=2e-5)


@each_family
def test_a_saved_adapter_is_its_vectors_and_loads_to_the_bit(model_type, steer, tmp_path):
    base, model, vectors = steer(model_type)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(map(tuple, (tensor.shape for tensor in saved.values()))) == [(32,)] * 3
    assert all(name.startswith("base_model.model.") and name.endswith(".steering_bias") for name in saved)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(out(again), out(model))
    assert again.get_vectors().keys() == vectors.keys()
    assert all(torch.equal(again.get_vectors()[layer], vectors[layer]) for layer in vectors)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mixtral", "qwen2", "gpt_neox"])
def test_auto_model_loads_the_folder_of_an_adapter(model_type, tiny_model, steer, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    _, model, _ = steer(base=base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is type(base)
    assert torch.equal(out(loaded), out(model))


@each_family
def test_merged_vectors_are_a_bias_and_leave_no_trace(model_type, steer):
    base, model, _ = steer(model_type)
    expected = out(model)
    if model_type not in LINEAR_END:
        with pytest.raises(
            ValueError, match="must be a Linear or Conv1D for 'default' to be merged, got a .*export_model"
        ):
            model.merge_adapter()
        assert torch.equal(out(model), expected)
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(out(model), expected, rtol=0, atol=2e-5)
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(out(model), expected)
    assert torch.equal(out(model.unload()), out(base))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mixtral", "olmo2", "lime", "phi3"])
def test_gradients_with_and_without_checkpointing_are_equal(model_type, reentrant, steer):
    _, model, _ = steer(model_type)
    # no dropout: the two passes of checkpointing would have to draw the same
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert len(plain) == 3 and all(gradient.abs().sum() > 0 for gradient in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_the_authors_literal_place_is_normed_in_post_norm_families(steer):
    # a down_proj bias goes through the norm behind it: another model than a vector on the stream
    base, model, vectors = steer("olmo2", placement="down_proj")
    with hooked(base, vectors):
        assert (out(model) - out(base)).abs().max() > 0.05
    literal = copy.deepcopy(base)
    for layer, vector in vectors.items():
        literal.model.layers[layer].mlp.down_proj.bias = torch.nn.Parameter(vector)
    torch.testing.assert_close(out(model), out(literal), rtol=0, atol=2e-5)


def test_only_the_language_model_of_a_vision_language_model_is_steered(steer):
    _, model, _ = steer("qwen2_5_vl", placement="down_proj")
    # the vision tower has modules of this name too
    assert all("visual" not in name for name, p in model.named_parameters() if p.requires_grad)
    assert model.get_vectors().keys() == {0, 1, 2}


def test_a_module_whose_output_is_a_tuple_is_steered_in_its_first_part(steer):
    base, model, vectors = steer("llama", placement="self_attn", layers_to_transform=[1])
    hooks = {"attention": resolve(base, "attn_out", 1)}
    with edit(base, hooks, lambda name, hidden, step: hidden + vectors[1]):
        torch.testing.assert_close(out(model), out(base), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "gpt2"])
def test_a_recorded_stream_of_a_steered_model_has_the_vector_in_it(model_type, steer):
    base, model, vectors = steer(model_type, layers_to_transform=[1])
    streams = []
    for which in (base, model):
        hooks = {site: resolve(which, site, 1) for site in ("mlp_out", "resid_post")}
        with torch.no_grad(), record(which, hooks) as seen:
            which(input_ids=IDS)
        streams.append(seen)
    for site in ("mlp_out", "resid_post"):
        expected = streams[0][site][0] + vectors[1]
        torch.testing.assert_close(streams[1][site][0], expected, rtol=0, atol=1e-5)
