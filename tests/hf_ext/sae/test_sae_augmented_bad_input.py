"""Every way to misplace an SAE or to misuse an edit says what is wrong, where and what to do."""

import warnings

import pytest
import torch

from hf_ext.sae import SAEAugmentedConfig, SAEAugmentedModelForCausalLM, SAEConfig, SAEModel


IDS = torch.arange(3, 27).view(2, 12)


def an_sae(path="model.layers.1", **options):
    torch.manual_seed(0)
    return SAEModel(SAEConfig(**{"d_in": 32, "d_sae": 50, "k": 6, "hook_name": path, **options})).eval()


@pytest.fixture
def attach(tiny_model):
    """`attach(saes=None, base=None, **options)` -> the augmented model."""

    def build(saes=None, base=None, **options):
        base = tiny_model("llama") if base is None else base
        return SAEAugmentedModelForCausalLM.from_base(base, an_sae() if saes is None else saes, **options)

    return build


# places


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        (
            {"a": an_sae(), "b": an_sae()},
            "`saes` must have one place each, got 'a' and 'b' at 'model.layers.1' .output.",
        ),
        ({"a": an_sae(None)}, r"`hook_name` of `saes\['a'\]` must be a module path.*got None"),
        (
            {"a": an_sae("model.layer.1")},
            "must be a module of LlamaForCausalLM, got 'model.layer.1'. The nearest are ",
        ),
        ({"a.b": an_sae()}, "`saes` must be named like \"layer12\".*got 'a.b'"),
        ({"a": an_sae(d_in=31)}, "`d_in` of .* must be the model's hidden size 32 at 'model.layers.1', got 31"),
        ({"a": torch.nn.Linear(2, 2)}, r"`saes\['a'\]` must be an SAEModel, got Linear"),
    ],
)
def test_an_sae_that_has_no_place_is_refused_before_any_forward(saes, message, attach):
    with pytest.raises(Exception, match=message):
        attach(saes)


def test_a_module_that_stands_at_two_places_is_refused_with_the_others(tiny_model, attach):
    base = tiny_model("llama")
    base.model.layers[2] = base.model.layers[1]  # as in models that run one layer twice
    with pytest.raises(
        ValueError, match="must be a module with one place in the model, got 'model.layers.1', which is also"
    ):
        attach(base=base)
    base = tiny_model("llama")
    base.model.layers[2].mlp = base.model.layers[0].mlp
    with pytest.raises(ValueError, match="'model.layers.0.mlp', which is also model.layers.2.mlp"):
        attach(an_sae("model.layers.0.mlp"), base)


def test_a_place_of_another_width_or_without_hidden_states_is_named_at_the_first_forward(attach):
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.k_proj' \(output\).*width d_in=32, got 16"):
        attach(an_sae("model.layers.1.self_attn.k_proj"))(IDS)
    with pytest.raises(ValueError, match=r"hidden states of shape \(batch, seq, width\) for the \(2, 12\) tokens"):
        attach(an_sae("lm_head", d_in=61))(input_ids=IDS, logits_to_keep=1)
    with pytest.raises(
        TypeError, match="An SAE must hook a tensor; the output of LlamaRotaryEmbedding|must hook a tensor"
    ):
        attach(an_sae("model", d_in=32))(IDS)


def test_a_module_that_the_model_never_calls_is_named(attach, tiny_model):
    base = tiny_model("llama")
    base.model.layers[1].spare = torch.nn.Identity()
    model = attach(an_sae("model.layers.1.spare"), base)
    with (
        pytest.raises(ValueError, match="'model.layers.1.spare', must be a module that the model calls, and was not"),
        model.sae_mode("steer", [{"latent": 1, "op": "add", "value": 1.0}]),
    ):
        model(IDS)


def test_a_module_that_is_called_twice_in_a_forward_is_refused(attach, tiny_model):
    base = tiny_model("llama")
    layer = base.model.layers[1].mlp
    forward = layer.forward
    model = attach(an_sae("model.layers.1.mlp.act_fn", d_in=48), base)
    layer.forward = lambda x: forward(x) + forward(x)
    with pytest.raises(ValueError, match="must be called once in a forward, got a second call"):
        model(IDS)


def test_a_hidden_state_with_nan_is_told_with_its_hook(attach, tiny_model):
    base = tiny_model("llama")
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="at hook 'model.layers.1'"):
        attach(base=base)(IDS)


