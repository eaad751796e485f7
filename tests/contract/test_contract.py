"""What every shippable model of ours promises, checked over all of `CASES`; a new model is one more row.

- One process without hf_ext loads all models, so the price of starting it is paid once.
- Both sides run the same operations on the same machine: outputs are compared to the bit.
- The fences of the system cards run as a reader would run them: in order, in one namespace. A fence marked
  `python no-run` is left out, one marked `python smollm2` runs where that model is in the cache.
"""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_ext
from hf_ext import hub
from hf_ext._registration import MODELS
from hf_ext.tiny import smollm2


class Case(NamedTuple):
    """A model: its system's card, public name, a tiny configuration, the Auto classes that load it, an input."""

    system: str
    model: str
    options: dict[str, Any]
    auto: tuple[str, ...]
    inputs: dict[str, torch.Tensor]


DECODER = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"input_ids": torch.arange(24).view(2, 12)}
STEERED = {"base_config": {"model_type": "mistral", **DECODER, **GROUPED}, "hook_names": ["model.layers.1.mlp"]}
MASKED_LM = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PREDICTED = {**MASKED_LM, "model_type": "mdlm", "intermediate_size": 64, "hidden_dropout": 0.0, "layer_norm_eps": 1e-5}
PREDICTED |= {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
PREDICTOR = {"vocab_size": 300, "hidden_size": 32, "base_config": PREDICTED}
ACTIVATIONS = {"x": torch.linspace(-3, 3, 72).sin().view(2, 3, 12)}
AUGMENTED = {
    "base_config": {"model_type": "llama", **DECODER, **GROUPED},
    "embed_base": True,
    "saes": {"layer1": {"d_in": 32, "d_sae": 50, "k": 4, "hook_name": "model.layers.1"}},
    "edits": [{"sae": "layer1", "latent": 3, "op": "add", "value": 2.0}],
    "modes": {"layer1": "steer"},
}
CASES = [
    Case("lime", "LimeForCausalLM", {**DECODER, **GROUPED}, ("AutoModel", "AutoModelForCausalLM"), TOKENS),
    Case("steering", "SteeredModelForCausalLM", STEERED, ("AutoModelForCausalLM",), TOKENS),
    Case("hierarchical_topk", "SAEModel", {"d_in": 12, "d_sae": 50, "k": 4}, ("AutoModel",), ACTIVATIONS),
    Case("hierarchical_topk", "SAEAugmentedModelForCausalLM", AUGMENTED, ("AutoModelForCausalLM",), TOKENS),
    Case("gstar", "MDLMForMaskedLM", MASKED_LM, ("AutoModel", "AutoModelForMaskedLM"), TOKENS),
    Case("gstar", "ErrorPredictor", PREDICTOR, ("AutoModel",), TOKENS),
]
AUTOS = [(case, auto) for case in CASES for auto in case.auto]
ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
SUFFIXES = {".safetensors", ".json", ".py", ".md", ".txt"}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
each_auto = pytest.mark.parametrize(("case", "auto"), AUTOS, ids=[f"{case.model}-{auto}" for case, auto in AUTOS])
each_card = pytest.mark.parametrize("key", [key for key, c in hub.system_cards().items() if c["status"] == "built"])


def tensors(value, name="output"):
    """Every tensor in a model's output by its path; caches and numbers are left out."""
    if isinstance(value, torch.Tensor):
        return {name: value.detach().contiguous().clone()}
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    else:
        items = vars(value).items() if hasattr(value, "__dataclass_fields__") else ()
    return {path: tensor for key, part in items for path, tensor in tensors(part, f"{name}.{key}").items()}


def outputs(model, inputs):
    with torch.no_grad():
        return tensors(model.eval()(**inputs))


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def config_class(case):
    return getattr(hf_ext, case.model).config_class


def build(case):
    torch.manual_seed(0)
    return getattr(hf_ext, case.model)(config_class(case)(**case.options))


def tokenizer():
    """The snippets of a language model's card read one beside the weights."""
    byte_level = Tokenizer(
        models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=byte_level)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Model's name -> a folder as `save_pretrained` left it, with inputs and expected outputs in `<folder>-io`."""
    folders = {}
    for case in CASES:
        folder = folders[case.model] = tmp_path_factory.mktemp("saved") / case.model
        build(case).save_pretrained(folder)
        side = folder.with_name(f"{case.model}-io")
        side.mkdir()
        save_file(case.inputs, side / "inputs.safetensors")
        for auto in case.auto:
            model = getattr(transformers, auto).from_pretrained(folder)
            save_file(outputs(model, case.inputs), side / f"{auto}.safetensors")
    return folders


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@each_case
def test_a_round_trip_changes_no_bit(case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_bits(again.state_dict(), model.state_dict())
    assert_same_bits(outputs(again, case.inputs), outputs(model, case.inputs))
    assert {name: getattr(again.config, name) for name in case.options} == case.options


@each_case
def test_a_saved_folder_holds_only_weights_settings_code_and_text(case, saved):
    assert {Path(name).suffix for name in files(saved[case.model])} <= SUFFIXES
    assert {Path(name).suffix for name in files(saved[case.model])} >= {".safetensors", ".json", ".py"}


def test_every_registered_model_has_a_case():
    covered = {(config_class(case).model_type, auto) for case in CASES for auto in case.auto}
    assert covered == {(entry.model_type, auto) for entry in MODELS for auto in entry.classes}


@each_case
def test_a_misspelt_option_is_refused_by_name(case):
    config = config_class(case)
    inherited = inspect.get_annotations(transformers.PreTrainedConfig)
    own = [name for name in inspect.get_annotations(config) if name not in inherited]
    assert own
    for name in own:
        wrong = name[:-1]
        with pytest.raises((TypeError, ValueError), match=f"`{wrong}`.*{name}"):
            config(**case.options, **{wrong: 1})


ABSENT = """
import json, torch, transformers
from collections.abc import Mapping
from pathlib import Path
from safetensors.torch import load_file, save_file

{functions}
report = {{}}
for name, folder, autos, snippets in json.loads({asked!r}):
    side = Path(folder + "-io")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    seen = report[name] = {{"config": type(config).__name__, "modules": [type(config).__module__]}}
    for auto in autos:
        load = getattr(transformers, auto).from_pretrained
        model = load(folder, trust_remote_code=True)
        save_file(outputs(model, load_file(side / "inputs.safetensors")), side / f"{{auto}}-clean.safetensors")
        model.save_pretrained(side / auto)
        again = load(side / auto, trust_remote_code=True)
        save_file(outputs(again, load_file(side / "inputs.safetensors")), side / f"{{auto}}-again.safetensors")
        seen["modules"] += [type(model).__module__, type(again).__module__]
    namespace = {{}}
    for snippet in snippets:
        exec(compile(snippet, "card of " + name, "exec"), namespace)
    seen["ran"] = len(snippets)
    seen["card"] = type(namespace["model"]).__name__
print()
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def absent(saved, run_python):
    """What one process that cannot import hf_ext saw of every saved model."""
    asked = []
    for case in CASES:
        folder = saved[case.model]
        card = hub.card(build(case), case.system)
        card.save(folder / "README.md")
        tokenizer().save_pretrained(folder)
        snippets = re.findall(r"^```python\n(.*?)^```", card.text, re.DOTALL | re.MULTILINE)
        placed = [snippet.replace(f'"you/{case.system}"', repr(str(folder))) for snippet in snippets]
        asked.append((case.model, str(folder), case.auto, placed))
    functions = "\n\n".join(inspect.getsource(function) for function in (tensors, outputs))
    return json.loads(run_python(ABSENT.format(functions=functions, asked=json.dumps(asked))).splitlines()[-1])


@each_auto
def test_where_hf_ext_is_absent_outputs_are_the_same_to_the_bit(case, auto, saved, absent):
    side = saved[case.model].with_name(f"{case.model}-io")
    assert_same_bits(load_file(side / f"{auto}-clean.safetensors"), load_file(side / f"{auto}.safetensors"))


@each_auto
def test_saving_a_remote_copy_again_keeps_code_and_bits(case, auto, saved, absent):
    side = saved[case.model].with_name(f"{case.model}-io")
    code = {name for name in files(saved[case.model]) if name.endswith(".py")}
    assert {name for name in files(side / auto) if name.endswith(".py")} == code
    assert_same_bits(load_file(side / f"{auto}-again.safetensors"), load_file(side / f"{auto}.safetensors"))


@each_case
def test_where_hf_ext_is_absent_the_code_comes_from_the_folder(case, absent):
    assert absent[case.model]["config"] == config_class(case).__name__
    assert {module.partition(".")[0] for module in absent[case.model]["modules"]} == {"transformers_modules"}


@each_case
def test_the_snippets_of_a_model_card_run_where_hf_ext_is_absent(case, absent):
    assert absent[case.model]["ran"] >= 1
    assert absent[case.model]["card"] == case.model


def package(name):
    return getattr(getattr(hf_ext, name, None), "__module__", "").rpartition(".")[0]


def test_public_names_of_a_family_name_their_paper():
    cards = [card for card in hub.system_cards().values() if card["status"] == "built"]
    silent = {}
    for name in hf_ext.__all__:
        papers = {card["arxiv"] for card in cards if name in card["classes"]}
        papers = papers or {c["arxiv"] for c in cards if package(name) in {package(listed) for listed in c["classes"]}}
        if papers and not any(paper in (getattr(hf_ext, name).__doc__ or "") for paper in papers):
            silent[name] = papers
    assert silent == {}, "a docstring must name the arXiv id of its card"


def test_every_public_name_has_a_docstring_of_its_own():
    documents = {name: getattr(hf_ext, name).__doc__ or "" for name in hf_ext.__all__}
    # a NamedTuple or dataclass without one is given its signature
    assert [name for name, text in documents.items() if not text or text.startswith(f"{name}(")] == []


def fences(text, marks):
    """The Python fences of a card whose mark is among `marks`, each on its own lines, so that errors name these."""
    for match in re.finditer(r"^```python(?: ([\w-]+))?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if match[1] in marks:
            yield "\n" * (text.count("\n", 0, match.start()) + 1) + match[2]


RUN = """
import json, os, tempfile
namespace = {{"__name__": "__main__"}}
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    for fence in json.loads({fences!r}):
        exec(compile(fence, {card!r}, "exec"), namespace)
    os.chdir("..")
"""


@each_card
def test_the_snippets_of_a_system_card_run(key, run_python):
    marks = {None, "smollm2"} if (smollm2.cache_dir() / smollm2.FOLDER).is_dir() else {None}
    text = (CARDS / f"{key}.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^```python ?(.*)$", text, re.MULTILINE)) <= {"", "no-run", "smollm2"}
    chosen = list(fences(text, marks))
    assert chosen, "a card shows how it is used"
    run_python(RUN.format(fences=json.dumps(chosen), card=f"model_cards/{key}.md"), block=())
