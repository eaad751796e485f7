"""LIMe's mathematics, and what transformers' own test-suite asks of a causal LM, by the names it uses there.

One file, as long as it is, so that it reads beside ModelTesterMixin and GenerationTesterMixin.
"""

import copy
import shutil

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from hf_ext.lime import LimeConfig, LimeForCausalLM, LimeModel
from hf_ext.lime.modeling_lime import route


SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # large enough that attention matters and greedy choices have no ties
}
ROUTINGS = [("full", None), ("first", 1), ("first", 2), ("last", 2), ("period", 2), ("none", None)]


def lime(seed=0, cls=LimeForCausalLM, attn="sdpa", **options):
    torch.manual_seed(seed)
    return cls._from_config(LimeConfig(**{**SHAPE, **options}), attn_implementation=attn).eval()


def tokens(batch=2, length=9, seed=1):
    return torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def other_route(model):
    """The same weights with the plain chain instead of the shared buffer."""
    twin = copy.deepcopy(model)
    twin.config.router_implementation = "reference"
    return twin


# --- the mathematics -------------------------------------------------------------------------------------------------


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
def test_logits_are_the_papers_formula(routing, window, implementation):
    model = lime(routing=routing, routing_window=window, router_implementation=implementation).double()
    ids = tokens()
    # RMS norm and the angles are float32 in transformers: their rounding is all that separates the two
    torch.testing.assert_close(model(ids).logits, by_definition(model, ids), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("routing", "window"), ROUTINGS[:-1])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])  # MQA, GQA, MHA
def test_the_shared_buffer_has_the_references_gradients(routing, window, kv_heads):
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


def test_gradients_flow_when_only_routers_are_trained():
    model = lime(router_init="identity").requires_grad_(False)
    for layer in model.model.layers[1:]:
        layer.self_attn.router.requires_grad_(True)
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers[1:]:  # the zero entries learn at once
        assert (layer.self_attn.router.weight.grad != 0).all()


def test_a_second_backward_over_a_retained_graph_is_the_same():
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
def test_sources_of_each_routing(routing, window, expected):
    config = LimeConfig(**{**SHAPE, "num_hidden_layers": 5}, routing=routing, routing_window=window)
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


def test_initial_routers_are_identity_plus_noise_of_the_papers_spread():
    model = lime(num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8)
    for index, layer in list(enumerate(model.model.layers))[1:]:
        weight = layer.self_attn.router.weight
        assert torch.equal(weight[:, -1], torch.eye(8))
        noise, bound = weight[:, :-1], (3 / (8 * (index + 1))) ** 0.5
        assert noise.abs().max() <= bound
        # standard deviation of n uniform draws: sigma (1 +- 3 * 0.45 / sqrt(n))
        assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=1.35 / noise.numel() ** 0.5)


def test_extra_saved_for_backward_is_at_most_three_kv_buffers_and_linear_in_depth():
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
        options = {**SHAPE, "num_hidden_layers": layers}
        llama = LlamaForCausalLM(LlamaConfig(**options)).train()
        one_buffer = layers * 2 * ids.numel() * 2 * 8 * 4  # layers x (K, V) x tokens x heads x head size x bytes
        for implementation in ("auto", "reference"):
            model = lime(**options, router_implementation=implementation).train()
            assert saved(model, ids) - saved(llama, ids) <= 3 * one_buffer


# --- conventions of a transformers model -----------------------------------------------------------------------------


def test_save_load(tmp_path):
    model = lime()
    model.save_pretrained(tmp_path)
    again, info = LimeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_can_init_all_missing_weights(tmp_path):
    lime(routing="none").save_pretrained(tmp_path)
    model, info = LimeForCausalLM.from_pretrained(tmp_path, routing="full", output_loading_info=True)
    assert len(info["missing_keys"]) == 3
    assert torch.equal(model.model.layers[3].self_attn.router.weight[:, -1], torch.eye(2))
    assert model.model.layers[3].self_attn.router.weight[:, :-1].abs().max() <= (3 / 8) ** 0.5


