"""Sites: every family's table against transformers' own hidden states, closed forms, and the sums that define them."""

import functools
import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from hf_ext.record import record
from hf_ext.sites import FAMILIES, SITES, Hook, resolve


LAYERS = 3
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_SHAPE = {"vocab_size": 61, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
IDS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))


@functools.cache
def make(model_type: str) -> transformers.PreTrainedModel:
    """A tiny model of the real class whose every parameter, biases and norms too, is random."""
    extra = {"head_dim": 16} if model_type == "qwen3" else {}
    config = transformers.AutoConfig.for_model(model_type, **(GPT2_SHAPE if model_type == "gpt2" else SHAPE | extra))
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def activations(model: nn.Module, sites: tuple[str, ...] | None = None, **kwargs):
    """({site: one tensor a layer}, the model's output)"""
    names = [site for site in SITES if site in FAMILIES[model.config.model_type].sites] if sites is None else sites
    hooks = {f"{site} {layer}": resolve(model, site, layer) for site in names for layer in range(LAYERS)}
    with torch.no_grad(), record(model, hooks) as acts:
        output = model(IDS, **kwargs)
    return {site: [acts[f"{site} {layer}"][0] for layer in range(LAYERS)] for site in names}, output


@pytest.mark.parametrize("model_type", FAMILIES)
def test_residual_stream_is_bit_equal_to_output_hidden_states(model_type):
    model = make(model_type)
    acts, output = activations(model, ("resid_pre", "resid_post"), output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    for layer in range(LAYERS):
        assert torch.equal(acts["resid_pre"][layer], output.hidden_states[layer])
    for layer in range(LAYERS - 1):
        assert torch.equal(acts["resid_post"][layer], output.hidden_states[layer + 1])
    norm = model.base_model.ln_f if model_type == "gpt2" else model.base_model.norm
    assert torch.equal(norm(acts["resid_post"][-1]), output.hidden_states[-1])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stream_is_exactly_the_sum_of_what_attention_and_mlp_add(model_type):
    acts, _ = activations(make(model_type))
    for layer in range(LAYERS):
        assert torch.equal(acts["resid_mid"][layer], acts["resid_pre"][layer] + acts["attn_out"][layer])
        assert torch.equal(acts["resid_post"][layer], acts["resid_mid"][layer] + acts["mlp_out"][layer])


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "gpt2"])
def test_projections_are_linear_maps_of_the_normed_stream(model_type):
    model = make(model_type)
    acts, _ = activations(model)
    for layer, module in enumerate(model.model.layers):
        attn, normed = module.self_attn, module.input_layernorm(acts["resid_pre"][layer])
        for site in ("q", "k", "v"):
            projection = getattr(attn, f"{site}_proj")
            assert torch.equal(acts[site][layer], F.linear(normed, projection.weight, projection.bias))
        assert acts["q"][layer].shape[-1] == 4 * attn.head_dim
        assert acts["k"][layer].shape[-1] == acts["v"][layer].shape[-1] == 2 * attn.head_dim
        assert torch.equal(acts["attn_out"][layer], F.linear(acts["z"][layer], attn.o_proj.weight, attn.o_proj.bias))


def test_gpt2_z_is_what_the_output_projection_reads():
    model = make("gpt2")
    acts, _ = activations(model)
    for layer, block in enumerate(model.transformer.h):
        flat = acts["z"][layer].view(-1, 32)
        expected = torch.addmm(block.attn.c_proj.bias, flat, block.attn.c_proj.weight).view(2, 7, 32)
        assert torch.equal(acts["attn_out"][layer], expected)


def test_z_holds_each_head_attending_over_v():
    # one token attends to itself alone, so z is v, each value head repeated for its two query heads
    model = make("llama")
    hooks = {site: resolve(model, site, 1) for site in ("v", "z")}
    with torch.no_grad(), record(model, hooks) as acts:
        model(IDS[:, :1])
    assert torch.equal(acts["z"][0].view(2, 1, 2, 2, 8), acts["v"][0].view(2, 1, 2, 1, 8).expand(2, 1, 2, 2, 8))


@pytest.mark.parametrize(
    ("model_type", "site", "expected"),
    [
        ("llama", "resid_post", Hook("model.layers.1", "output")),
        ("llama", "z", Hook("model.layers.1.self_attn.o_proj", "input")),
        ("lime", "resid_mid", Hook("model.layers.1.post_attention_layernorm", "input")),
        ("gpt2", "mlp_out", Hook("transformer.h.1.mlp", "output")),
    ],
)
def test_paths_start_at_the_model_handed_in(model_type, site, expected):
    model = make(model_type)
    assert resolve(model, site, 1) == expected
    base = expected.path.split(".", 1)[1]
    assert resolve(model.base_model, site, 1) == Hook(base, expected.io)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "lime"])
def test_base_model_records_what_the_causal_lm_records(model_type):
    whole, _ = activations(make(model_type))
    base, _ = activations(make(model_type).base_model)
    for site, tensors in whole.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, base[site], strict=True)), site


def test_peft_wrapper_records_what_the_plain_model_records():
    import peft

    plain, _ = activations(make("llama"))
    bare = transformers.LlamaForCausalLM(make("llama").config)
    bare.load_state_dict(make("llama").state_dict())
    # a fresh LoRA adds zero
    wrapped = peft.get_peft_model(bare, peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2)).eval()
    assert resolve(wrapped, "q", 0).path == "base_model.model.model.layers.0.self_attn.q_proj"
    acts, _ = activations(wrapped)
    for site, tensors in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, acts[site], strict=True)), site


def test_negative_layers_count_from_the_end():
    model = make("llama")
    assert resolve(model, "q", -1) == resolve(model, "q", LAYERS - 1)
    assert resolve(model, "q", -LAYERS) == resolve(model, "q", 0)


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1])
def test_layer_out_of_range_names_the_range(layer):
    with pytest.raises(ValueError, match=re.escape(f"`layer` must be in [-3, 2], got {layer}")):
        resolve(make("llama"), "q", layer)


@pytest.mark.parametrize("layer", [1.0, "1", None])
def test_layer_that_is_no_integer_is_a_type_error(layer):
    with pytest.raises(TypeError, match="`layer` must be an integer"):
        resolve(make("llama"), "q", layer)


def test_unknown_site_lists_those_the_family_has():
    with pytest.raises(ValueError, match="`site` must be one of resid_pre, .*, z; got 'residual'"):
        resolve(make("llama"), "residual", 0)


@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_site_that_gpt2_lacks_lists_those_it_has(site):
    with pytest.raises(ValueError, match=f"one of resid_pre, .*, z; gpt2 lacks '{site}'"):
        resolve(make("gpt2"), site, 0)


def test_unknown_architecture_says_how_to_pass_a_path():
    config = transformers.BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    message = re.escape("got 'bloom' (BloomForCausalLM). Pass a path yourself, for example Hook(\"model.layers.3\"")
    with pytest.raises(ValueError, match=message):
        resolve(model, "resid_post", 0)
    # and the path it speaks of works
    with record(model, {"x": Hook("transformer.h.0", "output")}) as acts:
        model(torch.tensor([[1, 2]]))
    assert acts["x"][0].shape == (1, 2, 8)


def test_module_without_a_config_is_an_unknown_architecture():
    with pytest.raises(ValueError, match=re.escape("got None (Linear)")):
        resolve(nn.Linear(2, 2), "resid_post", 0)
