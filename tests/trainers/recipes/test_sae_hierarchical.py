"""The recipe of hierarchical autoencoders on tiny models, and the parts that its figures stand on."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_ext.sae import SparseCodes
from hf_ext.tasks import stories
from trainers.recipes import sae_hierarchical as recipe
from trainers.recipes import stories as stories_recipe
from trainers.recipes.__main__ import main
from trainers.recipes.runner import Cell, Options, Place
from trainers.recipes.sae_activations import CONTEXT, harvest_stories, held_out_file
from trainers.recipes.sae_figures import known_latent_figures, reconstruction_figures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained Llama with the tokenizer and the chat template of the story model."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    folder.mkdir()
    stories_recipe.prepare(Options("smoke"), folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=stories_recipe.VOCABULARY, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "text.jsonl"
    rng = random.Random(0)
    file.write_text("\n".join(json.dumps({"text": stories.sample(rng).text}) for _ in range(200)))
    return file


@pytest.fixture(scope="module")
def known(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("known") / "stories-abc.safetensors"
    harvest_stories(model, file, tokens=1024, test=512)
    return file


def test_the_recipe_runs_every_kind_of_arm_and_answers_its_claims(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "stories_model", lambda: None)
    work = tmp_path / "work"
    options = ["--budget", "smoke", "--model", str(model), "--text", str(text), str(text), "--work", str(work)]
    assert main(["sae_hierarchical", *options]) == 0
    result = json.loads((work / "sae_hierarchical/smoke/sae_hierarchical.json").read_text())
    assert [cell["arm"] for cell in result["cells"]] == ["hierarchical", "topk_8", "matryoshka", "pca"]
    assert all(cell["status"] == "done" for cell in result["cells"])
    assert {claim["id"] for claim in result["claims"]} == {
        "matches_specialists",
        "matches_specialists_full",
        "beats_truncated",
        "monotone",
        "interpretable_at_high_k",
        "full_better_near_k",
    }
    for cell in result["cells"]:
        assert len(cell["series"]["curve"]) == 8
        assert cell["metrics"]["ev_global_at_8"] == pytest.approx(cell["series"]["curve"][-1], abs=1e-5)
    hierarchical = result["cells"][0]
    assert hierarchical["params_trained"] == 2 * 128 * 32 + 128 + 32
    assert hierarchical["metrics"].keys() >= {"delta_ce_at_1", "ce_recovered_zero_at_8", "dead_fraction", "l0"}
    assert result["hook"] == "model.layers.1.output"
    assert str(tmp_path) not in json.dumps(result)
    assert (work / "sae_hierarchical/smoke/sae_hierarchical.png").is_file()


def test_without_a_story_model_its_arms_are_left_out_with_a_sentence(model, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "stories_model", lambda: None)
    options = Options("small", model=str(model))
    without = recipe.cells(options)
    assert "left out: the package has no such model" in capsys.readouterr().err
    monkeypatch.setattr(recipe, "stories_model", lambda: model)
    with_it = recipe.cells(options)
    assert with_it[: len(without)] == without
    assert {cell.arm for cell in with_it[len(without) :]} == {
        "known_hierarchical",
        "known_topk_8",
        "known_topk_64",
    }
    seeds = {arm: sum(cell.arm == arm for cell in without) for arm in dict.fromkeys(cell.arm for cell in without)}
    assert seeds == {
        "hierarchical": 3, "topk_8": 3, "topk_64": 3, "hierarchical_full": 2, "topk_16": 1, "topk_32": 1,
        "matryoshka": 1, "multi_topk": 1, "frozen_decoder": 1, "random": 1, "pca": 1,
    }  # fmt: skip


def test_held_out_rows_are_those_of_the_model_and_leave_out_first_positions(model, text, tmp_path):
    options = Options("smoke", model=str(model), text=(str(text), str(text)))
    facts = recipe.prepare(options, tmp_path)
    file = held_out_file(recipe.cache_of(tmp_path, facts))
    content = load_file(file)
    assert content["input_ids"].shape == (recipe.SIZES["smoke"].rows, CONTEXT)
    lm = LlamaForCausalLM.from_pretrained(model, dtype="bfloat16")
    with torch.no_grad():
        # the output of layer 1 goes into layer 2
        expected = lm(content["input_ids"][:2], output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(content["x"][:2], expected, rtol=0.02, atol=1e-3)  # bfloat16, other batch sizes
    assert not content["kept"][:, 0].any() and content["kept"][:, 1:].float().mean() > 0.9
    before = file.stat().st_mtime_ns
    assert recipe.prepare(options, tmp_path) == facts and file.stat().st_mtime_ns == before


def test_known_facts_are_those_of_the_tokens(model, known):
    """Drawn again: the same stories, told by the same rules, give the same activations and labels."""
    with safe_open(known, framework="pt") as content:
        names = [tuple(pair) for pair in json.loads(content.metadata()["names"])]
        train, test, labels = (content.get_tensor(name) for name in ("train", "test", "labels"))
    assert train.shape == (1024, 32) and test.shape == (512, 32) and labels.shape == (512, len(names))
    assert {latent for latent, _ in names} == set(stories.LATENTS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = LlamaForCausalLM.from_pretrained(model, dtype="float32")
    rng = random.Random(0)
    found, facts = [], []
    while sum(map(len, found)) < 1024 + 512:
        story = stories_recipe.seen_story(rng)
        asked = tokenizer.apply_chat_template(
            stories.messages(story.prompt), tokenize=False, add_generation_prompt=True
        )
        prompt, answer = tokenizer(asked).input_ids, tokenizer(story.text, return_offsets_mapping=True)
        with torch.no_grad():
            hidden = lm(torch.tensor([prompt + answer.input_ids]), output_hidden_states=True).hidden_states[2]
        found.append(hidden[0, len(prompt) :])
        # the value in force: of the last span of this latent that has begun
        for _, end in answer.offset_mapping:
            told = [span for span in story.spans if span.start < end]
            facts.append({(span.latent, span.value) for span in {span.latent: span for span in told}.values()})
    x = torch.cat(found)
    torch.testing.assert_close(torch.cat([train, test]), x[:1536].to(torch.bfloat16), rtol=0.01, atol=1e-3)
    assert [{name for name, on in zip(names, row, strict=True) if on} for row in labels.tolist()] == facts[1024:1536]


def test_a_latent_that_is_a_fact_has_f1_one(tmp_path):
    labels = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) < 0.3
    names = [["mood", "glad"], ["mood", "sad"], ["who", "Mia"], ["who", "Tom"]]
    save_file({"test": labels.float(), "labels": labels}, tmp_path / "f", {"names": json.dumps(names)})

    class Perfect:
        def encode(self, x):
            return SparseCodes(*torch.cat([x, torch.zeros(len(x), 3)], 1).topk(5, dim=1), 7)

    figures, series = known_latent_figures(Perfect(), tmp_path / "f", [5])
    assert figures == {"f1_at_5": 1.0, "f1_mood_at_5": 1.0, "f1_who_at_5": 1.0}
    assert series == {"f1_at_5": [1.0] * 4}


@pytest.mark.parametrize(
    ("arm", "loss", "k"),
    [
        ("known_hierarchical", "full", 8),
        ("known_hierarchical", "powers_of_two", 8),
        ("known_multi_topk", "multi_topk", 8),
        ("frozen_decoder", "powers_of_two", 8),
        ("random", "none", 8),
    ],
)
def test_each_arm_trains_what_it_says(arm, loss, k, known, tmp_path):
    settings = {"d_sae": 64, "most": 8, "batch": 128, "lr": 1e-3, "loss": loss, "k": k, "samples": 512, "model": "abc"}
    place = Place(tmp_path, known.parent, {}, Options("smoke"), lambda share: None)
    sae, _ = recipe.trained(Cell(arm, 1, settings), place)
    untrained, _ = recipe.trained(Cell("random", 1, settings | {"loss": "none"}), place)
    x = load_file(known)["test"].float()
    moved = not torch.equal(sae.encoder.weight, untrained.encoder.weight)
    assert moved == (loss != "none")
    # rows that do not learn are still brought to norm 1: a rounding
    assert torch.allclose(sae.W_dec, untrained.W_dec, atol=1e-6) == (arm in ("frozen_decoder", "random"))
    ours, curve = reconstruction_figures(sae, x, k, 8)
    theirs, _ = reconstruction_figures(untrained, x, k, 8)
    assert len(curve) == 8 and ours["ev_global"] == pytest.approx(curve[k - 1], abs=1e-4)
    assert (ours["ev_global"] > theirs["ev_global"]) == moved


def made_up(hierarchical, specialist, detection, seeds=(0, 1, 2)):
    """Cells whose curves are given: arm -> ev at 1, 2, ..., 16, of which each seed adds a little."""
    found = []
    for arm, curve in {"hierarchical": hierarchical, **specialist}.items():
        for seed in seeds if arm in ("hierarchical", "topk_2", "topk_16") else (0,):
            curve_of_seed = [value + 0.001 * seed for value in curve]
            metrics = {f"ev_global_at_{2**i}": curve_of_seed[2**i - 1] for i in range(5)}
            metrics |= {f"detection_at_{k}": detection[arm] for k in (2, 16)}
            cell = {"arm": arm, "seed": seed, "status": "done", "metrics": metrics, "cost": {}}
            found.append(cell | {"settings": {"most": 16}, "series": {"curve": curve_of_seed}})
    return found


def test_claims_hold_and_fail_on_made_up_curves():
    rising = [0.4 + 0.02 * i for i in range(16)]
    specialist = {f"topk_{k}": [rising[k - 1] + 0.005] * 16 for k in (2, 4, 8)}
    specialist["topk_16"] = [0.1 + 0.04 * i for i in range(15)] + [rising[15] + 0.005]
    detection = dict.fromkeys(["hierarchical", *specialist], 0.8)
    by_id = {claim["id"]: claim for claim in recipe.claims(made_up(rising, specialist, detection))}
    assert by_id["matches_specialists"]["estimate"] == pytest.approx(0.005, abs=1e-5)
    assert by_id["beats_truncated"]["estimate"] == pytest.approx(rising[1] - 0.14, abs=1e-5)
    assert by_id["monotone"]["estimate"] == pytest.approx(0.02, abs=1e-5)
    held = ("matches_specialists", "beats_truncated", "monotone", "interpretable_at_high_k")
    assert {id: by_id[id]["verdict"] for id in held} == dict.fromkeys(held, "holds")
    assert by_id["full_better_near_k"]["estimate"] is None

    dented = [*rising[:8], rising[6], *rising[9:]]
    specialist["topk_4"] = [rising[3] + 0.05] * 16
    detection["hierarchical"] = 0.7
    by_id = {claim["id"]: claim for claim in recipe.claims(made_up(dented, specialist, detection))}
    assert by_id["matches_specialists"]["estimate"] == pytest.approx(0.05, abs=1e-5)
    assert by_id["monotone"]["estimate"] == pytest.approx(rising[6] - rising[7], abs=1e-5)
    failed = ("matches_specialists", "monotone", "interpretable_at_high_k")
    assert {id: by_id[id]["verdict"] for id in failed} == dict.fromkeys(failed, "fails")
