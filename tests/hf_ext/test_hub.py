"""Saved folders load where hf_ext is absent, also after a trip to the Hub and back; cards say what they were given."""

import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_ext import LimeConfig, LimeForCausalLM, LimeModel, hub


ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(12)[None]
CODE = {"configuration_lime.py", "modeling_lime.py"}
CARD = """---
title: Memory of Layers
arxiv: "2502.01230"
classes: [LimeForCausalLM]
recipe: stories
page: lime
status: built
summary: Heads that read earlier layers.
---

## What it does

Not part of a model card.

## Limits

Slow where G is large.

## Source and citation
"""
RESULTS = {
    "recipe": "stories",
    "command": "python -m trainers stories --budget small",
    "date": "2026-11-20",
    "budget": "small",
    "device": "2 CPU cores",
    "rows": [
        {"arm": "lime", "metric": "nll", "unit": "nats", "n": 3, "mean": 1.23456, "ci95": [1.2, 1.25]},
        {"arm": "llama", "metric": "nll", "unit": "nats", "n": 0, "mean": None, "ci95": None},
    ],
    "claims": [
        {
            "id": "L1",
            "paper": "Table 2",
            "statement": "LIMe has the lower loss.",
            "statistic": "difference",
            "estimate": 0.01,
            "ci95": [-0.02, 0.04],
            "threshold": 0,
            "verdict": "fails",
            "note": "Too few tokens.",
        }
    ],
}


