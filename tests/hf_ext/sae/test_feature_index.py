"""The index holds what dense codes of the same texts say, however it was stopped; and finds latents by words."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ext.record import record
from hf_ext.sae import FeatureIndex, SAEConfig, SAEModel, build_feature_index
from hf_ext.sae import feature_index_build as module
from hf_ext.sae.__main__ import main
from hf_ext.sites import Hook


HOOK = Hook("model.layers.1", "output")
R, T, F, W, N, M = 21, 23, 40, 7, 4, 5
SKIPPED = 11


@pytest.fixture
def lm(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def sae():
    torch.manual_seed(1)
    model = SAEModel(SAEConfig(d_in=32, d_sae=F, k=3, hook_name=HOOK.path)).eval()
    with torch.no_grad():
        model.encoder.bias[5] = -100.0  # never fires
        model.encoder.bias[6] = 30.0  # fires everywhere
    return model


@pytest.fixture
def rows():
    return torch.randint(61, (R, T), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def build(lm, sae, rows, tmp_path):
    options = {"contexts": N, "length": W, "tokens": M, "skip_ids": [SKIPPED], "rows_per_part": 8, "progress": False}

    def run(folder="index", **others):
        return build_feature_index(sae, lm, rows, tmp_path / folder, **{**options, **others})

    return run


@pytest.fixture
def dense(lm, sae, rows):
    """(R, T, F) as float16 keeps it, with what is left out as 0."""
    with torch.no_grad(), record(lm, {"x": HOOK}) as seen:
        lm(rows)
        found = sae.encode(seen["x"][0]).dense()
    found[:, 0] = 0
    return (found * (rows != SKIPPED)[:, :, None]).half().float()


def test_contexts_are_the_strongest_rows_around_their_peaks(build, dense, rows):
    index, (most, place) = build(), dense.max(1)
    checked = 0
    for latent in range(F):
        found = index.contexts(latent)
        order = most[:, latent].argsort(descending=True, stable=True)[:N]
        wanted = [int(row) for row in order if most[row, latent] > 0]
        assert len(found) == len(wanted)
        peaks = sorted((amounts[peak] for _, amounts, peak in found), reverse=True)
        assert peaks == [pytest.approx(float(most[row, latent]), rel=1e-2) for row in wanted]
        for ids, amounts, peak in found:
            row = int(index.tensors["rows"][index.tensors["slot"][latent], checked_row(found, ids, amounts)])
            at = int(place[row, latent])
            start = at - peak
            assert 0 <= start <= T - W and ids == rows[row, start : start + W].tolist()
            assert amounts == pytest.approx(dense[row, start : start + W, latent].tolist(), rel=1e-2)
            checked += 1
    assert checked > 50
    assert index.contexts(5) == [] and index.density(5) == 0


def checked_row(found, ids, amounts):
    return next(at for at, (a, b, _) in enumerate(found) if a == ids and b == amounts)


def test_figures_of_all_latents_equal_those_of_dense_codes(build, dense, rows):
    index = build()
    kept = int((rows[:, 1:] != SKIPPED).sum())
    flat = dense.reshape(-1, F)
    assert index.info["tokens"] == kept
    for latent in range(F):
        amounts = flat[:, latent][flat[:, latent] > 0]
        assert index.density(latent) == pytest.approx(len(amounts) / kept)
        edges = [0, *module.EDGES, float("inf")]
        expected = [int(((amounts >= a) & (amounts < b)).sum()) for a, b in zip(edges, edges[1:], strict=False)]
        assert index.histogram(latent) == expected
        if len(amounts):
            assert float(index.tensors["mean"][latent]) == pytest.approx(float(amounts.mean()), rel=1e-4)
            assert float(index.tensors["most"][latent]) == float(amounts.max())
    assert index.density(6) > 0.9


def test_neighbours_are_what_fires_on_the_same_tokens(build, dense):
    index, fires = build(), (dense.reshape(-1, F) > 0).double()
    together = fires.T @ fires
    for latent in range(F):
        own = together[latent].clone()
        total, own[latent] = own[latent].clone(), 0
        expected = own.sort(descending=True).values[:M] / total.clamp_min(1)
        found = index.near(latent)
        assert [share for _, share in found] == pytest.approx([float(s) for s in expected if s > 0], rel=1e-3)
        for other, share in found:
            assert other != latent and share == pytest.approx(float(together[latent, other] / total), rel=1e-3)


def test_logit_effects_are_the_row_on_the_unembedding(build, lm, sae):
    index = build()
    effect = (sae.W_dec * lm.model.norm.weight) @ lm.lm_head.weight.T
    for latent in (0, 6, 17):
        found = index.effects(latent)
        top, low = effect[latent].topk(M), effect[latent].topk(M, largest=False)
        assert [token for token, _ in found["raised"]] == top.indices.tolist()
        assert [by for _, by in found["raised"]] == pytest.approx(top.values.tolist(), rel=1e-2)
        assert [token for token, _ in found["lowered"]] == low.indices.tolist()


def test_a_stopped_build_goes_on_and_becomes_the_same(build, sae, tmp_path, monkeypatch):
    whole = build("whole")
    encode, calls = SAEModel.encode, []

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, *args)

    monkeypatch.setattr(SAEModel, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        build()
    with pytest.raises(ValueError, match="Its build was stopped: start it again"):
        FeatureIndex(tmp_path / "index")
    monkeypatch.setattr(SAEModel, "encode", lambda self, *args: calls.append(1) or encode(self, *args))
    again = build()
    assert len(calls) == 2 + 2  # the first part of three was not computed again
    for name, tensor in whole.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"index.json", "index.safetensors"}
    build()
    assert len(calls) == 4  # a finished one is kept


def test_batches_of_latents_and_parts_change_nothing(build, monkeypatch):
    whole = build("whole")
    monkeypatch.setattr(module, "LATENTS_AT_ONCE", 7)
    other = build("other", rows_per_part=5)
    for name, tensor in whole.tensors.items():
        assert torch.equal(other.tensors[name], tensor), name


def test_another_build_in_the_same_folder_is_refused(build, sae, tmp_path):
    build()
    with pytest.raises(ValueError, match="differs in contexts. Name another one"):
        build(contexts=3)
    with torch.no_grad():
        sae.W_dec[0].mul_(2)
    with pytest.raises(ValueError, match="differs in its SAE, rows or sizes"):
        build()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="must be new or empty"):
        build("full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": T + 1}, r"`rows` must be token ids \(R, T\) with T >= length=24"),
        ({"contexts": 0}, "must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message, build):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("latent", [-1, F, "3", True])
def test_a_latent_out_of_range_is_refused(latent, build):
    with pytest.raises(ValueError, match=r"`latent` must be in \[0, 39\]"):
        build().contexts(latent)


# words


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[UNK]", "Ġcat", "Ġdog", "cat", "ĠCat", "Ġsat", "."] + [f"w{at}" for at in range(54)]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@pytest.fixture
def spoken(tmp_path):
    """An index of three latents that fire: 0 on " cat", 2 on " dog" next to " cat sat", 3 on neither."""
    ids = torch.tensor(
        [[[9, 1, 9, 9], [9, 4, 9, 9]], [[2, 1, 5, 9], [2, 9, 9, 9]], [[9, 9, 9, 9], [0, 0, 0, 0]]], dtype=torch.uint16
    )
    activations = torch.tensor(
        [[[0, 8, 0, 0], [0, 4, 0, 0]], [[6, 3, 0, 0], [5, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]], dtype=torch.half
    )
    tensors = {
        "ids": ids, "activations": activations, "peaks": torch.tensor([[1, 1], [0, 0], [0, -1]], dtype=torch.int16),
        "slot": torch.tensor([0, -1, 1, 2], dtype=torch.int32), "density": torch.tensor([0.5, 0, 0.25, 0.1]),
        "most": torch.tensor([8.0, 0, 6, 1]), "histogram": torch.ones(3, 18, dtype=torch.int32),
        "near": torch.full((3, 1), -1, dtype=torch.int32), "near_share": torch.zeros(3, 1).half(),
        "raised": torch.full((3, 1), 1, dtype=torch.int32), "raised_by": torch.ones(3, 1).half(),
        "lowered": torch.full((3, 1), 2, dtype=torch.int32), "lowered_by": -torch.ones(3, 1).half(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "index.safetensors")
    info = {"schema": 1, "edges": module.EDGES, "model": "you/lm", "hook_name": "model.layers.1"}
    (tmp_path / "index.json").write_text(json.dumps(info))
    return FeatureIndex(tmp_path)


def test_words_find_the_latents_that_fire_on_them_before_those_beside_them(spoken, tokenizer):
    assert spoken.search("cat", tokenizer) == [(0, 2, 1.0), (2, 1, 0.25)]  # 3 of 6 in one of two contexts
    assert spoken.search("cat sat", tokenizer) == [(2, 1, 0.25)]
    assert [hit.latent for hit in spoken.search("dog", tokenizer)] == [2]
    assert spoken.search("bird", tokenizer) == []  # unknown words are no contexts that were left empty
    assert len(spoken.search("cat", tokenizer, most=1)) == 1
    with pytest.raises(ValueError, match="`words` must hold a word"):
        spoken.search("  ", tokenizer)


def test_a_feature_is_written_as_neuronpedia_does(spoken, tokenizer):
    found = json.loads(json.dumps(spoken.neuronpedia(0, tokenizer)))
    assert (found["modelId"], found["layer"], found["index"]) == ("you/lm", "model.layers.1", "0")
    assert found["frac_nonzero"] == 0.5 and found["maxActApprox"] == 8
    first = found["activations"][0]
    assert first["values"] == [0, 8, 0, 0] and first["maxValue"] == 8 and first["maxValueTokenIndex"] == 1
    assert "cat" in first["tokens"][1] and len(first["tokens"]) == 4
    assert "cat" in found["pos_str"][0] and found["pos_values"] == [1] and found["neg_values"] == [-1]
    assert len(found["freq_hist_data_bar_heights"]) == len(found["freq_hist_data_bar_values"])
    assert spoken.neuronpedia(1, tokenizer)["activations"] == []


# the command


def test_one_command_builds_an_index_of_any_sae_on_any_texts(lm, sae, tokenizer, tmp_path, capsys):
    pytest.importorskip("datasets")
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    sae.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "lens"), "--to", "sae_lens"]) == 0
    texts = [{"text": " cat sat dog. " * 30} for _ in range(4)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    common = [
        "--model",
        str(tmp_path / "lm"),
        "--data",
        str(tmp_path / "texts.jsonl"),
        "--row-tokens",
        "16",
        "--rows",
        "9",
    ]
    for source in ("ours", "lens"):
        assert (
            main(["index", str(tmp_path / source), str(tmp_path / f"{source}-index"), "--length", "5", *common]) == 0
        )
        assert "of 40 latents fire on" in capsys.readouterr().out
    ours, lens = (FeatureIndex(tmp_path / f"{name}-index") for name in ("ours", "lens"))
    assert ours.info["rows"] == 9 and ours.info["model"] == "lm" and ours.info["data"] == "texts.jsonl"
    assert torch.equal(ours.tensors["ids"], lens.tensors["ids"])
    wrong = ["--model", str(tmp_path / "lm"), "--data", str(tmp_path / "texts.jsonl"), "--row-tokens", "9999"]
    assert main(["index", str(tmp_path / "ours"), str(tmp_path / "x"), *wrong]) == 1
    assert "must hold a row of 9999 tokens" in capsys.readouterr().err
