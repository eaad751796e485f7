"""Training of error predictors: targets mark what the denoiser got wrong, losses are their definitions."""

import itertools
import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from hf_ext.gstar import ErrorPredictor
from trainers.error_predictor import (
    ErrorPredictorTrainer,
    ErrorPredictorTrainingArguments,
    bce_loss,
    rank_auc,
    ranknet_loss,
)


def drawn(batch=4, length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(batch, length, generator=generator, dtype=torch.double)
    y = torch.rand(batch, length, generator=generator) < 0.4
    counted = torch.rand(batch, length, generator=generator) < 0.8
    return e, y, counted


def test_ranknet_equals_the_sum_over_pairs():
    e, y, counted = drawn()
    y[0] = True  # a row without a right token is left out
    rows = []
    for i in range(1, 4):
        pairs = [
            math.log1p(math.exp(float(e[i, right] - e[i, wrong])))
            for wrong, right in itertools.product(range(6), repeat=2)
            if counted[i, wrong] and counted[i, right] and y[i, wrong] and not y[i, right]
        ]
        rows += [sum(pairs) / len(pairs)] if pairs else []
    assert len(rows) >= 2
    assert float(ranknet_loss(e, y, counted)) == pytest.approx(sum(rows) / len(rows), rel=1e-5)


@pytest.mark.parametrize("balance", [False, True])
def test_bce_equals_its_definition(balance):
    e, y, counted = drawn()
    n, wrong = int(counted.sum()), int((y & counted).sum())
    total = 0.0
    for i, j in counted.nonzero().tolist():
        p = 1 / (1 + math.exp(-float(e[i, j])))
        weight = (n / (2 * wrong) if y[i, j] else n / (2 * (n - wrong))) if balance else 1.0
        total -= weight * math.log(p if y[i, j] else 1 - p)
    assert float(bce_loss(e, y, counted, balance)) == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("loss", [bce_loss, ranknet_loss])
def test_a_batch_without_anything_to_learn_from_has_a_loss_of_zero_with_gradients(loss):
    e = torch.zeros(2, 3, requires_grad=True)
    value = loss(e, torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0 and torch.equal(e.grad, torch.zeros(2, 3))


def test_rank_auc_equals_sklearn_s_with_ties():
    e, y, _ = drawn(1, 200)
    e = (e * 3).round()[0]
    assert len(e.unique()) < 30
    assert rank_auc(e, y[0]) == pytest.approx(roc_auc_score(y[0], e))
    assert math.isnan(rank_auc(e, torch.zeros(200)))


@pytest.fixture
def trainer(mdlm, rows, tmp_path):
    def build(num_layers=1, denoiser=None, **options):
        denoiser = mdlm() if denoiser is None else denoiser
        common = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        args = ErrorPredictorTrainingArguments(**{**common, "warmup_steps": 0, "max_steps": 4, **options})
        predictor = ErrorPredictor.from_denoiser(denoiser, num_layers=num_layers)
        return ErrorPredictorTrainer(predictor, denoiser, args, train_dataset=rows, eval_dataset=rows)

    return build


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_targets_mark_new_tokens_that_differ(positions, trainer, rows):
    made = trainer(positions=positions)
    batch = made.data_collator(rows)
    seen = {"wrong": 0, "right": 0}
    made.model.eval()
    for seed in range(5):
        target = made.targets(batch, torch.Generator().manual_seed(seed))
        ids, proposal = batch["input_ids"], target["proposal"]
        assert torch.equal(target["wrong"], proposal != ids) and not (proposal == 2).any()
        assert not target["wrong"][batch["fixed"]].any() and torch.equal(proposal[batch["fixed"]], ids[batch["fixed"]])
        assert not target["counted"][batch["fixed"]].any()
        # with little noise hardly anything is new, and what was copied is right
        wrong_share = target["wrong"].double().mean(1)
        assert wrong_share[target["t"] < 0.05].max() <= 0.5
        seen["wrong"] += int(target["wrong"][target["counted"]].sum())
        seen["right"] += int((~target["wrong"])[target["counted"]].sum())
        if positions == "all":
            assert torch.equal(target["counted"], ~batch["fixed"])
    assert seen["wrong"] > 50 and seen["right"] > 5


def test_a_denoiser_that_is_always_right_has_no_errors(trainer, mdlm):
    denoiser = mdlm()
    with torch.no_grad():
        denoiser.lm_head.weight.zero_()
        denoiser.lm_head.bias.copy_(50.0 * torch.nn.functional.one_hot(torch.tensor(5), 13))
    made = trainer(denoiser=denoiser)
    batch = made.data_collator([{"input_ids": [5] * 6}] * 8)
    assert not made.targets(batch)["wrong"].any()


# ranks are learnt within a row, and measured over all; a head alone reads features that were not made for it
@pytest.mark.parametrize(("num_layers", "loss", "least"), [(1, "bce", 0.75), (None, "ranknet", 0.6), (0, "bce", 0.65)])
def test_a_predictor_learns_what_is_wrong(num_layers, loss, least, trainer):
    made = trainer(
        num_layers,
        loss=loss,
        class_balance=loss == "bce",
        max_steps=80,
        learning_rate=1e-2,
        per_device_train_batch_size=24,
        logging_steps=20,
    )
    before = made.evaluate()
    kept = {name: value.clone() for name, value in made.denoiser.state_dict().items()}
    made.train()
    after = made.evaluate()
    assert before["eval_auc"] == 0.5  # no opinion yet
    # an untrained denoiser fills in anything, and rows repeat one word: a wrong one is the odd one out
    assert after["eval_auc"] > least
    assert after["eval_loss"] < before["eval_loss"] and 0 < after["eval_error_rate"] < 1
    assert {"eval_f1", "eval_auc_t0_0.25", "eval_auc_t0.75_1"} <= set(after)
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logged) == 4 and all("error_rate" in entry and "auc_t0.25_0.5" in entry for entry in logged)
    assert all(torch.equal(value, kept[name]) for name, value in made.denoiser.state_dict().items())
    assert made.evaluate()["eval_loss"] == after["eval_loss"]  # the same times, masks and proposals


def test_the_denoiser_is_not_saved_with_the_predictor(trainer, tmp_path):
    made = trainer(0)
    made.train()
    made.save_model(tmp_path / "saved")
    again = ErrorPredictor.from_pretrained(tmp_path / "saved")
    assert sum(p.numel() for p in again.parameters()) == 3 * 32 + 1


def test_a_time_conditioned_denoiser_is_told_the_noise_level(trainer, mdlm):
    made = trainer(0, denoiser=mdlm(time_conditioning=True))
    made.train()
    assert made.state.global_step == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "mse"}, "`loss` must be one of bce, ranknet, got 'mse'"),
        ({"positions": "some"}, "`positions` must be one of all, generated, got 'some'"),
        ({"loss": "ranknet", "class_balance": True}, '`class_balance` belongs to loss="bce", got True with'),
    ],
)
def test_an_option_out_of_range_is_refused(options, said, trainer):
    with pytest.raises(ValueError, match=said):
        trainer(**options)


def test_a_predictor_of_another_denoiser_is_refused(mdlm, tmp_path):
    args = ErrorPredictorTrainingArguments(str(tmp_path), use_cpu=True)
    other = ErrorPredictor.from_denoiser(mdlm(hidden_size=16), num_layers=0)
    with pytest.raises(ValueError, match="`model` must have the denoiser's hidden_size, 32, got 16"):
        ErrorPredictorTrainer(other, mdlm(), args)
