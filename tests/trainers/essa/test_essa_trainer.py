import json
import logging

import numpy as np
import pytest
import torch

from trainers.essa import ESSAConfig, ESSATrainer


def wanted_letter(completions, wanted, **columns):
    """Share of a completion that is the letter its row wants."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [text.count(letter) / max(1, len(text)) for text, letter in zip(texts, wanted, strict=True)]


def digits_and_capitals(completions, **columns):
    """Share of the 6 places with a character from "0" to "Z", 43 of 60: dense enough to climb."""
    return [sum("0" <= letter <= "Z" for letter in text) / 6 for text in completions]


@pytest.fixture
def make(lora, letters, prompts, tmp_path):
    """`make(**options)`: a trainer on a tiny model; options of the trainer by name, the others are ESSAConfig's."""

    def build(
        model=None,
        reward_funcs=digits_and_capitals,
        data=None,
        eval_data=None,
        callbacks=None,
        tokenizer=letters,
        **options,
    ):
        settings = {
            "output_dir": str(tmp_path / "run"), "population_size": 8, "batch_size_per_candidate": 4, "sigma": 0.2,
            "max_completion_length": 6, "max_steps": 3, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        }  # fmt: skip
        return ESSATrainer(
            model=lora() if model is None else model,
            reward_funcs=reward_funcs,
            args=ESSAConfig(**settings | options),
            train_dataset=prompts(12) if data is None else data,
            eval_dataset=eval_data,
            processing_class=letters,
            callbacks=callbacks,
        )

    return build


def rewards(trainer):
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def test_evolution_raises_the_reward_of_the_mean(make, prompts):
    trainer = make(
        max_steps=40, sigma=0.5, population_size=16, batch_size_per_candidate=16, data=prompts(64),
        eval_data=prompts(40, seed=5),
    )  # fmt: skip
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    # 0.69 before; the best of as many random candidates reaches 0.81
    assert before < 0.75 and trainer.evaluate()["eval_reward"] > 0.9


def test_the_start_is_the_model_as_it_was_given(make, prompts):
    trainer = make(eval_data=prompts(6, seed=1))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.evaluate()
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())


def test_candidates_of_one_call_are_scored_as_one_by_one(make):
    runs = [make(candidate_backend=backend, max_concurrent_sequences=at_once) for backend, at_once in
            (("batched", None), ("batched", 5), ("sequential", None))]  # fmt: skip
    for trainer in runs:
        trainer.train()
    assert rewards(runs[0]) == rewards(runs[1]) == rewards(runs[2])
    assert np.array_equal(runs[0].strategy.mean, runs[2].strategy.mean)
    for name, weight in runs[0].model.named_parameters():
        assert torch.equal(weight, runs[2].model.get_parameter(name))


def test_a_resumed_run_ends_as_one_that_never_stopped(make, tmp_path, prompts):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "temperature": 1.0, "eval_steps": 2,
               "eval_strategy": "steps", "eval_data": prompts(5, seed=3), "kl_probe_prompts": 2}  # fmt: skip
    whole = make(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make(output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    times = ("seconds", "runtime", "per_second")

    def figures(trainer):
        return [{k: v for k, v in entry.items() if not k.endswith(times)} for entry in trainer.state.log_history[:-1]]

    assert figures(resumed) == figures(whole)
    assert np.array_equal(whole.strategy.mean, resumed.strategy.mean)
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name))
    again = make(output_dir=str(tmp_path / "whole"), **options | {"max_steps": 7})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7


def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(make, tmp_path, lora, prompts):
    make(save_strategy="steps", save_steps=3).train()
    for other, what in (
        ({"data": prompts(12, seed=9)}, "the same dataset"),
        ({"model": lora(seed=4)}, "the same adapter"),
        ({"batch_size_per_candidate": 3}, "the same batch_size_per_candidate"),
        ({"population_size": 10}, "population"),
        ({"svd_fraction": 0.5}, "svd_fraction"),
        ({"optimizer": "openai-es"}, "openai-es"),
        ({"seed": 5}, "seed"),
    ):
        with pytest.raises(ValueError, match=what):
            make(max_steps=5, **other).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="needs a checkpoint in"):
        make(output_dir=str(tmp_path / "empty")).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="must be a folder checkpoint-N"):
        make().train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_every_checkpoint_is_an_ordinary_lora_that_holds_the_mean(make, tmp_path, lora):
    from peft import PeftModel

    trainer = make(save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not list((tmp_path / "run").glob(".*"))
    ids = torch.tensor([[5, 6, 7]])
    loaded = PeftModel.from_pretrained(lora().unload(), tmp_path / "run" / "checkpoint-2")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)


