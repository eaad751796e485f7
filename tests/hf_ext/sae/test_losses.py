"""Each loss and each of its gradients equals autograd on the plain definition, in float64."""

from types import SimpleNamespace

import pytest
import torch

from hf_ext.sae import SparseCodes, losses
from hf_ext.sae.losses import (
    auxk_loss,
    hierarchical_loss,
    matryoshka_loss,
    multi_topk_loss,
    reconstruction_loss,
    variance,
)


CLOSE = {"rtol": 1e-10, "atol": 1e-13}  # float64: sums of some thousand products in another order
# tokens, K, F, D: none divides another, and some latents occur twice in a token
SHAPES = [(11, 7, 50, 13), (1, 1, 3, 1), (5, 37, 200, 6), (3, 70, 90, 5), (0, 4, 10, 3)]


def draw(shape, seed=0):
    tokens, k, latents, d = shape
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *size: torch.randn(*size, dtype=torch.double, generator=generator)  # noqa: E731
    values = torch.relu(randn(tokens, k)).sort(descending=True).values  # half of them padding
    indices = torch.randint(latents, (tokens, k), generator=generator)
    inputs = {"values": values, "W_dec": randn(latents, d), "b_dec": randn(d), "x": randn(tokens, d)}
    return indices, {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def prefix_errors(indices, values, W_dec, b_dec, x):
    """mean_{b,d} r_j^2 for j = 1..K, [K]: every prefix made, as the paper writes it."""
    prefixes = b_dec + (values[:, :, None] * W_dec[indices]).cumsum(1)
    return (prefixes - x[:, None]).square().mean((0, 2)), prefixes


def compare(found, expected, inputs, CLOSE=CLOSE):
    torch.testing.assert_close(found, expected, **CLOSE)
    # a gradient that does not come in alone is told from one that is 1
    pairs = (torch.autograd.grad(loss * 3, list(inputs.values())) for loss in (found, expected))
    for name, a, b in zip(inputs, *pairs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("most_segments", [0, 1000], ids=["prefixes", "segments"])
@pytest.mark.parametrize("block", [4, 32])
def test_the_full_hierarchical_loss_is_the_mean_over_every_prefix(shape, most_segments, block, monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEGMENTS", most_segments)
    monkeypatch.setattr(losses, "BLOCK", block)
    indices, inputs = draw(shape)
    errors, prefixes = prefix_errors(indices, **inputs)
    codes = SparseCodes(inputs["values"], indices, shape[2])
    found, reconstruction = hierarchical_loss(inputs["x"], codes, inputs["W_dec"], inputs["b_dec"])
    compare(found, errors.mean(), inputs)
    torch.testing.assert_close(reconstruction, prefixes[:, -1].detach(), **CLOSE)


@pytest.mark.parametrize("shape", SHAPES[2:4])
@pytest.mark.parametrize("budgets", [[1, 2, 4, 8, 16, 32], [37], [5], [3, 1, 30, 3], range(2, 37, 2)])
@pytest.mark.parametrize("most_segments", [0, 1000], ids=["prefixes", "segments"])
def test_the_loss_at_any_budgets_is_the_mean_over_these_prefixes(shape, budgets, most_segments, monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEGMENTS", most_segments)
    indices, inputs = draw(shape)
    errors, prefixes = prefix_errors(indices, **inputs)
    codes = SparseCodes(inputs["values"], indices, shape[2])
    found, reconstruction = hierarchical_loss(inputs["x"], codes, inputs["W_dec"], inputs["b_dec"], budgets)
    compare(found, errors[torch.tensor(sorted(set(budgets))) - 1].mean(), inputs)
    torch.testing.assert_close(reconstruction, prefixes[:, max(budgets) - 1].detach(), **CLOSE)


def test_codes_cut_to_one_latent_have_their_gradient():
    indices, inputs = draw((40, 7, 2000, 13))  # so few that no matrix product takes over
    errors, _ = prefix_errors(indices, **inputs)
    codes = SparseCodes(inputs["values"], indices, 2000).first(1)
    found, _ = hierarchical_loss(inputs["x"], codes, inputs["W_dec"], inputs["b_dec"])
    compare(found, errors[0], inputs)


def test_full_budgets_of_a_wide_code_take_the_closed_form_and_few_take_segments(monkeypatch):
    indices, inputs = draw(SHAPES[2])
    codes = SparseCodes(inputs["values"], indices, 200)
    arguments = (inputs["x"], codes, inputs["W_dec"], inputs["b_dec"])
    taken = []
    for name in ("_Segments", "_Prefixes"):
        original = getattr(losses, name)
        spy = SimpleNamespace(apply=lambda *given, o=original, n=name: taken.append(n) or o.apply(*given))
        monkeypatch.setattr(losses, name, spy)
    hierarchical_loss(*arguments), hierarchical_loss(*arguments, [1, 2, 4, 8, 16, 32])
    assert taken == ["_Prefixes", "_Segments"]


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_the_closed_form_in_chunks_of_tokens_changes_nothing(shape, monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEGMENTS", 0)
    indices, inputs = draw(shape)
    codes = SparseCodes(inputs["values"], indices, shape[2])
    whole, _ = hierarchical_loss(inputs["x"], codes, inputs["W_dec"], inputs["b_dec"])
    monkeypatch.setattr(losses, "chunk_rows", lambda *_: 3)
    parts, _ = hierarchical_loss(inputs["x"], codes, inputs["W_dec"], inputs["b_dec"])
    compare(parts, whole, inputs)


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_the_reconstruction_loss_is_the_mean_square_of_all_codes(shape):
    indices, inputs = draw(shape)
    errors, _ = prefix_errors(indices, **inputs)
    codes = SparseCodes(inputs["values"], indices, shape[2])
    found, _ = reconstruction_loss(inputs["x"], codes, inputs["W_dec"], inputs["b_dec"])
    compare(found, errors[-1], inputs)


def test_multi_topk_is_the_error_at_k_and_an_eighth_of_that_at_4k():
    indices, inputs = draw(SHAPES[2])
    errors, prefixes = prefix_errors(indices, **inputs)
    codes = SparseCodes(inputs["values"], indices, 200)
    found, reconstruction = multi_topk_loss(inputs["x"], codes, inputs["W_dec"], inputs["b_dec"], 9)
    compare(found, errors[8] + errors[35] / 8, inputs)
    torch.testing.assert_close(reconstruction, prefixes[:, 8].detach(), **CLOSE)


@pytest.mark.parametrize(("shape", "groups"), [(SHAPES[0], [10, 1, 39]), (SHAPES[2], [200]), (SHAPES[3], [30] * 3)])
def test_matryoshka_is_the_mean_over_prefixes_of_the_dictionary(shape, groups):
    indices, inputs = draw(shape)
    codes = SparseCodes(inputs["values"], indices, shape[2])
    found, reconstruction = matryoshka_loss(inputs["x"], codes, inputs["W_dec"], inputs["b_dec"], groups)
    expected = 0
    for end in torch.tensor(groups).cumsum(0):
        kept = inputs["values"] * (indices < end)
        prefix = inputs["b_dec"] + (kept[:, :, None] * inputs["W_dec"][indices]).sum(1)
        expected = expected + (prefix - inputs["x"]).square().mean() / len(groups)
    compare(found, expected, inputs)
    torch.testing.assert_close(reconstruction, prefix.detach(), **CLOSE)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("k_aux", [1, 4, 100, None])
@pytest.mark.parametrize("norm", [{}, {"input_norm": "scalar", "input_scale": 0.5}])
def test_auxk_is_the_fraction_of_the_residual_that_the_largest_dead_latents_leave(
    activation, k_aux, norm, sae, tokens
):
    model, x = sae(activation, **norm), tokens(9)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[1, 5, 6, 20, 33]] = True
    residual = tokens(9, seed=5)
    found = auxk_loss(model, x, residual, dead, k_aux)
    u = (model.normalize(x) - model.b_dec) @ model.encoder.weight.T + model.encoder.bias
    k = min(k_aux or 6, 5)
    top = u[:, dead].topk(k)
    error = torch.einsum("bk,bkd->bd", torch.relu(top.values), model.W_dec[dead][top.indices]) - residual
    spread = (residual - residual.mean(0)).square().sum()
    expected = error.square().sum() / spread * min(1, 5 / (k_aux or 6))
    named = {name: p for name, p in model.named_parameters() if name != "threshold"}
    compare(found, expected, named)


def test_auxk_is_0_without_dead_latents_and_without_a_residual(sae, tokens):
    model, x = sae("topk"), tokens(9)
    none, some = torch.zeros(40, dtype=torch.bool), torch.arange(40) < 3
    assert auxk_loss(model, x, tokens(9, seed=2), none) == 0
    loss = auxk_loss(model, x, torch.zeros(9, 12), some)
    loss.backward()
    assert loss == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="`k_aux` must be at least 1, got 0"):
        auxk_loss(model, x, x, some, 0)


def test_variance_is_of_each_coordinate_over_tokens(tokens):
    x = tokens(2, 50)
    torch.testing.assert_close(variance(x), x.reshape(-1, 12).var(0, correction=0).mean(), **CLOSE)


def test_losses_of_no_tokens_are_0_with_gradients_of_0():
    indices, inputs = draw(SHAPES[-1])
    codes = SparseCodes(inputs["values"], indices, 10)
    for budgets in (None, [2, 4]):
        loss, _ = hierarchical_loss(inputs["x"], codes, inputs["W_dec"], inputs["b_dec"], budgets)
        loss.backward()
        assert loss == 0 and not inputs["W_dec"].grad.any()


def test_a_model_trained_end_to_end_gets_the_gradients_of_the_plain_definition(sae, tokens):
    model, x = sae("topk", k=20), tokens(9)
    codes = model.encode(x)
    loss, _ = hierarchical_loss(model.normalize(x), codes, model.W_dec, model.b_dec)
    u = (x - model.b_dec) @ model.encoder.weight.T + model.encoder.bias
    top = u.topk(20)
    errors, _ = prefix_errors(top.indices, torch.relu(top.values), model.W_dec, model.b_dec, x)
    compare(loss, errors.mean(), dict(model.named_parameters()))


def test_float32_codes_in_any_layout_and_leading_dimensions_work():
    indices, inputs = draw((12, 7, 50, 13))
    small = {name: tensor.detach().float() for name, tensor in inputs.items()}
    values = small["values"].view(3, 4, 7).transpose(0, 1).contiguous().transpose(0, 1)
    codes = SparseCodes(values, indices.view(3, 4, 7).int(), 50)
    loss, reconstruction = hierarchical_loss(small["x"].view(3, 4, 13), codes, small["W_dec"], small["b_dec"])
    expected = prefix_errors(indices, **inputs)[0].mean()
    assert reconstruction.shape == (3, 4, 13)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # float32


def test_activations_in_bfloat16_are_compared_in_the_decoders_precision():
    indices, inputs = draw(SHAPES[0])
    rounded = inputs["x"].detach().bfloat16()
    codes = SparseCodes(inputs["values"].float(), indices, 50)
    loss, _ = hierarchical_loss(rounded, codes, inputs["W_dec"], inputs["b_dec"])
    inputs["x"] = rounded.double()
    assert loss.item() == pytest.approx(prefix_errors(indices, **inputs)[0].mean().item(), rel=1e-6)


def test_autocast_rounds_nothing():
    indices, inputs = draw(SHAPES[3])
    small = {name: tensor.detach().float() for name, tensor in inputs.items()}
    arguments = small["x"], SparseCodes(small["values"], indices, 90), small["W_dec"], small["b_dec"]
    expected = hierarchical_loss(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hierarchical_loss(*arguments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": []}, r"`budgets` must be numbers in \[1, 7\].*got \[\]"),
        ({"budgets": [0, 3]}, "got \\[0, 3\\]"),
        ({"budgets": [8]}, r"in \[1, 7\], the latents of each token in `codes`, got \[8\]"),
        ({"x": torch.zeros(11, 12)}, r"\(..., D\), \(F, D\) and \(D,\), got \(11, 12\), \(50, 13\)"),
        ({"x": torch.zeros(10, 13)}, r"`codes` must be of the tokens of `x`, \(10,\).*got \(11,\)"),
        ({"b_dec": torch.zeros(50)}, r"and \(50,\)"),
        ({"W_dec": torch.zeros(51, 13)}, "the 51 rows of `W_dec`, got .* d_sae=50"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    indices, inputs = draw(SHAPES[0])
    codes = SparseCodes(inputs["values"], indices, 50)
    given = {name: inputs[name] for name in ("x", "W_dec", "b_dec")} | {"codes": codes} | change
    with pytest.raises(ValueError, match=message):
        hierarchical_loss(**given)


def test_unsorted_codes_and_groups_that_do_not_fit_are_refused():
    indices, inputs = draw(SHAPES[0])
    rising = SparseCodes(inputs["values"].flip(1), indices, 50)
    with pytest.raises(ValueError, match="`codes` must be sorted by value"):
        hierarchical_loss(inputs["x"], rising, inputs["W_dec"], inputs["b_dec"])
    for groups in ([], [50, 0], [20, 20]):
        with pytest.raises(ValueError, match="`groups` must be sizes of at least 1 that sum to d_sae=50"):
            matryoshka_loss(inputs["x"], rising, inputs["W_dec"], inputs["b_dec"], groups)
    with pytest.raises(ValueError, match=r"`budgets` must be numbers in \[1, 7\].*got \[2, 8\]"):
        multi_topk_loss(inputs["x"], rising, inputs["W_dec"], inputs["b_dec"], 2)
