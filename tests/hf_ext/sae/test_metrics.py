"""Each figure has the value that its formula gives by hand, or by another library."""

from types import SimpleNamespace

import pytest
import torch
from sklearn.decomposition import PCA
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.sae import SparseCodes
from hf_ext.sae.metrics import (
    ReconstructionSums,
    bootstrap,
    budget_curve,
    language_metrics,
    mean_of,
    pca_ev_global,
    reconstruction_intervals,
    reconstruction_metrics,
    recovered,
)
from hf_ext.sites import resolve


def test_the_three_explained_variances_are_what_their_formulas_say_by_hand():
    # |x - mean|^2 = 4, 4; e = (1, 0), (1, 0): the error is all in its mean
    x = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    codes = SparseCodes(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([[0, 3], [0, 0]]), 5)
    sums = ReconstructionSums(mean_of([x]), 5)
    sums.update(x, x - torch.tensor([1.0, 0.0]), codes)
    found = sums.compute()
    assert found["ev_global"] == 1 - 2 / 8
    assert found["ev_centered"] == 1
    assert found["ev_per_token"] == 1 - 1 / 4
    assert (found["l0"], found["dead_fraction"], found["tokens"]) == (1.5, 3 / 5, 2)
    assert found["norm_ratio"] == pytest.approx((0 / 1 + 4 / 3) / 2)
    assert found["cosine"] == pytest.approx((0 + 1) / 2)  # a reconstruction of 0 has no direction
    assert found["relative_bias"] == pytest.approx((0 + 16) / (0 + 12))
    assert sums.density().tolist() == [1, 0, 0, 0.5, 0]


def test_one_huge_token_tells_the_explained_variances_apart():
    x = torch.cat([torch.eye(4), 1000 * torch.ones(1, 4)])
    reconstruction = torch.cat([torch.zeros(4, 4), x[4:]])  # all but the huge one is lost
    sums = ReconstructionSums(mean_of([x]), 1)
    sums.update(x, reconstruction, SparseCodes(torch.zeros(5, 1), torch.zeros(5, 1, dtype=torch.long), 1))
    found = sums.compute()
    assert found["ev_global"] > 0.999
    assert found["ev_per_token"] > 0.99  # each is far from a mean that the huge one has moved
    ordinary = ReconstructionSums(mean_of([x[:4]]), 1)
    ordinary.update(x[:4], reconstruction[:4], SparseCodes(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.long), 1))
    assert ordinary.compute()["ev_global"] == pytest.approx(-1 / 3)  # 4 of error to 3 of spread


def test_pieces_and_the_whole_give_the_same_figures(sae, tokens):
    model, x = sae("topk").eval(), tokens(50)
    whole, pieces = reconstruction_metrics(model, x), reconstruction_metrics(model, x, batch=7)
    assert pieces == pytest.approx(whole, rel=1e-12)
    expected = 1 - (model(x).reconstruction - x).square().sum() / (x - x.mean(0)).square().sum()
    assert whole["ev_global"] == pytest.approx(expected.item(), rel=1e-12)
    assert reconstruction_metrics(model, x, 2)["l0"] == 2


def test_intervals_of_all_figures_are_bootstraps_over_documents(sae, tokens):
    model, documents = sae("topk").eval(), tokens(6, 20)
    mean, parts = mean_of(documents), []
    for x in documents:
        output = model(x)
        parts.append(ReconstructionSums(mean, 40))
        parts[-1].update(x, output.reconstruction, output.codes)
    found = reconstruction_intervals(parts, samples=50, seed=3)

    def ev(chosen):
        whole = ReconstructionSums(mean, 40)
        for at in chosen:
            output = model(documents[at])
            whole.update(documents[at], output.reconstruction, output.codes)
        return whole.compute()["ev_centered"]

    assert found["ev_centered"] == pytest.approx(bootstrap(ev, 6, samples=50, seed=3), rel=1e-12)
    assert found.keys() == set(parts[0].compute()) - {"dead_fraction", "tokens"}


def test_the_curve_over_budgets_is_the_ev_at_each_budget(sae, tokens):
    model, x = sae("topk").eval(), tokens(50)
    curve = budget_curve(model, x, [1, 3, 5], batch=16)
    assert curve == pytest.approx({k: reconstruction_metrics(model, x, k)["ev_global"] for k in (1, 3, 5)}, rel=1e-12)


