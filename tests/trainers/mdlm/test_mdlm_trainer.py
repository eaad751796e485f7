"""Training of masked diffusion models: the loss is MDLM's, the average is an average, a run resumes to the bit."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from hf_ext.gstar.noising import MaskedDiffusionCollator, mask_tokens, propose, sigma_of, stratified_times
from trainers.mdlm import MDLMTrainer, MDLMTrainingArguments
from trainers.mdlm.ema import EMACallback


@pytest.fixture
def args(tmp_path):
    def build(**options):
        common = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        return MDLMTrainingArguments(**{**common, "warmup_steps": 0, "max_steps": 4, **options})

    return build


@pytest.fixture
def trainer(mdlm, args, rows):
    def build(model=None, **options):
        model = mdlm() if model is None else model
        return MDLMTrainer(model, args(**options), train_dataset=rows, eval_dataset=rows)

    return build


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_times_are_stratified():
    for count in (1, 7, 64):
        t = stratified_times(count, 1e-3, generator())
        assert (t >= 1e-3).all() and (t <= 1).all()
        parts = ((t - 1e-3) / (1 - 1e-3) * count).floor().sort().values
        assert parts.tolist() == list(range(count))


def test_a_batch_says_what_may_be_masked():
    batch = MaskedDiffusionCollator(0, max_length=4)(
        [{"input_ids": [5, 6, 7, 8, 9], "prompt_length": 2}, {"input_ids": [5]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["fixed"].tolist() == [[True, True, False, False], [False, True, True, True]]
    with pytest.raises(ValueError, match="`prompt_length` must be at most the length of its row, 1, got 2"):
        MaskedDiffusionCollator(0)([{"input_ids": [5], "prompt_length": 2}])


def test_noise_masks_open_positions_at_the_rate_of_t():
    ids = torch.full((3, 5000), 7)
    fixed = torch.zeros_like(ids, dtype=torch.bool)
    fixed[:, :1000] = True
    noisy = mask_tokens(ids, fixed, torch.tensor([0.1, 0.5, 1.0]), 2, generator=generator())
    share = (noisy == 2).double()[:, 1000:].mean(1)
    assert torch.allclose(share, torch.tensor([0.1, 0.5, 0.999]).double(), atol=0.04)  # 5 standard deviations
    assert (noisy[:, :1000] == 7).all()


def test_a_proposal_draws_tokens_at_masks_only():
    logits = torch.tensor([[1.0, 0.0, 5.0, -1.0]]).expand(4000, 1, 4)
    noisy = torch.full((4000, 1), 2)
    drawn = torch.bincount(propose(logits, noisy, 2, generator())[:, 0], minlength=4) / 4000
    expected = torch.tensor([1.0, 0.0, -torch.inf, -1.0]).softmax(0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.04)
    assert propose(logits[:1], torch.tensor([[3]]), 2).tolist() == [[3]]


def test_the_loss_is_the_weighted_cross_entropy_of_masked_tokens(trainer, mdlm, rows):
    made = trainer()
    made.model.eval()
    batch = made.data_collator(rows[:6])
    made._eval_generator = generator(5)
    loss = made.compute_loss(made.model, batch)
    again = generator(5)
    t = stratified_times(6, 1e-3, again)
    noisy = mask_tokens(batch["input_ids"], batch["fixed"], t, 2, generator=again)
    with torch.no_grad():
        log_probs = made.model.subs(made.model(noisy, attention_mask=batch["attention_mask"]).logits, noisy)
    expected, counted = 0.0, 0
    for i, row in enumerate(rows[:6]):
        for j in range(row["prompt_length"], 4):
            counted += 1
            expected -= float(log_probs[i, j, row["input_ids"][j]]) / float(t[i])
    assert float(loss.detach()) == pytest.approx(expected / counted, rel=1e-5)


def test_the_loss_of_a_model_that_knows_nothing_is_the_log_of_the_vocabulary(trainer, mdlm, rows):
    model = mdlm()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    made = trainer(model)
    made._eval_generator, losses = generator(), []
    model.eval()
    for _ in range(300):
        losses.append(float(made.compute_loss(model, made.data_collator(rows)).detach()))
    # E[masked / t] = 1 - eps for each token; weights 1/t have a wide spread
    assert sum(losses) / 300 == pytest.approx(0.999 * math.log(12), rel=0.02)


def test_training_learns_the_rule_and_says_its_perplexity(trainer):
    made = trainer(
        max_steps=150, per_device_train_batch_size=24, learning_rate=1e-2, ema_decay=0.9, eval_strategy="no"
    )
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert after["eval_perplexity"] == pytest.approx(math.exp(after["eval_loss"]))
    # the rows' entropy: log 8 over 3.5 open tokens where nothing is given, 0 where a prompt is
    assert after["eval_loss"] < 0.5 < before["eval_loss"]
    assert made.evaluate()["eval_loss"] == after["eval_loss"]  # the same times and masks


@pytest.mark.parametrize("options", [{"time_conditioning": True}, {"prefix_attention": "causal"}])
def test_variants_of_the_model_train(options, trainer, mdlm):
    made = trainer(mdlm(**options), random_prefix="prefix_attention" in options, ema_decay=None)
    before = made.model.lm_head.weight.detach().clone()
    made.train()
    assert not torch.equal(made.model.lm_head.weight, before)


def test_sigma_is_of_the_log_linear_schedule():
    assert float(sigma_of(torch.tensor(0.5))) == pytest.approx(-math.log(1 - 0.999 * 0.5))


def test_a_bert_trains_from_texts(args, tokenizer, tmp_path):
    shape = {"vocab_size": 13, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(**shape, intermediate_size=32, max_position_embeddings=6))
    texts = [{"text": "a b c"}, {"text": "d e f g h i j"}]
    made = MDLMTrainer(model, args(), train_dataset=texts, processing_class=tokenizer)
    assert made.mask_token_id == 2 and made.train_dataset[0]["input_ids"] == [3, 4, 5, 1]
    assert made.data_collator(made.train_dataset)["input_ids"].shape == (2, 6)  # cut to the model's positions
    made.train()
    made.save_model()
    assert type(AutoModelForMaskedLM.from_pretrained(made.args.output_dir)) is BertForMaskedLM


def test_the_average_is_that_of_its_definition():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMACallback(model, 0.5)
    ema.on_train_begin(None, None, None)
    expected = start = float(model.weight.detach())
    state = type("State", (), {})()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.fill_(float(step))
        state.global_step = step
        ema.on_step_end(None, state, None)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema.shadow["weight"]) == pytest.approx(expected) and start != expected
    with ema.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 5


def test_a_run_resumes_to_the_bit_with_its_average(trainer, tmp_path):
    whole = trainer(save_steps=2, output_dir=str(tmp_path / "whole"))
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    raw, averaged = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
    assert not torch.equal(raw["lm_head.weight"], averaged["lm_head.weight"])
    resumed = trainer(save_steps=2, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(folder))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    # what is left is the average, not the last weights
    last = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert not torch.equal(last["lm_head.weight"], whole.model.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\) or None, got 1.0"),
        ({"noise_eps": 0.0}, r"`noise_eps` must be in \(0, 1\), got 0.0"),
        ({"max_length": 0}, "`max_length` must be at least 1, got 0"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps"},
            r"`load_best_model_at_end` must be False with an average of the weights \(ema_decay=0.9999\)",
        ),
    ],
)
def test_an_option_out_of_range_is_refused(options, said, args):
    with pytest.raises(ValueError, match=said):
        args(**options)


def test_what_does_not_fit_is_refused(args, mdlm, rows, tokenizer):
    with pytest.raises(ValueError, match="`random_prefix` must be False unless"):
        MDLMTrainer(mdlm(), args(random_prefix=True), train_dataset=rows)
    with pytest.raises(ValueError, match=r"`mask_token_id` must be in \[0, 13\), got 13"):
        MDLMTrainer(mdlm(), args(), train_dataset=rows, mask_token_id=13)
    with pytest.raises(ValueError, match="`mask_token_id` must differ from the padding's id, got 0"):
        MDLMTrainer(mdlm(), args(), train_dataset=rows, mask_token_id=0)
    with pytest.raises(ValueError, match="`dataset_text_field` must be one of words, got 'text'"):
        MDLMTrainer(mdlm(), args(), train_dataset=[{"words": "a"}], processing_class=tokenizer)
    with pytest.raises(ValueError, match="`processing_class` must be given for rows of texts, got None"):
        MDLMTrainer(mdlm(), args(), train_dataset=[{"text": "a"}])
    shape = {"vocab_size": 13, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertForMaskedLM(BertConfig(**shape, intermediate_size=32))
    with pytest.raises(ValueError, match="`mask_token_id` must be given: neither the model nor the tokenizer has one"):
        MDLMTrainer(bert, args(), train_dataset=rows)
