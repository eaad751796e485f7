"""What an SAE computes, and every gradient, equal the dense definitions; budgets, thresholds and norms are as told."""

import pytest
import torch

from hf_ext.sae import SAEConfig, SAEModel


ACTIVATIONS = ["topk", "batchtopk", "jumprelu", "relu"]
# float64: sums of some hundred terms in another order
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


class Step(torch.autograd.Function):
    """[u > theta], whose gradient in theta is -(1 / eps) [|u - theta| < eps / 2] (arXiv 2407.14435)."""

    @staticmethod
    def forward(ctx, u, theta, eps):
        ctx.save_for_backward(u, theta)
        ctx.eps = eps
        return (u > theta).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        u, theta = ctx.saved_tensors
        return None, -grad / ctx.eps * ((u - theta).abs() < ctx.eps / 2), None


def dense_codes(sae, x, k=None):
    """Every latent's activation, [B, F], from the table in SAEConfig's docstring."""
    config = sae.config
    u = (x - sae.b_dec * config.apply_b_dec_to_input) @ sae.encoder.weight.T + sae.encoder.bias
    if config.activation == "topk":
        keep = torch.zeros_like(u).scatter(1, u.topk(k or config.k).indices, 1.0)
        return torch.relu(u) * keep
    if config.activation == "batchtopk":
        least = torch.relu(u).flatten().sort(descending=True).values[int(config.k * len(x)) - 1]
        return torch.relu(u) * (u >= least)
    if config.activation == "jumprelu":
        # z = u H(u - theta): the gradient of z in theta is theta times that of H
        step = Step.apply(u, sae.threshold, config.jump_bandwidth)
        return u * step.detach() + sae.threshold.detach() * (step - step.detach())
    return torch.relu(u)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("beta", [True, False])
