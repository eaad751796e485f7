"""The masked diffusion model against MDLM's own formulas, written here a second time in float64."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, DynamicCache

from hf_ext.gstar.convert import import_mdlm
from hf_ext.gstar.metrics import nelbo
from hf_ext.gstar.modeling_mdlm import MDLMConfig, MDLMForMaskedLM


SHAPE = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MASK = 30


@pytest.fixture
def mdlm():
    """`mdlm(**options)`: a tiny model in float64 and evaluation mode, every parameter random."""

    def build(attn="sdpa", **options):
        torch.manual_seed(0)
        model = MDLMForMaskedLM._from_config(MDLMConfig(**{**SHAPE, **options}), attn_implementation=attn).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return build


@pytest.fixture
def tokens():
    def draw(batch=2, length=9, masked=0.4):
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, MASK, (batch, length), generator=generator)
        return torch.where(torch.rand(ids.shape, generator=generator) < masked, MASK, ids)

    return draw


def published(hidden=32, layers=2, vocab=31, cond=16):
    """Random weights under the names of MDLM's DIT, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "vocab_embed.embedding": (vocab, hidden),
        "sigma_map.mlp.0.weight": (cond, 256),
        "sigma_map.mlp.0.bias": (cond,),
        "sigma_map.mlp.2.weight": (cond, cond),
        "sigma_map.mlp.2.bias": (cond,),
        "output_layer.norm_final.weight": (hidden,),
        "output_layer.linear.weight": (vocab, hidden),
        "output_layer.linear.bias": (vocab,),
        "output_layer.adaLN_modulation.weight": (2 * hidden, cond),
        "output_layer.adaLN_modulation.bias": (2 * hidden,),
    }
    for i in range(layers):
        shapes |= {
            f"blocks.{i}.norm1.weight": (hidden,),
            f"blocks.{i}.norm2.weight": (hidden,),
            f"blocks.{i}.attn_qkv.weight": (3 * hidden, hidden),
            f"blocks.{i}.attn_out.weight": (hidden, hidden),
            f"blocks.{i}.mlp.0.weight": (4 * hidden, hidden),
            f"blocks.{i}.mlp.0.bias": (4 * hidden,),
            f"blocks.{i}.mlp.2.weight": (hidden, 4 * hidden),
            f"blocks.{i}.mlp.2.bias": (hidden,),
            f"blocks.{i}.adaLN_modulation.weight": (6 * hidden, cond),
            f"blocks.{i}.adaLN_modulation.bias": (6 * hidden,),
        }
    draw = {n: 0.3 * torch.randn(s, dtype=torch.double, generator=generator) for n, s in shapes.items()}
    return {f"backbone.{name}": value for name, value in draw.items()} | {
        "backbone.rotary_emb.inv_freq": torch.ones(4)
    }