def test_router_weights_that_a_model_without_routing_ignores_are_reported(tmp_path):
    lime().save_pretrained(tmp_path)
    _, info = LimeForCausalLM.from_pretrained(tmp_path, routing="none", output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == [f"model.layers.{i}.self_attn.router.weight" for i in (1, 2, 3)]


def test_fewer_layers_load_from_a_deeper_checkpoint(tmp_path):
    model = lime()
    model.save_pretrained(tmp_path)
    cut = LimeForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    hidden = model(tokens(), output_hidden_states=True).hidden_states[2]
    assert torch.equal(cut.model(tokens()).last_hidden_state, cut.model.norm(hidden))
    cut.save_pretrained(tmp_path / "cut")
    again = LimeForCausalLM.from_pretrained(tmp_path / "cut")
    assert torch.equal(again(tokens()).logits, cut(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_stay_float32_in_half_precision(tmp_path, dtype):
    model = lime()
    exact = model.model.layers[2].self_attn.router.weight.clone()
    model.save_pretrained(tmp_path)
    loaded = LimeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for half in (loaded, model.to(dtype)):
        router = half.model.layers[2].self_attn.router.weight
        assert router.dtype == torch.float32 and torch.equal(router, exact)
        assert half.lm_head.weight.dtype == dtype and torch.isfinite(half(tokens()).logits).all()


def test_eager_matches_sdpa_inference():
    sdpa, eager = lime(), lime(attn="eager")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    keep = mask.bool()
    a, b = (m(tokens(), attention_mask=mask).logits[keep] for m in (sdpa, eager))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # float32, another order of sums


def test_flex_attention_matches_sdpa():
    ids = tokens(1, 16)
    with torch.no_grad():
        a, b = lime()(ids).logits, lime(attn="flex_attention")(ids).logits
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # float32, another order of sums


@pytest.mark.parametrize("window", [None, 4])
def test_left_padding_compatibility(window):
    model = lime(sliding_window=window)
    ids = tokens(2, 6)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(out, model(ids).logits, rtol=0, atol=1e-5)  # float32, other shapes


def test_packed_rows_equal_their_documents():
    model = lime()
    first, second = tokens(1, 4, seed=1), tokens(1, 5, seed=2)
    positions = torch.tensor([[*range(4), *range(5)]])
    packed = model(torch.cat((first, second), 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat((model(first).logits, model(second).logits), 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)  # float32, other shapes


def test_position_ids_with_gaps_and_4d_masks():
    model, ids = lime(), tokens()
    gaps = torch.arange(9)[None] * 3
    assert not torch.allclose(model(ids, position_ids=gaps).logits, model(ids).logits)
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 9, 9)
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_hidden_states_output():
    model, ids = lime(), tokens()
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 5 and all(s.shape == (2, 9, 32) for s in states)
    assert torch.equal(states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(states[-1]), model(ids).logits)


def test_attention_outputs():
    weights = lime(attn="eager")(tokens(), output_attentions=True).attentions
    assert len(weights) == 4 and weights[0].shape == (2, 4, 9, 9)
    torch.testing.assert_close(weights[2].sum(-1), torch.ones(2, 4, 9))


def test_attention_outputs_under_sdpa_say_what_to_do():
    model = lime()
    with pytest.raises(ValueError, match="set it to 'eager'"):
        model.config.output_attentions = True
        model.config.validate()


def test_resize_tokens_embeddings_keeps_tying(tmp_path):
    model = lime(tie_word_embeddings=True)
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model(tokens()).logits.shape[-1] == 70
    model.save_pretrained(tmp_path)
    again = LimeForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_inputs_embeds_equal_input_ids():
    model, ids = lime(), tokens()
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


def test_base_model_is_the_causal_lm_without_its_head(tmp_path):
    model = lime()
    model.save_pretrained(tmp_path)
    base = LimeModel.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head(base(tokens()).last_hidden_state), model(tokens()).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_training_gradient_checkpointing(use_reentrant, implementation):
    plain = lime(router_implementation=implementation).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    saving.enable_input_require_grads()
    plain.enable_input_require_grads()
    for model in (plain, saving):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8, msg=name)  # sums of two orders in float32


def test_autocast_trains():
    model = lime().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    exact = lime()(tokens(), labels=tokens()).loss
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)  # bfloat16 has 8 bits
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("routing", ["full", "first"])
def test_torch_compile_fullgraph(routing):
    model = lime(routing=routing, routing_window=1 if routing == "first" else None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a, b = compiled(tokens(), labels=tokens()), model(tokens(), labels=tokens())
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)  # the plain chain against one GEMM
    ours = torch.autograd.grad(b.loss, list(model.parameters()))
    theirs = torch.autograd.grad(a.loss, list(model.parameters()))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)  # float32, another order of sums


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize(("attn", "fullgraph"), [("sdpa", True), ("flex_attention", False)])
def test_torch_compile_with_inductor(attn, fullgraph):
    # flex breaks the graph while transformers builds its mask, in Llama too (transformers 5.23, torch 2.13)
    model = lime(attn=attn, num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=fullgraph)
    ids = tokens(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=0, atol=1e-5)  # float32, fused sums


def test_peft_lora_trains_on_top():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(lime(), LoraConfig(target_modules=["k_proj", "v_proj"], modules_to_save=["router"]))
    ids = tokens()
    before = model(ids, labels=ids).loss
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert model(ids, labels=ids).loss < before
    routers = [n for n, p in model.named_parameters() if p.requires_grad and ".router." in n]
    assert len(routers) == 3


# --- generation and caches -------------------------------------------------------------------------------------------


def greedy_without_cache(model, ids, new):
    for _ in range(new):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("routing", "window"), [("full", None), ("first", 1)])
