import copy

import numpy as np
import pytest
import torch

from trainers.essa.svd_lora import SvdLora


def lora_weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}


def draw(space, count=3, size=0.3, seed=0):
    return np.random.default_rng(seed).normal(size=(count, space.dim)) * size


def test_one_number_is_searched_for_each_of_the_largest_values_of_each_factor(lora):
    # 2 layers, 4 matrices, 2 factors; floor(alpha r) of each, as in the paper's table of lengths
    for fraction, each in ((1.0, 4), (0.5, 2), (0.25, 1), (0.74, 2)):
        assert SvdLora(lora(), fraction).dim == 2 * 4 * 2 * each


def test_only_the_largest_values_move_and_by_what_was_asked(lora):
    model = lora()
    space = SvdLora(model, fraction=0.5)
    before = lora_weights(model)
    x = draw(space, 1)[0]
    space.write(x)
    at = 0
    for name, weight in lora_weights(model).items():
        s = torch.linalg.svdvals(before[name].double())
        # U^T A' V is diagonal where A' = U diag(s + x) V^T
        U, _, Vt = torch.linalg.svd(before[name].double(), full_matrices=False)
        now = U.T @ weight.double() @ Vt.T
        wanted = s.clone()
        wanted[:2] += torch.tensor(x[at : at + 2])
        assert torch.allclose(now, wanted.diag(), atol=1e-6), name  # float32 rounding of weights below 1
        at += 2
    assert at == space.dim


def test_a_zero_offset_leaves_the_adapter_bit_for_bit_even_after_others(lora):
    model = lora()
    before = lora_weights(model)
    space = SvdLora(model)
    space.write(draw(space, 1)[0])
    assert any(not torch.equal(before[name], weight) for name, weight in lora_weights(model).items())
    space.write(np.zeros(space.dim))
    assert all(torch.equal(before[name], weight) for name, weight in lora_weights(model).items())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_rows_of_one_batch_have_the_logits_of_their_own_merged_candidate(lora, options, mode):
    model = lora(**options).double()
    space = SvdLora(model, mode=mode)
    X = draw(space)
    ids = torch.randint(2, 60, (5, 7), generator=torch.Generator().manual_seed(1))
    owners = [0, 2, 1, 1, 0]
    with torch.no_grad():
        with space.candidates(X, owners):
            batched = model(ids).logits
        for row, owner in enumerate(owners):
            space.write(X[owner])
            merged = copy.deepcopy(model).merge_and_unload()
            # bases and factors are float32 whatever the model: its rounding, through two layers
            assert torch.allclose(merged(ids[row : row + 1]).logits[0], batched[row], rtol=1e-5, atol=1e-5)


def test_conv1d_layers_of_gpt2_are_searched_like_linear_ones():
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32, initializer_range=0.3)
    model = get_peft_model(
        GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    ).eval()
    torch.nn.init.normal_(model.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight)
    space = SvdLora(model)
    X = draw(space, 2)
    ids = torch.arange(6)[None].repeat(2, 1)
    with torch.no_grad():
        with space.candidates(X, [0, 1]):
            batched = model(ids).logits
        space.write(X[1])
        # float32 through two layers
        assert torch.allclose(model(ids[1:]).logits[0], batched[1], atol=1e-5)
    assert not torch.allclose(batched[0], batched[1], atol=1e-3)


def test_beams_of_a_row_are_computed_with_the_rows_own_candidate(lora):
    model = lora()
    space = SvdLora(model)
    X = draw(space, 2, 1.0)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        with space.candidates(X, [0, 1]):
            both = model.generate(input_ids=ids, **options)
        for row in range(2):
            space.write(X[row])
            alone = model.generate(input_ids=ids[row : row + 1], **options | {"attention_mask": torch.ones(1, 3)})
            assert torch.equal(alone[0], both[row, : alone.shape[1]])


def test_leaving_the_context_by_an_error_restores_the_adapter(lora):
    model = lora()
    space = SvdLora(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(ValueError, match="a multiple of the 2 rows"), space.candidates(draw(space), [0, 1]):
            model(ids)
        assert torch.equal(model(ids).logits, before)


def test_the_least_singular_value_can_be_bounded_as_documented(lora):
    space = SvdLora(lora(), clamp_min=0.0)
    assert float(space.table(-10 * np.ones(space.dim)).min()) == 0.0
    assert float(SvdLora(lora()).table(-10 * np.ones(space.dim)).min()) < 0


def test_relative_offsets_count_in_mean_singular_values_of_their_factor(lora):
    model = lora()
    space = SvdLora(model, mode="relative")
    moved = space.table(np.ones(space.dim))[0] - space.table(np.zeros(space.dim))[0]
    at = 0
    for name, weight in lora_weights(model).items():
        mean = torch.linalg.svdvals(weight.double()).mean().float()
        assert torch.allclose(moved[at : at + 4], mean.repeat(4), rtol=1e-5), name  # float32
        at += 4


def test_a_loaded_state_brings_its_bases_and_the_meaning_of_x(lora):
    one, other = SvdLora(lora(seed=0)), SvdLora(lora(seed=1))
    x = draw(one, 1)[0]
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.table(x), one.table(x))
    assert other.fingerprint == one.fingerprint
    with pytest.raises(ValueError, match="bases of this adapter"):
        one.load_state_dict(SvdLora(lora(r=2)).state_dict())


def refused(model, match, **options):
    with pytest.raises(ValueError, match=match):
        SvdLora(model, **options)


def test_what_cannot_be_searched_is_refused_by_name(lora):
    from peft import IA3Config, get_peft_model

    refused(lora().get_base_model(), "must be a PeftModel with a trained LoRA, got LlamaForCausalLM")
    refused(lora(), r"floor\(svd_fraction \* r\) must be at least 1, got 0.1 \* 4", fraction=0.1)
    refused(lora(), "`svd_fraction` must be above 0 and at most 1, got 1.5", fraction=1.5)
    refused(lora(), "`sigma_mode` must be", mode="log")
    refused(lora(use_dora=True), "of a variant")
    refused(lora(lora_bias=True), "of a variant")
    refused(lora(bias="all"), "bias='none', got 'all'")
    refused(lora(modules_to_save=["lm_head"]), "modules_to_save=None")
    refused(lora(targets=("q_proj", "embed_tokens")), "must be linear, but .*embed_tokens")
    merged = lora()
    merged.merge_adapter()
    refused(merged, "must not be merged")
    broken = lora()
    next(w for n, w in broken.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    refused(broken, "must be finite, but .* holds NaN")
    two = lora()
    two.add_adapter("second", two.peft_config["default"])
    two.base_model.set_adapter(["default", "second"])
    refused(two, "one active adapter, got .*second")
    other = get_peft_model(
        lora().unload(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    refused(other, "must be a LoRA, got IA3|must be a LoRA, got PeftType.IA3")


def test_an_untrained_lora_is_searched_with_a_warning(lora):
    with pytest.warns(UserWarning, match="Every B of this LoRA is 0"):
        space = SvdLora(lora(zero_b=True), mode="relative")
    assert (space.scale > 0).all()


def test_candidates_and_rows_must_fit_together(lora):
    space = SvdLora(lora())
    for rows in ([], [0, 3], [-1]):
        with (
            pytest.raises(ValueError, match="`row_ids` must be indices of 3 candidates"),
            space.candidates(draw(space), rows),
        ):
            pass
    for wrong in (np.zeros(space.dim + 1), np.full(space.dim, np.nan)):
        with pytest.raises(ValueError, match=f"`X` must be finite numbers .*{space.dim}"):
            space.write(wrong)
