"""What transformers' own test-suite asks of a causal LM, by the names it uses there; generation and caches."""

import copy
import shutil

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hf_ext.lime import LimeForCausalLM, LimeModel


def test_save_load(tmp_path, lime, tokens):
    model = lime()
    model.save_pretrained(tmp_path)
    again, info = LimeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_can_init_all_missing_weights(tmp_path, lime):
    lime(routing="none").save_pretrained(tmp_path)
    model, info = LimeForCausalLM.from_pretrained(tmp_path, routing="full", output_loading_info=True)
    assert len(info["missing_keys"]) == 3
    assert torch.equal(model.model.layers[3].self_attn.router.weight[:, -1], torch.eye(2))
    assert model.model.layers[3].self_attn.router.weight[:, :-1].abs().max() <= (3 / 8) ** 0.5


def test_router_weights_that_a_model_without_routing_ignores_are_reported(tmp_path, lime):
    lime().save_pretrained(tmp_path)
    _, info = LimeForCausalLM.from_pretrained(tmp_path, routing="none", output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == [f"model.layers.{i}.self_attn.router.weight" for i in (1, 2, 3)]


def test_fewer_layers_load_from_a_deeper_checkpoint(tmp_path, lime, tokens):
    model = lime()
    model.save_pretrained(tmp_path)
    cut = LimeForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    hidden = model(tokens(), output_hidden_states=True).hidden_states[2]
    assert torch.equal(cut.model(tokens()).last_hidden_state, cut.model.norm(hidden))
    cut.save_pretrained(tmp_path / "cut")
    again = LimeForCausalLM.from_pretrained(tmp_path / "cut")
    assert torch.equal(again(tokens()).logits, cut(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_stay_float32_in_half_precision(tmp_path, dtype, lime, tokens):
    model = lime()
    exact = model.model.layers[2].self_attn.router.weight.clone()
    model.save_pretrained(tmp_path)
    loaded = LimeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for half in (loaded, model.to(dtype)):
        router = half.model.layers[2].self_attn.router.weight
        assert router.dtype == torch.float32 and torch.equal(router, exact)
        assert half.lm_head.weight.dtype == dtype and torch.isfinite(half(tokens()).logits).all()


def test_eager_matches_sdpa_inference(lime, tokens):
    sdpa, eager = lime(), lime(attn="eager")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    keep = mask.bool()
    a, b = (m(tokens(), attention_mask=mask).logits[keep] for m in (sdpa, eager))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # float32, another order of sums


def test_flex_attention_matches_sdpa(lime, tokens):
    ids = tokens(1, 16)
    with torch.no_grad():
        a, b = lime()(ids).logits, lime(attn="flex_attention")(ids).logits
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # float32, another order of sums


@pytest.mark.parametrize("window", [None, 4])
def test_left_padding_compatibility(window, lime, tokens):
    model = lime(sliding_window=window)
    ids = tokens(2, 6)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(out, model(ids).logits, rtol=0, atol=1e-5)  # float32, other shapes


def test_packed_rows_equal_their_documents(lime, tokens):
    model = lime()
    first, second = tokens(1, 4, seed=1), tokens(1, 5, seed=2)
    positions = torch.tensor([[*range(4), *range(5)]])
    packed = model(torch.cat((first, second), 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat((model(first).logits, model(second).logits), 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)  # float32, other shapes


def test_position_ids_with_gaps_and_4d_masks(lime, tokens):
    model, ids = lime(), tokens()
    gaps = torch.arange(9)[None] * 3
    assert not torch.allclose(model(ids, position_ids=gaps).logits, model(ids).logits)
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 9, 9)
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_hidden_states_output(lime, tokens):
    model, ids = lime(), tokens()
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 5 and all(s.shape == (2, 9, 32) for s in states)
    assert torch.equal(states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(states[-1]), model(ids).logits)


def test_attention_outputs(lime, tokens):
    weights = lime(attn="eager")(tokens(), output_attentions=True).attentions
    assert len(weights) == 4 and weights[0].shape == (2, 4, 9, 9)
    torch.testing.assert_close(weights[2].sum(-1), torch.ones(2, 4, 9))


def test_attention_outputs_under_sdpa_say_what_to_do(lime):
    model = lime()
    with pytest.raises(ValueError, match="set it to 'eager'"):
        model.config.output_attentions = True
        model.config.validate()


def test_resize_tokens_embeddings_keeps_tying(tmp_path, lime, tokens):
    model = lime(tie_word_embeddings=True)
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model(tokens()).logits.shape[-1] == 70
    model.save_pretrained(tmp_path)
    again = LimeForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_inputs_embeds_equal_input_ids(lime, tokens):
    model, ids = lime(), tokens()
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


def test_base_model_is_the_causal_lm_without_its_head(tmp_path, lime, tokens):
    model = lime()
    model.save_pretrained(tmp_path)
    base = LimeModel.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head(base(tokens()).last_hidden_state), model(tokens()).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_training_gradient_checkpointing(use_reentrant, implementation, lime, tokens):
    plain = lime(router_implementation=implementation).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    saving.enable_input_require_grads()
    plain.enable_input_require_grads()
    for model in (plain, saving):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8, msg=name)  # sums of two orders in float32


def test_autocast_trains(lime, tokens):
    model = lime().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    exact = lime()(tokens(), labels=tokens()).loss
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)  # bfloat16 has 8 bits
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("routing", ["full", "first"])
def test_torch_compile_fullgraph(routing, lime, tokens):
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
def test_torch_compile_with_inductor(attn, fullgraph, lime, tokens):
    # flex breaks the graph while transformers builds its mask, in Llama too (transformers 5.23, torch 2.13)
    model = lime(attn=attn, num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=fullgraph)
    ids = tokens(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=0, atol=1e-5)  # float32, fused sums


def test_peft_lora_trains_on_top(lime, tokens):
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


def greedy_without_cache(model, ids, new):
    for _ in range(new):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("routing", "window"), [("full", None), ("first", 1)])
def test_greedy_generate_is_the_same_with_every_cache(cache, routing, window, lime, tokens):
    model = lime(routing=routing, routing_window=window)
    model.generation_config.eos_token_id = None
    ids = tokens()
    out = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation=cache)
    assert torch.equal(out, greedy_without_cache(model, ids, 12))


