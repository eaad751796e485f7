"""Entropy, separability, router map and circuits: closed forms, planted answers, and everything once more by hand."""

import math

import pytest
import torch
import transformers

from hf_ext import LimeConfig, LimeForCausalLM
from hf_ext.analysis.depth import depthwise_circuits, layer_entropies, renyi_entropy, router_map, separability


SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
IDS = torch.randint(1, 20, (24, 20), generator=torch.Generator().manual_seed(1))
CLASSES = [3, 4, 5, 6]
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64: the same sums in another order


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **options})).double().eval()


def lime(seed=0, **options):
    torch.manual_seed(seed)
    return LimeForCausalLM(LimeConfig(**{**SHAPE, **options})).double().eval()


def entropy_by_hand(z, alpha):
    """The long way: a Gram matrix over vectors, and its singular values."""
    z = z.double()
    z = (z - z.mean(0)) / z.std(0, correction=0)
    p = torch.linalg.svdvals(z @ z.T)
    p = p / p.sum()
    return float((p**alpha).sum().log() / (1 - alpha))


@pytest.mark.parametrize("alpha", [0.5, 1, 2])
def test_k_equal_eigenvalues_have_entropy_log_k_whatever_the_order(alpha):
    # columns of a Hadamard matrix: mean 0, orthogonal, equally long
    two = torch.tensor([[1.0, 1], [1, -1]])
    hadamard = torch.kron(two, torch.kron(two, two))[:, 1:]
    for k in (1, 2, 3, 7):
        assert renyi_entropy(hadamard[:, :k], alpha) == pytest.approx(math.log(k), abs=1e-12)


def test_vectors_on_a_line_have_entropy_0():
    z = torch.randn(9, 1, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, -2, 5]])
    # the eigenvalues that should be 0 are about 1e-7 of the first in float32, and alpha = 0.5 takes their roots
    assert renyi_entropy(z) == pytest.approx(0, abs=1e-2)
    assert renyi_entropy(z, 2) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7)])
@pytest.mark.parametrize("alpha", [0.5, 0.99, 3])
def test_entropy_is_the_formulas_whichever_gram_matrix_is_smaller(shape, alpha):
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(
        1, shape[1] + 1
    )
    # the larger Gram matrix has zero eigenvalues that come out near 1e-17 of the sum: a root of that is 3e-9 each
    assert renyi_entropy(z, alpha) == pytest.approx(entropy_by_hand(z, alpha), abs=1e-6)


def test_shannons_entropy_is_the_limit_of_alpha_1():
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    near = (renyi_entropy(z, 1 - 1e-5) + renyi_entropy(z, 1 + 1e-5)) / 2
    assert renyi_entropy(z, 1) == pytest.approx(
        near, abs=1e-8
    )  # the error of a symmetric difference is of order 1e-10


def test_scale_shift_and_constant_features_do_not_change_the_entropy():
    z = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = torch.cat([z * torch.tensor([1, 10, 1e3, 1e-3, 7]) + 4, torch.full((12, 1), 0.1)], dim=1)
    assert renyi_entropy(other) == pytest.approx(renyi_entropy(z), abs=1e-9)
    assert renyi_entropy(torch.full((12, 5), 0.1)) == 0


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf])
def test_an_order_without_a_meaning_is_refused(alpha):
    with pytest.raises(ValueError, match="`alpha` must be above 0"):
        renyi_entropy(torch.randn(4, 3), alpha)


def test_vectors_that_cannot_have_an_entropy_are_refused_by_name():
    with pytest.raises(ValueError, match=r"at least 2 vectors \(t, dim\), got shape \(1, 3\)"):
        renyi_entropy(torch.randn(1, 3))
    with pytest.raises(ValueError, match="got shape"):
        renyi_entropy(torch.randn(3))
    with pytest.raises(ValueError, match="finite, got NaN or infinity"):
        renyi_entropy(torch.tensor([[1.0, 2], [math.nan, 4]]))
    with pytest.raises(TypeError, match=r"floating-point numbers, got torch.int64"):
        renyi_entropy(torch.ones(3, 3, dtype=torch.long))


