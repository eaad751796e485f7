"""What SAEs do inside a language model equals the dense formulas at the same hook, in every kind of forward."""

import copy

import pytest
import torch

from hf_ext.record import edit, record
from hf_ext.sae import SAEAugmentedModelForCausalLM, SAEConfig, SAEModel
from hf_ext.sae.metrics import language_metrics, recovered
from hf_ext.sae.sae_splice import place
from hf_ext.sites import Hook, reads_stream, resolve


IDS = torch.arange(3, 27).view(2, 12)
PLACE = Hook("model.layers.1", "output")
# float32 sums in another order, through at most two more layers
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3", "mixtral", "lime"]


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.fixture
def an_sae():
    """`an_sae(hook=..., seed=0, **options)`: of width 32, with biases that matter."""

    def build(hook=PLACE, seed=0, **options):
        torch.manual_seed(seed)
        options = {"d_in": 32, "d_sae": 50, "k": 6, **options}
        sae = SAEModel(SAEConfig(**options, hook_name=hook.path, hook_io=hook.io))
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return sae.eval()

    return build


@pytest.fixture
def augmented(tiny_model, an_sae):
    """`augmented(family="llama", hook=None, **options)` -> model with an SAE "a" after layer 1, and its base."""

    def build(family="llama", hook=None, sae=None, **options):
        base = tiny_model(family)
        hook = hook or resolve(base, "resid_post", 1)
        return SAEAugmentedModelForCausalLM.from_base(base, {"a": sae or an_sae(hook)}, **options), base

    return build


def z_of(sae, x, k=None):
    return sae.encode(x, k).dense()


def edited_logits(base, hook, change, skip=1, **inputs):
    """Logits where tokens from `skip` on become change(x), written with record.py's edit."""

    def fn(name, hidden, step):
        out = hidden.clone()
        out[:, skip:] = change(hidden[:, skip:])
        return out

    with edit(base, {"a": hook}, fn):
        return logits(base, **inputs)


# modes


def test_observing_changes_nothing_and_shows_the_codes_of_the_place(augmented):
    model, base = augmented()
    with torch.no_grad(), record(base, {"a": PLACE}) as seen:
        output = model(IDS)
    assert torch.equal(output.logits, logits(base))
    codes = output.sae_codes["a"].dense()
    expected = z_of(model.saes["a"], seen["a"][0])
    torch.testing.assert_close(codes[:, 1:], expected[:, 1:], **CLOSE)
    assert not codes[:, 0].any()  # no SAE reads the first token
    assert "sae_codes" not in model(IDS, output_sae_codes=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_is_the_reconstruction_at_that_place(family, augmented):
    model, base = augmented(family)
    hook = resolve(base, "resid_post", 1)
    with model.sae_mode("off"):
        expected = edited_logits(base, hook, lambda x: model.saes["a"](x).reconstruction)
        clean = logits(base)
    with model.sae_mode("replace"):
        torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert (expected - clean).abs().max() > 1e-2
    assert torch.equal(logits(model), clean)


def test_a_smaller_budget_is_asked_at_the_call(augmented):
    model, base = augmented()
    with model.sae_mode("off"):
        expected = edited_logits(base, PLACE, lambda x: model.saes["a"](x, 2).reconstruction)
    with model.sae_mode("replace", k=2):
        torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [True, False])
def test_replace_with_error_and_no_edit_leaves_logits_bit_equal(dtype, gradient, tiny_model, an_sae):
    base = tiny_model("llama").to(dtype)
    clean = logits(base)
    model = SAEAugmentedModelForCausalLM.from_base(base, an_sae())
    with model.sae_mode("replace+error"), torch.set_grad_enabled(gradient):
        output = model(IDS)
    assert (output.logits.grad_fn is not None) == gradient
    assert torch.equal(output.logits, clean)
    assert model.saes["sae"].W_dec.dtype == torch.float32


def test_replace_with_error_passes_gradients_through_the_reconstruction_alone(augmented):
    model, base = augmented()
    sae = model.saes["a"]
    embeddings = base.get_input_embeddings()(IDS).detach()

    def gradient(forward):
        x = embeddings.clone().requires_grad_()
        return torch.autograd.grad(forward(x).float().square().sum(), x)[0]

    with model.sae_mode("replace+error"):
        found = gradient(lambda x: model(inputs_embeds=x).logits)

    def change(name, hidden, step):
        kept = hidden[:, 1:]
        x_hat = sae(kept).reconstruction
        return torch.cat([hidden[:, :1], x_hat + (kept - x_hat).detach()], 1)

    with model.sae_mode("off"), edit(base, {"a": PLACE}, change):
        expected = gradient(lambda x: base(inputs_embeds=x).logits)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with model.sae_mode("off"):
        plain = gradient(lambda x: base(inputs_embeds=x).logits)
    assert (found - plain).abs().max() > 1e-2


