"""Every way to misuse an SAE says what is wrong, before anything is computed."""

import json

import pytest
import torch

from hf_ext.sae import SAEConfig, SAEModel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_in": 0}, "`d_in` must be at least 1, got 0"),
        ({"d_sae": 0}, "`d_sae` must be at least 1, got 0"),
        ({"k": 41}, r"`k` must be in \[1, d_sae=40\].*got 41. Lower `k` or raise `d_sae`"),
        ({"k": 0}, "got 0"),
        ({"k": 2.5}, "`k` must be a whole number for activation='topk', got 2.5"),
        ({"k": 2.5, "activation": "jumprelu"}, "`k` must be None for activation='jumprelu', got 2.5"),
        ({"activation": "groupmax"}, "activation"),
        ({"input_norm": "rms"}, "input_norm"),
        ({"input_scale": 2.0}, "`input_scale` must be 1 for input_norm='none', got 2.0"),
        ({"input_scale": 0.0, "input_norm": "scalar"}, "`input_scale` must be a number above 0, got 0"),
        ({"jump_threshold": -1.0}, "`jump_threshold` must be a number >= 0, got -1"),
        ({"jump_bandwidth": 0}, "`jump_bandwidth` must be a number above 0"),
        ({"hook_io": "both"}, "hook_io"),
        ({"hook_nam": "x"}, "Did you mean `hook_name`"),
        ({"expansion": 4}, "`expansion` is not an option of SAEConfig, got 4. The options are d_in, d_sae, k"),
        ({"model_type": "llama"}, "`model_type` must be 'sae', got 'llama'"),
    ],
)
def test_a_wrong_option_is_named_before_a_model_is_built(options, message):
    with pytest.raises(Exception, match=message):
        SAEConfig(**{"d_in": 12, "d_sae": 40, "k": 4, **options})


def test_notes_of_other_tools_in_a_config_file_are_kept_and_misspelt_options_are_not(tmp_path):
    SAEConfig(d_in=12, d_sae=40, k=4).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"some_tools_note": 1}))
    assert SAEConfig.from_pretrained(tmp_path).some_tools_note == 1
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hook_nme": "x"}))
    with pytest.raises(ValueError, match="Did you mean `hook_name`"):
        SAEConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("activation", "k", "most"),
    [("topk", 6, 5), ("topk", 0, 5), ("topk", True, 5), ("topk", 2.0, 5), ("relu", 41, 40), ("batchtopk", 41, 40)],
)
def test_a_budget_beyond_the_trained_one_is_refused(activation, k, most, sae, tokens):
    with pytest.raises(ValueError, match=rf"`k` must be a whole number in \[1, {most}\].*got {k}"):
        sae(activation).encode(tokens(3), k=k)


def test_activations_of_another_width_or_type_are_refused_with_the_hook(sae, tokens):
    model = sae("topk", hook_name="model.layers.3")
    with pytest.raises(ValueError, match=r"d_in=12\), got \(3, 11\).*hook 'model.layers.3' \(output\)"):
        model(tokens(3, width=11))
    with pytest.raises(TypeError, match="`x` must be a tensor of floats, got torch.int64"):
        model(torch.zeros(3, 12, dtype=torch.long))
    with pytest.raises(TypeError, match="got list"):
        model([1.0] * 12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("training", [True, False])
def test_activations_that_are_not_finite_are_counted_and_their_hook_named(value, training, sae, tokens):
    model = sae("topk", hook_name="model.layers.3").train(training)
    x = tokens(4, 5)
    x[1, 2, 3] = x[3, 0, :] = value
    with pytest.raises(FloatingPointError, match="in 2 of 20 tokens at hook 'model.layers.3'"):
        model(x)


def test_large_but_finite_activations_pass(sae):
    model = sae("topk").float()
    # their sum is beyond float32
    assert torch.isfinite(model.encode(torch.full((40, 12), 3e36)).values).all()


def test_codes_of_another_sae_are_refused(sae, tokens):
    with pytest.raises(ValueError, match="`codes` must be of d_sae=40 latents, got 41"):
        sae("topk").decode(sae("topk", d_sae=41).encode(tokens(3)))


def test_weights_of_another_size_are_refused_by_from_pretrained(tmp_path, sae):
    sae("topk").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ize"):
        SAEModel.from_pretrained(tmp_path, d_sae=41)
