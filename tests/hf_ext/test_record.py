"""record and edit against hand-written forwards, changed weights and single rows; then every way to misuse them."""

import copy
import functools
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

import hf_ext  # noqa: F401  registers "lime"
from hf_ext.record import Step, edit, record
from hf_ext.sites import Hook, resolve


LAYERS, WIDTH, VOCAB = 3, 32, 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
MODELS = ("llama", "gpt2", "lime")
IDS = torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[0, 0, 0, 5, 6], [9, 8, 7, 3, 4]])
MASK = (PADDED != 0).long()
V = 2 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))


@functools.cache
def prototype(model_type: str):
    if model_type == "gpt2":
        config = transformers.GPT2Config(**GPT2_SHAPE, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    else:
        extra = {"mlp_bias": True} if model_type == "llama" else {}
        config = transformers.AutoConfig.for_model(model_type, **SHAPE, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def llama():
    return copy.deepcopy(prototype("llama"))


@pytest.fixture(params=MODELS)
def model(request):
    return copy.deepcopy(prototype(request.param))


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def add(vector=V):
    return lambda name, hidden, step: hidden + vector


def new_tokens(model, ids, **kwargs):
    kwargs = {"max_new_tokens": 8, "do_sample": False} | kwargs
    with torch.no_grad():
        return model.generate(ids, **kwargs)[:, ids.shape[1] :]


def test_record_keeps_one_tensor_for_each_forward_of_generate(model):
    hooks = {"last": resolve(model, "resid_post", -1), "first": resolve(model, "z", 0)}
    with record(model, hooks) as acts:
        tokens = new_tokens(model, IDS, max_new_tokens=4)
    assert [tuple(x.shape) for x in acts["last"]] == [(2, 7, WIDTH), (2, 1, WIDTH), (2, 1, WIDTH), (2, 1, WIDTH)]
    assert len(acts["first"]) == 4
    with torch.no_grad(), record(model, hooks) as whole:
        model(torch.cat([IDS, tokens[:, :-1]], dim=1))
    # cached and uncached attention add up in another order
    for name in hooks:
        torch.testing.assert_close(torch.cat(acts[name], dim=1), whole[name][0], rtol=1e-4, atol=1e-5)


def test_record_keeps_the_graph_unless_gradients_are_off(llama):
    hooks = {"x": resolve(llama, "resid_post", 0)}
    with record(llama, hooks) as acts:
        logits = llama(IDS).logits
    assert torch.autograd.grad(logits.sum(), acts["x"][0])[0].abs().sum() > 0
    with torch.no_grad(), record(llama, hooks) as acts:
        llama(IDS)
    assert not acts["x"][0].requires_grad


def test_stop_ends_the_forward_and_the_block_after_the_last_hook(model):
    reached, after = [], []
    layers = [resolve(model, "resid_post", layer) for layer in range(LAYERS)]
    for hook in layers:
        model.get_submodule(hook.path).register_forward_hook(lambda *_: reached.append(1))
    with torch.no_grad(), record(model, {"a": layers[1], "b": layers[0]}, stop=True) as acts:
        model(IDS)
        after.append("not run")
    # the last hook fires where it was placed, after the counter of layer 1
    assert len(reached) == 2 and not after
    with torch.no_grad(), record(model, {"a": layers[1], "b": layers[0]}) as full:
        model(IDS)
    assert all(torch.equal(acts[name][0], full[name][0]) and len(acts[name]) == 1 for name in "ab")


def test_inner_stop_ends_the_inner_block_only(llama):
    first, last = resolve(llama, "resid_post", 0), resolve(llama, "resid_post", -1)
    with torch.no_grad(), record(llama, {"x": last}) as outer:
        with record(llama, {"x": first}, stop=True) as inner:
            llama(IDS)
        assert len(inner["x"]) == 1 and outer["x"] == []
        llama(IDS)
    assert len(outer["x"]) == 1


def test_outer_stop_ends_both_blocks(llama):
    first, last = resolve(llama, "resid_post", 0), resolve(llama, "resid_post", -1)
    reached = []
    with torch.no_grad(), record(llama, {"x": first}, stop=True) as outer:
        with record(llama, {"x": last}, stop=True) as inner:
            llama(IDS)
        reached.append("not run")
    assert len(outer["x"]) == 1 and inner["x"] == [] and not reached


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_records_once_and_edits_the_recomputation(llama, use_reentrant):
    def gradients(model):
        vector = V.clone().requires_grad_()
        hooks = {site: resolve(model, site, 1) for site in ("mlp_out", "resid_mid")}
        with record(model, hooks) as acts, edit(model, hooks, add(vector)):
            model(IDS, labels=IDS).loss.backward()
        assert [len(x) for x in acts.values()] == [1, 1]
        return [vector.grad, *(p.grad for p in model.parameters())]

    expected = gradients(copy.deepcopy(llama).train())
    llama.train().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for found, wanted in zip(gradients(llama), expected, strict=True):
        assert torch.equal(found, wanted)


def llama_forward(model, site, layer, vector):
    """The logits of a Llama written out, with one place multiplied by `vector`."""

    def at(here, hidden):
        return hidden * vector if here == (site, layer) else hidden

    base = model.model
    hidden = base.embed_tokens(IDS)
    rotary = base.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    for i, block in enumerate(base.layers):
        hidden = at(("resid_pre", i), hidden)
        attended, _ = block.self_attn(block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)
        hidden = at(("resid_mid", i), hidden + at(("attn_out", i), attended))
        mlp = block.mlp(block.post_attention_layernorm(hidden))
        hidden = at(("resid_post", i), hidden + at(("mlp_out", i), mlp))
    return model.lm_head(base.norm(hidden))


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_edit_equals_a_forward_written_out(llama, site):
    vector = V.clone().requires_grad_()
    # a product saves its factors for backward, so it also shows an edit that spoils what autograd has saved
    with edit(llama, {"x": resolve(llama, site, 1)}, lambda name, hidden, step: hidden * vector):
        found = llama(IDS).logits
    expected = llama_forward(llama, site, 1, vector)
    assert torch.equal(found, expected)
    assert (found - llama(IDS).logits).abs().max() > 0.1
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    grads = [torch.autograd.grad((logits * weights).sum(), vector)[0] for logits in (found, expected)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_stream_edit_moves_the_end_of_the_layer(model, site):
    # replacing the stream (or what is added to it) by a constant c shows at the layer's end as its definition says
    hooks = {name: resolve(model, name, 1) for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")}
    constant = edit(model, {"x": hooks[site]}, lambda name, hidden, step: V.expand_as(hidden))
    with torch.no_grad(), record(model, hooks) as acts, constant:
        model(IDS)
    acts = {name: tensors[0] for name, tensors in acts.items()}
    assert torch.equal(acts[site], V.expand(2, 7, WIDTH))
    if site != "resid_mid":
        assert torch.equal(acts["resid_mid"], acts["resid_pre"] + acts["attn_out"])
    if site != "resid_post":
        assert torch.equal(acts["resid_post"], acts["resid_mid"] + acts["mlp_out"])


def test_identity_edits_change_no_bit(model):
    with torch.no_grad():
        plain = model(IDS).logits
        sites = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
        hooks = {f"{site} {layer}": resolve(model, site, layer) for site in sites for layer in range(LAYERS)}
        with edit(model, hooks, lambda name, hidden, step: hidden):
            assert torch.equal(model(IDS).logits, plain)


def test_edit_at_mlp_out_equals_a_bias_in_greedy_and_beam_search(llama):
    biased = copy.deepcopy(llama)
    with torch.no_grad():
        biased.model.layers[1].mlp.down_proj.bias += V
    plain, moved = (new_tokens(model, PADDED, attention_mask=MASK) for model in (llama, biased))
    assert not torch.equal(plain, moved)
    for kwargs in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}):
        with edit(llama, {"x": resolve(llama, "mlp_out", 1)}, add()):
            found = new_tokens(llama, PADDED, attention_mask=MASK, **kwargs)
        assert torch.equal(found, new_tokens(biased, PADDED, attention_mask=MASK, **kwargs)), kwargs


def test_edit_sees_every_beam(llama):
    rows = []

    def look(name, hidden, step):
        rows.append((hidden.shape[0], step.attention_mask.shape, step.position_ids.shape))
        return hidden

    with edit(llama, {"x": resolve(llama, "resid_post", 1)}, look):
        new_tokens(llama, PADDED, attention_mask=MASK, num_beams=3, max_new_tokens=3)
    assert rows == [(6, (6, 5), (6, 5)), (6, (6, 1), (6, 1)), (6, (6, 1), (6, 1))]


def test_left_padded_rows_write_what_single_rows_write(model):
    # the edit depends on all of Step: parity of the position, prompt or not, padding or not
    def by_step(name, hidden, step):
        scale = 1 + step.position_ids % 2 + 3 * step.is_prefill
        if step.attention_mask is not None:
            scale = scale * step.attention_mask
        return hidden + scale[..., None] * V

    with edit(model, {"x": resolve(model, "resid_post", 0)}, by_step):
        together = new_tokens(model, PADDED, attention_mask=MASK)
        alone = [new_tokens(model, row[mask == 1][None]) for row, mask in zip(PADDED, MASK, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, new_tokens(model, PADDED, attention_mask=MASK))


@pytest.mark.parametrize("cache", [None, "static", "sliding"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_step_describes_the_current_tokens_under_every_cache(cache, attention):
    model = prototype("llama")
    if cache == "sliding":
        config = transformers.MistralConfig(**SHAPE, sliding_window=4)
        model, cache = transformers.MistralForCausalLM(config), "static"
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    steps: list[Step] = []

    def look(name, hidden, step):
        steps.append(step)
        return hidden

    with edit(model, {"x": resolve(model, "resid_pre", 0)}, look):
        new_tokens(model, PADDED, attention_mask=MASK, max_new_tokens=4, cache_implementation=cache)
    assert [step.is_prefill for step in steps] == [True, False, False, False]
    assert torch.equal(steps[0].attention_mask, MASK.bool())
    # generate gives padding position 0
    assert steps[0].position_ids.tolist() == [[0, 0, 0, 0, 1], [0, 1, 2, 3, 4]]
    for i, step in enumerate(steps[1:]):
        assert step.attention_mask.tolist() == [[True], [True]]
        assert step.position_ids.tolist() == [[2 + i], [5 + i]]


def test_step_counts_past_tokens_where_the_caller_gives_no_positions(llama):
    steps, cache = [], DynamicCache(config=llama.config)

    def look(name, hidden, step):
        steps.append(step)
        return hidden

    with torch.no_grad(), edit(llama, {"a": resolve(llama, "resid_pre", 0), "b": resolve(llama, "z", 2)}, look):
        llama(IDS[:, :4], past_key_values=cache)
        llama(IDS[:, 4:], past_key_values=cache)
        llama.model(PADDED, MASK)  # positional, and past the causal LM
    assert [step.is_prefill for step in steps] == [True, True, False, False, True, True]
    assert all(step.attention_mask is None for step in steps[:4])
    assert all(torch.equal(step.attention_mask, MASK.bool()) for step in steps[4:])
    positions = [step.position_ids.tolist() for step in steps]
    assert positions == [[[0, 1, 2, 3]] * 2] * 2 + [[[4, 5, 6]] * 2] * 2 + [[[0, 1, 2, 3, 4]] * 2] * 2


def test_record_and_output_hidden_states_see_the_edit_whichever_was_entered_first(llama):
    hook = {"x": resolve(llama, "resid_post", 0)}
    with torch.no_grad():
        llama(IDS, output_hidden_states=True)  # transformers places its own hooks now
        with record(llama, hook) as plain:
            llama(IDS)
        with record(llama, hook) as before, edit(llama, hook, add()), record(llama, hook) as after:
            output = llama(IDS, output_hidden_states=True)
    expected = plain["x"][0] + V
    for found in (before["x"][0], after["x"][0], output.hidden_states[1]):
        assert torch.equal(found, expected)


def test_of_two_edits_at_one_place_the_inner_runs_first_and_one_edits_hooks_run_in_order(llama):
    order, hook = [], resolve(llama, "resid_post", 0)

    def note(name, hidden, step):
        order.append(name)
        return hidden

    with edit(llama, {"outer 1": hook, "outer 2": hook}, note), edit(llama, {"inner": hook}, note):
        llama(IDS)
    assert order == ["inner", "outer 1", "outer 2"]


def test_any_module_can_be_hooked_by_path():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(self.first(x))

    net, x = Net(), torch.randn(1, 5, 3)
    with record(net, {"x": Hook("second", "input")}) as acts, edit(net, {"x": Hook("first", "output")}, add(1.0)):
        y = net(x)
    assert torch.equal(acts["x"][0], net.first(x) + 1.0)
    assert torch.equal(y, net.second(net.first(x) + 1.0))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_hooks_leave_on_any_exception(llama, error):
    hooks, count = {"x": resolve(llama, "resid_mid", 0), "y": resolve(llama, "z", 1)}, num_hooks(llama)

    def fail(name, hidden, step):
        raise error("planted")

    with pytest.raises(error, match="planted"), record(llama, hooks), edit(llama, hooks, fail):
        assert num_hooks(llama) == count + 5
        llama(IDS)
    assert num_hooks(llama) == count
    assert llama.generation_config.disable_compile is None


def test_hooks_leave_when_a_generator_that_holds_them_is_closed(llama):
    hooks, count = {"x": resolve(llama, "resid_mid", 0)}, num_hooks(llama)

    def stream():
        with record(llama, hooks), edit(llama, hooks, add()):
            while True:
                yield llama(IDS)

    running = stream()
    next(running)
    assert num_hooks(llama) > count
    running.close()
    assert num_hooks(llama) == count


def test_no_hook_stays_when_one_of_several_is_wrong(llama):
    count = num_hooks(llama)
    hooks = {"good": resolve(llama, "q", 0), "bad": Hook("model.layers.7", "output")}
    for manager in (record(llama, hooks), edit(llama, hooks, add())):
        with pytest.raises(ValueError, match="`path` of hook 'bad'"), manager:
            pass
    assert num_hooks(llama) == count


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda n, h, s: None, TypeError, "`fn` must return a tensor, got NoneType for hook 'here'"),
        (lambda n, h, s: h[:, :1], ValueError, "got (2, 1, 32), torch.float32, cpu for hook 'here'"),
        (lambda n, h, s: h.double(), ValueError, "got (2, 7, 32), torch.float64, cpu for hook 'here'"),
        (lambda n, h, s: h / 0, ValueError, "got NaN or infinity for hook 'here'"),
    ],
)
@pytest.mark.parametrize("site", ["resid_mid", "resid_post"])
def test_what_an_edit_may_not_return_is_refused_by_name(llama, site, fn, error, message):
    with pytest.raises(error, match=re.escape(message)), edit(llama, {"here": resolve(llama, site, 1)}, fn):
        llama(IDS)


def test_values_that_were_not_finite_before_are_not_the_edits_fault(llama):
    with torch.no_grad():
        llama.model.embed_tokens.weight[IDS[0, 0]] = torch.inf
        with edit(llama, {"x": resolve(llama, "resid_pre", 0)}, add()):
            assert llama(IDS).logits.isnan().any()


@pytest.mark.parametrize(
    ("hooks", "error", "message"),
    [
        ({"x": Hook("model.layer.1.mlp", "output")}, ValueError, "The nearest are model.layers.1.mlp"),
        ({"x": Hook("zzz", "output")}, ValueError, "got 'zzz'. model.named_modules() lists them."),
        ({"x": Hook("model.norm", "out")}, ValueError, "`io` of hook 'x' must be \"input\" or \"output\", got 'out'"),
        ({"x": "model.norm"}, TypeError, "`hooks['x']` must be a Hook, got str"),
        ([Hook("model.norm", "output")], TypeError, "`hooks` must be a dict of names and hooks, got list"),
    ],
)
def test_wrong_hooks_are_refused_at_entry(llama, hooks, error, message):
    for manager in (record(llama, hooks), edit(llama, hooks, add())):
        with pytest.raises(error, match=re.escape(message)), manager:
            pass


def test_edit_needs_a_function_and_hidden_states(llama):
    with pytest.raises(TypeError, match="`fn` must be a function"), edit(llama, {}, V):
        pass
    with pytest.raises(ValueError, match=r"must point at hidden states .* got \(2, 7\)"):  # noqa: SIM117
        with edit(llama, {"x": Hook("model.embed_tokens", "input")}, add()):
            llama(IDS)


def test_a_place_without_a_tensor_is_named(llama):
    message = "Hook 'x' must point at a tensor; the output of LlamaModel starts with BaseModelOutputWithPast"
    with pytest.raises(TypeError, match=message), record(llama, {"x": Hook("model", "output")}):
        llama(IDS)


def test_compiled_models_are_refused_with_the_cure(llama):
    hooks = {"x": resolve(llama, "resid_post", 0)}
    compiled = torch.compile(llama, backend="eager")
    assert resolve(compiled, "resid_post", 0) == hooks["x"]
    message = "`model` must not be compiled.*Pass the original, model._orig_mod"
    for manager in (record(compiled, hooks), edit(compiled, hooks, add())):
        with pytest.raises(ValueError, match=message), manager:
            pass
    with record(compiled._orig_mod, hooks) as acts:
        compiled._orig_mod(IDS)
    assert len(acts["x"]) == 1
    llama.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="`model.layers.0` in the model must not be compiled"), record(llama, hooks):
        pass


def test_generate_compiles_nothing_inside_a_block(llama, monkeypatch):
    # with this option the CPU takes the path that GPUs take by themselves with a static cache
    from transformers import CompileConfig

    everywhere = CompileConfig(backend="eager")
    everywhere._compile_all_devices = True
    kwargs = {"cache_implementation": "static", "compile_config": everywhere, "max_new_tokens": 3}

    def refuse(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(llama, "get_compiled_call", refuse)
    with pytest.raises(AssertionError, match="compiled"):
        new_tokens(llama, IDS, **kwargs)
    with record(llama, {"x": resolve(llama, "resid_post", 0)}) as acts:
        new_tokens(llama, IDS, **kwargs)
    assert [x.shape[1] for x in acts["x"]] == [7, 1, 1]
    assert llama.generation_config.disable_compile is None
