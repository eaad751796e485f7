"""A converted model is its source, to the last bit; the authors' layout is read by its formula; others are refused."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ext.lime import LimeConfig, LimeForCausalLM
from hf_ext.lime.__main__ import main
from hf_ext.lime.convert import convert, from_original_state_dict


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


def authors_attention(hidden, state, layer, buffer, heads, dim):
    """Keys and values of one layer by the authors' formula: fused rows (feature, head), buffer rows (layer, head)."""
    batch, tokens, width = hidden.shape
    fused = hidden.reshape(-1, width) @ state[f"model.layers.{layer}.self_attn.kv_proj_weight"].t()
    rows = fused.view(batch, tokens, 2 * dim, heads).permute(3, 0, 1, 2).reshape(heads, -1)
    buffer = torch.cat((buffer, rows))
    weights = state.get(f"model.layers.{layer}.self_attn.lime_router.static_weights")
    routed = rows if weights is None else weights @ buffer
    return routed.view(heads, batch, tokens, 2 * dim).permute(1, 0, 2, 3), buffer


def test_the_authors_checkpoint_gives_the_authors_keys_and_values():
    torch.manual_seed(0)
    config = LimeConfig(**SHAPE)
    heads, dim, width = 2, 8, 32
    state = {k: v for k, v in LimeForCausalLM(config).state_dict().items() if "k_proj" not in k and "v_proj" not in k}
    state = {k: v for k, v in state.items() if ".router." not in k}
    for layer in range(3):
        state[f"model.layers.{layer}.self_attn.kv_proj_weight"] = torch.randn(2 * dim * heads, width)
        if layer:
            name = f"model.layers.{layer}.self_attn.lime_router.static_weights"
            state[name] = torch.randn(heads, (layer + 1) * heads)
    model = from_original_state_dict(state, config)
    buffer, memory = torch.empty(0, 2 * 5 * 2 * dim), ()
    for layer in range(3):
        hidden, attention = torch.randn(2, 5, width), model.model.layers[layer].self_attn
        expected, buffer = authors_attention(hidden, state, layer, buffer, heads, dim)
        key, value = (p(hidden).view(2, 5, heads, dim) for p in (attention.k_proj, attention.v_proj))
        key, value, *memory = attention.mix(key, value, *memory)
        torch.testing.assert_close(torch.cat((key, value), -1), expected)


def test_states_that_are_no_lime_v2_or_do_not_fit_are_refused():
    config = LimeConfig(**SHAPE)
    with pytest.raises(ValueError, match="v1 mixes hidden states"):
        from_original_state_dict({"model.layers.1.router.weights": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="has 8 rows.*is 32"):
        from_original_state_dict({"model.layers.0.self_attn.kv_proj_weight": torch.zeros(8, 32)}, config)
    with pytest.raises(ValueError, match="got missing"):
        from_original_state_dict({"model.layers.0.self_attn.kv_proj_weight": torch.zeros(32, 32)}, config)