def test_the_best_evaluation_is_loaded_at_the_end(make, prompts, tmp_path):
    calls = []

    def first_is_best(completions, **columns):
        calls.append(len(completions))
        # evaluations have 5 rows: the first one is rewarded most, later ones less and less
        return [1.0 / sum(n == 5 for n in calls)] * 5 if len(completions) == 5 else digits_and_capitals(completions)

    trainer = make(
        reward_funcs=first_is_best, eval_data=prompts(5), eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="reward", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert trainer.strategy.generation == 1


def test_a_run_stops_on_its_target_its_patience_or_its_time(make):
    assert make(max_steps=50, target_reward=-1.0).train().global_step == 1
    assert make(max_steps=50, stop_patience=2, reward_funcs=lambda completions, **_: [0.5] * len(completions)).train(
    ).global_step == 3  # the first is better than nothing, then two are not  # fmt: skip
    assert make(max_steps=50, max_wall_time=1e-9).train().global_step == 1


def test_messages_columns_and_weighted_rewards_arrive_as_in_trl(make, prompts):
    seen = {}

    def keep(prompts, completions, completion_ids, wanted, trainer_state, log_metric, **columns):
        seen.update(prompts=prompts, completions=completions, wanted=wanted, step=trainer_state.global_step)
        log_metric("longest", max(map(len, completion_ids)))
        return [None if i == 0 else 1.0 for i in range(len(prompts))]

    async def slow(completions, **columns):
        return [2.0] * len(completions)

    rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts(12)]
    trainer = make(data=rows, reward_funcs=[keep, slow], reward_weights=[1.0, 0.5], max_steps=1)
    trainer.train()
    assert seen["completions"][0][0]["role"] == "assistant" and seen["prompts"][0][0]["role"] == "user"
    assert len(seen["wanted"]) == 8 * 4 and seen["step"] == 0
    entry = trainer.state.log_history[0]
    # 31 rows of 1 * 1 + 0.5 * 2, one of 0.5 * 2
    assert entry["reward"] == pytest.approx((31 * 2 + 1) / 32)
    assert entry["rewards/keep/mean"] == 1.0 and entry["rewards/slow/mean"] == 2.0
    assert 1 <= entry["longest"] <= 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "text", None])
def test_a_bad_reward_stops_the_run_and_leaves_the_search_as_it_was(make, value, tmp_path):
    calls = []

    def turns_bad(completions, **columns):
        calls.append(1)
        return [value] * len(completions) if len(calls) == 3 else digits_and_capitals(completions)

    trainer = make(reward_funcs=turns_bad, max_steps=5, save_strategy="steps", save_steps=100)
    with pytest.raises((ValueError, TypeError)):
        trainer.train()
    assert trainer.strategy.generation == 2 and np.isfinite(trainer.strategy.mean).all()
    resumed = make(max_steps=5)
    resumed.train(resume_from_checkpoint=True)  # what was reached before was saved
    plain = make(output_dir=str(tmp_path / "plain"), max_steps=5)
    plain.train()
    assert np.array_equal(resumed.strategy.mean, plain.strategy.mean)


def test_what_is_saved_after_an_error_is_the_mean_and_not_the_last_candidate(make, lora, tmp_path):
    from peft import PeftModel

    calls = []

    def turns_bad(completions, **columns):
        calls.append(1)
        return [float("nan")] * len(completions) if len(calls) == 2 else digits_and_capitals(completions)

    trainer = make(reward_funcs=turns_bad, candidate_backend="sequential", save_strategy="steps", save_steps=100)
    with pytest.raises(ValueError, match="turns_bad"):
        trainer.train()
    saved = PeftModel.from_pretrained(lora().unload(), tmp_path / "run" / "checkpoint-1")
    trainer.space.write(trainer.strategy.mean)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, trainer.model(ids).logits)


