"""Exports, each proved by equal logits in one process that can import neither hf_ext nor trainers.

There the vectors of plain files are added by hooks of torch's own to the base model, as another program would.
"""

import copy
import json
import re

import pytest
import torch
from peft import BeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_ext
from hf_ext import SteeringConfig
from hf_ext.steering import export_model, save_gguf, save_npy


IDS = torch.arange(2, 16).view(2, 7)
# model type -> class of what `export_model` makes
EXPORTED = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "lime": "LimeForCausalLM",
    "qwen2": "LlamaForCausalLM",
} | dict.fromkeys(
    ("gemma2", "gemma3_text", "mistral", "mixtral", "olmo2", "phi3", "qwen3", "qwen3_moe"), "SteeredModelForCausalLM"
)
# float32 sums in another order, through at most two more layers
CLOSE = {"rtol": 0, "atol": 2e-5}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def exported(steer, tmp_path_factory):
    """Model type -> (folder of the exported model, logits of the model with the adapter)."""
    found = {}
    for model_type in EXPORTED:
        _, model, _ = steer(model_type, scale=0.5)
        plain = export_model(model)
        assert type(plain).__name__ == EXPORTED[model_type]
        folder = tmp_path_factory.mktemp("exported") / model_type
        plain.save_pretrained(folder)
        found[model_type] = folder, logits(model)
        # the model with the adapter is as it was
        assert torch.equal(logits(model), found[model_type][1])
        torch.testing.assert_close(logits(plain), found[model_type][1], **CLOSE)
    return found


@pytest.fixture(scope="module")
def files(steer, tmp_path_factory):
    """A folder with `base`, `adapter` and its twin, `vectors.npy`, `vectors.gguf`; and the logits of the adapter."""
    folder = tmp_path_factory.mktemp("files")
    base, model, _ = steer("llama", scale=0.5, layers_to_transform=[1, 2])
    base.save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")
    save_npy(model, folder / "vectors.npy")
    save_gguf(model, folder / "vectors.gguf")
    return folder, logits(model)


ABSENT = """
import json, sys
import gguf, numpy, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

asked = json.loads({asked!r})
ids = torch.arange(2, 16).view(2, 7)

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits

def hooked(vectors):
    model = AutoModelForCausalLM.from_pretrained(asked["files"] + "/base")
    for layer, vector in vectors.items():
        shift = torch.from_numpy(numpy.array(vector))
        model.model.layers[layer].register_forward_hook(lambda m, a, output, shift=shift: output + shift)
    return model

found, classes = {{}}, {{}}
for name, folder in asked["models"].items():
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    found[name], classes[name] = logits(model), type(model).__name__
    tokens = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    found[name + " tokens"] = tokens
base = AutoModelForCausalLM.from_pretrained(asked["files"] + "/base")
found["twin"] = logits(PeftModel.from_pretrained(base, asked["files"] + "/adapter", subfolder="beft"))
table = numpy.load(asked["files"] + "/vectors.npy")
found["npy"] = logits(hooked(dict(enumerate(table))))
directions = gguf.GGUFReader(asked["files"] + "/vectors.gguf").tensors
found["gguf"] = logits(hooked({{int(t.name.split(".")[1]): t.data for t in directions}}))
try:
    PeftModel.from_pretrained(base, asked["files"] + "/adapter")
except KeyError as error:
    classes["refusal"] = str(error)
assert not any(name.startswith("hf_ext.") for name in sys.modules)
save_file(found, asked["out"])
print()
print(json.dumps(classes))
"""


@pytest.fixture(scope="module")
def absent(exported, files, run_python, tmp_path_factory):
    """(tensors, names of classes) of a process without hf_ext."""
    out = tmp_path_factory.mktemp("absent") / "found.safetensors"
    models = {name: str(folder) for name, (folder, _) in exported.items()}
    asked = json.dumps({"models": models, "files": str(files[0]), "out": str(out)})
    said = run_python(ABSENT.format(asked=asked))
    return load_file(out), json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("model_type", EXPORTED)
