"""Vectors in and out of files: what others write is read, what cannot be right is refused."""

import re

import gguf
import numpy as np
import pytest
import torch
from peft import BeftConfig, get_peft_model

from hf_ext import SteeringConfig
from hf_ext.steering import add_vectors, read_vectors, save_gguf, save_npy


IDS = torch.arange(2, 16).view(2, 7)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def refuses(error, *parts):
    return pytest.raises(error, match=".*".join(map(re.escape, parts)))


def control_vector(path, directions, architecture="controlvector"):
    """What repeng writes: its fields, and float32 tensors by layer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "mistral")
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["npy", "gguf", "adapter", "beft", "dict"])
def test_every_kind_of_source_gives_the_same_model(kind, steer, tiny_model, tmp_path):
    base, model, vectors = steer(scale=0.5, layers_to_transform=[1, 2])
    save = {"npy": save_npy, "gguf": save_gguf}.get(kind)
    source = tmp_path / f"vectors.{kind}"
    if save:
        save(model, source)
    elif kind == "dict":
        source = {layer: 0.5 * vector for layer, vector in vectors.items()}
    else:
        model.save_pretrained(tmp_path)
        source = tmp_path / "beft" if kind == "beft" else tmp_path
    found = read_vectors(source)
    rows = range(3) if kind == "npy" else [1, 2]
    assert list(found) == list(rows)
    assert all(torch.equal(found[layer], 0.5 * vectors[layer]) for layer in (1, 2))
    again = add_vectors(tiny_model("llama"), source)
    assert torch.equal(logits(again), logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_control_vector_of_others_is_read_by_layer(tmp_path):
    directions = {layer: np.random.default_rng(layer).normal(size=32).astype(np.float32) for layer in (1, 2, 11)}
    control_vector(tmp_path / "happy.gguf", directions)
    found = read_vectors(tmp_path / "happy.gguf")
    assert list(found) == [1, 2, 11]
    assert all(np.array_equal(found[layer].numpy(), directions[layer]) for layer in directions)


def test_our_control_vector_has_what_llama_cpp_looks_for(steer, tmp_path):
    _, model, vectors = steer(layers_to_transform=[1, 2])
    save_gguf(model, tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")

    def text(name):
        return bytes(reader.get_field(name).parts[-1]).decode()

    assert text("general.architecture") == "controlvector"
    assert text("controlvector.model_hint") == "llama"
    assert reader.get_field("controlvector.layer_count").parts[-1][0] == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and list(t.shape) == [32] for t in reader.tensors)


def test_a_beft_adapter_of_plain_peft_is_read(tiny_model, tmp_path):
    theirs = get_peft_model(tiny_model("llama"), BeftConfig(target_modules=["down_proj"])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(len(parameter)))
    theirs.save_pretrained(tmp_path)
    ours = add_vectors(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(ours), logits(theirs))


def test_vectors_are_added_to_a_model_that_has_some(steer, vectors_like, tmp_path):
    _, model, _ = steer()
    before = logits(model)
    other = vectors_like([1], seed=2)
    assert add_vectors(model, other, "other", scale=3.0) is model
    assert torch.equal(logits(model), before), "it is not active"
    assert torch.equal(model.get_vectors("other")[1], 3.0 * other[1])
    # one adapter's numbers into another, by way of a dict
    moved = add_vectors(model, model.get_vectors("default"), "moved")
    assert torch.equal(moved.get_vectors("moved")[2], model.get_vectors("default")[2])


def test_vectors_move_to_another_model_of_their_width_on_purpose(steer, tiny_model):
    _, model, vectors = steer()
    moved = add_vectors(tiny_model("mistral"), model.get_vectors())
    assert torch.equal(moved.get_vectors()[1], vectors[1])


def test_numbers_of_half_precision_and_quantised_tensors_are_read(tmp_path):
    values = np.linspace(-2, 2, 32, dtype=np.float32)
    control_vector(tmp_path / "half.gguf", {1: values.astype(np.float16)})
    assert torch.equal(read_vectors(tmp_path / "half.gguf")[1], torch.from_numpy(values.astype(np.float16)).float())
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "controlvector")
    packed = gguf.quants.quantize(values[None], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("direction.1", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # 8 bits of a range of 2 in blocks of 32
    torch.testing.assert_close(read_vectors(tmp_path / "q8.gguf")[1], torch.from_numpy(values), rtol=0, atol=0.01)


def damaged(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_sources_that_are_none_are_refused(steer, tmp_path):
    _, model, _ = steer(layers_to_transform=[1])
    model.save_pretrained(tmp_path / "adapter")
    save_npy(model, tmp_path / "v.npy")
    save_gguf(model, tmp_path / "v.gguf")
    control_vector(tmp_path / "model.gguf", {1: np.zeros(32, np.float32)}, architecture="llama")
    np.save(tmp_path / "flat.npy", np.zeros(32, np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((3, 32), np.int64))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "nan.npy", np.full((3, 32), np.nan, np.float32))
    (tmp_path / "empty").mkdir()
    (tmp_path / "v.pt").touch()
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (lora / "adapter_model.safetensors").touch()
    for source, error, parts in [
        (tmp_path / "absent.npy", FileNotFoundError, ["`source` must be a folder", "absent.npy", "no such file"]),
        (tmp_path / "empty", FileNotFoundError, ["without adapter_config.json"]),
        (tmp_path / "v.pt", ValueError, ["`source` must be a folder", "v.pt"]),
        (lora, ValueError, ["type STEERING or BEFT, got 'LORA'"]),
        (tmp_path / "model.gguf", ValueError, ["must be a control vector, got a GGUF file of architecture 'llama'"]),
        (tmp_path / "flat.npy", ValueError, ["(layers, hidden_size), got float32 (32,)"]),
        (tmp_path / "whole.npy", ValueError, ["got int64 (3, 32)"]),
        (tmp_path / "objects.npy", ValueError, ["without Python objects"]),
        (tmp_path / "nan.npy", ValueError, ["`source[0]` must be finite"]),
        (damaged(tmp_path / "v.npy"), ValueError, ["`source` must be", "v.npy"]),
        (damaged(tmp_path / "v.gguf"), ValueError, ["`source` must be a whole GGUF file"]),
        (damaged(tmp_path / "adapter" / "adapter_model.safetensors").parent, ValueError, ["`source` must be whole"]),
        ({}, ValueError, ["`source` must hold a vector, got none"]),
        ({"1": torch.ones(32)}, TypeError, ["layers, counted from 0, as its keys, got '1'"]),
        ({-1: torch.ones(32)}, TypeError, ["got -1"]),
        ({1: torch.ones(2, 16)}, ValueError, ["`source[1]` must have the shape (16,)"]),
        ({1: torch.ones(32), 2: torch.ones(16)}, ValueError, ["vectors of one width, got widths [16, 32]"]),
        ({1: [1.0]}, TypeError, ["`source[1]` must be a tensor of floats, got list"]),
        (3, TypeError, ["`source` must be a folder", "got int"]),
    ]:
        with refuses(error, *parts):
            read_vectors(source)


def test_vectors_of_another_width_or_layer_leave_the_model_alone(tiny_model):
    model = tiny_model("llama")
    with refuses(ValueError, "`source` must hold vectors of the model's width, 32, got 16"):
        add_vectors(model, {1: torch.ones(16)})
    with refuses(ValueError, "`layers_to_transform` must hold numbers in [-3, 2], got [3]"):
        add_vectors(model, {3: torch.ones(32)})
    assert not hasattr(model, "peft_config") and not model._forward_hooks


def test_files_are_for_vectors_on_the_stream(steer, tmp_path):
    for options in ({"placement": "self_attn.o_proj"}, {"positions": "first"}, {"target_modules": ["mlp"]}):
        _, model, _ = steer(**options)
        with refuses(ValueError, "must be on the residual stream at every token to be a file of vectors"):
            save_npy(model, tmp_path / "v.npy")
    _, model, _ = steer("olmo2", placement="down_proj")
    with refuses(ValueError, "must be on the residual stream"):
        save_gguf(model, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_llama_cpp_has_no_place_for_layer_0(steer, tmp_path):
    _, model, vectors = steer()
    with refuses(ValueError, "must have no vector in layer 0 to be a control vector", "layers_to_transform from 1 on"):
        save_gguf(model, tmp_path / "v.gguf")
    model.set_vectors("default", {0: torch.zeros(32)})
    save_gguf(model, tmp_path / "v.gguf")
    assert list(read_vectors(tmp_path / "v.gguf")) == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_names_of_files_tell_their_kind(steer, tmp_path):
    _, model, _ = steer(layers_to_transform=[1])
    with refuses(ValueError, "`path` must end in .npy, got"):
        save_npy(model, tmp_path / "v.bin")
    with refuses(ValueError, "`path` must end in .gguf, got"):
        save_gguf(model, tmp_path / "v.bin")
    with refuses(TypeError, "`model` must be a PeftModel with steering vectors, got LlamaForCausalLM"):
        save_npy(model.get_base_model(), tmp_path / "v.npy")
    with refuses(ValueError, "`adapter_name` must be one of default, got 'math'"):
        save_npy(model, tmp_path / "v.npy", "math")


def test_without_gguf_the_extra_is_named(monkeypatch, tmp_path, steer):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with refuses(ImportError, "pip install 'hf_ext[steering]'"):
        save_gguf(steer(layers_to_transform=[1]).model, tmp_path / "v.gguf")


def test_options_of_the_adapter_can_be_given_with_the_vectors(tiny_model, vectors_like):
    model = add_vectors(tiny_model("llama"), vectors_like([0]), "math", scale=2.0, positions="completion")
    config = model.peft_config["math"]
    assert isinstance(config, SteeringConfig)
    assert (config.scale, config.positions, config.layers_to_transform) == (2.0, "completion", [0])