def test_a_stop_in_the_midst_of_a_step_saves_the_whole_ones_before_it(make, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100}
    trainer = make(**options)

    def interrupted(fingerprint, generation):
        if generation == 2:  # the strategy has learned from it, the trainer has not counted it
            raise KeyboardInterrupt

    trainer.backend.check_agreement = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed, whole = make(**options), make(output_dir=str(tmp_path / "whole"), max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert np.array_equal(resumed.strategy.mean, whole.strategy.mean)


def test_a_second_run_of_a_trainer_begins_anew(make):
    trainer = make()
    trainer.train()
    first, mean = rewards(trainer), trainer.strategy.mean
    trainer.train()
    assert rewards(trainer) == first and np.array_equal(trainer.strategy.mean, mean)
    assert trainer.state.log_history[-2]["completions_total"] == 3 * 8 * 4
    assert trainer.fitness.shape == (8,) and trainer.fitness.max() == trainer.state.log_history[-2]["reward_max"]


def test_data_are_refused_before_any_weight_is_read(lora, letters, tmp_path):
    from peft import LoraConfig

    folder = tmp_path / "model"
    lora().unload().save_pretrained(folder)
    letters.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    args = ESSAConfig(str(tmp_path / "run"), use_cpu=True, batch_size_per_candidate=1, max_completion_length=6)
    config = LoraConfig(target_modules=["q_proj"])
    for data, match in (([{"question": "A"}], 'a column "prompt"'), ([{"prompt": "A" * 200}], "from 1 to")):
        with pytest.raises((ValueError, TypeError), match=match):
            ESSATrainer(str(folder), digits_and_capitals, args, data, peft_config=config)


def test_a_reward_function_that_raises_or_hangs_is_named(make):
    import time

    def broken(completions, **columns):
        raise KeyError("answer")

    def hangs(completions, **columns):
        time.sleep(30)

    with pytest.raises(ValueError, match="broken"):
        make(reward_funcs=broken).train()
    with pytest.raises(ValueError, match="hangs"):
        make(reward_funcs=hangs, reward_time_limit=0.2).train()


def test_constant_rewards_move_nothing(make):
    trainer = make(reward_funcs=lambda completions, **_: [1.0] * len(completions))
    trainer.train()
    assert not trainer.strategy.mean.any() and trainer.strategy.sigma == 0.2
    assert trainer.strategy.generation == 3


def test_candidates_with_nan_logits_are_left_out_and_too_many_shrink_sigma(make, lora, caplog):
    trainer = make(max_steps=1)
    broken = {"left": 0}
    original = trainer.backend.score

    def score(X, rows, *rest):
        scored = original(X, rows, *rest)
        candidates = np.array([row.candidate for row in rows])
        lost = candidates < (1 if broken["left"] else 6)
        broken["left"] += 1
        scored.values[lost, 0], scored.values[lost, 3] = np.nan, 1
        return scored

    trainer.backend.score = score
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "half the step size, 0.1" in caplog.text
    entry = trainer.state.log_history[0]
    assert entry["candidates/failed"] == 1 and entry["candidates/scored"] == 7


def test_completions_that_are_all_cut_are_warned_about(make, caplog):
    with caplog.at_level(logging.WARNING):
        make(max_completion_length=1, max_steps=1).train()
    assert "cut at max_completion_length=1" in caplog.text


def test_sigma_is_chosen_by_how_far_candidates_move(make, caplog, prompts):
    near, far = (make(sigma="auto", sigma_kl=kl, max_steps=1) for kl in (1e-3, 10.0))
    for trainer in (near, far):
        trainer.train()
    assert near.state.log_history[0]["sigma"] < 0.2 < far.state.log_history[0]["sigma"]
    with caplog.at_level(logging.WARNING):
        make(sigma="auto", sigma_kl=1e-12, max_steps=1).train()
    assert "Even sigma=0.01 moves candidates" in caplog.text


def test_the_kl_probe_is_zero_at_the_start_and_that_of_the_definition_later(make, prompts):
    trainer = make(eval_data={"task": prompts(5), "off_task": prompts(5, seed=8)}, kl_probe_prompts=3, max_steps=4)
    start = trainer.evaluate()
    assert start["eval_task_kl"] == pytest.approx(0, abs=1e-9)
    trainer.train()
    found = trainer.evaluate()
    assert {"eval_task_reward", "eval_off_task_reward", "eval_off_task_kl"} <= set(found)
    asked, written = trainer._start_samples("task", trainer.eval_prompts["task"], 3, 64)
    total, count = 0.0, 0
    for prompt, completion in zip(asked, written, strict=True):
        ids = torch.tensor([prompt + completion])
        logs = []
        for x in (np.zeros(trainer.space.dim), trainer.strategy.mean):
            trainer.space.write(x)
            with torch.no_grad():
                logs.append(trainer.model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1))
        total += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        count += len(completion)
    assert found["eval_task_kl"] == pytest.approx(total / count, rel=1e-4)  # float32 logits


