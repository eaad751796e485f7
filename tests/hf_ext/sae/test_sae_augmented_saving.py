"""Saved with the language model or by its name, an augmented model comes back to the bit, also without hf_ext."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_ext import hub
from hf_ext.sae import SAEAugmentedModelForCausalLM, SAEConfig, SAEModel
from hf_ext.sae.sae_attach import fingerprint


IDS = torch.arange(3, 27).view(2, 12)
EDIT = {"sae": "b", "latent": 3, "op": "add", "value": 4.0}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def an_sae(path, seed=0, **options):
    torch.manual_seed(seed)
    return SAEModel(SAEConfig(**{"d_in": 32, "d_sae": 50, "k": 6, "hook_name": path, **options})).eval()


@pytest.fixture
def base(tiny_model, tmp_path):
    """A language model that was loaded from a folder."""
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.fixture
def augmented(base):
    saes = {"a": an_sae("model.layers.1"), "b": an_sae("model.layers.2.mlp", 1, k=None, activation="jumprelu")}
    model = SAEAugmentedModelForCausalLM.from_base(base, saes)
    model.set_sae_mode("steer", [EDIT], tokens="all")
    return model


@pytest.mark.filterwarnings("ignore:The causal LM is saved as")
@pytest.mark.parametrize("embed", [True, False])
def test_weights_modes_and_edits_come_back(embed, augmented, tmp_path):
    augmented.config.embed_base = embed
    augmented.generation_config.max_new_tokens = 3
    augmented.save_pretrained(tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    own = {f"saes.{name}" for name in augmented.saes.state_dict()}
    assert own <= names
    assert any(name.startswith("model.") for name in names) == embed
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is SAEAugmentedModelForCausalLM and not again.training
    assert torch.equal(logits(again), logits(augmented))
    assert again._states["b"].edits == (EDIT,) and again._states["a"].mode == "observe"
    with augmented.sae_mode("off"):
        assert not torch.equal(logits(again), logits(augmented))
    assert again.generate(IDS).shape == (2, 15)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), logits(augmented))


@pytest.mark.filterwarnings("ignore:The causal LM is saved as")
@pytest.mark.parametrize("embed", [True, False])
def test_the_saes_keep_their_dtype_beside_a_model_in_half_precision(embed, augmented, tmp_path):
    augmented.config.embed_base = embed
    augmented.saes["a"].bfloat16()
    augmented.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in again.named_parameters()}
    assert {kind for name, kind in kinds.items() if name.startswith("model.")} == {torch.bfloat16}
    assert kinds["saes.a.W_dec"] == torch.bfloat16 and kinds["saes.b.W_dec"] == torch.float32
    assert torch.isfinite(logits(again)).all()


ABSENT = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids, found, classes = torch.arange(3, 27).view(2, 12), {{}}, {{}}
for name, place in {places}.items():
    model, info = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        found[name] = model(input_ids=ids).logits
        found[name + " codes"] = model(input_ids=ids).sae_codes["a"].dense()
    found[name + " tokens"] = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    classes[name] = type(model).__module__.partition(".")[0]
    if name == "hub":
        model.save_pretrained({again!r})
        model = AutoModelForCausalLM.from_pretrained({again!r}, trust_remote_code=True)
        with torch.no_grad():
            found["again"] = model(input_ids=ids).logits
save_file(found, {out!r})
print()
print(json.dumps(classes))
"""


def test_both_load_where_hf_ext_is_absent_from_folders_and_from_a_hub(
    augmented, base, tmp_path, run_python, loopback_hub
):
    augmented.config.embed_base = True
    augmented.save_pretrained(tmp_path / "embedded")
    augmented.config.embed_base, augmented.config.base_model_name_or_path = False, "tester/augmented-base"
    augmented.save_pretrained(tmp_path / "named")
    pushed = {"tester/augmented-base": str(tmp_path / "base"), "tester/augmented": str(tmp_path / "named")}
    push = f"""
from huggingface_hub import HfApi
for name, folder in {pushed}.items():
    HfApi().create_repo(name)
    HfApi().upload_folder(folder_path=folder, repo_id=name)
"""
    run_python(push, env=loopback_hub.env)
    places = {"embedded": str(tmp_path / "embedded"), "named": str(tmp_path / "named"), "hub": "tester/augmented"}
    out = tmp_path / "found.safetensors"
    code = ABSENT.format(places=places, out=str(out), again=str(tmp_path / "again"))
    said = run_python(code, env=loopback_hub.env)
    assert set(json.loads(said.splitlines()[-1]).values()) == {"transformers_modules"}
    found = load_file(out)
    with torch.no_grad():
        codes = augmented(IDS).sae_codes["a"].dense()
    for name in places:
        assert torch.equal(found[name], logits(augmented)), name
        assert torch.equal(found[f"{name} codes"], codes)
        tokens = augmented.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(found[f"{name} tokens"], tokens)
    assert torch.equal(found["again"], logits(augmented))


