"""Vectors from prompt pairs: by their definition in float64, on a model with a planted direction, and by sklearn."""

import re

import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ext.steering import add_vectors, contrastive_vectors


WORDS = [f"w{i}" for i in range(57)]
POSITIVE = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9", "w10 w11 w12 w13 w14"]
NEGATIVE = ["w21 w22", "w23 w24 w25", "w26", "w27 w28 w29 w30"]


@pytest.fixture(scope="module", params=["left", "right"])
def tokenizer(request):
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side=request.param)
    made.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w50{% else %}w51{% endif %}"
    )
    return made


def differences(model, tokenizer, positive, negative):
    """[layer, pair, d] in float64, each prompt by itself, from transformers' own hidden states."""
    model = model.double()
    rows = []
    for texts in (positive, negative):
        streams = []
        for text in texts:
            with torch.no_grad():
                ids = tokenizer(text, return_tensors="pt").input_ids
                # the last of the hidden states has had the final norm
                streams.append(
                    torch.stack([h[0, -1] for h in model(ids, output_hidden_states=True).hidden_states[1:3]])
                )
        rows.append(torch.stack(streams, 1))
    model.float()
    return rows[0] - rows[1]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_the_mean_difference_is_its_definition(model_type, tiny_model, tokenizer):
    model = tiny_model(model_type)
    found = contrastive_vectors(model, tokenizer, POSITIVE, NEGATIVE, batch_size=3)
    assert list(found) == [0, 1, 2]
    expected = differences(model, tokenizer, POSITIVE, NEGATIVE).mean(1)
    for layer in range(2):
        assert found[layer].dtype == torch.float32
        # batches with padding against single rows in float64
        torch.testing.assert_close(found[layer].double(), expected[layer], rtol=0, atol=2e-5)


def test_pca_is_the_first_direction_of_the_differences(tiny_model, tokenizer):
    model = tiny_model("llama")
    found = contrastive_vectors(model, tokenizer, POSITIVE, NEGATIVE, method="pca", layers=[1])
    rows = differences(model, tokenizer, POSITIVE, NEGATIVE)[1]
    # an independent implementation, which does not centre either
    direction = torch.from_numpy(TruncatedSVD(1, algorithm="arpack").fit(rows.numpy()).components_[0])
    along = rows.mean(0) @ direction
    torch.testing.assert_close(found[1].double(), along * direction, rtol=0, atol=1e-4)
    assert found[1].double() @ rows.mean(0) > 0, "it points from negative to positive"


def test_a_planted_direction_is_found_and_steers(tiny_model, tokenizer):
    model = tiny_model("llama")
    planted = torch.zeros(32)
    planted[7] = 4.0
    with torch.no_grad():
        # the words of positive prompts have the planted direction in their embedding, those of negative ones do not
        model.model.embed_tokens.weight[4 + 40] = model.model.embed_tokens.weight[4 + 41] + planted
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    positive, negative = ["w1 w40", "w2 w3 w40"], ["w1 w41", "w2 w3 w41"]
    for method in ("mean_difference", "pca"):
        found = contrastive_vectors(model, tokenizer, positive, negative, method=method, layers=[-1])
        # the embedding is not normed in Llama: the stream is the embedding here
        torch.testing.assert_close(found[2], planted, rtol=0, atol=1e-5)
    steered = add_vectors(tiny_model("llama"), found)
    assert steered.peft_config["default"].layers_to_transform == [2]


def test_chat_messages_get_the_template(tiny_model, tokenizer):
    model = tiny_model("llama")

    def chat(text, answer=None):
        said = [{"role": "user", "content": text}]
        return said + ([{"role": "assistant", "content": answer}] if answer else [])

    asked = contrastive_vectors(model, tokenizer, [chat("w1")], [chat("w2")])
    assert torch.equal(asked[1], contrastive_vectors(model, tokenizer, ["w1 w50"], ["w2 w50"])[1])
    answered = contrastive_vectors(model, tokenizer, [chat("w1", "w3")], [chat("w1", "w4")])
    assert torch.equal(answered[1], contrastive_vectors(model, tokenizer, ["w1 w3 w51"], ["w1 w4 w51"])[1])


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"method": "mean"}, ValueError, ["`method` must be one of mean_difference, pca, got 'mean'"]),
        ({"negative": NEGATIVE[:2]}, ValueError, ["must be as many, and at least 1", "got 4 and 2"]),
        ({"positive": [], "negative": []}, ValueError, ["at least 1 for 'mean_difference', got 0 and 0"]),
        ({"method": "pca", "positive": ["w1"], "negative": ["w2"]}, ValueError, ["at least 2 for 'pca', got 1 and 1"]),
        ({"positive": ["w1", "", "w2", "w3"]}, TypeError, ["must hold texts or lists of messages", "got ''"]),
        ({"positive": [1, 2, 3, 4]}, TypeError, ["must hold texts or lists of messages", "got 1"]),
        ({"layers": [3]}, ValueError, ["`layer` must be in [-3, 2], got 3"]),
        ({"batch_size": 0}, ValueError, ["`batch_size` must be at least 1, got 0"]),
    ],
)
def test_pairs_that_are_none_are_refused_before_any_forward(options, error, parts, tiny_model, tokenizer):
    model = tiny_model("llama")
    model.forward = None
    arguments = {"positive": POSITIVE, "negative": NEGATIVE} | options
    with pytest.raises(error, match=".*".join(map(re.escape, parts))):
        contrastive_vectors(model, tokenizer, **arguments)


def test_activations_that_are_not_finite_are_named(tiny_model, tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="activations of layer 1 must be finite"):
        contrastive_vectors(model, tokenizer, POSITIVE, NEGATIVE, layers=[1])