def test_pca_is_that_of_scikit_learn(tokens):
    x = tokens(80) * torch.arange(1, 13)
    shares = PCA().fit(x.numpy()).explained_variance_ratio_.cumsum()
    assert pca_ev_global(x, [1, 4, 12, 99]) == pytest.approx({1: shares[0], 4: shares[3], 12: 1, 99: 1}, rel=1e-9)


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    shape = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, initializer_range=0.5, **shape)).eval()


@pytest.fixture
def ids():
    return torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(1))


def test_a_perfect_reconstruction_costs_nothing_and_ablation_costs_what_it_costs(lm, ids):
    hook = resolve(lm, "resid_post", 1)
    config = SimpleNamespace(hook_name=hook.path, hook_io=hook.io)

    class Perfect:
        def __init__(self):
            self.config = config

        def __call__(self, x, k):
            return SimpleNamespace(reconstruction=x)

    found = language_metrics(lm, {"mid": Perfect()}, ids)
    assert {name: tensor.shape for name, tensor in found.items()} == dict.fromkeys(found, (4,))
    expected = torch.stack([lm(row[None], labels=row[None]).loss for row in ids]).double()
    torch.testing.assert_close(found["ce_clean"], expected, rtol=1e-5, atol=0)  # float32
    torch.testing.assert_close(found["ce_sae"], found["ce_clean"])
    assert found["kl"].abs().max() < 1e-6
    assert recovered(found) == recovered(found, "mean") == 1
    # what follows a layer whose output is 0 sees 0: zero ablation by other means
    weights = {name: p.clone() for name, p in lm.named_parameters()}
    try:
        with torch.no_grad():
            lm.model.embed_tokens.weight.zero_()
            for layer in lm.model.layers[:2]:
                layer.mlp.down_proj.weight.zero_(), layer.self_attn.o_proj.weight.zero_()
        zero = torch.stack([lm(row[None], labels=row[None]).loss for row in ids]).double()
    finally:
        with torch.no_grad():
            for name, p in lm.named_parameters():
                p.copy_(weights[name])
    torch.testing.assert_close(language_metrics(lm, {"m": Perfect()}, ids, skip_positions=0)["ce_zero"], zero)


def test_a_real_sae_recovers_less_than_all_and_has_a_positive_kl(lm, ids, sae):
    hook = resolve(lm, "resid_post", 1)
    model = sae("topk", hook_name=hook.path, hook_io=hook.io).float().eval()
    found = language_metrics(lm, {"mid": model}, ids, k=2)
    assert found["kl"].min() > 0
    assert recovered(found, "mean") < 1
    with pytest.raises(ValueError, match='`of` must be "zero" or "mean", got \'median\''):
        recovered(found, "median")


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error():
    values = torch.randn(400, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap(lambda chosen: float(values[chosen].mean()), 400)
    error = float(values.std()) / 20
    assert low < float(values.mean()) < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)  # 1000 samples: a few per cent of noise
    with pytest.raises(ValueError, match="`documents` must be at least 2"):
        bootstrap(lambda chosen: 0.0, 1)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        mean_of([torch.zeros(0, 3)])
    with pytest.raises(ValueError, match="at least one token"):
        ReconstructionSums(torch.zeros(3), 4).compute()


def test_ablation_takes_a_mean_that_is_given_and_can_be_left_out(lm, ids, sae):
    hook = resolve(lm, "resid_post", 1)
    model = sae("topk", hook_name=hook.path).eval()
    whole = language_metrics(lm, {"sae": model}, ids)
    alone = language_metrics(lm, {"sae": model}, ids, ablate=False)
    assert set(whole) - set(alone) == {"ce_zero", "ce_mean"}
    assert all(torch.equal(whole[name], alone[name]) for name in alone)
    zeros = language_metrics(lm, {"sae": model}, ids, means={"sae": torch.zeros(12)})
    assert torch.equal(zeros["ce_mean"], whole["ce_zero"]) and not torch.equal(whole["ce_mean"], whole["ce_zero"])