def test_greedy_generate_is_the_same_with_every_cache(cache, routing, window):
    model = lime(routing=routing, routing_window=window)
    model.generation_config.eos_token_id = None
    ids = tokens()
    out = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation=cache)
    assert torch.equal(out, greedy_without_cache(model, ids, 12))


@pytest.mark.parametrize("layer_types", [None, ["sliding_attention", "full_attention"] * 2])
def test_sliding_windows_generate_the_same_with_and_without_cache(layer_types):
    model = lime(sliding_window=4, layer_types=layer_types)
    model.generation_config.eos_token_id = None
    out = model.generate(tokens(), max_new_tokens=12, do_sample=False)
    assert torch.equal(out, greedy_without_cache(model, tokens(), 12))


def test_cached_keys_have_llamas_shape():
    cache = lime()(tokens(), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache) and len(cache.layers) == 4
    assert all(layer.keys.shape == layer.values.shape == (2, 2, 9, 8) for layer in cache.layers)


def test_continue_from_past_key_values_and_chunked_prefill():
    model, ids = lime(), tokens(2, 12)
    whole = model(ids).logits
    cache, chunks = DynamicCache(config=model.config), []
    for start in (0, 5, 6):  # chunks of 5, 1 and 6
        chunks.append(model(ids[:, start : {0: 5, 5: 6, 6: 12}[start]], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=0, atol=1e-5)  # float32, other shapes
    a = model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=5)
    assert torch.equal(a, model.generate(ids, max_new_tokens=6, do_sample=False))


def test_left_padded_batch_generates_what_single_rows_do():
    model = lime()
    model.generation_config.eos_token_id = None
    rows = [tokens(1, n, seed=n) for n in (3, 6, 8)]
    batch = torch.cat([nn.functional.pad(row, (8 - row.shape[1], 0)) for row in rows])
    out = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=8, do_sample=False)
    for row, got in zip(rows, out, strict=True):
        alone = model.generate(row, max_new_tokens=8, do_sample=False)
        assert torch.equal(got[8:], alone[0, row.shape[1] :])


def test_beam_search_finds_the_best_of_all_continuations():
    model = lime(vocab_size=8)
    model.generation_config.eos_token_id = None
    ids = tokens(1, 4) % 8
    beams = model.generate(ids, num_beams=64, max_new_tokens=3, do_sample=False, length_penalty=0.0)
    every = torch.cartesian_prod(*[torch.arange(8)] * 3)
    rows = torch.cat((ids.expand(512, 4), every), 1)
    scores = model(rows).logits.log_softmax(-1)[:, 3:6].gather(2, every[..., None]).sum((1, 2))
    assert torch.equal(beams[0, 4:], every[scores.argmax()])


