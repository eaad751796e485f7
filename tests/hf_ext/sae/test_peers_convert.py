"""dictionary_learning and sparsify themselves beside our readers and writers of their formats, where they are there.

Both ask for much that the classes compared here do not need, so they are part of no extra, and this is enough (tried
with 0.1.0 and 1.3.3):

    pip install --no-deps dictionary-learning eai-sparsify simple-parsing natsort docstring-parser einops
"""

import importlib
import importlib.util
import json
import sys
import types

import pytest
import torch

from hf_ext.sae.convert import export_sae, load_sae


# a JumpReLU's and a gate's biases are folded: float32 sums in another order
FOLDED = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def library(monkeypatch):
    """`library(package, module)` -> the module, without what the package's own __init__ imports."""

    def load(package, module):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
        parts = f"{package}.{module}".split(".")[:-1]
        path = next(iter(importlib.util.find_spec(package).submodule_search_locations))
        for depth in range(1, len(parts) + 1):
            bare = types.ModuleType(".".join(parts[:depth]))
            bare.__path__ = ["/".join([path, *parts[1:depth]])]
            monkeypatch.setitem(sys.modules, bare.__name__, bare)
        try:
            return importlib.import_module(f"{package}.{module}")
        except ImportError as error:
            pytest.skip(f"{package} lacks what it needs: {error}")

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dictionary_learning", "sparsify")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("activation", "module", "name"),
    [
        ("relu", "dictionary", "AutoEncoder"),
        ("jumprelu", "dictionary", "JumpReluAutoEncoder"),
        ("topk", "trainers.top_k", "AutoEncoderTopK"),
        ("batchtopk", "trainers.batch_top_k", "BatchTopKSAE"),
    ],
)
@pytest.mark.parametrize("unit", [True, False])
def test_dictionary_learning_loads_what_we_export(activation, module, name, unit, library, sae, tokens, tmp_path):
    model, x = sae(activation).float().eval(), tokens(9).float()
    if unit:
        model.constrain_()
    if activation == "batchtopk":
        model.threshold.fill_(0.8)
    export_sae(model, tmp_path / "out", "dictionary_learning")
    theirs = getattr(library("dictionary_learning", module), name).from_pretrained(tmp_path / "out" / "ae.pt")
    codes = theirs.encode(x)
    ours = load_sae(tmp_path / "out")[0](x)
    torch.testing.assert_close(ours.codes.dense(), codes, **FOLDED)
    torch.testing.assert_close(ours.reconstruction, theirs.decode(codes), **FOLDED)
    torch.testing.assert_close(ours.reconstruction, model(x).reconstruction, **FOLDED)


@pytest.mark.parametrize("kind", ["GatedAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_we_load_what_dictionary_learning_saves(kind, library, tokens, tmp_path):
    torch.manual_seed(0)
    if kind == "GatedAutoEncoder":
        theirs = library("dictionary_learning", "dictionary").GatedAutoEncoder(12, 40)
    else:
        made = library("dictionary_learning", "trainers.matryoshka_batch_top_k")
        theirs = made.MatryoshkaBatchTopKSAE(12, 40, 5, [8, 32])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if hasattr(theirs, "threshold"):
        theirs.threshold.fill_(0.5)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": 12, "dict_size": 40, "k": 5, "layer": 1, "lm_name": "you/lm"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    x = tokens(9).float()
    codes, output = theirs.encode(x), load_sae(tmp_path)[0](x)
    assert (codes > 0).any()
    torch.testing.assert_close(output.codes.dense(), codes, **FOLDED)
    torch.testing.assert_close(output.reconstruction, theirs.decode(codes), **FOLDED)


def test_sparsify_loads_what_we_export_and_we_what_it_saves(library, sae, tokens, tmp_path):
    coder = library("sparsify", "sparse_coder").SparseCoder
    model, x = sae("topk").float(), tokens(9).float()
    export_sae(model, tmp_path / "layers.3", "sparsify")
    theirs = coder.load_from_disk(tmp_path / "layers.3")
    found, expected = theirs.encode(x), model.encode(x)
    assert torch.equal(found.top_acts.sort(descending=True).values, expected.values)
    dense = torch.zeros(9, 40).scatter(1, found.top_indices, found.top_acts)
    torch.testing.assert_close(dense @ theirs.W_dec + theirs.b_dec, model(x).reconstruction)
    theirs.save_to_disk(tmp_path / "layers.4")
    again, _ = load_sae(tmp_path / "layers.4")
    assert torch.equal(again(x).reconstruction, model(x).reconstruction)
