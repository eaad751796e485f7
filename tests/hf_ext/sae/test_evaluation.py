"""`evaluate` and its command line: figures against the functions they are made of, intervals, baselines, refusals."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ext.record import record
from hf_ext.sae import SAEConfig, SAEModel
from hf_ext.sae.__main__ import main
from hf_ext.sae.evaluation import evaluate
from hf_ext.sae.metrics import language_metrics, pca_ev_global, reconstruction_metrics
from hf_ext.sites import Hook


HOOK = "model.layers.1"


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.3, **shape)).eval()


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(0)
    return SAEModel(SAEConfig(d_in=16, d_sae=64, k=8, hook_name=HOOK)).eval()


@pytest.fixture(scope="module")
def folders(lm, sae, tmp_path_factory):
    """Folders of the model with a tokenizer of bytes, and of the SAE; a file of texts."""
    root = tmp_path_factory.mktemp("saved")
    vocabulary = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<end>").save_pretrained(root / "lm")
    lm.save_pretrained(root / "lm")
    sae.save_pretrained(root / "sae")
    rows = [{"text": f"One day {name} saw {i} birds in the tree."} for i in range(4) for name in ("Mia", "Tom")]
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(300, (length,), generator=generator) for length in (40, 33, 50, 40)]


def test_its_figures_are_those_of_the_metrics_over_all_documents(lm, sae, documents):
    found = evaluate(sae, lm, documents, [None, 2], samples=50, progress=False)
    hidden = []
    for ids in documents:
        with torch.no_grad(), record(lm, {"x": Hook(HOOK, "output")}) as seen:
            lm(ids[None])
        hidden.append(seen["x"][0][0, 1:])
    x = torch.cat(hidden)
    assert (found["documents"], found["tokens"]) == (4, len(x))
    for entry, k in zip(found["budgets"], (8, 2), strict=True):
        values = {name: figure["value"] for name, figure in entry["figures"].items()}
        direct = reconstruction_metrics(sae, x, k)
        assert {name: values[name] for name in direct if name != "tokens"} == pytest.approx(
            {name: value for name, value in direct.items() if name != "tokens"}, rel=1e-6
        )
        mean = {"sae": x.mean(0)}
        costs = [language_metrics(lm, {"sae": sae}, ids[None], k=k, means=mean) for ids in documents]
        merged = {name: torch.cat([cost[name] for cost in costs]).mean().item() for name in costs[0]}
        assert {name: values[name] for name in merged} == pytest.approx(merged, rel=1e-5)  # float32
        of_zero = (merged["ce_zero"] - merged["ce_sae"]) / (merged["ce_zero"] - merged["ce_clean"])
        assert values["ce_recovered_zero"] == pytest.approx(of_zero, rel=1e-4)
        assert values["delta_ce"] == pytest.approx(merged["ce_sae"] - merged["ce_clean"], rel=1e-4)
        for name, figure in entry["figures"].items():
            if name != "dead_fraction":
                low, high = figure["ci95"]
                assert low <= high and math.isfinite(low)
        assert entry["l0_quantiles"][-1] == k and entry["l0_quantiles"] == sorted(entry["l0_quantiles"])
        assert sum(entry["density"]["latents"]) + entry["density"]["never"] == 64
        assert entry["density"]["never"] == round(values["dead_fraction"] * 64)


def test_baselines_are_ordered_and_pca_is_that_of_its_function(lm, sae, documents):
    found = evaluate(sae, lm, documents, [4], samples=5, baselines=["random", "frozen_decoder", "pca"], progress=False)
    baselines = found["baselines"]
    assert {name: list(values) for name, values in baselines.items()} == dict.fromkeys(baselines, ["4"])
    assert baselines["random"]["4"] < baselines["frozen_decoder"]["4"] < 1
    hidden = []
    for ids in documents:
        with torch.no_grad(), record(lm, {"x": Hook(HOOK, "output")}) as seen:
            lm(ids[None])
        hidden.append(seen["x"][0][0, 1:])
    assert baselines["pca"]["4"] == pytest.approx(pca_ev_global(torch.cat(hidden), [4])[4])


def test_the_command_line_writes_json_and_shows_a_table(folders, capsys):
    out = folders / "found.json"
    arguments = ["eval", str(folders / "sae"), "--model", str(folders / "lm"), "--data", str(folders / "texts.jsonl")]
    main(
        [
            *arguments,
            "--k",
            "8",
            "2",
            "--documents",
            "6",
            "--baselines",
            "pca",
            "--dtype",
            "float32",
            "--out",
            str(out),
        ]
    )
    said = capsys.readouterr().out
    assert "ev_global of pca" in said and "k = 2" in said and "ce_recovered_mean" in said
    found = json.loads(out.read_text())
    assert (found["sae"], found["model"], found["data"]) == ("sae", "lm", "texts.jsonl")
    assert found["documents"] == 6 and [entry["k"] for entry in found["budgets"]] == [8, 2]
    assert str(folders) not in out.read_text()
    main([*arguments, "--documents", "3", "--dtype", "float32", "--latents", "2"])
    assert json.loads(capsys.readouterr().out)["budgets"][0]["scores"] == {"latents": 0}  # too few contexts


def test_stories_of_the_grammar_are_the_default_text(folders, capsys):
    main(["eval", str(folders / "sae"), "--model", str(folders / "lm"), "--documents", "2", "--context", "32"])
    found = json.loads(capsys.readouterr().out)
    assert (found["data"], found["documents"], found["tokens"]) == ("tasks:stories", 2, 62)


@pytest.fixture
def refused(folders, capsys):
    """`refused(*arguments)` -> the sentence, where the run ends with exit code 1."""

    def run(*arguments, sae="sae", model="lm"):
        with pytest.raises(SystemExit) as ended:
            main(["eval", str(folders / sae), "--model", str(folders / model), *arguments])
        assert ended.value.code == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def test_what_does_not_go_together_is_refused_before_weights_load(refused, folders, sae, monkeypatch):
    for name, options in {
        "wide": {"d_in": 17},
        "lost": {"hook_name": "model.layer.1"},
        "bare": {"hook_name": None},
    }.items():
        SAEConfig(**{"d_in": 16, "d_sae": 64, "k": 8, "hook_name": HOOK, **options}).save_pretrained(folders / name)
    monkeypatch.setattr(SAEModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    texts = ["--data", str(folders / "texts.jsonl")]
    assert "`--k` must be in [1, 8], the latents that the SAE can be asked for, got 9" in refused("--k", "9", *texts)
    assert "activations of width d_in=17 at 'model.layers.1', got 16 in lm" in refused(*texts, sae="wide")
    assert "model.layer.1" in refused(*texts, sae="lost")
    assert "without `hook_name`" in refused(*texts, sae="bare")
    assert "`--text-field` must be one of text, got 'body'" in refused("--text-field", "body", *texts)
    assert "`--documents` must be at least 2, got 1" in refused("--documents", "1")
    (folders / "short.jsonl").write_text('{"text": "Hi."}\n{"text": "Ho."}\n')
    said = refused("--data", str(folders / "short.jsonl"))
    assert "`--data` must hold at least 2 texts of 16 tokens, got 0 among 2" in said
    (folders / "data.bin").write_text("x")
    assert "`--data` must be a file of .txt" in refused("--data", str(folders / "data.bin"))


def test_activations_with_nan_are_named_by_hook_and_count(lm, sae, documents):
    weight = lm.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = math.nan
        with pytest.raises(FloatingPointError, match=r"NaN or infinity in 39 of 39 tokens at hook 'model.layers.1'"):
            evaluate(sae, lm, documents, progress=False)
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": [torch.arange(9)]}, "`documents` must be at least 2, whose spread gives intervals, got 1"),
        ({"documents": [torch.arange(9), torch.arange(2)]}, r"longer than skip_positions \+ 1 tokens, got 1 that"),
        ({"baselines": ["zero"]}, "`baselines` must be of random, frozen_decoder, pca, got zero"),
        ({"budgets": [9]}, r"`k` must be a whole number in \[1, 8\]"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(lm, sae, documents, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**{"sae": sae, "model": lm, "documents": documents, "progress": False, **change})