def dit(state, ids, sigma, heads=4, layers=2):
    """MDLM's network, position by position and head by head; sigma (B,)."""
    w = {name.removeprefix("backbone."): value for name, value in state.items()}
    hidden = w["vocab_embed.embedding"].shape[1]
    angle = sigma.double()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
    wave = torch.cat((angle.cos(), angle.sin()), 1)
    c = F.silu(wave @ w["sigma_map.mlp.0.weight"].T + w["sigma_map.mlp.0.bias"])
    c = F.silu(c @ w["sigma_map.mlp.2.weight"].T + w["sigma_map.mlp.2.bias"])

    def modulated(x, norm, shift, scale):
        return F.layer_norm(x, (hidden,)) * w[norm] * (1 + scale[:, None]) + shift[:, None]

    def turned(x):
        size, length = x.shape[-1], x.shape[1]
        out = torch.empty_like(x)
        for position in range(length):
            for pair in range(size // 2):
                a = position / 10_000 ** (2 * pair / size)
                left, right = x[:, position, pair], x[:, position, pair + size // 2]
                out[:, position, pair] = left * math.cos(a) - right * math.sin(a)
                out[:, position, pair + size // 2] = right * math.cos(a) + left * math.sin(a)
        return out

    x = w["vocab_embed.embedding"][ids]
    for i in range(layers):
        m = (c @ w[f"blocks.{i}.adaLN_modulation.weight"].T + w[f"blocks.{i}.adaLN_modulation.bias"]).chunk(6, 1)
        y = modulated(x, f"blocks.{i}.norm1.weight", m[0], m[1])
        q, k, v = (y @ w[f"blocks.{i}.attn_qkv.weight"].T).chunk(3, -1)
        seen = []
        for head in range(heads):
            part = slice(head * hidden // heads, (head + 1) * hidden // heads)
            a = turned(q[..., part]) @ turned(k[..., part]).transpose(1, 2) / math.sqrt(hidden // heads)
            seen.append(a.softmax(-1) @ v[..., part])
        x = x + m[2][:, None] * (torch.cat(seen, -1) @ w[f"blocks.{i}.attn_out.weight"].T)
        y = modulated(x, f"blocks.{i}.norm2.weight", m[3], m[4])
        y = F.gelu(y @ w[f"blocks.{i}.mlp.0.weight"].T + w[f"blocks.{i}.mlp.0.bias"], approximate="tanh")
        x = x + m[5][:, None] * (y @ w[f"blocks.{i}.mlp.2.weight"].T + w[f"blocks.{i}.mlp.2.bias"])
    last = c @ w["output_layer.adaLN_modulation.weight"].T + w["output_layer.adaLN_modulation.bias"]
    x = modulated(x, "output_layer.norm_final.weight", *last.chunk(2, 1))
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_published_weights_give_the_published_logits(time_conditioning, tokens):
    state = published()
    model = import_mdlm(state, num_attention_heads=4, time_conditioning=time_conditioning)
    assert (model.model.time_embedding is not None) == time_conditioning
    sigma = torch.tensor([0.7, 2.0]) if time_conditioning else torch.zeros(2)
    with torch.no_grad():
        ours = model(tokens(), sigma=sigma if time_conditioning else None).logits
    expected = dit(state, tokens(), sigma)
    assert (ours[..., MASK] == -math.inf).all()
    # RoPE's angles are float32, as in the original
    torch.testing.assert_close(ours[..., :MASK], expected[..., :MASK], rtol=1e-5, atol=1e-5)


def test_weights_of_something_else_are_refused():
    with pytest.raises(ValueError, match="`weights` must be those of MDLM's DIT, got no vocab_embed.embedding"):
        import_mdlm({"model.embed_tokens.weight": torch.zeros(3, 4)})
    state = published()
    del state["backbone.blocks.1.norm2.weight"]
    with pytest.raises((ValueError, KeyError), match="post_attention_layernorm"):
        import_mdlm(state, num_attention_heads=4)


def test_every_token_sees_every_other(mdlm, tokens):
    model, ids = mdlm(), tokens()
    logits = model(ids).logits[..., :MASK]
    for position in (0, 4, 8):
        other = ids.clone()
        other[:, position] = 3 if ids[0, position] != 3 else 4
        changed = (model(other).logits[..., :MASK] - logits).abs().amax((0, 2))
        assert (changed > 1e-6).all()


def test_padding_on_either_side_changes_nothing(mdlm, tokens):
    model, ids = mdlm(), tokens()
    expected = model(ids).logits[..., :MASK]
    for left, right in ((3, 0), (0, 2), (2, 2)):
        padded = F.pad(ids, (left, right), value=7)
        mask = F.pad(torch.ones_like(ids), (left, right))
        got = model(padded, attention_mask=mask).logits[:, left : left + 9, :MASK]
        # RoPE sees differences of positions only; its angles are float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_eager_matches_sdpa(mdlm, tokens):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    keep = mask.bool()
    a, b = (mdlm(attn=attn)(tokens(), attention_mask=mask).logits[keep][:, :MASK] for attn in ("sdpa", "eager"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # eager's softmax is float32


def test_subs_projection(mdlm, tokens):
    model, ids = mdlm(), tokens()
    log_probs = model.subs(model(ids).logits, ids)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 9))
    assert (log_probs[..., MASK] == -math.inf)[ids == MASK].all()
    kept = log_probs.exp()[ids != MASK]
    assert torch.equal(kept, F.one_hot(ids[ids != MASK], 31).float())


def test_the_loss_counts_masked_positions_with_labels_only(mdlm, tokens):
    model, ids = mdlm(), tokens()
    labels = torch.arange(18).view(2, 9)
    labels[0, :5] = -100
    output = model(ids, labels=labels)
    counted = (ids == MASK) & (labels != -100)
    assert 0 < counted.sum() < (ids == MASK).sum()
    log_probs = output.logits.log_softmax(-1)
    expected = -torch.stack([log_probs[i, j, labels[i, j]] for i, j in counted.nonzero()]).mean()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=1e-6)
    nothing = model(torch.zeros_like(ids), labels=labels).loss
    assert nothing.item() == 0
    nothing.backward()


def test_a_causal_prefix_depends_on_nothing_behind_it(mdlm, tokens):
    model, ids = mdlm(prefix_attention="causal"), tokens(length=10)
    lengths = torch.tensor([4, 6])
    hidden = model.model(ids, prefix_length=lengths).last_hidden_state
    other = ids.clone()
    other[:, 7:] = 2
    changed = (model.model(other, prefix_length=lengths).last_hidden_state - hidden).abs().amax(-1) > 1e-9
    assert changed.tolist() == [[False] * 4 + [True] * 6, [False] * 6 + [True] * 4]
    early = ids.clone()
    early[:, 2] = 1 if ids[0, 2] != 1 else 5
    changed = (model.model(early, prefix_length=lengths).last_hidden_state - hidden).abs().amax(-1) > 1e-9
    assert not changed[:, :2].any() and changed[:, 2:].all()


@pytest.mark.parametrize("left", [0, 2])
def test_a_cached_prefix_gives_the_same_logits_and_is_not_written_to(left, mdlm, tokens):
    model, ids = mdlm(prefix_attention="causal"), tokens(length=10)
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    whole = model(ids, attention_mask=mask, prefix_length=6).logits[:, 6:]
    cache = model(ids[:, :6], attention_mask=mask[:, :6], prefix_length=6, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    for _ in range(2):
        got = model(ids[:, 6:], attention_mask=mask, past_key_values=cache)
        torch.testing.assert_close(got.logits, whole)
        assert got.past_key_values is None and cache.get_seq_length() == 6


def test_time_conditioning_reads_sigma(mdlm, tokens):
    model, ids = mdlm(time_conditioning=True), tokens()
    a, b = (model(ids, sigma=torch.full((2,), s)).logits[..., :MASK] for s in (0.1, 3.0))
    assert (a - b).abs().max() > 1e-3


def test_hidden_states_and_attentions_are_those_of_each_layer(mdlm, tokens):
    output = mdlm(attn="eager")(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[-1].shape == (2, 9, 32)
    assert len(output.attentions) == 2 and torch.allclose(output.attentions[0].sum(-1), torch.ones(()).double())


def test_tied_embeddings_stay_tied(tmp_path, mdlm, tokens):
    model = mdlm(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)  # RoPE in float32


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_gradient_checkpointing_changes_no_gradient(time_conditioning, mdlm, tokens):
    grads = []
    for checkpointing in (False, True):
        model = mdlm(time_conditioning=time_conditioning, hidden_dropout=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        sigma = torch.ones(2) if time_conditioning else None
        model(tokens(), labels=torch.zeros(2, 9, dtype=torch.long), sigma=sigma).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, saved in zip(*grads, strict=True):
        torch.testing.assert_close(plain, saved)


def test_a_new_model_without_gates_starts_as_its_embedding():
    torch.manual_seed(0)
    model = MDLMForMaskedLM(MDLMConfig(**SHAPE, time_conditioning=True)).eval()
    ids = torch.arange(6)[None]
    hidden = model.model(ids, sigma=torch.ones(1)).last_hidden_state
    torch.testing.assert_close(hidden, model.model.norm(model.model.embed_tokens(ids)))


class Grammar:
    """Words of length 4 over {0, 1, 2}, of unequal probability; every conditional distribution is known."""

    def __init__(self):
        self.words = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2], [2, 1, 0, 0], [1, 1, 1, 1], [2, 0, 0, 2]])
        self.probs = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)

    def __call__(self, input_ids, attention_mask=None):
        fits = ((input_ids[:, None] == self.words) | (input_ids[:, None] == 3)).all(-1) * self.probs
        one_hot = F.one_hot(self.words, 4).double()
        probs = torch.einsum("bw,wlv->blv", fits, one_hot) / fits.sum(1)[:, None, None]
        return type("Output", (), {"logits": probs.log()})()


def test_the_nelbo_of_a_model_that_knows_the_grammar_is_its_entropy():
    grammar = Grammar()
    entropy = float(-(grammar.probs * grammar.probs.log()).sum()) / 4
    # rows in exact proportion, so that only the choice of masks is random
    rows = grammar.words.repeat_interleave((grammar.probs * 2000).round().long(), 0)
    measured = nelbo(grammar, rows, mask_token_id=3, num_samples=4, generator=torch.Generator().manual_seed(0))
    assert measured.tokens == 8000 and 0 < measured.standard_error < 0.01
    assert measured.nats_per_token == pytest.approx(entropy, abs=4 * measured.standard_error)
    assert measured.perplexity == pytest.approx(math.exp(measured.nats_per_token))


def test_the_nelbo_of_a_model_that_knows_nothing_is_the_log_of_the_vocabulary():
    def uniform(input_ids, attention_mask=None):
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 4)})()

    ids = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    fixed = torch.zeros(3, 7, dtype=torch.bool)
    fixed[1, :2] = True
    measured = nelbo(uniform, ids, mask_token_id=3, attention_mask=mask, fixed=fixed)
    assert measured.nats_per_token == pytest.approx(math.log(3)) and measured.tokens == 3 + 5 + 7