def test_what_is_no_causal_lm_is_refused(attach):
    with pytest.raises(TypeError, match="`model` must be a causal LM of transformers, got Linear"):
        attach(base=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`model` must be a causal LM of transformers, got SAEModel"):
        attach(base=an_sae())


# edits


EDIT = {"latent": 3, "op": "add", "value": 1.0}


@pytest.mark.parametrize(
    ("mode", "edits", "message"),
    [
        ("steer", [{**EDIT, "latent": 50}], r"`latent` must be in \[0, 49\], the latents of 'sae', got 50"),
        ("steer", [{**EDIT, "latent": -1}], "got -1"),
        ("steer", [{**EDIT, "latent": 2.0}], "got 2.0"),
        ("ablate", [50], r"`latent` must be in \[0, 49\]"),
        ("ablate", [("b", 3)], "`sae` of an edit must be one of sae, got 'b'"),
        ("ablate", [EDIT], 'of mode "ablate" must be latents or op="ablate"'),
        (
            "steer",
            [{**EDIT, "op": "multiply"}],
            "`op` of an edit must be one of scale, set, add, ablate, got 'multiply'",
        ),
        (
            "steer",
            [{**EDIT, "value": float("nan")}],
            "`value` of an edit must be a finite number, got nan for latent 3",
        ),
        ("steer", [{**EDIT, "value": float("inf")}], "got inf"),
        ("steer", [{"latent": 3, "op": "scale"}], "got None for latent 3"),
        ("steer", [{**EDIT, "op": "ablate"}], "`value` must be left out for op='ablate', got 1.0"),
        ("steer", [{**EDIT, "feature": 3}], "got feature"),
        ("steer", [{**EDIT, "sae": "b"}], "`sae` of an edit must be one of sae, got 'b'"),
        ("steer", [3], "`edits` must be dicts like .*got 3"),
        ("steer", EDIT, "`edits` must be a list of edits, got dict"),
        ("steer", [], "`edits` of 'sae' must be given for mode 'steer', got none"),
        (
            "observe",
            [EDIT],
            "`edits` of 'sae' belong to the modes replace, replace.error, steer, ablate, got 'observe'",
        ),
        ("patch", None, "`mode` must be one of off, observe, replace.*got 'patch'"),
        ("mean", None, "`means` must hold the mean of 'sae'"),
        ({"b": "replace"}, None, "`saes` must be among sae, got 'b'"),
    ],
)
def test_a_wrong_mode_or_edit_is_refused_when_it_is_asked(mode, edits, message, attach):
    model = attach()
    before = dict(model._states)
    with pytest.raises((TypeError, ValueError), match=message), model.sae_mode(mode, edits):
        pytest.fail("entered")
    assert model._states == before


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("answer", "`tokens` must be one of all, prompt, generated, or a mask, got 'answer'"),
        (torch.ones(3), "or a mask .batch, seq."),
        (7, "or a mask .batch, seq., got 7"),
    ],
)
def test_wrong_tokens_are_refused(tokens, message, attach):
    with pytest.raises((TypeError, ValueError), match=message), attach().sae_mode("replace", tokens=tokens):
        pytest.fail("entered")


def test_tokens_that_a_plain_forward_cannot_tell_and_masks_of_other_batches_are_refused(attach):
    model = attach()
    with (
        model.sae_mode("replace", tokens="prompt"),
        pytest.raises(ValueError, match="outside of `generate`, got 'prompt'"),
    ):
        model(IDS)
    with (
        model.sae_mode("replace", tokens=torch.ones(3, 12)),
        pytest.raises(ValueError, match=r"a mask \(batch, seq\) for 2 rows.*got shape \(3, 12\)"),
    ):
        model(IDS)
    with pytest.raises(TypeError, match="`tokens` must be one of all, prompt, generated to last, got Tensor"):
        model.set_sae_mode("replace", tokens=torch.ones(2, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("in_generate", [True, False])
def test_a_value_that_makes_nan_logits_is_refused_with_the_edit(dtype, in_generate, attach, tiny_model):
    model = attach(base=tiny_model("llama").to(dtype))
    # the second is beyond any float32
    edits = [{"latent": 3, "op": "add", "value": 3e38 if dtype == torch.float32 else 1e6}] * 2
    words = r"must leave finite logits, got NaN at \d+ tokens \(sae/3 add .*\). Lower their `value`"
    with model.sae_mode("steer", edits), pytest.raises(FloatingPointError, match=words):
        model.generate(IDS, max_new_tokens=2) if in_generate else model(IDS)
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("in_generate", [True, False])
def test_an_inactive_latent_that_is_scaled_is_told_and_add_offered(in_generate, attach):
    model = attach()
    with torch.no_grad():
        model.saes["sae"].encoder.bias[7] = -100
        fires = int((model(IDS).sae_codes["sae"].dense() > 0).sum((0, 1)).argmax())
        clean = model(IDS).logits

    def run():
        with torch.no_grad():
            return model.generate(IDS, max_new_tokens=2) if in_generate else model(IDS).logits

    request = [{"latent": 7, "op": "scale", "value": 5.0}]
    with model.sae_mode("steer", request):
        with pytest.warns(UserWarning, match="Latent 7 of 'sae' was active on no token.*Use op=\"add\"") as told:
            found = run()
        assert len([one for one in told if "Latent 7" in str(one.message)]) == 1
    assert in_generate or torch.equal(found, clean)
    with warnings.catch_warnings(), model.sae_mode("steer", [{**request[0], "latent": fires}]):
        warnings.simplefilter("error", UserWarning)
        run()


# the configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": {"a": "patch"}}, r"`modes\['a'\]` must be one of off, observe.*got 'patch'"),
        ({"modes": {"b": "off"}}, "`modes` must name SAEs, a, got 'b'"),
        ({"modes": {"a": "mean"}}, "got 'mean'"),
        ({"edits": [{"latent": 50, "op": "ablate"}]}, r"`latent` must be in \[0, 49\]"),
        ({"tokens": "answer"}, "`tokens` must be one of all, prompt, generated, got 'answer'"),
        ({"in_place": ["b"]}, "`in_place` must name SAEs, a, got b"),
        ({"skip_positions": -1}, "`skip_positions` must be at least 0, got -1"),
        ({"base_config": {"model_type": "nonsense"}}, "`base_config` must name a family .*got 'nonsense'"),
        ({"saes": {"a": {"model_type": "kron_sae"}}}, "must be of model_type 'sae', got 'kron_sae'"),
        ({"saes": {"a": {"d_in": 32, "d_sae": 50, "k": 51, "hook_name": "x"}}}, r"`k` must be in \[1, d_sae=50\]"),
        ({"sae": {}}, "Did you mean `saes`"),
    ],
)
def test_a_wrong_option_is_named_before_a_model_is_built(options, message):
    good = {
        "base_config": {"model_type": "llama", "hidden_size": 32},
        "saes": {"a": {"d_in": 32, "d_sae": 50, "k": 4, "hook_name": "model.layers.1"}},
    }
    with pytest.raises(Exception, match=message):
        SAEAugmentedConfig(**{**good, **options})