OPS = {
    "scale": lambda z, v: z * v,
    "set": lambda z, v: z * 0 + v,
    "add": lambda z, v: z + v,
    "ablate": lambda z, v: z * 0,
}


def active_latent(model, mask=None):
    """The latent that fires most often."""
    with torch.no_grad():
        codes = model(IDS).sae_codes["a"].dense()
    return int((codes > 0).sum((0, 1)).argmax())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "norm", [{}, {"input_norm": "scalar", "input_scale": 0.5}, {"input_norm": "layer_norm"}], ids=["", "scalar", "ln"]
)
def test_an_edit_moves_the_activation_along_its_row_and_keeps_the_error(op, norm, augmented, an_sae):
    model, base = augmented(sae=an_sae(**norm))
    sae, latent, value = model.saes["a"], active_latent(model), 3.0

    def change(x):
        z = z_of(sae, x)[..., latent]
        moved = (OPS[op](z, value) - z)[..., None] * sae.W_dec[latent]
        unit = {"scalar": 0.5, "layer_norm": None, None: 1.0}[norm.get("input_norm")]
        return x + (moved * x.std(-1, keepdim=True) if unit is None else moved / unit)

    with model.sae_mode("off"):
        expected = edited_logits(base, PLACE, change)
    request = [{"latent": latent, "op": op} | ({} if op == "ablate" else {"value": value})]
    with model.sae_mode("steer", request):
        found = logits(model)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - logits(base)).abs().max() > 1e-3
    with model.sae_mode("replace+error", request):
        torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_edits_of_a_replaced_place_add_to_the_reconstruction(augmented):
    model, base = augmented()
    sae, latent = model.saes["a"], active_latent(model)

    def change(x):
        z = z_of(sae, x)
        z[..., latent] = 0
        return z @ sae.W_dec + sae.b_dec

    with model.sae_mode("off"):
        expected = edited_logits(base, PLACE, change)
    with model.sae_mode("replace", [{"latent": latent, "op": "ablate"}]):
        torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_ablating_the_chosen_latent_shows_activation_0_and_leaves_the_others(augmented):
    model, _ = augmented()
    latent = active_latent(model)
    with torch.no_grad():
        before = model(IDS).sae_codes["a"].dense()
        with model.sae_mode("ablate", [latent]):
            after = model(IDS).sae_codes["a"]
    assert before[..., latent].any() and not after.dense()[..., latent].any()
    expected = before.clone()
    expected[..., latent] = 0
    torch.testing.assert_close(after.dense(), expected)
    assert (after.values.diff(dim=-1) <= 0).all()


def test_edits_of_one_latent_follow_each_other_and_several_add_up(augmented):
    model, base = augmented()
    sae, latent = model.saes["a"], active_latent(model)
    request = [
        {"latent": latent, "op": "scale", "value": 2.0},
        {"latent": latent, "op": "add", "value": 1.0},
        {"latent": 7, "op": "set", "value": 0.5},
    ]

    def change(x):
        z = z_of(sae, x)
        moved = (z[..., latent] + 1)[..., None] * sae.W_dec[latent]
        return x + moved + (0.5 - z[..., 7])[..., None] * sae.W_dec[7]

    with model.sae_mode("off"):
        expected = edited_logits(base, PLACE, change)
    with model.sae_mode("steer", request):
        torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_two_saes_at_two_places_have_a_mode_each(tiny_model, an_sae):
    base = tiny_model("llama")
    late = Hook("model.layers.2.mlp", "output")
    model = SAEAugmentedModelForCausalLM.from_base(base, {"a": an_sae(), "b": an_sae(late, seed=1)})
    with model.sae_mode("off"):
        expected = edited_logits(base, late, lambda x: model.saes["b"](x).reconstruction)
    with model.sae_mode({"a": "observe", "b": "replace"}), torch.no_grad():
        output = model(IDS)
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    assert set(output.sae_codes) == {"a", "b"}
    with model.sae_mode("steer", [{"sae": "b", "latent": 3, "op": "add", "value": 1.0}]):
        assert (model._states["a"].mode, model._states["b"].mode) == ("observe", "steer")


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "q"])
def test_every_site_is_read_and_changed_as_record_and_edit_do(site, augmented, tiny_model):
    base = tiny_model("llama")
    hook = resolve(base, site, 1)
    mid = ["a"] if reads_stream(base, hook) else []
    model, base = augmented(hook=hook, in_place=mid)
    with model.sae_mode("off"):
        with torch.no_grad(), record(base, {"a": hook}) as seen:
            base(IDS)
        expected = edited_logits(base, hook, lambda x: model.saes["a"](x).reconstruction)
    with torch.no_grad():
        codes = model(IDS).sae_codes["a"].dense()
    torch.testing.assert_close(codes[:, 1:], z_of(model.saes["a"], seen["a"][0])[:, 1:], **CLOSE)
    with model.sae_mode("replace"):
        torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("io", ["input", "output"])
