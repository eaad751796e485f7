"""v1's lookup over hidden states, against its definition written out by loops in float64."""

import pytest
import torch

from hf_ext.lime import LimeConfig, LimeForCausalLM, lime_param_groups
from hf_ext.lime.modeling_lime_routers import LimeHiddenRouter


KINDS = ["static", "static_top_p", "dynamic"]
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def model_of(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = LimeForCausalLM(LimeConfig(**SHAPE, router_type=kind, router_top_p=0.6, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "source_layernorm" in name or "router" in name:  # no special values
                parameter.copy_(torch.randn_like(parameter) * (0.2 if kind == "dynamic" else 1.0))
    return model.to(dtype)


def ids_of(rows=2, tokens=9):
    return torch.randint(3, 50, (rows, tokens), generator=torch.Generator().manual_seed(1))


def plain_weights(kind, router, newest):
    """w[h][j] at one position, from the definition."""
    logits = router.weight.double()
    if kind == "dynamic":
        logits = (logits @ newest).view(router.heads, -1)
    weights = logits.exp() / logits.exp().sum(1, keepdim=True)
    if kind != "static_top_p":
        return weights
    out = torch.zeros_like(weights)
    for h, row in enumerate(weights):
        mass, kept = 0.0, []
        for j in sorted(range(len(row)), key=lambda j: -row[j]):
            kept.append(j)
            mass += row[j].item()
            if mass > 0.6:
                break
        out[h, kept] = row[kept] / sum(row[j] for j in kept)
    return out


@pytest.mark.parametrize("routing", [{}, {"routing": "last", "routing_window": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_those_of_the_definition(kind, routing):
    model, ids = model_of(kind, **routing), ids_of()
    with torch.no_grad():
        out = model(ids, use_cache=True, output_hidden_states=True)
    streams = [x.double() for x in out.hidden_states[:-1]]  # X_0 the embeddings, X_j the input of layer j
    normed = [x / (x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() for x in streams]
    for at in range(1, 4):
        attention = model.model.layers[at].self_attn
        sources = [normed[j] * attention.source_layernorm.weight for j in model.config.sources(at)]
        plain = [normed[j] for j in model.config.sources(at)]
        for b in range(2):
            for t in range(ids.shape[1]):
                w = plain_weights(kind, attention.router, plain[-1][b, t])
                for h in range(4):
                    read = sum(w[h, j] * sources[j][b, t] for j in range(len(sources)))
                    expected = attention.v_proj.weight[8 * h : 8 * h + 8] @ read
                    found = out.past_key_values.layers[at].values[b, h, t]
                    # norms are computed in float32, as Llama's
                    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layer_is_plain_and_mixtures_sum_to_one(kind):
    model = model_of(kind)
    assert model.model.layers[0].self_attn.router is None
    for layer in model.model.layers[1:]:
        weight = layer.self_attn.router.mixture(torch.randn(2, 3, 32))
        torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight.sum(-1)))  # float32 rounding


def test_top_p_keeps_the_fewest_sources_whose_mass_exceeds_p():
    router = LimeHiddenRouter(LimeConfig(**SHAPE, router_type="static_top_p", router_top_p=0.9), 3)
    masses = [[0.5, 0.3, 0.15, 0.05], [0.95, 0.02, 0.02, 0.01], [0.25, 0.25, 0.25, 0.25], [0.05, 0.05, 0.3, 0.6]]
    router.weight.data = torch.tensor(masses).log()
    weight = router.mixture(torch.empty(0))
    # 0.5 + 0.3 + 0.15 is the first sum above 0.9; 0.95 alone exceeds it; four quarters are all needed
    expected = torch.tensor([[0.5, 0.3, 0.15, 0], [0.95, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(weight[:3], expected)
    assert (weight[3] > 0).sum() == 3  # of the two equal ones either may stay


@pytest.mark.parametrize("kind", KINDS)
def test_cached_padded_saved_and_lora_models_agree_with_the_plain_forward(kind, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, ids = model_of(kind, torch.float32), ids_of()
    with torch.no_grad():
        logits = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, logits[:, 5:], rtol=0, atol=1e-5)  # another order of float32 sums
        padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
        mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)), 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        assert torch.equal(LimeForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
        lora = get_peft_model(model, LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False))
        changed = lora(ids).logits
        assert (changed - logits).abs().max() > 1e-4  # the adapter is not bypassed
        torch.testing.assert_close(lora.merge_and_unload()(ids).logits, changed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_trains_and_checkpointing_changes_no_gradient(kind):
    model, ids = model_of(kind, torch.float32).train(), ids_of()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in plain.values())
    for reentrant in (False, True):
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, plain[name], rtol=1e-4, atol=1e-6)  # sums in another order


def test_routers_stay_in_float32_and_have_their_own_group():
    model = model_of("static", torch.bfloat16)
    assert model.model.layers[1].self_attn.router.weight.dtype == torch.float32
    assert torch.isfinite(model(ids_of()).logits).all()
    groups = {group["name"]: group["params"] for group in lime_param_groups(model)}
    assert len(groups["routers"]) == 3
    assert sum(p.numel() for p in groups["routers"]) == 4 * (2 + 3 + 4)


def test_initial_weights_are_the_published_ones():
    config = LimeConfig(**{**SHAPE, "num_attention_heads": 16, "num_hidden_layers": 24}, router_type="static")
    weight = LimeForCausalLM(config).model.layers[23].self_attn.router.weight
    # 384 draws of standard deviation 0.1: 4 standard errors of a standard deviation are 0.0145
    assert float(weight.std()) == pytest.approx(0.1, abs=0.0145)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"router_type": "static", "num_key_value_heads": 2},
            "`num_key_value_heads` must equal num_attention",
        ),
        ({"router_type": "dynamic", "router_init": "identity"}, "`router_init` must not be 'identity'"),
        ({"router_type": "static_top_p", "router_top_p": 1.0}, r"`router_top_p` must be in \(0, 1\), got 1.0"),
        ({"router_type": "softmax"}, "router_type"),
    ],
)
def test_what_v1_cannot_do_is_refused(options, said):
    with pytest.raises(Exception, match=said):
        LimeConfig(**SHAPE, **options)


def test_conversion_to_v1_is_refused_before_weights_load():
    from transformers import LlamaConfig, LlamaForCausalLM

    source = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with pytest.raises(Exception, match="a softmax over layers never equals one of them"):
        LimeForCausalLM.from_llama(source, router_type="static")
