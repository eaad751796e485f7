"""Sites: every family's table against transformers' own hidden states, closed forms, and the sums that define them."""

import functools
import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from hf_ext.record import edit, record
from hf_ext.sites import FAMILIES, SITES, Hook, anatomy, resolve


LAYERS = 3
IDS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))
# the table has no place between two branches that read the same stream
SEQUENTIAL = [name for name, family in FAMILIES.items() if "resid_mid" in family.sites]
POST_NORM = ("gemma2", "gemma3", "gemma3_text", "olmo2")
SEPARATE = [name for name, family in FAMILIES.items() if "q" in family.sites]


@pytest.fixture(scope="module")
def make(tiny_model):
    return functools.cache(tiny_model)


def blocks(model):
    """The layers of the language model, and the norm after the last one, found without the table."""
    base = getattr(model, model.base_model_prefix, model)
    base = getattr(base, "language_model", base)
    names = next(
        pair for pair in [("h", "ln_f"), ("layers", "final_layer_norm"), ("layers", "norm")] if hasattr(base, pair[1])
    )
    return [getattr(base, name) for name in names]


def activations(model: nn.Module, sites: tuple[str, ...] | None = None, **kwargs):
    """({site: one tensor a layer}, the model's output)"""
    names = [site for site in SITES if site in FAMILIES[model.config.model_type].sites] if sites is None else sites
    hooks = {f"{site} {layer}": resolve(model, site, layer) for site in names for layer in range(LAYERS)}
    with torch.no_grad(), record(model, hooks) as acts:
        output = model(IDS, **kwargs)
    return {site: [acts[f"{site} {layer}"][0] for layer in range(LAYERS)] for site in names}, output


@pytest.mark.parametrize("model_type", FAMILIES)
def test_residual_stream_is_bit_equal_to_output_hidden_states(model_type, make):
    model = make(model_type)
    acts, output = activations(model, ("resid_pre", "resid_post"), output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    for layer in range(LAYERS):
        assert torch.equal(acts["resid_pre"][layer], output.hidden_states[layer])
    for layer in range(LAYERS - 1):
        assert torch.equal(acts["resid_post"][layer], output.hidden_states[layer + 1])
    _, norm = blocks(model)
    assert torch.equal(norm(acts["resid_post"][-1]), output.hidden_states[-1])


@pytest.mark.parametrize("model_type", SEQUENTIAL)
def test_stream_is_exactly_the_sum_of_what_attention_and_mlp_add(model_type, make):
    acts, _ = activations(make(model_type))
    for layer in range(LAYERS):
        assert torch.equal(acts["resid_mid"][layer], acts["resid_pre"][layer] + acts["attn_out"][layer])
        assert torch.equal(acts["resid_post"][layer], acts["resid_mid"][layer] + acts["mlp_out"][layer])


def test_parallel_branches_add_to_the_stream_that_both_read(make):
    acts, _ = activations(make("gpt_neox"))
    for layer in range(LAYERS):
        # in the model's own order of additions
        total = acts["mlp_out"][layer] + acts["attn_out"][layer] + acts["resid_pre"][layer]
        assert torch.equal(acts["resid_post"][layer], total)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_constant_added_where_the_mlp_ends_is_added_to_the_stream(model_type, make):
    model = make(model_type)
    family, prefix, _ = anatomy(model)
    shift = torch.linspace(-1, 1, 32)
    place = Hook(f"{prefix}{family.layers}.1.{family.mlp_end}", "output")
    with torch.no_grad():
        before = model(IDS, output_hidden_states=True).hidden_states
        with edit(model, {"end": place}, lambda name, hidden, step: hidden + shift):
            after = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(after[1], before[1])
    # float32: the sums differ by a rounding of numbers up to about 10
    torch.testing.assert_close(after[2], before[2] + shift, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", SEPARATE)
def test_projections_are_linear_maps_of_what_attention_reads(model_type, make):
    model = make(model_type)
    acts, _ = activations(model)
    layers, _ = blocks(model)
    for layer, module in enumerate(layers):
        attn, stream = module.self_attn, acts["resid_pre"][layer]
        normed = stream if model_type == "olmo2" else module.input_layernorm(stream)
        for site in ("q", "k", "v"):
            projection = getattr(attn, f"{site}_proj")
            assert torch.equal(acts[site][layer], F.linear(normed, projection.weight, projection.bias))
        assert acts["q"][layer].shape[-1] == 4 * attn.head_dim
        assert acts["k"][layer].shape[-1] == acts["v"][layer].shape[-1] == 2 * attn.head_dim
        added = F.linear(acts["z"][layer], attn.o_proj.weight, attn.o_proj.bias)
        if model_type in POST_NORM:
            added = module.post_attention_layernorm(added)
        assert torch.equal(acts["attn_out"][layer], added)


def test_gpt2_z_is_what_the_output_projection_reads(make):
    model = make("gpt2")
    acts, _ = activations(model)
    for layer, block in enumerate(model.transformer.h):
        flat = acts["z"][layer].view(-1, 32)
        expected = torch.addmm(block.attn.c_proj.bias, flat, block.attn.c_proj.weight).view(2, 7, 32)
        assert torch.equal(acts["attn_out"][layer], expected)


def test_z_holds_each_head_attending_over_v(make):
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
        ("gemma2", "mlp_out", Hook("model.layers.1.post_feedforward_layernorm", "output")),
        ("qwen2_5_vl", "resid_post", Hook("model.language_model.layers.1", "output")),
    ],
)
def test_paths_start_at_the_model_handed_in(model_type, site, expected, make):
    model = make(model_type)
    assert resolve(model, site, 1) == expected
    base = expected.path.split(".", 1)[1]
    assert resolve(model.base_model, site, 1) == Hook(base, expected.io)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "lime", "gpt_neox", "gemma3"])
def test_base_model_records_what_the_causal_lm_records(model_type, make):
    whole, _ = activations(make(model_type))
    base, _ = activations(make(model_type).base_model)
    for site, tensors in whole.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, base[site], strict=True)), site


def test_peft_wrapper_records_what_the_plain_model_records(make):
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


def test_negative_layers_count_from_the_end(make):
    model = make("llama")
    assert resolve(model, "q", -1) == resolve(model, "q", LAYERS - 1)
    assert resolve(model, "q", -LAYERS) == resolve(model, "q", 0)


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1])
def test_layer_out_of_range_names_the_range(layer, make):
    with pytest.raises(ValueError, match=re.escape(f"`layer` must be in [-3, 2], got {layer}")):
        resolve(make("llama"), "q", layer)


@pytest.mark.parametrize("layer", [1.0, "1", None])
def test_layer_that_is_no_integer_is_a_type_error(layer, make):
    with pytest.raises(TypeError, match="`layer` must be an integer"):
        resolve(make("llama"), "q", layer)


def test_unknown_site_lists_those_the_family_has(make):
    with pytest.raises(ValueError, match="`site` must be one of resid_pre, .*, z; got 'residual'"):
        resolve(make("llama"), "residual", 0)


@pytest.mark.parametrize(
    ("model_type", "site"),
    [("gpt2", "q"), ("gpt2", "k"), ("gpt2", "v"), ("phi3", "q"), ("gpt_neox", "v"), ("gpt_neox", "resid_mid")],
)
def test_site_that_a_family_lacks_lists_those_it_has(model_type, site, make):
    with pytest.raises(ValueError, match=f"one of resid_pre, .*, z; {model_type} lacks '{site}'"):
        resolve(make(model_type), site, 0)


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