@pytest.mark.parametrize("path", ["model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp.up_proj"])
def test_the_hooks_that_travel_place_what_record_places(path, io, tiny_model):
    base, ours = tiny_model("llama"), []
    with torch.no_grad(), record(base, {"a": Hook(path, io)}) as theirs:
        handle = place(base.get_submodule(path), io, lambda hidden: ours.append(hidden.clone()), False)
        base(IDS)
        handle.remove()
    assert torch.equal(ours[0], theirs["a"][0])
    with torch.no_grad(), edit(base, {"a": Hook(path, io)}, lambda name, hidden, step: hidden * 1.5):
        expected = base(IDS).logits
    handle = place(base.get_submodule(path), io, lambda hidden: hidden * 1.5, False)
    assert torch.equal(logits(base), expected)
    handle.remove()


# tokens


def test_padding_first_and_special_tokens_are_never_read(augmented):
    model, _ = augmented()
    ids = IDS.clone()
    ids[0, 5] = 1  # BOS in mid-text
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0  # left padding
    with torch.no_grad():
        codes = model(input_ids=ids, attention_mask=mask).sae_codes["a"]
    read = codes.l0() > 0
    assert read[0].tolist() == [False, True, True, True, True, False] + [True] * 6
    assert read[1].tolist() == [False] * 4 + [True] * 8
    model, _ = augmented(skip_positions=0, skip_special_tokens=False)
    with torch.no_grad():
        codes = model(input_ids=ids, attention_mask=mask).sae_codes["a"]
    assert (codes.l0() > 0).tolist() == mask.bool().tolist()


def test_a_mask_says_where_an_edit_acts(augmented):
    model, base = augmented()
    where = torch.zeros(2, 12, dtype=torch.bool)
    where[0, 4], where[1, 7:] = True, True
    sae = model.saes["a"]

    def fn(name, hidden, step):
        return hidden + 2 * where[..., None] * sae.W_dec[3]

    with model.sae_mode("off"), edit(base, {"a": PLACE}, fn):
        expected = logits(base)
    with model.sae_mode("steer", [{"latent": 3, "op": "add", "value": 2.0}], tokens=where):
        torch.testing.assert_close(logits(model), expected, **CLOSE)


