"""The error predictor: what it copies, that it starts without an opinion, what it refuses."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from hf_ext.gstar.modeling_error_predictor import ErrorPredictor, ErrorPredictorConfig
from hf_ext.gstar.modeling_mdlm import MDLMConfig, MDLMForMaskedLM


SHAPE = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
OTHERS = {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


DENOISERS = {
    "mdlm": lambda: MDLMForMaskedLM(MDLMConfig(**SHAPE)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE, **OTHERS)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SHAPE, **OTHERS, cls_token_id=1, sep_token_id=2, local_attention=4)
    ),
    "eurobert": lambda: EuroBertForMaskedLM(EuroBertConfig(**SHAPE, **OTHERS, mask_token_id=3)),
}
each_denoiser = pytest.mark.parametrize("kind", DENOISERS)


@each_denoiser
@pytest.mark.parametrize("num_layers", [None, 1])
@torch.no_grad()
def test_a_copy_sees_what_the_denoiser_sees_and_has_no_opinion(kind, num_layers):
    denoiser = randomised(DENOISERS[kind]())
    predictor = ErrorPredictor.from_denoiser(denoiser, num_layers=num_layers).eval()
    seen = []
    predictor.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    logits = predictor(IDS, attention_mask=PADDING).logits
    assert torch.equal(logits, torch.zeros(2, 9))
    states = denoiser(IDS, attention_mask=PADDING, output_hidden_states=True).hidden_states
    keep = PADDING.bool()
    if num_layers is None:
        torch.testing.assert_close(seen[0][keep], states[-1][keep])
    else:  # a block's output, normed where the family norms at the end
        norm = {"mdlm": "norm", "modernbert": "final_norm", "eurobert": "norm"}.get(kind)
        expected = states[1] if norm is None else getattr(denoiser.base_model, norm)(states[1])
        torch.testing.assert_close(seen[0][keep], expected[keep])


@each_denoiser
def test_a_head_alone_reads_the_denoisers_last_hidden_states(kind):
    denoiser = randomised(DENOISERS[kind]())
    predictor = ErrorPredictor.from_denoiser(denoiser, num_layers=0)
    assert sum(p.numel() for p in predictor.parameters()) == 32 * 2 + 32 + 1
    features = denoiser(IDS, output_hidden_states=True).hidden_states[-1].detach()
    assert torch.equal(predictor(hidden_states=features).logits, torch.zeros(2, 9))
    torch.nn.init.normal_(predictor.head.linear.weight)
    expected = F.layer_norm(features, (32,)) @ predictor.head.linear.weight[0]
    torch.testing.assert_close(predictor(hidden_states=features).logits, expected)


@torch.no_grad()
def test_a_time_conditioned_denoiser_is_copied_at_noise_level_zero():
    denoiser = randomised(MDLMForMaskedLM(MDLMConfig(**SHAPE, time_conditioning=True)))
    predictor = ErrorPredictor.from_denoiser(denoiser).eval()
    expected = denoiser.model(IDS, sigma=torch.zeros(2)).last_hidden_state
    torch.testing.assert_close(predictor.backbone(IDS), expected, rtol=1e-4, atol=1e-4)  # float32, other products


def test_a_denoiser_is_left_alone_and_not_shared():
    denoiser = randomised(DENOISERS["mdlm"]())
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    predictor = ErrorPredictor.from_denoiser(denoiser, num_layers=2)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert not denoiser.training


def test_freezing_leaves_the_head_to_train():
    predictor = ErrorPredictor.from_denoiser(DENOISERS["mdlm"](), freeze=True)
    assert {n for n, p in predictor.named_parameters() if p.requires_grad} == {
        "head.norm.weight",
        "head.norm.bias",
        "head.linear.weight",
        "head.linear.bias",
    }


def test_the_loss_is_binary_cross_entropy_over_labelled_positions():
    predictor = randomised(ErrorPredictor.from_denoiser(DENOISERS["mdlm"]()))
    labels = torch.tensor([[1, 0, -100] * 3, [0, 0, 1] * 3])
    output = predictor(IDS, labels=labels)
    p = output.logits.sigmoid()
    terms = torch.where(labels == 1, -p.log(), -(1 - p).log())[labels != -100]
    torch.testing.assert_close(output.loss, terms.mean())
    nothing = predictor(IDS, labels=torch.full_like(labels, -100)).loss
    assert nothing.item() == 0 and nothing.requires_grad


@each_denoiser
@pytest.mark.parametrize("num_layers", [None, 1, 0])
def test_save_load(kind, num_layers, tmp_path):
    predictor = randomised(ErrorPredictor.from_denoiser(DENOISERS[kind](), num_layers=num_layers))
    predictor.save_pretrained(tmp_path)
    again, info = ErrorPredictor.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    given = {"hidden_states": torch.ones(2, 9, 32)} if num_layers == 0 else {"input_ids": IDS}
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in predictor.state_dict().items())
    # a product of a matrix and a vector depends on where its memory begins
    torch.testing.assert_close(again(**given).logits, predictor(**given).logits, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused():
    denoiser = DENOISERS["mdlm"]()
    with pytest.raises(ValueError, match=r"`num_layers` must be in \[0, 3\], the denoiser's blocks, got 4"):
        ErrorPredictor.from_denoiser(denoiser, num_layers=4)
    with pytest.raises(ValueError, match="`hidden_states` must be given: this predictor is a head alone"):
        ErrorPredictor.from_denoiser(denoiser, num_layers=0)(IDS)
    with pytest.raises(ValueError, match="`input_ids` must be given, .* got hidden_states"):
        ErrorPredictor.from_denoiser(denoiser)(IDS, hidden_states=torch.zeros(2, 9, 32))
    with pytest.raises((ValueError, StrictDataclassError), match="that transformers knows, or mdlm, got 'llada'"):
        ErrorPredictorConfig(vocab_size=31, hidden_size=32, base_config={"model_type": "llada"})
    with pytest.raises(
        (ValueError, StrictDataclassError), match="`vocab_size` must be that of `base_config`, 40, got 31"
    ):
        ErrorPredictorConfig(vocab_size=31, hidden_size=32, base_config={"model_type": "bert", "vocab_size": 40})
    with pytest.raises(
        (ValueError, StrictDataclassError), match="`base_config` must be a whole MDLMConfig, got none of"
    ):
        ErrorPredictorConfig(vocab_size=31, hidden_size=32, base_config={"model_type": "mdlm"})
