"""Several models in one folder, code once: each loads where hf_ext is absent, from a folder and from a Hub."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ext import LimeConfig, LimeForCausalLM, SAEConfig, SAEModel, hub


X = torch.linspace(-3, 3, 60).sin().view(5, 12)
CODE = {"configuration_sae.py", "modeling_sae.py", "sparse_ops.py"}


def sae(seed, **options):
    torch.manual_seed(seed)
    return SAEModel(SAEConfig(**{"d_in": 12, "d_sae": 50, "k": 4, **options}))


SAES = {
    "layer3": lambda: sae(3),
    "layer9/k8": lambda: sae(9, k=8),
    "jump": lambda: sae(1, k=None, activation="jumprelu", jump_threshold=0.2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "saes"
    hub.save_many(folder, {name: build() for name, build in SAES.items()})
    return folder


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_code_lies_once_in_the_root_and_weights_in_sub_folders(folder):
    assert names(folder) == CODE | {f"{name}/{file}" for name in SAES for file in ("config.json", "model.safetensors")}


def test_verify_loads_one_of_them_and_names_what_is_wrong_with_it(folder, tmp_path):
    report = hub.verify(folder, subfolder="layer9/k8")
    assert report["auto"] == {"AutoConfig": "SAEConfig", "AutoModel": "SAEModel"}
    assert report["parameters"] == sum(p.numel() for p in sae(9).parameters())
    with pytest.raises(ValueError, match=r"layer4.config\.json must be there"):
        hub.verify(folder, subfolder="layer4")


SEEN = """
import json, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

x = load_file("{x}")["x"]
report, seen = {{}}, {{}}
for place in {places}:
    for name in {names}:
        sae = AutoModel.from_pretrained(place, subfolder=name, trust_remote_code=True)
        seen[name] = sae(x).reconstruction.detach()
        report[f"{{place}} {{name}}"] = type(sae).__module__.partition(".")[0]
    save_file(seen, "{out}-" + str(place.count("/")) + ".safetensors")
print()
print(json.dumps(report))
"""


def test_each_loads_where_hf_ext_is_absent_from_the_folder_and_from_a_hub(folder, tmp_path, run_python, loopback_hub):
    push = f"""
from huggingface_hub import HfApi
HfApi().create_repo("tester/saes")
HfApi().upload_folder(folder_path={str(folder)!r}, repo_id="tester/saes")
"""
    run_python(push, env=loopback_hub.env)
    save_file({"x": X}, tmp_path / "x.safetensors")
    places = [str(folder), "tester/saes"]
    code = SEEN.format(x=tmp_path / "x.safetensors", places=places, names=list(SAES), out=tmp_path / "seen")
    report = json.loads(run_python(code, env=loopback_hub.env).splitlines()[-1])
    assert set(report.values()) == {"transformers_modules"}
    found = [load_file(path) for path in tmp_path.glob("seen-*.safetensors")]
    assert len(found) == 2
    for name, build in SAES.items():
        expected = build().eval()(X).reconstruction
        for seen in found:
            assert torch.equal(seen[name], expected)  # the same operations on the same machine


def test_saving_again_replaces_what_is_named_and_keeps_the_rest(tmp_path):
    hub.save_many(tmp_path / "saes", {"a": sae(1), "b": sae(2)})
    hub.save_many(tmp_path / "saes", {"b": sae(3, k=2), "c": sae(4)})
    loaded = {name: SAEModel.from_pretrained(tmp_path / "saes", subfolder=name) for name in "abc"}
    assert [loaded[name].config.k for name in "abc"] == [4, 2, 4]
    for name, seed in zip("abc", (1, 3, 4), strict=True):
        assert torch.equal(loaded[name].W_dec, sae(seed).W_dec)
    assert {path.name for path in (tmp_path / "saes").iterdir()} == {*CODE, *"abc"}  # nothing temporary is left


def test_models_of_different_families_share_a_folder(tmp_path):
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    lime = LimeForCausalLM(LimeConfig(hidden_size=8, intermediate_size=8, **heads))
    hub.save_many(tmp_path, {"lime": lime, "sae": sae(1)})
    assert hub.verify(tmp_path, subfolder="lime", auto=("AutoModelForCausalLM",))["model_type"] == "lime"


@pytest.mark.parametrize("name", ["", "../up", "/abs", "a//b", ".", "a\\b", " ", 3])
def test_what_is_no_sub_folder_is_refused_before_anything_is_written(name, tmp_path):
    with pytest.raises(ValueError, match="`models` must be named by sub-folders"):
        hub.save_many(tmp_path / "saes", {"fine": sae(1), name: sae(1)})
    assert not (tmp_path / "saes").exists()


def test_what_is_no_model_or_no_folder_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`models` must be a dict.*got list"):
        hub.save_many(tmp_path, [sae(1)])
    with pytest.raises(TypeError, match="got an empty one"):
        hub.save_many(tmp_path, {})
    with pytest.raises(TypeError, match=r"`models\['a'\]` must be a model.*got dict"):
        hub.save_many(tmp_path, {"a": {}})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`folder` must be a folder or not exist yet"):
        hub.save_many(tmp_path / "file", {"a": sae(1)})


def test_models_that_need_different_code_of_the_same_name_are_refused(tmp_path):
    class Other:
        def save_pretrained(self, folder):
            folder.mkdir(parents=True)
            (folder / "modeling_sae.py").write_text("other = True\n")

    with pytest.raises(ValueError, match="`models` must share their code, got another modeling_sae.py with 'b'"):
        hub.save_many(tmp_path, {"a": sae(1), "b": Other()})
    assert not list(tmp_path.iterdir())