def greedy(model, ids, mask=None, steps=6, **options):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **options
    )


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steering_with_a_cache_is_steering_without(family, tokens, augmented):
    model, base = augmented(family)
    latent = active_latent(model)
    request = [{"latent": 3, "op": "add", "value": 6.0}, {"latent": latent, "op": "scale", "value": -2.0}]
    scores = {"return_dict_in_generate": True, "output_logits": True}
    with model.sae_mode("steer", request, tokens=tokens):
        cached = greedy(model, IDS, use_cache=True, **scores)
        plain = greedy(model, IDS, use_cache=False, **scores)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # attention over a cache sums in another order
    clean = greedy(model, IDS, **scores)
    first = 0 if tokens != "generated" else 1  # the prompt alone makes the first token's logits
    assert (cached.logits[first] - clean.logits[first]).abs().max() > 1e-3
    if tokens == "generated":
        assert torch.equal(cached.logits[0], clean.logits[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_left_padding_and_batches_change_no_continuation(options, augmented):
    model, _ = augmented()
    request = [{"latent": 3, "op": "add", "value": 6.0}]
    short = IDS[1:, 4:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    batch, mask = torch.cat([IDS[:1], padded]), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    for tokens in ("all", "prompt"):
        with model.sae_mode("steer", request, tokens=tokens):
            both = greedy(model, batch, mask, **options)
            alone = [greedy(model, IDS[:1], **options), greedy(model, short, torch.ones_like(short), **options)]
        assert torch.equal(both[0], alone[0][0])
        assert torch.equal(both[1, 12:], alone[1][0, 8:])


def test_beams_share_the_mask_of_their_prompt(augmented):
    model, _ = augmented()
    where = torch.zeros(2, 12, dtype=torch.bool)
    where[0, 3:] = True
    with model.sae_mode("steer", [{"latent": 3, "op": "add", "value": 9.0}], tokens=where):
        found = greedy(model, IDS, num_beams=3)
    with model.sae_mode("steer", [{"latent": 3, "op": "add", "value": 9.0}], tokens="prompt"):
        steered = greedy(model, IDS, num_beams=3)
    clean = greedy(model, IDS, num_beams=3)
    assert torch.equal(found[1], clean[1])
    assert not torch.equal(steered[1], clean[1])


def test_generation_encodes_nothing_that_no_mode_needs_and_leaves_the_base_as_it_was(augmented, monkeypatch):
    model, base = augmented()
    monkeypatch.setattr(SAEModel, "encode", lambda *args: pytest.fail("encoded"))
    own = base.generation_config
    greedy(model, IDS)
    with model.sae_mode("steer", [{"latent": 3, "op": "add", "value": 1.0}]):
        greedy(model, IDS)
    assert base.generation_config is own and own.disable_compile is not True


def test_a_copy_has_modes_of_its_own(augmented):
    model, _ = augmented()
    clean, copied = logits(model), copy.deepcopy(model)
    with copied.sae_mode("replace"):
        assert not torch.equal(logits(copied), clean)
        assert torch.equal(logits(model), clean)
    with model.sae_mode("replace"):
        assert torch.equal(logits(copied), clean)


def test_a_cache_that_is_handed_on_is_continued_at_its_place(augmented):
    model, _ = augmented()
    with torch.no_grad(), model.sae_mode("steer", [{"latent": 3, "op": "add", "value": 5.0}]):
        whole = model(IDS).logits
        first = model(IDS[:, :6], use_cache=True)
        rest = model(IDS[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 6:], **CLOSE)
    assert (rest.sae_codes["a"].l0() > 0).all()  # its first token is not the text's first


def test_a_base_that_is_detached_is_as_it_was(augmented):
    model, base = augmented()
    model.set_sae_mode("replace")
    changed, hooks = logits(base), len(base.model.layers[1]._forward_hooks)
    model.detach()
    assert hooks == 1 and not base.model.layers[1]._forward_hooks and not base._forward_pre_hooks
    assert not torch.equal(logits(base), changed)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(augmented):
    model, base = augmented()
    sae = model.saes["a"]

    def gradients():
        model.zero_grad()
        with model.sae_mode("replace", [{"latent": 3, "op": "add", "value": 1.0}]):
            output = model(input_ids=IDS, labels=IDS)
            output.loss.backward()
        assert set(output.sae_codes) == {"a"}  # not replaced by what backward computes again
        return sae.W_dec.grad.clone(), base.model.layers[0].mlp.up_proj.weight.grad.clone()

    model.train()
    assert not sae.training
    expected = gradients()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)


# cross entropies


def test_ce_metrics_equal_those_of_metrics_and_count_no_padding(augmented):
    model, base = augmented()
    found = model.ce_metrics(IDS)
    with model.sae_mode("off"):
        expected = language_metrics(base, {"a": model.saes["a"]}, IDS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    for of in ("zero", "mean"):
        assert float(found[f"ce_recovered_{of}"]) == pytest.approx(recovered(expected, of), rel=1e-4)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    padded = model.ce_metrics(ids, mask)
    for name, value in found.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-4, atol=1e-4)


def test_a_perfect_sae_recovers_everything(augmented, an_sae):
    # u = x and -x, so that relu keeps every number of x
    sae = an_sae(activation="relu", k=None, d_sae=64)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.cat([torch.eye(32), -torch.eye(32)]))
        sae.W_dec.copy_(sae.encoder.weight)
        sae.encoder.bias.zero_()
        sae.b_dec.zero_()
    found = augmented(sae=sae)[0].ce_metrics(IDS)
    torch.testing.assert_close(found["ce_sae"], found["ce_clean"], **CLOSE)
    assert float(found["ce_recovered_zero"]) == pytest.approx(1, abs=1e-3)
    assert found["kl"].abs().max() < 1e-5