def test_completions_are_written_at_each_logging_step(make, tmp_path):
    make(log_completions=True, logging_steps=2, max_steps=4).train()
    files = sorted((tmp_path / "run" / "completions").iterdir())
    assert [file.name for file in files] == ["completions_00002.jsonl", "completions_00004.jsonl"]
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(lines) == 8 * 4 and set(lines[0]) == {"candidate", "prompt", "completion", "reward"}


def test_epochs_count_generations_and_every_row_is_used_once_in_each(make):
    trainer = make(max_steps=-1, num_train_epochs=2)
    assert trainer.train().global_step == 2 * 3
    for epoch in (0, 1):
        used = [i for batch in range(3 * epoch, 3 * epoch + 3) for i in trainer.prompts.batch(batch, 4, 42)]
        assert sorted(used) == list(range(12))
    assert {row.prompt for row in make(resample="never")._rows(0)} == {row.prompt for row in trainer._rows(0)}
    own = make(resample="candidate")._rows(1)
    assert len({tuple(sorted(r.prompt for r in own if r.candidate == k)) for k in range(8)}) > 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"population_size": 3}, "`population_size` must be a whole number >= 4, got 3"),
        ({"sigma": 0}, '`sigma` must be a number > 0 or "auto", got 0'),
        ({"sigma": float("nan")}, "`sigma` must be"),
        ({"batch_size_per_candidate": 13}, "at most the 12 rows of train_dataset, got 13"),
        ({"optimizer": "adam"}, "`optimizer` must be one of sep-cma"),
        ({"svd_fraction": 0.1}, r"floor\(svd_fraction \* r\)"),
        ({"top_k": 5}, "need sampling, but `temperature` is 0"),
        ({"max_completion_length": 128}, "below the model's context of 128 tokens, got 128"),
        ({"generation_kwargs": {"do_sample": True}}, "must not set 'do_sample'"),
        ({"temperature": 1.0, "generation_kwargs": {"num_beams": 2}}, "`num_beams` needs temperature=0"),
        ({"deepspeed": "x.json"}, "`deepspeed` shards"),
        ({"reward_weights": [1.0, 2.0]}, "weights"),
        ({"optimizer": "openai-es", "population_size": 5, "optimizer_kwargs": {"antithetic": True}}, "even|odd"),
        ({"data": []}, "must have rows, got none"),
        ({"data": [{"question": "A"}]}, 'a column "prompt"'),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_generation(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(**options).train()


def test_models_that_are_no_loras_are_refused_with_the_cure(make, lora, letters):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="must have a trained LoRA, got a model without one"):
        make(model=lora().unload())
    with pytest.raises(TypeError, match="`model` must be a name, a PreTrainedModel or a PeftModel, got int"):
        make(model=3)
    config, args, data = (
        LoraConfig(target_modules=["q_proj"]),
        ESSAConfig(output_dir="x", use_cpu=True),
        [{"prompt": "A"}],
    )
    args.batch_size_per_candidate = 1
    with pytest.raises(ValueError, match="`processing_class` must be given: the model has no name"):
        ESSATrainer(lora(), digits_and_capitals, args, data)
    with pytest.raises(ValueError, match="`peft_config` must be left out"):
        ESSATrainer(lora(), digits_and_capitals, args, data, processing_class=letters, peft_config=config)


def test_gradient_options_are_told_to_have_no_effect(tmp_path):
    with pytest.warns(UserWarning, match="no gradients: learning_rate, gradient_accumulation_steps will be ignored"):
        ESSAConfig(output_dir=str(tmp_path), learning_rate=1e-3, gradient_accumulation_steps=2)