def test_sample_generate_repeats_with_its_seed():
    model = lime()
    torch.manual_seed(3)
    first = model.generate(tokens(), max_new_tokens=8, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(tokens(), max_new_tokens=8, do_sample=True))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"num_attention_heads": 3}, "multiple of `num_key_value_heads`, got 3 and 2"),
        ({"head_dim": 7}, "`head_dim` must be even"),
        ({"head_dim": 0}, "`head_dim` must be at least 1"),
        ({"routing": "first"}, r"`routing_window` must be in \[1, num_hidden_layers=4\).*got None"),
        ({"routing": "last", "routing_window": 0}, "got 0"),
        ({"routing": "period", "routing_window": 4}, "got 4"),
        ({"routing_window": 2}, "must be None for routing='full', got 2"),
        ({"routing": "some"}, "routing"),
        ({"router_init": "zeros"}, "router_init"),
        ({"rms_norm_eps": 1}, "rms_norm_eps"),
        ({"router_inti": "identity"}, "Did you mean `router_init`"),
        ({"routr": 3}, "routing options are"),
        ({"n_layers": 3}, "`n_layers` is not an option of LimeConfig, got 3"),
        ({"layer_types": ["sliding_attention"] * 4}, "`sliding_window` must be given"),
        ({"sliding_window": 0}, "`sliding_window` must be at least 1"),
    ],
)
def test_a_wrong_option_is_named_before_a_model_is_built(options, message):
    with pytest.raises(Exception, match=message):
        LimeConfig(**{**SHAPE, **options})


def test_notes_of_other_tools_in_a_config_file_are_kept(tmp_path):
    import json

    LimeConfig(**SHAPE).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"some_tools_note": 1}))
    config = LimeConfig.from_pretrained(tmp_path)
    assert config.some_tools_note == 1
    file.write_text(json.dumps(json.loads(file.read_text()) | {"routing_windw": 1}))
    with pytest.raises(ValueError, match="Did you mean `routing_window`"):
        LimeConfig.from_pretrained(tmp_path)


def test_one_layer_routes_nothing():
    model = lime(num_hidden_layers=1)
    assert model.model.layers[0].self_attn.router is None
    assert torch.equal(model(tokens()).logits, lime(num_hidden_layers=1, routing="none")(tokens()).logits)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_empty_input_is_refused(shape):
    with pytest.raises(ValueError, match="at least one row and one token"):
        lime()(torch.zeros(shape, dtype=torch.long))


def test_neither_or_both_inputs_are_refused():
    model = lime()
    with pytest.raises(ValueError, match="got neither"):
        model()
    with pytest.raises(ValueError, match="got both"):
        model(tokens(), inputs_embeds=model.model.embed_tokens(tokens()))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_infinite_keys_are_reported_with_their_layer(implementation):
    model = lime(router_implementation=implementation)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="layer 2"):
        model(tokens())


def test_a_cache_of_another_model_is_refused():
    other = lime(num_key_value_heads=4)(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"\(2, 2, 8\), got \(2, 4, 8\)"):
        lime()(tokens(), past_key_values=other)
    deeper = lime(num_hidden_layers=6)(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="got one of 6"):
        lime()(tokens(), past_key_values=deeper)


def test_a_static_cache_shorter_than_the_chunk_is_refused():
    model = lime()
    with pytest.raises(ValueError, match="max_cache_len=9"):
        cache = StaticCache(config=model.config, max_cache_len=4)
        model(tokens()[:, :4], past_key_values=cache)
        model(tokens(), past_key_values=cache)


def test_a_router_missing_its_gradient_group_is_not_decayed():
    from hf_ext.lime import lime_param_groups

    groups = {g["name"]: g for g in lime_param_groups(lime(attention_bias=True))}
    assert groups["routers"]["lr"] == 1e-2 and groups["routers"]["weight_decay"] == 0
    assert len(groups["routers"]["params"]) == 3
    assert all(p.dim() == 1 for p in groups["vectors"]["params"]) and groups["vectors"]["weight_decay"] == 0
    assert sum(len(g["params"]) for g in groups.values()) == len(list(lime(attention_bias=True).parameters()))
    with pytest.raises(ValueError, match="`router_lr` must be a number >= 0, got -1"):
        lime_param_groups(lime(), router_lr=-1)
    with pytest.raises(ValueError, match="require a gradient"):
        lime_param_groups(lime().requires_grad_(False))


def test_a_plain_trainer_takes_the_groups_by_one_argument(tmp_path):
    from transformers import Trainer, TrainingArguments

    from hf_ext.lime import lime_param_groups

    model = lime().train()
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, save_strategy="no"),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": lime_param_groups(model)}),
    )
    before = model(tokens(8), labels=tokens(8)).loss.item()
    trainer.train()
    assert model(tokens(8), labels=tokens(8)).loss.item() < before
    # a linear schedule over 3 steps: after the last step every group is at 0 of its own initial rate
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-2, 1e-3, 1e-3]
