"""The logit lens against the model's own output, against float64 written out, and on a model with a planted answer."""

import copy
import functools
import math
import re

import pytest
import torch
import transformers

import hf_ext  # noqa: F401  registers "lime"
from hf_ext.analysis.lens import logit_lens


LAYERS, WIDTH, VOCAB = 3, 32, 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
MODELS = ("llama", "gpt2", "lime")
IDS = torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


@functools.cache
def make(model_type: str):
    config = transformers.AutoConfig.for_model(model_type, **(GPT2_SHAPE if model_type == "gpt2" else SHAPE))
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", [*MODELS, "gemma2", "gpt_neox"])
def test_last_row_is_the_models_own_output_to_the_last_bit(model_type, dtype):
    model = copy.deepcopy(make(model_type)).to(dtype)
    out = logit_lens(model, IDS, top_k=4)
    with torch.no_grad():
        logits = model(IDS).logits.float()
    logprobs, probs = logits.log_softmax(-1), logits.softmax(-1)
    top = logprobs.topk(4)
    assert out.layers == [0, 1, 2, 3]
    assert torch.equal(out.top_ids[-1], top.indices)
    assert torch.equal(out.top_probs[-1], top.values.exp())
    assert torch.equal(out.target_ids, logprobs.argmax(-1))
    assert torch.equal(out.target_prob[-1], logprobs.exp().amax(-1))
    assert torch.equal(out.entropy[-1], -(probs * logprobs).sum(-1))
    assert not out.target_rank[-1].any() and not out.kl[-1].any()


@pytest.mark.parametrize("model_type", MODELS)
def test_every_row_is_the_definition_in_float64(model_type):
    model = make(model_type)
    out = logit_lens(model, IDS, top_k=3)
    with torch.no_grad():
        # the last of transformers' hidden states has had the final norm already
        *streams, _ = model(IDS, output_hidden_states=True).hidden_states
        norm = model.transformer.ln_f if model_type == "gpt2" else model.model.norm
        rows = torch.stack([model.lm_head(norm(stream)) for stream in streams] + [model(IDS).logits]).double()
    p = rows.softmax(-1)
    target = p[-1].argmax(-1)
    chosen = p.gather(-1, target.expand(LAYERS + 1, 2, 7)[..., None])
    expected = {
        "top_ids": p.argsort(-1, descending=True)[..., :3],
        "top_probs": p.sort(-1, descending=True).values[..., :3],
        "target_ids": target,
        "target_prob": chosen[..., 0],
        "target_rank": (p > chosen).sum(-1),
        "entropy": -(p * p.log()).sum(-1),
        "kl": (p[-1] * (p[-1].log() - p.log())).sum(-1),
    }
    for name, value in expected.items():
        # float32 softmax and sums over 61 terms of size <= ln 61
        torch.testing.assert_close(getattr(out, name), value, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert out.entropy.max() <= math.log(VOCAB)


def test_rows_are_only_those_asked_for():
    full, some = logit_lens(make("llama"), IDS), logit_lens(make("llama"), IDS, layers=(-1, 0, 2))
    assert some.layers == [3, 0, 2]
    assert torch.equal(some.kl, full.kl[[3, 0, 2]]) and torch.equal(some.top_ids, full.top_ids[[3, 0, 2]])


def test_a_planted_token_appears_at_the_layer_that_writes_it():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**SHAPE | {"vocab_size": WIDTH}, mlp_bias=True)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        # token i writes axis i, the head reads axis i, and only layer 1 adds anything: ten times axis 5
        model.model.embed_tokens.weight.copy_(torch.eye(WIDTH))
        model.lm_head.weight.copy_(torch.eye(WIDTH))
        model.model.layers[1].mlp.down_proj.bias[5] = 10.0
    out = logit_lens(model, torch.tensor([[3, 4]]), top_k=1)
    assert out.top_ids[:, 0, :, 0].tolist() == [[3, 4], [3, 4], [5, 5], [5, 5]]
    # before layer 1 the target ties with all tokens but the input's own
    assert out.target_rank[:, 0].tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert (out.kl[:2] > 1).all() and not out.kl[2:].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", MODELS)
def test_padded_rows_show_what_single_rows_show(model_type, side):
    model = make(model_type)
    short, long = IDS[0, :4], IDS[1]
    pads = torch.zeros(3, dtype=torch.long)
    row = torch.cat([pads, short] if side == "left" else [short, pads])
    ids = torch.stack([row, long])
    together = logit_lens(model, ids, (ids != 0).long())
    for i, tokens in enumerate((short, long)):
        real = ids[i] != 0
        alone = logit_lens(model, tokens[None])
        assert torch.equal(together.top_ids[:, i, real], alone.top_ids[:, 0])
        # another batch shape, so sums in another order
        torch.testing.assert_close(together.kl[:, i, real], alone.kl[:, 0], rtol=1e-4, atol=1e-5)


def test_works_inside_a_peft_wrapper():
    import peft

    bare = transformers.AutoModelForCausalLM.from_config(make("llama").config)
    bare.load_state_dict(make("llama").state_dict())
    wrapped = peft.get_peft_model(bare, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    assert torch.equal(logit_lens(wrapped, IDS).kl, logit_lens(make("llama"), IDS).kl)


def test_no_hook_and_no_graph_stay_behind():
    model = make("llama")
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    out = logit_lens(model, IDS)
    assert not out.kl.requires_grad
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == count


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, "`input_ids` must be a tensor of integers, got list"),
        ({"input_ids": IDS.float()}, TypeError, "`input_ids` must be a tensor of integers, got torch.float32"),
        ({"input_ids": IDS[0]}, ValueError, "`input_ids` must have shape (batch, seq) with a token, got (7,)"),
        ({"input_ids": IDS[:, :0]}, ValueError, "`input_ids` must have shape (batch, seq) with a token, got (2, 0)"),
        ({"attention_mask": IDS[:1]}, ValueError, "`attention_mask` must have the shape of `input_ids`, (2, 7)"),
        ({"layers": [4]}, ValueError, "`layers` must be one or more numbers in [-4, 3]"),
        ({"layers": []}, ValueError, "`layers` must be one or more numbers in [-4, 3]"),
        ({"layers": 2}, TypeError, "`layers` must be a sequence of integers, got 2"),
        ({"layers": [0.5]}, TypeError, "`layers` must be a sequence of integers, got [0.5]"),
        ({"top_k": 0}, ValueError, "`top_k` must be in [1, vocabulary = 61], got 0"),
        ({"top_k": 62}, ValueError, "`top_k` must be in [1, vocabulary = 61], got 62"),
        ({"top_k": 1.5}, TypeError, "`top_k` must be an integer, got 1.5"),
    ],
)
def test_wrong_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        logit_lens(make("llama"), **{"input_ids": IDS} | kwargs)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="must have a language-modelling head, got LlamaModel"):
        logit_lens(make("llama").model, IDS)