@pytest.mark.parametrize("layer_types", [None, ["sliding_attention", "full_attention"] * 2])
def test_sliding_windows_generate_the_same_with_and_without_cache(layer_types, lime, tokens):
    model = lime(sliding_window=4, layer_types=layer_types)
    model.generation_config.eos_token_id = None
    out = model.generate(tokens(), max_new_tokens=12, do_sample=False)
    assert torch.equal(out, greedy_without_cache(model, tokens(), 12))


def test_cached_keys_have_llamas_shape(lime, tokens):
    cache = lime()(tokens(), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache) and len(cache.layers) == 4
    assert all(layer.keys.shape == layer.values.shape == (2, 2, 9, 8) for layer in cache.layers)


def test_continue_from_past_key_values_and_chunked_prefill(lime, tokens):
    model, ids = lime(), tokens(2, 12)
    whole = model(ids).logits
    cache, chunks = DynamicCache(config=model.config), []
    for start in (0, 5, 6):  # chunks of 5, 1 and 6
        chunks.append(model(ids[:, start : {0: 5, 5: 6, 6: 12}[start]], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=0, atol=1e-5)  # float32, other shapes
    a = model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=5)
    assert torch.equal(a, model.generate(ids, max_new_tokens=6, do_sample=False))


def test_left_padded_batch_generates_what_single_rows_do(lime, tokens):
    model = lime()
    model.generation_config.eos_token_id = None
    rows = [tokens(1, n, seed=n) for n in (3, 6, 8)]
    batch = torch.cat([nn.functional.pad(row, (8 - row.shape[1], 0)) for row in rows])
    out = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=8, do_sample=False)
    for row, got in zip(rows, out, strict=True):
        alone = model.generate(row, max_new_tokens=8, do_sample=False)
        assert torch.equal(got[8:], alone[0, row.shape[1] :])


def test_beam_search_finds_the_best_of_all_continuations(lime, tokens):
    model = lime(vocab_size=8)
    model.generation_config.eos_token_id = None
    ids = tokens(1, 4) % 8
    beams = model.generate(ids, num_beams=64, max_new_tokens=3, do_sample=False, length_penalty=0.0)
    every = torch.cartesian_prod(*[torch.arange(8)] * 3)
    rows = torch.cat((ids.expand(512, 4), every), 1)
    scores = model(rows).logits.log_softmax(-1)[:, 3:6].gather(2, every[..., None]).sum((1, 2))
    assert torch.equal(beams[0, 4:], every[scores.argmax()])


def test_sample_generate_repeats_with_its_seed(lime, tokens):
    model = lime()
    torch.manual_seed(3)
    first = model.generate(tokens(), max_new_tokens=8, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(tokens(), max_new_tokens=8, do_sample=True))