@pytest.mark.parametrize("x_has_gradient", [True, False])
def test_outputs_and_gradients_equal_the_dense_definition(activation, beta, x_has_gradient, sae, tokens):
    model, x = sae(activation, apply_b_dec_to_input=beta), tokens(9).requires_grad_(x_has_gradient)
    target = tokens(9, seed=2)
    output = model(x)
    codes = dense_codes(model, x)
    reconstruction = codes @ model.W_dec + model.b_dec
    torch.testing.assert_close(output.codes.dense(), codes, **CLOSE)
    torch.testing.assert_close(output.reconstruction, reconstruction, **CLOSE)
    named = {**({"x": x} if x_has_gradient else {}), **dict(model.named_parameters())}
    found = torch.autograd.grad(((output.reconstruction - target) ** 2).sum(), list(named.values()))
    expected = torch.autograd.grad(((reconstruction - target) ** 2).sum(), list(named.values()))
    for name, a, b in zip(named, found, expected, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_the_l0_of_a_jumprelu_has_the_straight_through_gradient_of_the_paper(sae, tokens):
    model, x = sae("jumprelu"), tokens(9)
    l0 = model.encode(x).l0()
    u = (x - model.b_dec) @ model.encoder.weight.T + model.encoder.bias
    torch.testing.assert_close(l0.double(), (u > model.threshold).sum(1).double(), rtol=0, atol=0)
    (found,) = torch.autograd.grad(l0.sum(), model.threshold)
    (expected,) = torch.autograd.grad(Step.apply(u, model.threshold, 0.5).sum(), model.threshold)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # counts are kept in float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_codes_are_sorted_and_what_is_0_is_padding_that_is_not_counted(activation, sae, tokens):
    codes = sae(activation).encode(tokens(9) - 1)
    assert (codes.values.diff(dim=1) <= 0).all()
    assert (codes.values >= 0).all()
    torch.testing.assert_close(codes.l0(), (codes.dense() > 0).sum(1).float(), rtol=0, atol=0)


def test_more_places_than_positive_pre_activations_stay_empty(sae, tokens):
    model = sae("topk", k=30)
    codes = model.encode(tokens(9))
    assert (codes.values == 0).any()
    torch.testing.assert_close(codes.dense(), dense_codes(model, tokens(9)), **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k", [1, 3])
def test_a_smaller_budget_is_a_cut_of_the_same_codes(activation, k, sae, tokens):
    model, x = sae(activation), tokens(2, 4)
    model(x)  # estimates the threshold of BatchTopK
    model.eval()
    full, cut = model.encode(x), model.encode(x, k=k)
    assert cut.values.shape == (2, 4, k)
    assert torch.equal(cut.dense(), full.first(k).dense())
    assert torch.equal(model(x, k=k).reconstruction, model.decode(full.first(k), x))


def test_batchtopk_keeps_k_times_b_over_the_batch_also_in_chunks(sae, tokens, monkeypatch):
    from hf_ext.sae import sparse_ops

    model, x = sae("batchtopk"), tokens(10)
    whole = model.encode(x)
    assert whole.l0().sum() == 45
    assert len(set(whole.l0().tolist())) > 1
    monkeypatch.setitem(sparse_ops.CHUNK_BYTES, "cpu", 3 * 40 * 8)  # three tokens a chunk
    torch.testing.assert_close(model.encode(x).dense(), whole.dense(), **CLOSE)


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
def test_chunks_of_tokens_change_nothing(activation, sae, tokens, monkeypatch):
    from hf_ext.sae import sparse_ops

    model, x = sae(activation), tokens(10)
    whole = model.encode(x)
    monkeypatch.setitem(sparse_ops.CHUNK_BYTES, "cpu", 3 * 40 * 8)
    torch.testing.assert_close(model.encode(x).dense(), whole.dense(), **CLOSE)


def test_batchtopk_is_evaluated_by_the_running_mean_of_the_least_kept_values(sae, tokens):
    model, expected = sae("batchtopk"), None
    for seed in range(4):
        codes = dense_codes(model, tokens(9, seed=seed))
        model(tokens(9, seed=seed))
        least = codes[codes > 0].min().item()
        expected = least if expected is None else 0.99 * expected + 0.01 * least
    assert model.threshold.item() == pytest.approx(expected, rel=1e-6)  # kept with the weights, here in float64
    model.eval()
    u = torch.relu((tokens(9) - model.b_dec) @ model.encoder.weight.T + model.encoder.bias)
    torch.testing.assert_close(model.encode(tokens(9)).dense(), u * (u > expected), **CLOSE)


def test_batchtopk_without_a_threshold_is_refused_in_evaluation_unless_a_budget_is_asked(sae, tokens):
    model = sae("batchtopk").eval()
    with pytest.raises(ValueError, match="`threshold` must be estimated.*got -1"):
        model(tokens(3))
    assert model.encode(tokens(3), k=2).values.shape == (3, 2)


def test_evaluation_and_no_grad_leave_a_threshold_alone_and_count_no_latent_in_the_band(sae, tokens):
    model = sae("jumprelu")
    trained = model.encode(tokens(9))
    with torch.no_grad():
        assert torch.equal(model.encode(tokens(9)).dense(), trained.dense())
    codes = model.eval().encode(tokens(9))
    assert codes.gates is None
    assert codes.k == int(codes.l0().max()) < trained.k
    assert torch.equal(codes.dense(), trained.dense())


def test_latents_that_compete_alone_are_the_largest_of_these(sae, tokens):
    model, x = sae("jumprelu"), tokens(9)
    chosen = torch.tensor([3, 17, 4, 39, 0, 8])
    codes = model.encode(x, k=2, latents=chosen)
    assert codes.d_sae == 6
    u = ((x - model.b_dec) @ model.encoder.weight.T + model.encoder.bias)[:, chosen]
    torch.testing.assert_close(codes.values.sort(descending=True).values, torch.relu(u.topk(2).values), **CLOSE)
    found = torch.autograd.grad(codes.values.square().sum(), [model.encoder.weight, model.b_dec])
    expected = torch.autograd.grad(torch.relu(u.topk(2).values).square().sum(), [model.encoder.weight, model.b_dec])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_scale_of_the_input_equals_weights_that_hold_it(sae, tokens):
    scaled, x = sae("topk", input_norm="scalar", input_scale=0.25), tokens(9)
    folded = sae("topk")
    folded.load_state_dict(scaled.state_dict())
    with torch.no_grad():  # u = W (s x - b) + c, and the output divided by s: as SAELens folds
        folded.encoder.weight.mul_(0.25)
        folded.W_dec.div_(0.25)
        folded.b_dec.div_(0.25)
    torch.testing.assert_close(scaled(x).reconstruction, folded(x).reconstruction, **CLOSE)


def test_the_layer_norm_of_the_input_is_undone_on_the_output(sae, tokens):
    normed, x = sae("topk", input_norm="layer_norm"), 3 * tokens(9) + 5
    plain = sae("topk")
    plain.load_state_dict(normed.state_dict())
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)  # unbiased, and put back without the 1e-5
    expected = plain((x - mean) / (deviation + 1e-5)).reconstruction * deviation + mean
    torch.testing.assert_close(normed(x).reconstruction, expected, **CLOSE)
    with pytest.raises(ValueError, match="`x` must be given to decode"):
        normed.decode(normed.encode(x))


def test_a_step_keeps_decoder_rows_at_norm_1_and_thresholds_at_0_or_above(sae, tokens):
    model = sae("jumprelu")
    with torch.no_grad():
        model.W_dec[3] = 0
        model.threshold[5] = -1
    model.constrain_()
    norms = model.W_dec.norm(dim=1)
    assert norms[3] == 0  # a row of zeros has no direction to keep
    torch.testing.assert_close(norms[norms > 0], torch.ones(39, dtype=torch.double), **CLOSE)
    assert model.threshold[5] == 0
    model(tokens(9)).reconstruction.square().sum().backward()
    before = model.W_dec.grad.clone()
    model.remove_parallel_gradient_()
    along = (before * model.W_dec).sum(1, keepdim=True) * model.W_dec
    torch.testing.assert_close(model.W_dec.grad, before - along, **CLOSE)
    free = sae("topk", normalize_decoder=False)
    norms = free.W_dec.norm(dim=1)
    free.constrain_()
    assert torch.equal(free.W_dec.norm(dim=1), norms)


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (2, 3, 1)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_number_of_tokens_goes_through(activation, shape, sae, tokens):
    model, x = sae(activation), tokens(*shape)
    output = model(x)
    assert output.reconstruction.shape == x.shape
    output.reconstruction.sum().backward()
    assert torch.isfinite(model.W_dec.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reconstruction_has_the_dtype_of_the_activations(dtype, sae, tokens):
    model = sae("topk").float()
    output = model(tokens(9).to(dtype))
    assert output.reconstruction.dtype == dtype
    assert output.codes.values.dtype == torch.float32


def test_weights_in_bfloat16_and_autocast_come_close_to_float32(sae, tokens):
    model, x = sae("relu").float(), tokens(9).float()
    expected = model(x).reconstruction
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(x).reconstruction
    small = model.bfloat16()(x).reconstruction
    # some 20 latents of about 1, each right to 2 ** -8
    torch.testing.assert_close(cast, expected, atol=0.1, rtol=0)
    torch.testing.assert_close(small, expected, atol=0.1, rtol=0)


def test_an_sae_starts_with_unit_decoder_rows_that_the_encoder_reads():
    torch.manual_seed(0)
    model = SAEModel(SAEConfig(d_in=12, d_sae=40, k=5))
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(model.encoder.weight, model.W_dec)
    assert not model.b_dec.any() and not model.encoder.bias.any()


def test_sharded_and_half_saved_weights_come_back(tmp_path, sae):
    model = sae("jumprelu").half()
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    again = SAEModel.from_pretrained(tmp_path, dtype="auto")
    assert {n: (t.dtype, t.sum()) for n, t in again.state_dict().items()} == {
        n: (t.dtype, t.sum()) for n, t in model.state_dict().items()
    }