def test_a_clean_process_is_what_verify_uses_too(augmented, tmp_path):
    augmented.config.embed_base = True
    augmented.save_pretrained(tmp_path / "saved")
    report = hub.verify(tmp_path / "saved", auto=("AutoModelForCausalLM",))
    assert report["auto"]["AutoModelForCausalLM"] == "SAEAugmentedModelForCausalLM"
    assert {"sae_splice.py", "sparse_ops.py", "modeling_sae.py"} <= set(report["files"])


# the base


def test_another_base_is_warned_of_by_its_fingerprint(augmented, base, tmp_path):
    augmented.config.base_revision = "abc123"
    with pytest.warns(UserWarning, match="saved as .*a folder of this machine"):
        augmented.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for dtype in (torch.float32, torch.bfloat16):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype, base_model=str(tmp_path / "base"))
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(
        UserWarning, match=r"must be .*base \(revision abc123\).*got one with .*another revision, or fine"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", base_model=str(tmp_path / "base"))


def test_a_fingerprint_is_of_weights_and_shapes_whatever_the_dtype(tiny_model):
    model = tiny_model("llama")
    mark = fingerprint(model)
    assert fingerprint(tiny_model("llama")) == mark == fingerprint(tiny_model("llama").bfloat16())
    assert fingerprint(tiny_model("llama", vocab_size=62)) != mark
    assert fingerprint(tiny_model("llama").half()) is None
    assert fingerprint(tiny_model("llama").to("meta")) is None


@pytest.mark.filterwarnings("ignore:The causal LM is saved as")
def test_a_loaded_base_can_be_given_and_is_used_itself(augmented, base, tmp_path):
    augmented.save_pretrained(tmp_path / "saved")
    augmented.detach()
    again = SAEAugmentedModelForCausalLM.from_pretrained(tmp_path / "saved", base_model=base)
    assert again.model is base
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(plain))


def test_a_base_in_memory_has_no_name_and_must_be_embedded(tiny_model, tmp_path):
    model = SAEAugmentedModelForCausalLM.from_base(tiny_model("llama"), an_sae("model.layers.1"))
    with pytest.raises(ValueError, match="`base_model_name_or_path` must name the causal LM where it is not embedded"):
        model.save_pretrained(tmp_path / "saved")
    model.config.embed_base = True
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    with pytest.raises(ValueError, match="`base_model` must not be given where the model is embedded"):
        SAEAugmentedModelForCausalLM.from_pretrained(tmp_path / "saved", base_model=tiny_model("llama"))


def test_a_base_with_code_of_its_own_goes_by_its_name(tiny_model, tmp_path):
    tiny_model("lime").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="`embed_base` must be False for LimeForCausalLM"):
        SAEAugmentedModelForCausalLM.from_base(base, an_sae("model.layers.1"), embed_base=True)
    model = SAEAugmentedModelForCausalLM.from_base(base, an_sae("model.layers.1"))
    with pytest.warns(UserWarning, match="a folder of this machine"):
        model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.vocab_size == 61
    assert torch.equal(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore:The causal LM is saved as")
def test_lost_and_misfitting_weights_are_errors(augmented, tmp_path):
    augmented.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    save_file(
        {**weights, "saes.a.W_dec": torch.zeros(51, 32)}, tmp_path / "saved" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(RuntimeError, match="ize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(Exception, match="(?i)header|safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_options_can_be_changed_at_the_load(augmented, tmp_path):
    augmented.config.embed_base = True
    augmented.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", skip_positions=3)
    with torch.no_grad():
        codes = again(IDS).sae_codes["a"]
    assert (codes.l0()[0] > 0).tolist() == [False] * 3 + [True] * 9
