"""The example in the docstring of `hierarchical_loss` trains a SAELens SAE; needs the extra `peers`."""

import inspect
import re
import textwrap

import pytest
import torch

from hf_ext.sae import SparseCodes, hierarchical_loss


sae_lens = pytest.importorskip("sae_lens", reason='the extra "peers" brings it')


@pytest.fixture(scope="module")
def example():
    """The class that the docstring defines."""
    text = inspect.getdoc(hierarchical_loss)
    (code,) = [fence for fence in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sae_lens" in fence]
    namespace = {"torch": torch, "SparseCodes": SparseCodes, "hierarchical_loss": hierarchical_loss}
    exec(textwrap.dedent(code), namespace)
    return namespace["HierarchicalTrainingSAE"]


@pytest.fixture
def step(example):
    """`step(rescale)` -> the SAE, its input and what its training step returned."""
    from sae_lens.saes.sae import TrainStepInput

    def run(rescale, x):
        torch.manual_seed(0)
        config = sae_lens.TopKTrainingSAEConfig(d_in=12, d_sae=40, k=5, rescale_acts_by_decoder_norm=rescale)
        sae = example(config)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        dead = torch.arange(40) < 4
        given = TrainStepInput(x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
        return sae, sae.training_forward_pass(given)

    return run


@pytest.mark.parametrize("rescale", [True, False])
def test_its_loss_is_the_mean_of_saelens_own_error_over_budgets(rescale, step, tokens):
    x = tokens(9).float()
    sae, output = step(rescale, x)
    expected = 0
    for k in range(1, 6):
        top = output.feature_acts.topk(k)
        cut = torch.zeros_like(output.feature_acts).scatter(1, top.indices, top.values)
        expected = expected + (sae.decode(cut) - x).square().sum(-1).mean() / 5
    torch.testing.assert_close(output.losses["mse_loss"], expected)  # float32
    aux = output.losses["auxiliary_reconstruction_loss"]
    torch.testing.assert_close(output.loss, output.losses["mse_loss"] + aux)
    assert aux > 0
    found = torch.autograd.grad(output.losses["mse_loss"], sae.parameters(), retain_graph=True)
    wanted = torch.autograd.grad(expected, sae.parameters())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32


def test_some_steps_of_its_trainer_lower_the_error_at_one_latent(example):
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 12), dim=1)

    def data():
        while True:
            yield torch.rand(256, 3, 1).mul(directions[torch.randint(40, (256, 3))]).sum(1)

    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = example(sae_lens.TopKTrainingSAEConfig(d_in=12, d_sae=40, k=4))
    config = SAETrainerConfig(
        total_training_samples=256 * 60,
        train_batch_size_samples=256,
        lr=3e-3,
        lr_end=3e-3,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    x = next(data())

    def error():
        top = sae.encode(x).topk(1)
        cut = torch.zeros(256, 40).scatter(1, top.indices, top.values)
        return (sae.decode(cut) - x).square().mean().item()

    before = error()
    SAETrainer(cfg=config, sae=sae, data_provider=data()).fit()
    assert error() < before