def test_a_text_with_masks_has_no_nelbo():
    with pytest.raises(ValueError, match=r"`input_ids` must be whole texts, got the mask \(id 3\)"):
        nelbo(Grammar(), torch.tensor([[0, 3]]), mask_token_id=3)
    with pytest.raises(ValueError, match="neither padding nor fixed, got none"):
        nelbo(Grammar(), torch.tensor([[0, 1]]), mask_token_id=3, attention_mask=torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"vocab_size": 1}, "`vocab_size` must be at least 2, a token and the mask, got 1"),
        ({"hidden_size": 36}, r"`hidden_size` must be a multiple of 2 \* num_attention_heads=8, .* got 36"),
        ({"hidden_dropout": 1.0}, r"`hidden_dropout` must be in \[0, 1\), got 1.0"),
        ({"mask_token_id": 31}, r"`mask_token_id` must be in \[0, vocab_size=31\), got 31"),
        ({"mask_token_id": 5, "pad_token_id": 5}, "`mask_token_id` must differ from `pad_token_id`, got 5"),
        ({"prefix_attention": "left"}, "prefix_attention"),
        ({"num_layers": 3}, "`num_layers` is not an option of MDLMConfig, got 3"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options, said):
    with pytest.raises((ValueError, StrictDataclassError), match=said):
        MDLMConfig(**{**SHAPE, **options})


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({}, {"sigma": torch.ones(2)}, r"`sigma` must be None for time_conditioning=False, got one of shape \(2,\)"),
        ({"time_conditioning": True}, {}, "`sigma` must be given for time_conditioning=True, got None"),
        ({}, {"prefix_length": 3}, '`prefix_length` must be None for prefix_attention="full"'),
        ({}, {"use_cache": True}, '`use_cache` must be False for prefix_attention="full"'),
        ({}, {"inputs_embeds": torch.zeros(2, 9, 32)}, "exactly one of `input_ids` and `inputs_embeds`, got both"),
    ],
)
def test_an_input_that_does_not_fit_the_model_is_refused(config, options, said, mdlm, tokens):
    with pytest.raises(ValueError, match=said):
        mdlm(**config)(tokens(), **options)
