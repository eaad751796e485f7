"""The critic's head: what it pools, what passes gradients, and that it comes back from disk."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext import hub
from hf_ext.vldac import ValueHead, ValueHeadConfig


# left padding, a prompt, a response; and a longer prompt
MASK = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 0]])


@pytest.fixture
def states():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def head(**options):
    torch.manual_seed(1)
    return ValueHead(ValueHeadConfig(input_size=8, hidden_sizes=[6, 4], **options))


def by_hand(model, x):
    """Linear, ReLU, Linear, ReLU, Linear in plain products."""
    first, second, last = (layer for layer in model.layers if isinstance(layer, torch.nn.Linear))
    x = (x @ first.weight.T + first.bias).clamp(min=0)
    x = (x @ second.weight.T + second.bias).clamp(min=0)
    return (x @ last.weight.T + last.bias)[..., 0]


def test_last_prompt_reads_the_position_that_predicts_the_response(states):
    model = head()
    expected = by_hand(model, torch.stack([states[0, 3], states[1, 3]]))
    torch.testing.assert_close(model(states, MASK), expected)
    other = states.clone()
    other[:, 4] = 9.0  # the response
    other[0, :2] = -9.0  # padding
    assert torch.equal(model(other, MASK), model(states, MASK))


def test_mean_prompt_is_the_mean_over_the_prompt(states):
    model = head(pooling="mean_prompt")
    expected = by_hand(model, torch.stack([states[0, 2:4].mean(0), states[1, :4].mean(0)]))
    torch.testing.assert_close(model(states, MASK), expected)
    states[0, 0] = float("nan")  # padding is not even multiplied by 0
    torch.testing.assert_close(model(states, MASK), expected)


def test_without_a_mask_every_position_has_its_value(states):
    model = head()
    assert torch.allclose(model(states)[:, 3], model(states, MASK), atol=1e-6)
    assert model(states).shape == (2, 5)


@pytest.mark.parametrize("pooling", ["last_prompt", "mean_prompt"])
def test_stop_gradient_spares_the_policy(states, pooling):
    states.requires_grad_()
    loss = head(pooling=pooling)(states, MASK).square().sum()
    loss.backward()
    assert states.grad is None
    head(pooling=pooling, stop_gradient=False)(states, MASK).square().sum().backward()
    assert states.grad.abs().sum() > 0
    assert not states.grad[:, 4].any()


def test_values_are_float32_whatever_the_policy_is(states):
    model = head()
    assert model(states.bfloat16(), MASK).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(states, MASK)
    assert torch.equal(inside, model(states, MASK))


def test_it_loads_in_float32_beside_a_policy_in_bfloat16(tmp_path, states):
    model = head(pooling="mean_prompt", stop_gradient=False)
    hub.save_many(tmp_path, {"value_head": model})
    again = ValueHead.from_pretrained(tmp_path / "value_head", dtype=torch.bfloat16)
    assert torch.equal(again(states, MASK), model(states, MASK))
    assert again.config.pooling == "mean_prompt"
    assert again.config.stop_gradient is False
    assert again.config.hidden_sizes == [6, 4]


def test_it_loads_where_hf_ext_is_absent(tmp_path):
    hub.save_many(tmp_path, {"value_head": head()})
    report = hub.verify(tmp_path, subfolder="value_head")
    assert report["auto"] == {"AutoConfig": "ValueHeadConfig", "AutoModel": "ValueHead"}
    assert report["parameters"] == 8 * 6 + 6 + 6 * 4 + 4 + 4 + 1


def test_for_policy_takes_the_text_models_width():
    policy = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    model = ValueHead.for_policy(policy, hidden_sizes=[3])
    assert model.config.input_size == 16
    hidden = policy(torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states[model.config.layer]
    assert model(hidden, torch.ones(1, 2)).shape == (1,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "`pooling` must be"),
        ({"input_size": 0}, "`input_size` must be"),
        ({"hidden_sizes": [4, 0]}, "`hidden_sizes` must be"),
        ({"hidden_size": [4]}, "`hidden_size` is not an option.*`hidden_sizes`"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        ValueHeadConfig(**options)


def test_bad_inputs_are_refused(states):
    model = head()
    with pytest.raises(ValueError, match="`hidden_states` must have shape"):
        model(states[..., :7], MASK)
    with pytest.raises(ValueError, match="`prompt_mask` must have shape"):
        model(states, MASK[:, :4])
    with pytest.raises(ValueError, match="a row without any"):
        model(states, MASK * torch.tensor([[0], [1]]))


def test_no_hidden_layer_is_a_linear_critic(states):
    model = ValueHead(ValueHeadConfig(input_size=8, hidden_sizes=[]))
    expected = states[:, 3] @ model.layers[0].weight[0] + model.layers[0].bias
    torch.testing.assert_close(model(states, MASK), expected)
