"""A converted model is its source, to the last bit; the authors' layout is read by its formula; others are refused."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from hf_ext.lime import LimeConfig, LimeForCausalLM, modeling_lime
from hf_ext.lime.__main__ import main
from hf_ext.lime.convert import convert, from_original, from_original_state_dict


SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "llama-tied": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3},
    },
    "mistral": {"sliding_window": 4},
    "mistral-wide": {"sliding_window": None},
    "qwen2": {},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 12},
}


def source(family, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split("-")[0], **{**SHAPE, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms would be 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_logits_are_bit_equal(family, dtype):
    model = source(family, dtype)
    lime = LimeForCausalLM.from_llama(model)
    assert lime.dtype == dtype and torch.equal(lime(IDS).logits, model(IDS).logits)
    a, b = (m.generate(IDS, max_new_tokens=8, do_sample=False) for m in (lime, model))
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_converted_model_is_a_copy(family):
    model = source(family)
    before = model(IDS).logits
    with torch.no_grad():
        for parameter in LimeForCausalLM.from_llama(model).parameters():
            parameter.zero_()
    assert torch.equal(model(IDS).logits, before)


def test_overrides_reach_the_configuration():
    lime = LimeForCausalLM.from_llama(source("llama"), routing="first", routing_window=1)
    assert lime.config.routing == "first" and torch.equal(lime(IDS).logits, source("llama")(IDS).logits)
    noisy = LimeForCausalLM.from_llama(source("llama"), router_init="identity_plus_noise")
    assert not torch.allclose(noisy(IDS).logits, source("llama")(IDS).logits)


def test_the_command_converts_a_folder_and_says_that_it_has_no_tokenizer(tmp_path, capsys, caplog):
    model = source("qwen2", torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    main(["convert", str(tmp_path / "in"), str(tmp_path / "out")])
    assert "20 router weights, still the identity" in capsys.readouterr().out
    assert "No tokenizer was saved" in caplog.text and not (tmp_path / "out" / "tokenizer_config.json").exists()
    again, model = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("out", "in"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="must be new or empty"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_folder_path_does_not_become_the_base_models_name(tmp_path):
    source("llama").save_pretrained(tmp_path)
    assert LimeForCausalLM.from_llama(tmp_path).config.base_model_name_or_path is None


@pytest.mark.parametrize("kind", ["gpt2", "deepseek_v3", "gemma3n_text"])
def test_other_architectures_are_refused_with_those_that_work(kind, tmp_path):
    config = AutoConfig.for_model(kind)
    with pytest.raises(ValueError, match=f"llama, mistral, qwen2, qwen3.*got model_type='{kind}'"):
        LimeConfig.from_llama_config(config)


def test_a_llama_folder_is_not_taken_for_a_lime_model(tmp_path):
    source("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be 'lime', got 'qwen2'.*from_llama"):
        LimeForCausalLM.from_pretrained(tmp_path)


def test_the_refusal_comes_before_any_weights_load(tmp_path, capsys):
    transformers.GPT2Config().save_pretrained(tmp_path)  # a configuration alone: loading weights would fail otherwise
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path), str(tmp_path / "out")])
    assert "llama, mistral, qwen2, qwen3" in capsys.readouterr().err


def authors_state(dtype=torch.float32):
    """Random weights under the names and in the shapes of the authors' v2 code, for SHAPE."""
    torch.manual_seed(0)
    heads, dim, width, mlp, layers = 2, 8, 32, 48, 3
    shapes = {"model.embed_tokens.weight": (61, width), "model.norm.weight": (width,), "lm_head.weight": (61, width)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes |= {
            f"{name}self_attn.kv_proj_weight": (2 * dim * heads, width),
            f"{name}self_attn.q_proj.weight": (4 * dim, width),
            f"{name}self_attn.o_proj.weight": (width, 4 * dim),
            f"{name}mlp.gate_proj.weight": (mlp, width),
            f"{name}mlp.up_proj.weight": (mlp, width),
            f"{name}mlp.down_proj.weight": (width, mlp),
            f"{name}input_layernorm.weight": (width,),
            f"{name}post_attention_layernorm.weight": (width,),
        }
        if layer:
            shapes[f"{name}self_attn.lime_router.static_weights"] = (heads, (layer + 1) * heads)
    return {name: torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def authors_keys_and_values(inputs, state, heads, dim):
    """Per layer [B, T, G, 2d] before RoPE, by their formula: fused rows (feature, head), buffer rows (layer, head)."""
    buffer, found = None, []
    for layer, x in enumerate(inputs):
        name = f"model.layers.{layer}.self_attn."
        fused = torch.einsum("btw,rw->btr", x, state[name + "kv_proj_weight"])
        raw = torch.stack([fused[..., h::heads] for h in range(heads)])  # keys before values, head fastest
        buffer = raw if buffer is None else torch.cat((buffer, raw))
        weights = state.get(name + "lime_router.static_weights")
        routed = raw if weights is None else torch.einsum("hr,rbtf->hbtf", weights, buffer)
        assert routed.shape[-1] == 2 * dim
        found.append(routed.permute(1, 2, 0, 3))
    return found


def test_the_authors_checkpoint_gives_the_authors_keys_and_values(tmp_path, monkeypatch):
    state = authors_state(torch.float64)
    save_file(state, tmp_path / "model.safetensors")
    model = from_original(tmp_path, LimeConfig(**SHAPE))
    inputs, keys, rotate = [], [], modeling_lime.apply_rotary_pos_emb

    def spy(query, key, cos, sin):
        keys.append(key.transpose(1, 2))
        return rotate(query, key, cos, sin)

    monkeypatch.setattr(modeling_lime, "apply_rotary_pos_emb", spy)
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda module, args, output: inputs.append(output))
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        expected = authors_keys_and_values(inputs, state, heads=2, dim=8)
    for layer, both in enumerate(expected):
        found = torch.cat((keys[layer], cache.layers[layer].values.transpose(1, 2)), -1)
        # float64: sums of at most 32 * 6 terms of order 1, in another order
        torch.testing.assert_close(found, both, rtol=1e-12, atol=1e-12)


def safetensors_and_optimizer(folder, state):
    save_file(state, folder / "model.safetensors")
    torch.save({"step": 1}, folder / "optimizer.bin")
    return folder


def shards(folder, state):
    names = sorted(state)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    return index


def pickled(name, wrap=lambda state: state):
    def write(folder, state):
        torch.save(wrap(state), folder / name)
        return folder / name

    return write


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


FORMS = {
    "accelerate": safetensors_and_optimizer,
    "shards": shards,
    "folder-of-shards": lambda folder, state: shards(folder, state).parent,
    "folder-of-bin": lambda folder, state: pickled("pytorch_model.bin")(folder, state).parent,
    "legacy-pt": lambda folder, state: (
        torch.save(state, folder / "a.pt", _use_new_zipfile_serialization=False) or folder / "a.pt"
    ),
    "nested": pickled("a.pt", lambda state: {"model": {"state_dict": state}, "step": 3}),
    "ddp-and-compile": pickled("a.pth", lambda state: {"state_dict": prefixed("module._orig_mod.")(state)}),
    "one-module-around": pickled("a.bin", prefixed("model.")),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_authors_checkpoint_gives_the_same_model(form, tmp_path):
    state = authors_state()
    model = from_original(FORMS[form](tmp_path, state), LimeConfig(**SHAPE))
    expected = from_original_state_dict(state, LimeConfig(**SHAPE)).state_dict()
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not model.training and torch.equal(model.lm_head.weight, state["lm_head.weight"])


@pytest.mark.parametrize("dropped", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings_need_one_of_their_two_names(dropped):
    state = authors_state(torch.bfloat16)
    gone = state.pop(dropped)
    model = from_original_state_dict(state, LimeConfig(**SHAPE, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight and not torch.equal(model.lm_head.weight, gone)
    assert model.dtype == torch.bfloat16 and model.model.layers[1].self_attn.router.weight.dtype == torch.float32


def test_the_command_imports_with_the_configuration_that_the_authors_training_saves(tmp_path, capsys):
    state = authors_state()
    save_file(state, tmp_path / "model.safetensors")
    LlamaConfig(**SHAPE).save_pretrained(tmp_path / "config")
    main(["import-original", str(tmp_path), str(tmp_path / "config" / "config.json"), str(tmp_path / "out")])
    assert "of 3 layers" in capsys.readouterr().out
    config = from_original(tmp_path, tmp_path / "config").config
    assert (config.model_type, config.router_init) == ("lime", "identity_plus_noise")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(model(IDS).logits, from_original_state_dict(state, LimeConfig(**SHAPE))(IDS).logits)
    with pytest.raises(SystemExit):
        main(["import-original", str(tmp_path), str(tmp_path / "nowhere.json"), str(tmp_path / "new")])
    assert "`config` must be a config.json" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config", "out"}
    with pytest.raises(ValueError, match="must be new or empty"):
        from_original(tmp_path, LimeConfig(**SHAPE), tmp_path / "out")


def renamed(old, new):
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def reshaped(name, *shape):
    return lambda state: {**state, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("self_attn.kv_proj_weight", "self_attn.k_proj_lime.lime_kv_proj"), "names of v1.*another model"),
        (renamed("self_attn.kv_proj_weight", "self_attn.k_proj.weight"), "Llama-likes are converted by `convert`"),
        (lambda state: {}, "got no tensors"),
        (renamed("model.layers.2.mlp", "model.layers.2.moe"), r"3 missing \(.*2\.mlp.*; 3 unknown \(.*2\.moe"),
        (renamed("lm_head.weight", "head.weight"), r"1 missing \(lm_head.weight\); 1 unknown \(head.weight\)"),
        (reshaped("lm_head.weight", 60, 32), r"lm_head.weight \(60, 32\) instead of \(61, 32\)"),
        (reshaped("model.layers.1.self_attn.kv_proj_weight", 64, 32), r"are \(32, 32\), got \(64, 32\) for model"),
        (reshaped("model.layers.1.self_attn.lime_router.static_weights", 2, 6), r"\(2, 3, 2\) instead of \(2, 2, 2\)"),
        (reshaped("model.layers.1.self_attn.lime_router.static_weights", 2, 5), r"\(2, 5\) instead of \(2, 2, 2\)"),
        (reshaped("module.lm_head.weight", 61, 32), "each tensor once"),
    ],
)  # fmt: skip
def test_a_state_that_is_no_lime_v2_or_does_not_fit_is_refused_by_its_names(change, message):
    with pytest.raises(ValueError, match=message):
        from_original_state_dict(change(authors_state()), LimeConfig(**SHAPE))


@pytest.mark.parametrize("options", [{"routing": "none"}, {"router_type": "static", "num_key_value_heads": 4}])
def test_a_configuration_that_their_code_does_not_have_is_refused(options):
    with pytest.raises(ValueError, match="must have routing='full' and router_type='kv'"):
        from_original_state_dict(authors_state(), LimeConfig(**{**SHAPE, **options}))


class Code:
    """Unpickled where code may run, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def cut(folder, name):
    file = folder / name
    (save_file if file.suffix == ".safetensors" else torch.save)(authors_state(), file)
    os.truncate(file, file.stat().st_size - 300)
    return file


def text(folder, name, content=""):
    (folder / name).write_text(content)
    return folder / name


def lost_shard(folder):
    index = shards(folder, authors_state())
    (folder / "model-00002-of-00002.safetensors").unlink()
    return index


@pytest.mark.parametrize(
    ("write", "kind", "message"),
    [
        (lambda f: pickled("a.pt")(f, {"a": Code(str(f / "ran"))}), ValueError, r"runs code \(.*mkdir\)"),
        (lambda f: pickled("a.pt")(f, torch.nn.Linear(1, 1)), ValueError, r"runs code \(torch.nn"),
        (lambda f: pickled("a.pt")(f, {"step": 3, "loss": 1.0}), ValueError, "a dict of loss, step in"),
        (lambda f: pickled("a.pt")(f, [1]), ValueError, "state dict.*got a list"),
        (lambda f: cut(f, "a.pt"), ValueError, "must be a whole checkpoint"),
        (lambda f: cut(f, "a.safetensors"), ValueError, "must be a whole checkpoint"),
        (lambda f: text(f, "a.pt"), ValueError, "whole checkpoint.*empty"),
        (lambda f: text(f, "a.bin", "version https://"), ValueError, "whole checkpoint.*not written by torch.save"),
        (lambda f: text(f, "a.safetensors", "version https://"), ValueError, "must be a whole checkpoint"),
        (lambda f: text(f, "model.safetensors.index.json", "{}"), ValueError, "whole checkpoint.*weight_map"),
        (lambda f: text(f, "a.gguf"), ValueError, "must end in .safetensors, .bin"),
        (lambda f: text(f, "a.pt") and text(f, "b.pt").parent, ValueError, "a.pt, b.pt. Name the file"),
        (lambda f: f, ValueError, "a folder with one checkpoint.*with none"),
        (lambda f: f / "nowhere", FileNotFoundError, "no such file"),
        (lost_shard, FileNotFoundError, "model-00002-of-00002.safetensors"),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoint_are_refused_with_the_reason_and_nothing_runs(write, kind, message, tmp_path):
    source = write(tmp_path)
    with pytest.raises(kind, match=message) as info:
        from_original(source, LimeConfig(**SHAPE), tmp_path / "out")
    assert "\n" not in str(info.value)
    assert not {"ran", "out", "out.part"} & {path.name for path in tmp_path.iterdir()}


def test_a_configuration_that_is_none_is_refused(tmp_path):
    safetensors_and_optimizer(tmp_path, authors_state())
    with pytest.raises(TypeError, match="`config` must be .*got dict"):
        from_original(tmp_path, SHAPE)
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type of 'lime' or 'llama'.*KeyError.*gpt2"):
        from_original(tmp_path, tmp_path)
