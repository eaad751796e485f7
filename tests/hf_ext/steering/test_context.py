"""Which tokens are steered, and which caches may be continued: the rules of the paper's specification, section 6.

The vectors that a gate lets through are checked against hooks that add them at the columns written out here.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_ext import SteeringConfig
from hf_ext.record import edit
from hf_ext.sites import resolve


PROMPT = 4  # columns 0..3; the output at column 3 is the first token of the completion
IDS = torch.randint(2, 61, (2, 8), generator=torch.Generator().manual_seed(1))
LABELS = IDS.masked_fill(torch.arange(8) < PROMPT, -100)
COLUMNS = {"all": range(8), "first": [PROMPT - 1], "completion": range(PROMPT - 1, 8)}
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
each_gate = pytest.mark.parametrize("positions", ["first", "completion"])


def by_hooks(base, vectors, columns, ids=IDS):
    """Logits of the base with vectors added at some columns of a whole sequence."""
    mask = torch.zeros(ids.shape[1], 1)
    mask[list(columns)] = 1
    hooks = {str(layer): resolve(base, "resid_post", layer) for layer in vectors}
    with torch.no_grad(), edit(base, hooks, lambda name, hidden, step: hidden + mask * vectors[int(name)]):
        return base(input_ids=ids).logits


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**{"input_ids": IDS, **kwargs}).logits


@each_gate
def test_labels_tell_where_the_completion_begins(positions, steer):
    base, model, vectors = steer(positions=positions)
    expected = by_hooks(base, vectors, COLUMNS[positions])
    torch.testing.assert_close(logits(model, labels=LABELS), expected, rtol=0, atol=2e-5)


@each_gate
def test_logits_to_keep_tell_where_the_completion_begins(positions, steer):
    base, model, vectors = steer(positions=positions)
    # GRPO asks for the completion's logits and the one before them
    got = logits(model, logits_to_keep=8 - PROMPT + 1)
    expected = by_hooks(base, vectors, COLUMNS[positions])[:, PROMPT - 1 :]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_every_answer_of_a_packed_row_has_a_first_token(steer):
    base, model, vectors = steer(positions="first")
    labels = IDS.clone()
    labels[:, [0, 1, 4, 5]] = -100  # answers at columns 2, 3 and 6, 7
    torch.testing.assert_close(logits(model, labels=labels), by_hooks(base, vectors, [1, 5]), rtol=0, atol=2e-5)


def test_rows_may_have_prompts_of_different_lengths(steer):
    base, model, vectors = steer(positions="first")
    labels = LABELS.clone()
    labels[1, PROMPT] = -100
    got = logits(model, labels=labels)
    torch.testing.assert_close(got[0], by_hooks(base, vectors, [3])[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(got[1], by_hooks(base, vectors, [4])[1], rtol=0, atol=2e-5)


@each_gate
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_generate_knows_where_its_prompt_ends(model_type, positions, steer):
    base, model, vectors = steer(model_type, positions=positions)
    ids = IDS[:, :PROMPT]
    settings = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    got = model.generate(input_ids=ids, **settings)
    columns = [column for column in COLUMNS[positions] if column < 8]
    expected = by_hooks(base, vectors, columns, got.sequences)[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(got.logits, 1), expected, rtol=0, atol=2e-5)
    # without a cache every step computes the prompt again
    again = model.generate(input_ids=ids, use_cache=False, **settings)
    assert torch.equal(again.sequences, got.sequences)
    torch.testing.assert_close(torch.stack(again.logits, 1), expected, rtol=0, atol=2e-5)
    # a whole forward outside of generate needs to be told again
    with pytest.raises(ValueError, match="`labels` or `logits_to_keep` .* must tell where the completion begins"):
        logits(model)


@each_gate
def test_generate_from_embeddings_and_by_position(positions, steer):
    _, model, _ = steer(positions=positions)
    ids = IDS[:, :PROMPT]
    expected = model.generate(input_ids=ids, **GREEDY)[:, PROMPT:]
    assert torch.equal(model.generate(ids, **GREEDY)[:, PROMPT:], expected)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY)[:, -4:], expected)


def test_rows_of_a_batch_have_their_own_positions(steer, vectors_like):
    base, model, vectors = steer()
    for name in ("first", "completion"):
        model.add_adapter(name, SteeringConfig(positions=name, scale=0.5))
        model.set_vectors(name, vectors)
    names = ["first", "all", "completion", "base"]
    rows = {"all": "default", "base": "__base__"}
    ids = IDS[:1].expand(4, -1)
    labels = LABELS[:1].expand(4, -1)
    got = logits(model, input_ids=ids, labels=labels, adapter_names=[rows.get(name, name) for name in names])
    half = {layer: 0.5 * vector for layer, vector in vectors.items()}
    expected = [
        by_hooks(base, half, COLUMNS["first"], ids)[0],
        by_hooks(base, vectors, COLUMNS["all"], ids)[1],
        by_hooks(base, half, COLUMNS["completion"], ids)[2],
        by_hooks(base, vectors, [], ids)[3],
    ]
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=2e-5)
    # and in generate, with copies of rows
    prompts = ids[:, :PROMPT]
    adapters = [rows.get(name, name) for name in names]
    mixed = model.generate(input_ids=prompts, adapter_names=adapters, num_beams=2, **GREEDY)
    for row, adapter in enumerate(adapters):
        alone = model.generate(input_ids=prompts[:1], adapter_names=[adapter], num_beams=2, **GREEDY)
        assert torch.equal(mixed[row : row + 1], alone)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_each_forward_with_its_own_tokens(reentrant, steer):
    _, model, _ = steer(positions="completion")
    model.train()
    later = LABELS.masked_fill(torch.arange(8) < PROMPT + 2, -100)

    def gradients(first, second):
        """Of two forwards, with another between them, before one backward."""
        model.zero_grad()
        loss = model(input_ids=IDS, labels=first).loss
        loss = loss + 2 * model(input_ids=IDS.flip(0), labels=second).loss
        with torch.no_grad():
            model(input_ids=IDS[:, :5], labels=LABELS[:, :5])
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients(LABELS, later)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients(LABELS, later)
    for a, b, c in zip(plain, again, gradients(later, LABELS), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_a_part_of_the_model_does_not_know_where_the_completion_begins(steer):
    _, model, _ = steer(positions="completion")
    logits(model, labels=LABELS)
    with pytest.raises(ValueError, match="call the model itself, not a part of it"):
        model.get_base_model().model(IDS)


def test_transformers_own_loading_says_how_a_gated_adapter_is_generated_with(steer, tiny_model, tmp_path):
    base, model, _ = steer(positions="completion")
    model.save_pretrained(tmp_path)
    plain = tiny_model("llama")
    plain.load_adapter(tmp_path)
    expected = logits(model, labels=LABELS)
    assert torch.equal(logits(plain, labels=LABELS), expected)
    with pytest.raises(ValueError, match="call `generate` of the PeftModel"):
        plain.generate(IDS)


# caches


def filled(model, ids=IDS[:, :PROMPT], **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **kwargs).past_key_values


def go_on(model, cache, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS[:, PROMPT:], past_key_values=cache, use_cache=True, **kwargs).logits


def test_a_cache_filled_by_the_base_is_wrong_for_most_vectors_and_refused(steer):
    base, model, _ = steer()
    with pytest.raises(
        ValueError, match=r"same vectors, default \(scale 1, version 1\), got one filled with the base"
    ):
        go_on(model, filled(base))
    with model.disable_adapter():
        cache = filled(model)
    with pytest.raises(ValueError, match="Start with an empty cache"):
        go_on(model, cache)
    with model.disable_adapter():
        go_on(model, cache)


def test_vectors_of_the_last_layer_share_the_cache_of_the_base(steer):
    for model_type in ("llama", "gemma2", "gpt_neox", "mixtral"):
        base, model, _ = steer(model_type, layers_to_transform=-1)
        expected = logits(model)[:, PROMPT:]
        torch.testing.assert_close(go_on(model, filled(base)), expected, rtol=0, atol=2e-5)
    # an earlier place in the last layer changes its keys
    base, model, _ = steer(placement="input_layernorm", layers_to_transform=-1)
    with pytest.raises(ValueError, match="got one filled with the base"):
        go_on(model, filled(base))


def test_switching_adapters_or_scales_between_turns_is_refused(steer, vectors_like):
    _, model, _ = steer()
    model.add_adapter("other", SteeringConfig())
    model.set_vectors("other", vectors_like(seed=2))
    cache = filled(model)
    go_on(model, copy.deepcopy(cache))
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"same vectors, other .* filled with default"):
        go_on(model, copy.deepcopy(cache))
    model.set_adapter("default")
    model.set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"default \(scale 0.5, .* filled with default \(scale 1"):
        go_on(model, copy.deepcopy(cache))
    model.set_scale("default", 1.0)
    # writing another adapter's vectors does not concern this cache
    model.set_vectors("other", vectors_like(seed=3))
    go_on(model, copy.deepcopy(cache))
    model.set_vectors("default", vectors_like(seed=3))
    with pytest.raises(ValueError, match="version 2.* filled with .*version 1"):
        go_on(model, copy.deepcopy(cache))


def test_rows_must_stay_with_their_adapters_in_a_cache(steer):
    _, model, _ = steer()
    cache = filled(model, adapter_names=["default", "__base__"])
    expected = logits(model, adapter_names=["default", "__base__"])[:, PROMPT:]
    got = go_on(model, copy.deepcopy(cache), adapter_names=["default", "__base__"])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="must have been filled with the same vectors"):
        go_on(model, copy.deepcopy(cache), adapter_names=["__base__", "default"])
    with pytest.raises(ValueError, match="must have been filled with the same vectors"):
        go_on(model, copy.deepcopy(cache))
    # one name for all is the active adapter
    cache = filled(model, adapter_names=["default", "default"])
    go_on(model, cache)


def test_a_conversation_goes_on_in_its_cache(steer):
    _, model, _ = steer()
    cache = DynamicCache()
    first = model.generate(input_ids=IDS[:, :PROMPT], past_key_values=cache, **GREEDY)
    longer = torch.cat((first, IDS[:, PROMPT:]), 1)
    got = model.generate(input_ids=longer, past_key_values=cache, **GREEDY)
    assert torch.equal(got, model.generate(input_ids=longer, **GREEDY))


def test_a_merged_vector_counts_in_a_cache(steer):
    _, model, _ = steer()
    cache = filled(model)
    model.merge_adapter()
    go_on(model, copy.deepcopy(cache))
    model.unmerge_adapter()
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="same vectors, the base, got one filled with default"),
    ):
        go_on(model, cache)