def tiny(seed, **options):
    torch.manual_seed(seed)
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LimeForCausalLM(LimeConfig(vocab_size=300, hidden_size=32, intermediate_size=48, **heads, **options)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.flatten().tolist()


def tokenizer():
    vocabulary = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a saved causal LM; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("saved") / "lime"
    tiny(seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """A folder of cards with the real template and one planted system."""
    folder = tmp_path / "model_cards"
    folder.mkdir()
    shutil.copy(ROOT / "model_cards" / "template.md", folder)
    (folder / "lime.md").write_text(CARD)
    monkeypatch.setattr(hub, "_cards_folder", lambda: folder)
    return folder


def test_verify_reports_the_classes_and_size_of_a_folder_that_loads(saved):
    report = hub.verify(saved, auto=("AutoModel", "AutoModelForCausalLM"))
    assert report["auto"] == {
        "AutoConfig": "LimeConfig",
        "AutoModel": "LimeModel",
        "AutoModelForCausalLM": "LimeForCausalLM",
    }
    assert report["model_type"] == "lime"
    assert report["parameters"] == sum(p.numel() for p in tiny(seed=1).parameters())
    assert CODE | {"config.json", "model.safetensors"} <= set(report["files"])
    assert report["seconds"] > 0


def test_verify_refuses_a_folder_that_lacks_weights_of_the_class(tmp_path):
    model = tiny(seed=1).model
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"every weight of its AutoModelForCausalLM.*lm_head\.weight.*leave"):
        hub.verify(tmp_path, auto=("AutoModelForCausalLM",))


def test_verify_fails_where_the_code_needs_hf_ext(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    code = folder / "configuration_lime.py"
    code.write_text(f"from hf_ext.sites import Hook\n{code.read_text()}")
    with pytest.raises(RuntimeError, match="must load where hf_ext is absent(.|\n)*hf_ext"):
        hub.verify(folder, auto=())


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "`folder` must be a folder that `save_pretrained` wrote"),
        (lambda f: (f / "config.json").unlink(), r"config\.json must be there.*save_pretrained"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json must be JSON.*save_pretrained"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json must hold one JSON object, got a list"),
        (lambda f: edit_config(f, auto_map=None), r"`auto_map` in .*config\.json must name the code of AutoConfig"),
        (lambda f: edit_config(f, auto_map={"AutoConfig": "u/r--a.B"}), "must name code in the folder for.*u/r--a"),
        (lambda f: (f / "modeling_lime.py").unlink(), r"modeling_lime\.py must be there.*AutoModel"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors must be there: it holds the weights"),
        (cut, r"model\.safetensors must be a whole safetensors file, got \d+ bytes.*download it again"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"must be a whole safetensors file, got 0 bytes"),
        (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**40)), "must be a whole safetensors"),
        (shard, r"model-00001-of-00002\.safetensors must be there"),
    ],
)
def test_verify_names_the_file_that_is_wrong_without_starting_a_process(saved, tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    folder = shutil.copytree(saved, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        hub.verify(folder)


def test_verify_takes_names_of_auto_classes_in_a_tuple(saved):
    with pytest.raises(TypeError, match="`auto` must be a tuple of names"):
        hub.verify(saved, auto="AutoModel")


def test_verify_lists_what_auto_map_holds_for_an_unknown_auto_class(saved):
    with pytest.raises(ValueError, match="AutoModelForMaskedLM, got only.*AutoModelForCausalLM"):
        hub.verify(saved, auto=("AutoModelForMaskedLM",))


def test_card_says_what_library_system_paper_and_task_a_model_is(cards):
    data = hub.card(tiny(seed=1), "lime").data
    assert (data.library_name, data.license, data.pipeline_tag) == ("transformers", "apache-2.0", "text-generation")
    assert data.tags == ["hf_ext", "lime", "arxiv:2502.01230"]
    assert data.base_model is None
    assert data.eval_results is None


def test_card_of_a_model_its_configuration_and_its_base_model(cards):
    model = tiny(seed=1)
    assert "a `LimeForCausalLM`" in hub.card(model, "lime").text
    assert "AutoModelForCausalLM.from_pretrained" in hub.card(model, "lime").text
    assert "a `LimeModel`" in hub.card(model.config, "lime").text
    assert "AutoModel.from_pretrained" in hub.card(LimeModel(model.config), "lime").text


@pytest.mark.parametrize("name", ["someone/base-1b", "out/folder", "/home/somebody/model", "somebody", ""])
def test_card_names_a_base_model_of_the_hub_and_never_a_path(cards, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "folder").mkdir(parents=True)
    config = tiny(seed=1, base_model_name_or_path=name).config
    card = hub.card(config, "lime")
    is_id = name == "someone/base-1b"
    assert card.data.base_model == (name if is_id else None)
    assert (f"huggingface.co/{name}" in card.content) == is_id
    assert is_id or not name or name not in card.content


def test_card_body_has_summary_limits_and_citation_and_says_that_nothing_was_measured(cards):
    text = hub.card(tiny(seed=1), "lime").text
    assert "Heads that read earlier layers." in text
    assert "## Limits\n\nSlow where G is large.\n\n##" in text
    assert "## Measured\n\nNot measured.\n\n##" in text
    assert "eprint = {2502.01230}" in text
    assert "year = {2025}" in text
    assert "Not part of a model card" not in text


def test_card_shows_results_their_command_and_a_claim_that_failed(cards, tmp_path):
    (tmp_path / "stories.json").write_text(json.dumps(RESULTS))
    card = hub.card(tiny(seed=1), "lime", tmp_path / "stories.json")
    assert (
        "| arm | metric | unit | n | mean | 95 % interval |\n|---|---|---|---|---|---|\n"
        "| lime | nll | nats | 3 | 1.235 | [1.2, 1.25] |\n| llama | nll | nats | 0 | - | - |\n" in card.text
    )
    assert "python -m trainers stories --budget small" in card.text
    assert (
        "`L1` LIMe has the lower loss. **fails** (difference: 0.01, 95 % interval [-0.02, 0.04], threshold 0). Too"
        in (card.text)
    )
    assert card.content == hub.card(tiny(seed=1), "lime", RESULTS).content


def test_card_results_come_back_from_its_model_index(cards, tmp_path):
    hub.card(tiny(seed=1), "lime", RESULTS).save(tmp_path / "README.md")
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results  # the row without a mean is no result
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("stories", "nll", 1.23456)
    assert result.metric_args == {"arm": "lime", "unit": "nats", "n": 3, "ci95": [1.2, 1.25]}


def test_card_refuses_what_is_no_model_no_system_and_no_results(cards, tmp_path):
    model = tiny(seed=1)
    with pytest.raises(TypeError, match="`obj` must be a model or its configuration, got str"):
        hub.card("lime", "lime")
    with pytest.raises(ValueError, match="`system` must be one of lime, got 'limes'"):
        hub.card(model, "limes")
    with pytest.raises(ValueError, match="`results` must hold .* got none of command"):
        hub.card(model, "lime", {k: v for k, v in RESULTS.items() if k != "command"})
    with pytest.raises(ValueError, match="Each row of `results` must hold mean, ci95, got"):
        hub.card(model, "lime", RESULTS | {"rows": [{"arm": "a", "metric": "m", "unit": "u", "n": 1}]})
    with pytest.raises(ValueError, match=r"nowhere\.json must be there.*a recipe wrote"):
        hub.card(model, "lime", tmp_path / "nowhere.json")


def test_card_works_for_a_model_without_code_of_its_own(cards):
    card = hub.card(LlamaConfig(architectures=["LlamaForCausalLM"]), "lime")
    assert card.data.pipeline_tag == "text-generation"


def test_system_cards_gives_the_front_matter_of_each_system(cards):
    assert hub.system_cards()["lime"]["classes"] == ["LimeForCausalLM"]
    assert list(hub.system_cards()) == ["lime"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"2502.01230"', "2502.01230", "`arxiv` in model_cards/lime.md must be a text, got 2502.0123"),
        ("title: Memory of Layers\n", "", "front matter of model_cards/lime.md must hold title"),
    ],
)
def test_system_cards_refuses_a_card_that_lacks_something(cards, old, new, message):
    (cards / "lime.md").write_text(CARD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        hub.system_cards()


def test_an_installed_wheel_has_the_cards_of_the_checkout(run_python, tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs it to build a wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("hf_ext", "model_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "dist"), "."]
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=tmp_path, check=True, timeout=120)
    (wheel,) = (tmp_path / "dist").iterdir()
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
        sys.path.insert(0, {str(tmp_path / "site")!r})
        from hf_ext import hub
        assert hub.__file__.startswith(sys.path[0])
        print(list(hub.system_cards()))
        """
    keys = list(hub.system_cards())
    assert "lime" in keys
    assert run_python(re.sub(r"^ +", "", code, flags=re.MULTILINE), block=()) == f"{keys}\n"


PUSH = """
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments
from huggingface_hub import HfApi, ModelCard
from hf_ext import LimeForCausalLM

LimeForCausalLM.from_pretrained("{v1}").push_to_hub("tester/lime")
HfApi().create_tag("tester/lime", tag="v1")
model = LimeForCausalLM.from_pretrained("{v2}")
model.push_to_hub("tester/lime")
AutoTokenizer.from_pretrained("{v2}").push_to_hub("tester/lime")
ModelCard.load("{card}").push_to_hub("tester/lime")

rows = [dict(input_ids=torch.arange(8), labels=torch.arange(8))] * 2
args = TrainingArguments(
    "out", max_steps=1, use_cpu=True, push_to_hub=True, hub_model_id="tester/trained", disable_tqdm=True
)
trainer = Trainer(model, args, train_dataset=rows)
trainer.train()
trainer.push_to_hub()
model.eval().save_pretrained("{trained}")
"""
PULL = """
import json, os, re, torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.arange(12)[None]

def logits(repo, **options):
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, **options)
    with torch.no_grad():
        return model, model(ids).logits.flatten().tolist()

tagged, of_v1 = logits("tester/lime", revision="v1")
tagged.save_pretrained("again")
report = dict(v1=of_v1, v2=logits("tester/lime")[1], trained=logits("tester/trained")[1], again=logits("again")[1])
report["base"] = type(AutoModel.from_pretrained("again", trust_remote_code=True)).__name__
report["module"] = type(tagged).__module__
report["files"] = os.listdir("again")
card = ModelCard.load("tester/lime")
report["tags"] = HfApi().model_info("tester/lime").tags
exec("\\n".join(re.findall(r"```python\\n(.*?)```", card.text, re.DOTALL)).replace("you/lime", "tester/lime"))
print()
print(json.dumps(report))
"""
AWAY = """
import json, time
from transformers import AutoModelForCausalLM
from huggingface_hub import HfApi

def attempt(action):
    start = time.perf_counter()
    try:
        said = type(action()).__name__
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.perf_counter() - start

load = lambda repo, **options: AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, **options)
cached = attempt(lambda: load("tester/lime", revision="v1"))
push = attempt(lambda: HfApi().create_repo("tester/new"))
time.sleep = lambda seconds: None  # the library waits 23 s for each look-up before it says so
print(json.dumps([cached, attempt(lambda: load("tester/never-seen")), push]))
"""


@pytest.fixture(scope="module")
def hub_trip(loopback_hub, run_python, tmp_path_factory):
    """Two versions pushed where hf_ext is, and what a process without it saw; its cache is left in `home`."""
    folder = tmp_path_factory.mktemp("trip")
    expected = {}
    for seed, version in enumerate(("v1", "v2"), start=1):
        model = tiny(seed)
        model.save_pretrained(folder / version)
        tokenizer().save_pretrained(folder / version)
        expected[version] = logits(model)
    with pytest.MonkeyPatch.context() as patch:
        cards = folder / "model_cards"
        cards.mkdir()
        shutil.copy(ROOT / "model_cards" / "template.md", cards)
        (cards / "lime.md").write_text(CARD)
        patch.setattr(hub, "_cards_folder", lambda: cards)
        hub.card(model, "lime", RESULTS).save(folder / "README.md")
    places = {name: folder / name for name in ("v1", "v2", "trained")}
    run_python(PUSH.format(**places, card=folder / "README.md"), env=loopback_hub.env, block=())
    home = str(folder / "home")
    seen = json.loads(run_python(PULL, env={**loopback_hub.env, "HF_HOME": home}).splitlines()[-1])
    expected["trained"] = logits(LimeForCausalLM.from_pretrained(folder / "trained"))
    return expected, seen, home


@pytest.mark.parametrize("version", ["v1", "v2", "trained"])
def test_a_pushed_model_gives_the_same_logits_where_hf_ext_is_absent(hub_trip, version):
    expected, seen, _ = hub_trip
    assert seen[version] == expected[version]  # the same weights and operations on the same machine: equal to the bit


def test_a_revision_is_the_version_that_was_tagged(hub_trip):
    expected, seen, _ = hub_trip
    assert seen["v1"] != seen["v2"]
    assert seen["module"].startswith("transformers_modules.tester.lime.")


def test_saving_a_pulled_model_again_keeps_its_code(hub_trip):
    expected, seen, _ = hub_trip
    assert set(seen["files"]) >= CODE
    assert seen["again"] == expected["v1"]
    assert seen["base"] == "LimeModel"


def test_a_pushed_card_is_read_by_the_hub_and_its_snippets_run(hub_trip):
    _, seen, _ = hub_trip  # the snippets ran in the process that pulled, or it would have failed
    assert {"hf_ext", "lime", "arxiv:2502.01230"} <= set(seen["tags"])


def test_a_hub_that_is_away_leaves_the_cache_usable_and_says_so_in_a_sentence(hub_trip, run_python):
    # port 9 of this machine: nothing listens there
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": None, "HF_TOKEN": "hf_x", "HF_HOME": hub_trip[2]}
    cached, unknown, push = json.loads(run_python(AWAY, env=env).splitlines()[-1])
    assert cached[0] == "LimeForCausalLM"
    assert cached[1] < 15  # one refused request per file and no repeats; with them it would be above 23 s
    assert unknown[0].startswith("OSError: We couldn't connect to 'http://127.0.0.1:9'")
    assert push[0].startswith("ConnectError")
    assert push[1] < 15  # refused at once


def test_offline_mode_says_so_at_once(run_python):
    said = run_python(AWAY.replace('cached = attempt(lambda: load("tester/lime", revision="v1"))', "cached = ['', 0]"))
    _, unknown, push = json.loads(said.splitlines()[-1])
    assert re.match("OSError: We couldn't connect to .* offline mode", unknown[0], re.DOTALL)
    assert push[0].startswith("OfflineModeIsEnabled")
    assert max(unknown[1], push[1]) < 5  # no request is made