def test_entropies_are_of_v_projs_output_and_of_the_stream_before_the_final_norm():
    model = llama()
    found = layer_entropies(model, IDS, batch_size=7)
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(keep(("values", i)))
        layer.register_forward_hook(keep(("hidden", i)))
    with torch.no_grad():
        model(IDS)
    for side in ("values", "hidden"):
        expected = [entropy_by_hand(seen[side, i], 0.5) for i in range(3)]
        # by hand the larger Gram matrix: 480 eigenvalues that should be 0, each a root of 1e-17
        assert getattr(found, side).tolist() == pytest.approx(expected, abs=1e-4)
    assert found.tokens == IDS.numel()


def routed_by_hand(model, ids):
    """Layer by layer: [tokens, G, d] of raw and of routed values, without the model's own routing code."""
    raw = {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(
            lambda module, args, output, i=i: raw.__setitem__(i, output.detach().flatten(0, 1).unflatten(-1, (2, -1)))
        )
    with torch.no_grad():
        model(ids)
    routed = []
    for i, layer in enumerate(model.model.layers):
        router = layer.self_attn.router
        out = torch.zeros_like(raw[0]) if router is not None else raw[i]
        for head in range(2 if router is not None else 0):
            for place, source in enumerate(router.sources):
                for other in range(2):
                    out[:, head] += router.weight[head, place, other].detach().double() * raw[source][:, other]
        routed.append(out)
    return raw, routed


@pytest.mark.parametrize("options", [{}, {"routing": "last", "routing_window": 2}])
def test_limes_values_are_the_routed_ones(options):
    model = lime(**options)
    found = layer_entropies(model, IDS)
    expected = [renyi_entropy(routed.flatten(1)) for routed in routed_by_hand(model, IDS)[1]]
    torch.testing.assert_close(found.values, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)  # float32 routers


def test_a_llama_and_its_identity_twin_give_the_same_numbers():
    plain = llama()
    twin = LimeForCausalLM.from_llama(plain)
    for ours, theirs in zip(layer_entropies(twin, IDS), layer_entropies(plain, IDS), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    for ours, theirs in zip(separability(twin, IDS, CLASSES), separability(plain, IDS, CLASSES), strict=True):
        assert ours == theirs if isinstance(ours, dict) else torch.equal(ours, theirs)
    assert depthwise_circuits(twin, IDS) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side):
    model = lime()
    pad = torch.full((len(IDS), 5), CLASSES[0])  # as an id it would count as a class
    padded = torch.cat([pad, IDS] if side == "left" else [IDS, pad], dim=1)
    mask = torch.cat([pad * 0, IDS * 0 + 1] if side == "left" else [IDS * 0 + 1, pad * 0], dim=1)
    for function in (layer_entropies, lambda *a, **k: separability(*a, CLASSES, **k)):
        clean, found = function(model, IDS), function(model, padded, attention_mask=mask)
        torch.testing.assert_close(found.values, clean.values, **EXACT)
        torch.testing.assert_close(found.hidden, clean.hidden, **EXACT)
        assert found[2] == clean[2]
    clean, found = depthwise_circuits(model, IDS), depthwise_circuits(model, padded, attention_mask=mask)
    assert [c._replace(strength=round(c.strength, 9)) for c in found] == [
        c._replace(strength=round(c.strength, 9)) for c in clean
    ]


def test_only_the_first_tokens_count_and_a_batch_size_changes_nothing():
    model = llama()
    first = layer_entropies(model, IDS[:3], batch_size=2)
    limited = layer_entropies(model, IDS, max_tokens=60)
    assert first.tokens == limited.tokens == 60
    torch.testing.assert_close(limited.values, first.values, **EXACT)


def test_a_window_of_attention_does_not_cut_the_values():
    model = lime(sliding_window=4)
    assert layer_entropies(model, IDS).tokens == IDS.numel()


def test_gpt2_and_the_base_model_alone_are_welcome():
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    assert layer_entropies(transformers.GPT2LMHeadModel(config).eval(), IDS).values.shape == (2,)
    model = llama()
    assert torch.equal(layer_entropies(model.model, IDS).hidden, layer_entropies(model, IDS).hidden)


def plant(model, scale):
    """The token decides the first two coordinates of the embedding, and no layer adds anything to the stream."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        generator = torch.Generator().manual_seed(0)
        embedding = torch.randn(61, 32, dtype=torch.float64, generator=generator)
        for token in CLASSES:
            embedding[token] = scale * embedding[token]
        model.model.embed_tokens.weight.copy_(embedding)
    return model


def test_tokens_with_vectors_of_their_own_are_told_apart_and_tokens_with_the_same_one_are_not():
    apart = separability(plant(llama(), 1.0), IDS, CLASSES)
    assert apart.values.tolist() == apart.hidden.tolist() == [1.0] * 3
    # embeddings all 0: one vector, so every guess is one class, and classes are balanced: chance exactly
    alike = separability(plant(llama(), 0.0), IDS, CLASSES)
    assert alike.values.tolist() == alike.hidden.tolist() == [0.25] * 3


def test_counts_are_those_of_the_text_and_classes_are_cut_to_the_rarest():
    ids = torch.tensor([[3] * 10 + [4] * 30 + [7] * 4])
    found = separability(llama(), ids, [3, 4])
    assert found.counts == {3: 10, 4: 30}
    scaled = found.values * 20  # 10 vectors a class were classified
    torch.testing.assert_close(scaled, scaled.round(), **EXACT)


def test_a_class_too_rare_is_refused_by_name_and_number():
    with pytest.raises(ValueError, match=r"2 \* folds = 10 times, got 60: 0. Give more text"):
        separability(llama(), IDS, [3, 60])
    assert separability(llama(), IDS, CLASSES, per_class=10).values.shape == (3,)
    with pytest.raises(ValueError, match="`per_class` must be at least 10, got 9"):
        separability(llama(), IDS, CLASSES, per_class=9)
    with pytest.raises(ValueError, match=r"two or more different token ids, got \[3, 3\]"):
        separability(llama(), IDS, [3, 3])


def test_the_router_map_has_a_planted_weight_in_the_row_that_reads_and_nan_where_none_can():
    model = LimeForCausalLM.from_llama(llama())
    with torch.no_grad():
        model.model.layers[2].self_attn.router.weight[0, 1, 1] = -0.5  # layer 2, head 0 reads layer 1, head 1
        model.model.layers[2].self_attn.router.weight[1, 1, 0] = 0.25
    nan = math.nan
    expected = torch.tensor([[1, nan, nan], [0, 1, nan], [0, 0.5, 1]])
    torch.testing.assert_close(router_map(model), expected, equal_nan=True, rtol=0, atol=0)
    summed = torch.tensor([[2, nan, nan], [0, 2, nan], [0, 0.75, 2]])
    torch.testing.assert_close(router_map(model.model, "sum"), summed, equal_nan=True, rtol=0, atol=0)


def test_the_router_map_follows_a_window():
    found = router_map(lime(routing="first", routing_window=1, num_hidden_layers=4))
    assert found.isnan().tolist() == [
        [False, True, True, True],
        [False, False, True, True],
        [False, False, False, True],
        [False, True, False, False],
    ]


@pytest.mark.parametrize("router_type", ["static", "static_top_p"])
def test_v1_routers_share_one_softmax_over_the_layers(router_type):
    found = router_map(lime(router_type=router_type, num_key_value_heads=4), "sum")
    # 4 heads, each of weight 1; float32
    torch.testing.assert_close(found.nansum(1), torch.full((3,), 4.0), rtol=1e-6, atol=0)


def test_circuits_are_the_planted_ones_with_the_tokens_that_matter():
    model = LimeForCausalLM.from_llama(plant(llama(), 1.0))
    with torch.no_grad():
        model.model.layers[2].self_attn.router.weight[1, 0, 0] = 2.0
        model.model.layers[1].self_attn.router.weight[0, 0, 1] = 0.1
        model.model.embed_tokens.weight[9] *= 1e-9  # far below the norm's epsilon: its values are near 0
    found = depthwise_circuits(model, IDS, tokens=100)
    assert [c[:4] for c in found] == [(2, 1, 0, 0), (1, 0, 0, 1)]
    assert found[0].tokens[-1] == 9
    assert sorted(found[0].tokens) == IDS.unique().tolist()


def test_strengths_tokens_and_order_are_those_computed_by_hand():
    model = lime(seed=3)
    found = depthwise_circuits(model, IDS, top=5, tokens=3)
    raw, routed = routed_by_hand(model, IDS)
    expected = []
    for i, layer in enumerate(model.model.layers[1:], start=1):
        weight = layer.self_attn.router.weight.detach().double()
        for head in range(2):
            for source in range(i):
                parts = [weight[head, source, other] * raw[source][:, other] for other in range(2)]
                fetched = (parts[0] + parts[1]).norm(dim=-1)
                strength = float((fetched / routed[i][:, head].norm(dim=-1)).mean())
                strongest = max(range(2), key=lambda other: float(parts[other].norm(dim=-1).mean()))
                means = {int(t): float(fetched[IDS.flatten() == t].mean()) for t in IDS.unique()}
                tokens = sorted(means, key=means.get, reverse=True)[:3]
                expected.append((i, head, source, strongest, strength, tokens))
    expected.sort(key=lambda c: -c[4])
    assert [(*c[:4], c.tokens) for c in found] == [(*c[:4], c[5]) for c in expected[:5]]
    assert [c.strength for c in found] == pytest.approx([c[4] for c in expected[:5]], rel=1e-6)  # float32 routers


def test_a_model_without_the_routers_needed_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"must be a LIMe, got LlamaForCausalLM. Convert it: LimeForCausalLM"):
        router_map(llama())
    with pytest.raises(ValueError, match="among kv, static, static_top_p, got 'dynamic'"):
        router_map(lime(router_type="dynamic", num_key_value_heads=4))
    with pytest.raises(ValueError, match="among kv, got 'static'"):
        depthwise_circuits(lime(router_type="static", num_key_value_heads=4), IDS)
    with pytest.raises(ValueError, match='`reduce` must be "max" or "sum", got \'mean\''):
        router_map(lime(), "mean")


def test_bad_tokens_masks_and_numbers_are_refused_in_a_sentence():
    model = llama()
    with pytest.raises(TypeError, match="tensor of integers, got torch.float32"):
        layer_entropies(model, IDS.float())
    with pytest.raises(ValueError, match=r"shape \(N, T\) with a token, got \(20,\). Add a batch: ids\[None\]"):
        layer_entropies(model, IDS[0])
    with pytest.raises(ValueError, match=r"at least 2 tokens, got 1. Give more text"):
        layer_entropies(model, IDS[:1, :1])
    with pytest.raises(ValueError, match=r"shape of `input_ids`, \(24, 20\), got \(1, 20\)"):
        separability(model, IDS, CLASSES, attention_mask=IDS[:1])
    with pytest.raises(ValueError, match="keep a token, got only zeros"):
        layer_entropies(model, IDS, attention_mask=IDS * 0)
    with pytest.raises(ValueError, match="`folds` must be at least 2, got 1"):
        separability(model, IDS, CLASSES, folds=1)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        layer_entropies(model, IDS, batch_size=0)
    with pytest.raises(TypeError, match="`top` must be an integer, got 2.5"):
        depthwise_circuits(lime(), IDS, top=2.5)
