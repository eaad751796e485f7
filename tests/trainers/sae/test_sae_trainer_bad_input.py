"""Whatever cannot be trained is refused with what to do, before weights load wherever that can be known."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_ext import SAEModel
from trainers.sae import ActivationCache, SAETrainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "`loss` must be one of reconstruction, hierarchical.*got 'mse'"),
        ({"budgets": [1, 2]}, 'belongs to loss="hierarchical"'),
        (
            {"loss": "hierarchical", "budgets": "all"},
            "`budgets` must be a list of numbers or \"powers_of_two\", got 'all'",
        ),
        ({"loss": "matryoshka"}, "`groups` must be given"),
        ({"groups": [3, 4]}, '`groups` must be given for loss="matryoshka" and for no other'),
        ({"k_aux": 0}, "`k_aux` must be a whole number >= 1, got 0"),
        ({"auxk_coefficient": -1.0}, "`auxk_coefficient` must be a number >= 0"),
        ({"buffer_mix": 1.0}, r"`buffer_mix` must be in \[0, 1\), got 1.0"),
        ({"max_norm_ratio": 0.5}, "`max_norm_ratio` must be above 1"),
        ({"skip_positions": 32}, "`skip_positions` must be below context_size=32, got 32"),
        ({"activation_dtype": "int8"}, "`activation_dtype` must be one of auto"),
        ({"cache_tokens": 100}, "`cache_tokens` belongs to `activation_cache`"),
        ({"eval_tokens": 1}, "`eval_tokens` must be a whole number >= 2"),
        ({"learning_rat": 1.0}, "learning_rat"),
    ],
)
def test_an_option_out_of_range_is_named(options, message, arguments):
    with pytest.raises((ValueError, TypeError), match=message):
        arguments(**options)


def test_two_lengths_are_refused(arguments, tmp_path):
    from trainers.sae import SAETrainingArguments

    with pytest.raises(ValueError, match="both say how long to train, got 100 and 5"):
        SAETrainingArguments(str(tmp_path), train_tokens=100, max_steps=5, use_cpu=True)


def sae_case(**options):
    return lambda config: {"sae": config(**options)}


def data_case(data, **more):
    return lambda config: {"train_dataset": data, "sae": config(), **more}


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (sae_case(hook_name=None), {}, "`hook_name` of the SAE must be a module path.*got None"),
        (sae_case(hook_name="model.layers.7"), {}, "must be a module of the model.*'model.layers.7'.*nearest"),
        (sae_case(d_in=12), {}, "`d_in` of 'sae' must be 16, the width of the activations at 'model.layers.1.output'"),
        (sae_case(hook_name="model.layers"), {}, "`hook_name` must be a module that the model calls"),
        (sae_case(activation="jumprelu", k=None), {}, "`sparsity_coefficient` must be above 0"),
        (sae_case(activation="relu", k=None), {}, "`sparsity_coefficient` must be above 0"),
        (sae_case(activation="batchtopk"), {"loss": "hierarchical"}, "'hierarchical' needs activation='topk'"),
        (sae_case(k=6), {"loss": "multi_topk"}, "`k` must be a multiple of 4"),
        (sae_case(), {"loss": "matryoshka", "groups": [8, 8]}, r"`groups` must sum to d_sae=48, got \[8, 8\]"),
        (sae_case(), {"loss": "hierarchical", "budgets": [5]}, r"`budgets` must be whole numbers in \[1, k=4\]"),
        (sae_case(), {"train_tokens": 10}, "`train_tokens` must be at least a step of 64 tokens, got 10"),
        (sae_case(), {"max_steps": -1}, "`train_tokens` or `max_steps` must be given"),
        (lambda config: {"sae": {}}, {}, "`sae` must hold at least one SAE"),
        (lambda config: {"sae": {"a": 3}}, {}, r"`sae` must be an SAEModel.*got int \(a\)"),
        (data_case(None), {}, "`train_dataset` must be given"),
        (data_case([]), {}, "at least one row, got none"),
        (lambda config: {"model": None, "sae": config()}, {}, "`model` must be given: `train_dataset` holds texts"),
        (
            lambda config: {"loss_funcs": {"b": "hierarchical"}, "sae": config()},
            {},
            "`loss_funcs` must be named.*got b",
        ),
        (
            lambda config: {"train_dataset": torch.zeros(30, 16), "sae": config()},
            {"max_steps": -1},
            "at least a step of 64",
        ),
        (
            lambda config: {"train_dataset": torch.zeros(30, 16), "sae": config()},
            {},
            "at least one batch of 64 tokens",
        ),
        (data_case(torch.zeros(90, 12)), {}, "`d_in` of 'sae' must be 12"),
        (
            lambda config: {"train_dataset": {"a": torch.zeros(90, 16)}, "sae": {"a": config(), "b": config()}},
            {},
            "got none of b",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_weights_load(
    case, options, message, lm, tokenizer, texts, config, arguments, tmp_path, monkeypatch
):
    folder = tmp_path / "lm"
    lm.save_pretrained(folder), tokenizer.save_pretrained(folder)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were loaded")
    )
    given = {"model": str(folder), "train_dataset": texts, **case(config)}
    with pytest.raises((ValueError, TypeError), match=message):
        SAETrainer(args=arguments(**options), **given)


def test_a_cache_of_other_hooks_or_a_full_disk_is_refused_before_weights_load(
    trainer, lm, tokenizer, texts, config, arguments, tmp_path, monkeypatch
):
    import shutil

    cache = str(tmp_path / "cache")
    trainer(activation_cache=cache, cache_tokens=100)
    folder = tmp_path / "lm"
    lm.save_pretrained(folder), tokenizer.save_pretrained(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    given = {"model": str(folder), "train_dataset": texts}
    with pytest.raises(ValueError, match="must hold model.layers.0.output, but"):
        SAETrainer(sae=config(hook_name="model.layers.0"), args=arguments(activation_cache=cache), **given)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 50, 50))
    with pytest.raises(OSError, match="GiB free. Lower `cache_tokens`"):
        SAETrainer(sae=config(), args=arguments(activation_cache=cache, cache_tokens=10**6), **given)


def test_a_cache_of_another_model_is_refused(trainer, lm, tmp_path):
    cache = str(tmp_path / "cache")
    trainer(activation_cache=cache, cache_tokens=100)
    with torch.no_grad():
        lm.model.embed_tokens.weight[0] += 1
    try:
        with pytest.raises(ValueError, match="`activation_cache` must be of the same model"):
            trainer(activation_cache=cache, cache_tokens=100)
    finally:
        with torch.no_grad():
            lm.model.embed_tokens.weight[0] -= 1


def test_runs_share_a_cache_and_the_model_runs_once(trainer, lm, tmp_path):
    cache = str(tmp_path / "cache")
    trainer(activation_cache=cache, cache_tokens=300).train()
    ran = []
    handle = lm.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        other = trainer(activation_cache=cache, cache_tokens=300)
        ran.clear()  # the width of the hook was looked at
        other.train()
    finally:
        handle.remove()
    assert not ran
    ready = trainer(data=ActivationCache(cache), more={"model": None})
    ready.train()


def test_nan_in_training_names_the_step_and_the_loss(trainer, config):
    sae = SAEModel(config())
    run = trainer(sae)
    with torch.no_grad():
        sae.W_dec[3] = torch.inf
        sae.encoder.bias[3] = 50  # always among the largest
    with pytest.raises(FloatingPointError, match="The loss must be finite, got .* at step 1"):
        run.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": {"d_sae": 32}}, "the same d_sae of 'sae', but .* has 48 and this run 32"),
        ({"per_device_train_batch_size": 32}, "the same batch in tokens, got 64 there and 32 here"),
        ({"buffer_tokens": 512}, "the same capacity in tokens, got 256 there and 512 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changes, message, trainer, config, tmp_path):
    trainer(save_strategy="steps", save_steps=5, max_steps=5).train()
    options = dict(changes)
    sae = config(**options.pop("sae", {}))
    with pytest.raises(ValueError, match=message):
        trainer(sae, **options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))


def test_a_folder_that_is_no_checkpoint_of_this_trainer_is_refused(trainer, tmp_path, config):
    SAEModel(config()).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a checkpoint of SAETrainer, but .* has no sae_state.json"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "other"))


def test_evaluation_without_data_or_model_is_refused(trainer, texts):
    with pytest.raises(ValueError, match="`eval_dataset` must be given"):
        trainer().evaluate()
    ready = trainer(data=torch.randn(128, 16), more={"model": None})
    with pytest.raises(ValueError, match="`eval_dataset` must hold activations"):
        ready.evaluate(texts)
    assert ready.evaluate(torch.randn(64, 16))["eval_tokens"] == 64
