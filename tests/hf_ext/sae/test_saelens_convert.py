"""SAELens itself beside our reader and writer of its format; needs the extra `peers`."""

import json

import pytest
import torch

from hf_ext.sae.convert import export_sae, load_sae


sae_lens = pytest.importorskip("sae_lens", reason='the extra "peers" brings it')
# float32 sums of 12 or 40 terms in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("beta", [True, False])
def test_it_loads_what_we_export_and_computes_the_same(activation, beta, sae, tokens, tmp_path):
    model = sae(activation, apply_b_dec_to_input=beta, hook_name="model.layers.3").float().eval()
    if activation == "batchtopk":
        model.threshold.fill_(0.5)
    export_sae(model, tmp_path / "lens", "sae_lens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "lens")
    x, output = tokens(9).float(), model(tokens(9).float())
    codes = theirs.encode(x)
    torch.testing.assert_close(codes, output.codes.dense(), **CLOSE)
    torch.testing.assert_close(theirs.decode(codes), output.reconstruction, **CLOSE)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


def test_it_undoes_a_layer_norm_as_we_do(sae, tokens, tmp_path):
    model = sae("topk", input_norm="layer_norm").float().eval()
    export_sae(model, tmp_path / "lens", "sae_lens")
    theirs, x = sae_lens.SAE.load_from_disk(tmp_path / "lens"), 0.01 * tokens(9).float()  # the 1e-5 matters
    torch.testing.assert_close(theirs(x), model(x).reconstruction, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("TopKSAE", {"k": 5}),
        ("TopKSAE", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("TopKSAE", {"k": 5, "normalize_activations": "layer_norm"}),
        ("StandardSAE", {}),
        ("StandardSAE", {"apply_b_dec_to_input": False}),
        ("JumpReLUSAE", {}),
        ("GatedSAE", {}),
        ("TopKTrainingSAE", {"k": 5}),
        ("BatchTopKTrainingSAE", {"k": 5}),
    ],
)
def test_we_load_what_it_saves_and_compute_the_same(kind, options, tokens, tmp_path):
    torch.manual_seed(0)
    theirs = getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(d_in=12, d_sae=40, **options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    if kind.startswith("Batch"):
        theirs.topk_threshold.fill_(0.5)
        theirs.save_inference_model(tmp_path)
        theirs = sae_lens.SAE.load_from_disk(tmp_path)
    else:
        theirs.save_model(tmp_path)
    model, _ = load_sae(tmp_path, dtype=torch.float32)
    x = tokens(9).float()
    codes = theirs.encode(x)
    torch.testing.assert_close(model(x).reconstruction, theirs.decode(codes), **CLOSE)
    torch.testing.assert_close(model.encode(x).dense(), codes, **CLOSE)


def test_its_own_reader_of_sparsify_fails_on_a_genuine_file_that_ours_reads(sae, tokens, tmp_path):
    # why our reader is written from the formula: theirs transposes W_dec, which lies as a row for each latent
    model = sae("topk").float()
    folder = tmp_path / "layers.1"
    export_sae(model, folder, "sparsify")
    loader = sae_lens.loading.pretrained_sae_loaders.sparsify_disk_loader
    _, state = loader(folder)
    assert tuple(state["W_dec"].shape) == (12, 40)
    ours, _ = load_sae(folder)
    assert torch.equal(ours(tokens(9).float()).reconstruction, model(tokens(9).float()).reconstruction)
    assert json.loads((folder / "cfg.json").read_text())["k"] == 5
