"""The index holds what each latent does fire on, and what its row writes: against dense codes and plain products."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.record import record
from hf_ext.sae import SAEConfig, SAEModel
from hf_ext.sae.latent_index import LatentIndex, build_index
from hf_ext.sites import Hook


HOOK = "model.layers.1"
ROWS, T, F, W = 19, 23, 40, 7


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=90, initializer_range=0.4, **shape)).eval()
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand(16))
    return model


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(1)
    model = SAEModel(SAEConfig(d_in=16, d_sae=F, k=3, hook_name=HOOK)).eval()
    with torch.no_grad():
        model.encoder.bias[5] = -100.0  # never fires
    return model


@pytest.fixture(scope="module")
def rows():
    return torch.randint(90, (ROWS, T), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def index(lm, sae, rows):
    return build_index(sae, lm, rows, contexts=4, length=W, tokens=5, skip_ids=[11], progress=False)


@pytest.fixture(scope="module")
def dense(lm, sae, rows):
    """(R, T, F), with what is left out as 0."""
    with torch.no_grad(), record(lm, {"x": Hook(HOOK, "output")}) as seen:
        lm(rows)
        found = sae.encode(seen["x"][0]).dense()
    found[:, 0] = 0
    return found * (rows != 11)[:, :, None]


def test_contexts_are_the_strongest_of_their_rows(index, dense, rows):
    most, place = dense.max(1)  # of each row
    for latent in range(F):
        order = most[:, latent].sort(descending=True)
        wanted = [int(row) for value, row in zip(order.values[:4], order.indices[:4], strict=True) if value > 0]
        found = index.contexts(latent)
        assert len(found) == len(wanted)
        for (ids, amounts, peak), row in zip(found, wanted, strict=True):
            at = int(place[row, latent])
            start = at - peak
            assert 0 <= peak < W and ids == rows[row, start : start + W].tolist()
            expected = dense[row, start : start + W, latent].tolist()
            assert amounts == pytest.approx(expected, rel=1e-3)  # float16
            assert amounts[peak] == max(amounts)


def test_density_is_the_share_of_the_tokens_that_count(index, dense, rows):
    counted = (rows[:, 1:] != 11).sum()
    torch.testing.assert_close(index.density, (dense > 0).sum((0, 1)) / counted)
    assert index.density[5] == 0 and index.contexts(5) == []


def test_effects_are_the_rows_on_the_normed_unembedding(index, lm, sae):
    with torch.no_grad():
        effect = (sae.W_dec * lm.model.norm.weight) @ lm.lm_head.weight.T
    for latent in (0, 17, 39):
        found = index.effects(latent)
        for name, sign in (("raised", 1), ("lowered", -1)):
            order = (sign * effect[latent]).sort(descending=True)
            assert [token for token, _ in found[name]] == order.indices[:5].tolist()
            assert [by for _, by in found[name]] == pytest.approx((sign * order.values[:5]).tolist(), rel=2e-3)


def test_a_saved_index_comes_back_and_a_broken_one_is_refused(index, tmp_path):
    index.save(tmp_path / "index.safetensors")
    again = LatentIndex.load(tmp_path / "index.safetensors")
    assert again.contexts(3) == index.contexts(3) and again.effects(3) == index.effects(3)
    # 4,096 latents with 8 contexts of 21 tokens take 3 MB: ids and activations are two bytes each
    assert again.ids.dtype == torch.uint16 and again.activations.dtype == torch.float16
    from safetensors.torch import save_file

    save_file({"ids": index.ids.contiguous()}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="must be an index of latents, .* without activations, density"):
        LatentIndex.load(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"`latent` must be in \[0, 40\), got 40"):
        index.effects(40)


@pytest.mark.parametrize("shape", [(3, 23), (19, 6), (19,)])
def test_rows_that_are_too_few_or_short_are_refused(lm, sae, shape):
    with pytest.raises(ValueError, match=r"`rows` must be \(R, T\) token ids with R >= contexts=4 and T >= length=7"):
        build_index(sae, lm, torch.zeros(shape, dtype=torch.long), contexts=4, length=W)