def test_an_exported_model_loads_without_hf_ext_and_says_the_same(model_type, exported, absent):
    folder, expected = exported[model_type]
    tensors, classes = absent
    assert classes[model_type] == EXPORTED[model_type]
    torch.testing.assert_close(tensors[model_type], expected, **CLOSE)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(tensors[model_type], logits(again))
    assert torch.equal(
        tensors[f"{model_type} tokens"],
        again.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False),
    )


@pytest.mark.parametrize("kind", ["twin", "npy", "gguf"])
def test_plain_files_say_the_same_without_hf_ext(kind, files, absent):
    torch.testing.assert_close(absent[0][kind], files[1], **CLOSE)


def test_where_hf_ext_is_missing_the_readme_says_what_to_do(files, absent):
    # PEFT's own words, which nobody outside of PEFT can change
    assert absent[1]["refusal"] == "'STEERING'"
    readme = (files[0] / "adapter" / "README.md").read_text()
    assert "`KeyError: 'STEERING'` means that the import is missing" in readme
    assert 'subfolder="beft"' in readme and "import hf_ext" in readme


def test_a_clean_process_is_what_verify_uses_too(exported):
    report = hf_ext.hub.verify(exported["gemma2"][0], auto=("AutoModelForCausalLM",))
    assert report["auto"]["AutoModelForCausalLM"] == "SteeredModelForCausalLM"
    assert {"configuration_steered.py", "modeling_steered.py"} <= set(report["files"])


# the twin


def test_the_twin_is_the_adapter_in_pefts_own_type(steer, tmp_path):
    base, model, _ = steer("qwen2", scale=2.0, layers_to_transform=[0, 2], task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    twin = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, subfolder="beft")
    assert isinstance(twin.peft_config["default"], BeftConfig)
    assert twin.peft_config["default"].task_type == "CAUSAL_LM"
    torch.testing.assert_close(logits(twin), logits(model), **CLOSE)


def test_a_trained_beft_adapter_gives_the_same_gradient(tiny_model):
    # BEFT on down_proj is the paper's parametrisation: an independent implementation of a step
    ours = get_peft_model(tiny_model("llama"), SteeringConfig())
    theirs = get_peft_model(tiny_model("llama"), BeftConfig(target_modules=["down_proj"]))
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    pairs = zip(*([p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)), strict=True)
    assert all(torch.equal(a.grad, b.grad.flatten()) for a, b in pairs)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gemma2", {}),
        ("gpt2", {}),
        ("mixtral", {}),
        ("llama", {"positions": "first"}),
        ("llama", {"placement": "mlp"}),
    ],
)
def test_what_beft_cannot_express_gets_no_twin_and_the_readme_says_so(model_type, options, steer, tmp_path):
    steer("llama").model.save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    assert (tmp_path / "beft" / "adapter_config.json").is_file()
    # another adapter in the same folder must not leave the old twin
    steer(model_type, **options).model.save_pretrained(tmp_path)
    assert not (tmp_path / "beft").exists()
    assert "hf_ext.steering.export_model" in (tmp_path / "README.md").read_text()


def test_saving_twice_writes_the_readme_once_and_nothing_unfinished(steer, tmp_path):
    _, model, _ = steer()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("## Load this steering adapter") == 1
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    weights = {"adapter_model.safetensors", "adapter_config.json"}
    assert names == weights | {"README.md"} | {f"beft/{name}" for name in weights}


# what export_model refuses, and details


def test_export_is_of_the_adapters_that_are_named(steer, vectors_like):
    base, model, vectors = steer()
    model.add_adapter("other", SteeringConfig(layers_to_transform=[1]))
    other = vectors_like([1], seed=2)
    model.set_vectors("other", other)
    both = steer(base=base, vectors=vectors | {1: vectors[1] + other[1]}).model
    torch.testing.assert_close(logits(export_model(model, ["default", "other"])), logits(both), **CLOSE)
    torch.testing.assert_close(
        logits(export_model(model, ["other"])),
        logits(steer(base=base, vectors=other, layers_to_transform=[1]).model),
        **CLOSE,
    )


