"""LIMe's mathematics: the paper's formula, the shared buffer against the plain chain, initialisation and memory."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.lime import LimeConfig, LimeForCausalLM
from hf_ext.lime.modeling_lime import route


ROUTINGS = [("full", None), ("first", 1), ("first", 2), ("last", 2), ("period", 2), ("none", None)]


def other_route(model):
    """The same weights with the plain chain instead of the shared buffer."""
    twin = copy.deepcopy(model)
    twin.config.router_implementation = "reference"
    return twin


def by_definition(model, ids):
    """Logits by the paper's formulas with loops over heads and layers, in the model's dtype, without its forward."""
    config = model.config
    B, T, G, d = *ids.shape, config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // G
    angles = torch.arange(T).double()[:, None] / 1e4 ** (torch.arange(0, d, 2).double() / d)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))

    def rope(x):
        return x * cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin

    def norm(x, module):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * module.weight

    x, raws = model.model.embed_tokens(ids), []
    future = torch.full((T, T), -torch.inf).triu(1)
    for layer in model.model.layers:
        attention, h = layer.self_attn, norm(x, layer.input_layernorm)
        raws.append([p(h).view(B, T, G, d) for p in (attention.k_proj, attention.v_proj)])
        q, heads = attention.q_proj(h).view(B, T, -1, d), []
        for head in range(config.num_attention_heads):
            if attention.router is None:
                key, value = (raw[:, :, head // group] for raw in raws[-1])
            else:
                key, value = (
                    sum(
                        attention.router.weight[head // group, column, other] * raws[source][kind][:, :, other]
                        for column, source in enumerate(attention.router.sources)
                        for other in range(G)
                    )
                    for kind in (0, 1)
                )
            scores = rope(q[:, :, head]) @ rope(key).transpose(1, 2) / d**0.5 + future
            heads.append(scores.softmax(-1) @ value)
        x = x + attention.o_proj(torch.cat(heads, -1))
        h, mlp = norm(x, layer.post_attention_layernorm), layer.mlp
        x = x + mlp.down_proj(nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return model.lm_head(norm(x, model.model.norm))


@pytest.mark.parametrize(("routing", "window"), ROUTINGS)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_logits_are_the_papers_formula(routing, window, implementation, lime, tokens):
    model = lime(routing=routing, routing_window=window, router_implementation=implementation).double()
    ids = tokens()
    # RMS norm and the angles are float32 in transformers: their rounding is all that separates the two
    torch.testing.assert_close(model(ids).logits, by_definition(model, ids), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("routing", "window"), ROUTINGS[:-1])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])  # MQA, GQA, MHA
def test_the_shared_buffer_has_the_references_gradients(routing, window, kv_heads, lime, tokens):
    ours = lime(routing=routing, routing_window=window, num_key_value_heads=kv_heads).double()
    plain = other_route(ours)
    ids = tokens()
    for model in (ours, plain):
        model(ids, labels=ids).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)  # float64, another order of sums


def test_route_passes_gradcheck_and_matches_einsum():
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    raws = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.testing.assert_close(route(weight, raws), torch.einsum("hjo,jon->hn", weight, torch.stack(raws)))
    assert torch.autograd.gradcheck(lambda w, *r: route(w, list(r)), (weight, *raws))


def test_gradients_flow_when_only_routers_are_trained(lime, tokens):
    model = lime(router_init="identity").requires_grad_(False)
    for layer in model.model.layers[1:]:
        layer.self_attn.router.requires_grad_(True)
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers[1:]:  # the zero entries learn at once
        assert (layer.self_attn.router.weight.grad != 0).all()


def test_a_second_backward_over_a_retained_graph_is_the_same(lime, tokens):
    model, ids = lime(), tokens()
    loss = model(ids, labels=ids).loss
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("routing", "window", "expected"),
    [
        ("full", None, [[], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
        ("first", 1, [[], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]),
        ("first", 2, [[], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4]]),
        ("last", 2, [[], [0, 1], [1, 2], [2, 3], [3, 4]]),
        ("period", 2, [[], [1], [0, 2], [1, 3], [0, 2, 4]]),
        ("none", None, [[], [], [], [], []]),
    ],
)
def test_sources_of_each_routing(routing, window, expected, shape):
    config = LimeConfig(**{**shape, "num_hidden_layers": 5}, routing=routing, routing_window=window)
    assert [config.sources(layer) for layer in range(5)] == expected


def test_full_routing_adds_the_papers_number_of_parameters_and_macs():
    for layers, heads, expected in ((16, 8, 8640), (16, 32, 138240)):  # paper, section 3: the 1B models
        with torch.device("meta"):
            model = LimeForCausalLM(
                LimeConfig(
                    hidden_size=2048,
                    intermediate_size=8192,
                    num_hidden_layers=layers,
                    num_attention_heads=32,
                    num_key_value_heads=heads,
                    vocab_size=50257,
                )
            )
        routers = [layer.self_attn.router for layer in model.model.layers[1:]]
        assert sum(router.weight.numel() for router in routers) == expected
        macs = sum(2 * 64 * router.weight.numel() for router in routers)  # every weight meets 2d numbers of a token
        assert macs == 2 * 64 * heads**2 * (layers * (layers + 1) // 2 - 1)


def test_initial_routers_are_identity_plus_noise_of_the_papers_spread(lime):
    model = lime(num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8)
    for index, layer in list(enumerate(model.model.layers))[1:]:
        weight = layer.self_attn.router.weight
        assert torch.equal(weight[:, -1], torch.eye(8))
        noise, bound = weight[:, :-1], (3 / (8 * (index + 1))) ** 0.5
        assert noise.abs().max() <= bound
        # standard deviation of n uniform draws: sigma (1 +- 3 * 0.45 / sqrt(n))
        assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=1.35 / noise.numel() ** 0.5)


def test_extra_saved_for_backward_is_at_most_three_kv_buffers_and_linear_in_depth(lime, tokens, shape):
    def saved(model, ids):
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept, sizes = [], {}

        def pack(tensor):
            kept.append(tensor)  # so that no address is used twice
            if (pointer := tensor.untyped_storage().data_ptr()) not in owned:
                sizes[pointer] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept.append(model(ids, labels=ids).loss)
        return sum(sizes.values())

    ids = tokens(2, 32)
    for layers in (4, 12):
        options = {**shape, "num_hidden_layers": layers}
        llama = LlamaForCausalLM(LlamaConfig(**options)).train()
        one_buffer = layers * 2 * ids.numel() * 2 * 8 * 4  # layers x (K, V) x tokens x heads x head size x bytes
        for implementation in ("auto", "reference"):
            model = lime(**options, router_implementation=implementation).train()
            assert saved(model, ids) - saved(llama, ids) <= 3 * one_buffer