def test_a_sliding_qwen2_keeps_its_windows(tiny_model, steer, tmp_path):
    base = tiny_model("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1)
    _, model, _ = steer(base=base)
    exported = export_model(model)
    assert type(exported).__name__ == "SteeredModelForCausalLM"
    exported.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), **CLOSE)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2"])
def test_half_precision_is_kept(model_type, tiny_model, steer, tmp_path):
    _, model, _ = steer(base=tiny_model(model_type).to(torch.bfloat16))
    export_model(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert logits(again).dtype == torch.bfloat16
    # a bias is rounded once, a vector with the sum: an ulp of numbers up to about 10
    torch.testing.assert_close(logits(again).float(), logits(model).float(), rtol=0, atol=0.25)


def test_a_steered_model_trains_and_generates_with_a_cache(steer):
    exported = export_model(steer("gemma2").model)
    before = exported.vectors.detach().clone()
    exported.requires_grad_(False)
    exported.vectors.requires_grad_(True)
    exported.train()
    exported(input_ids=IDS, labels=IDS).loss.backward()
    plain = exported.vectors.grad.clone()
    exported.zero_grad()
    exported.gradient_checkpointing_enable()
    exported.enable_input_require_grads()
    exported(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.equal(exported.vectors.grad, plain) and plain.abs().sum() > 0
    assert torch.equal(exported.vectors, before)
    exported.eval()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = exported.generate(IDS, **settings)
    assert torch.equal(cached, exported.generate(IDS, use_cache=False, **settings))


def test_tied_embeddings_stay_tied(tiny_model, steer, tmp_path):
    for model_type in ("gemma2", "llama", "qwen2"):
        base = tiny_model(model_type, tie_word_embeddings=True)
        _, model, _ = steer(base=base)
        export_model(model).save_pretrained(tmp_path / model_type)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / model_type)
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
        torch.testing.assert_close(logits(again), logits(model), **CLOSE)


@pytest.mark.parametrize(
    ("model_type", "options", "act", "parts"),
    [
        ("llama", {"positions": "first"}, None, ["must steer all tokens to be exported, got positions='first'"]),
        ("llama", {}, "merge_adapter", ["`model` must not be merged"]),
        ("qwen2_5_vl", {}, None, ["must be a causal language model of transformers", "Qwen2_5_VLForCond"]),
        ("lime", {"placement": "self_attn.o_proj"}, None, ["must be a causal language model of transformers"]),
    ],
)
def test_what_no_plain_model_can_hold_is_refused(model_type, options, act, parts, steer):
    _, model, _ = steer(model_type, **options)
    if act:
        getattr(model, act)()
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))):
        export_model(model)


def test_export_wants_a_peft_model_and_a_known_adapter(steer, tiny_model):
    with pytest.raises(TypeError, match="`model` must be a PeftModel with steering vectors, got LlamaForCausalLM"):
        export_model(tiny_model("llama"))
    with pytest.raises(ValueError, match="`adapter_name` must be one of default, got 'math'"):
        export_model(steer().model, ["math"])


# a Hub

PUSH = """
from peft import PeftModel
import hf_ext
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({files!r} + "/base")
model = PeftModel.from_pretrained(base, {files!r} + "/adapter")
model.push_to_hub("tester/vectors")
# with hf_ext an adapter of the Hub is loaded like any other
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({files!r} + "/base"), "tester/vectors")
assert again.peft_config["default"].peft_type == "STEERING"
"""
PULL = """
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({files!r} + "/base")
model = PeftModel.from_pretrained(base, "tester/vectors", subfolder="beft").eval()
with torch.no_grad():
    save_file({{"logits": model(input_ids=torch.arange(2, 16).view(2, 7)).logits}}, {out!r})
"""


def test_a_pushed_adapter_is_loaded_from_the_hub_with_and_without_hf_ext(files, loopback_hub, run_python, tmp_path):
    out = tmp_path / "logits.safetensors"
    run_python(PUSH.format(files=str(files[0])), env=loopback_hub.env, block=())
    run_python(PULL.format(files=str(files[0]), out=str(out)), env=loopback_hub.env)
    torch.testing.assert_close(load_file(out)["logits"], files[1], **CLOSE)
