"""The trainer on a real VLM class of two layers: what a rollout holds, what an update does, and going on."""

import logging
import math

import pytest
import torch

from hf_ext.vldac import ValueHead
from trainers.vldac.loading import language_lora
from trainers.vldac.policy import encode, score
from trainers.vldac.vldac_config import VLDACConfig
from trainers.vldac.vldac_trainer import VLDACTrainer


@pytest.fixture
def make(tmp_path, policy, processor, colours):
    """`make(**options)` -> a trainer of two environments and two optimiser steps an update."""

    def made(peft_config=None, factory=colours, folder="run", model=policy, action_start=None, **options):
        defaults = {
            "num_envs": 2, "rollout_steps": 4, "total_env_steps": 16, "image_history": 2, "max_completion_length": 3,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_ppo_epochs": 1,
            "value_warmup_updates": 0, "value_hidden_sizes": [8], "learning_rate": 1e-2, "use_cpu": True,
            "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        }  # fmt: skip
        return VLDACTrainer(
            model=model,
            args=VLDACConfig(str(tmp_path / folder), **{**defaults, **options}),
            environment_factory=factory,
            processing_class=processor,
            peft_config=peft_config,
            action_start=action_start,
        )

    return made


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_scores_do_not_depend_on_the_batch(policy, processor, colours):
    """Left padding and right padding: rows of a batch are the rows alone (float32 sums in another order)."""
    from trainers.vldac.policy import Prompt

    frame = colours().reset(seed=0)[0]["image"]
    prompts = [Prompt((frame,), "r?"), Prompt((frame, frame), "r or b?")]
    tokens, mask = torch.tensor([[7, 8, 1], [8, 1, 0]]), torch.tensor([[True] * 3, [True, True, False]])
    together, _ = score(policy, encode(processor, prompts, "cpu"), tokens, mask, [5, 6])
    for i, length in ((0, 3), (1, 2)):
        alone, _ = score(
            policy, encode(processor, prompts[i : i + 1], "cpu"), tokens[i : i + 1, :length], mask[i : i + 1, :length],
            [5, 6],
        )  # fmt: skip
        torch.testing.assert_close(together[i, :length], alone[0], atol=1e-5, rtol=0)
    assert together[1, 2] == 0


def test_a_rollout_holds_what_happened(make):
    trainer = make(rollout_steps=6)
    buffer = trainer.collect_rollouts()
    assert buffer.tokens.shape[:2] == (6, 2)
    assert buffer.counted.all()
    assert buffer.terminated.nonzero().tolist() == [[3, 0], [3, 1]]  # episodes of four steps
    assert not buffer.truncated.any()
    assert [[len(prompt.frames) for prompt in row] for row in buffer.prompts] == [[n, n] for n in (1, 2, 2, 2, 1, 2)]
    assert set(buffer.rewards[buffer.valid].tolist()) <= {-1.0, 1.0}
    assert (buffer.rewards[~buffer.valid] <= -1).all()
    assert len(trainer.episodes) == 2
    assert trainer.suppressed
    assert not torch.isin(buffer.tokens[buffer.mask], torch.tensor(trainer.suppressed)).any()
    assert buffer.mask[..., 0].all()
    assert (buffer.logprobs[buffer.mask] <= 0).all()
    again = make(rollout_steps=6).collect_rollouts()
    assert torch.equal(again.tokens, buffer.tokens)


def test_a_clock_is_worth_the_value_of_what_it_cut(make, colours):
    cut = make(rollout_steps=4, factory=lambda: colours(cut=True)).collect_rollouts()
    assert cut.truncated[3].all()
    assert cut.final_values[3].all()
    assert not cut.final_values[:3].any()
    limit = make(rollout_steps=4, max_episode_steps=3).collect_rollouts()
    assert limit.truncated.nonzero().tolist() == [[2, 0], [2, 1]]
    unwanted = make(rollout_steps=4, max_episode_steps=3, bootstrap_truncated=False).collect_rollouts()
    assert not unwanted.final_values.any()


def test_at_first_the_ratio_is_1_and_the_kl_0(make):
    trainer = make(learning_rate=1e-12, gradient_accumulation_steps=4, logging_steps=1)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "approx_kl" in entry)
    assert first["clip_fraction"] == 0
    assert abs(first["approx_kl"]) < 1e-9
    assert abs(first["kl"]) < 1e-9
    assert math.isfinite(first["explained_variance"])


def test_training_changes_policy_and_critic_and_logs_what_matters(make):
    trainer = make()
    policy, head = weights(trainer.policy), weights(trainer.value_head)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.update == 2
    assert changed(policy, trainer.policy.state_dict())
    assert changed(head, trainer.value_head.state_dict())
    names = set().union(*trainer.state.log_history)
    assert {"kl", "clip_fraction", "value_loss", "explained_variance"} <= names
    assert {
        "invalid_rate",
        "truncated_completions",
        "episode/success_rate",
        "episode/return",
        "env_steps",
        "reward",
    } <= names


def test_warm_up_trains_the_critic_alone(make):
    trainer = make(value_warmup_updates=2)
    policy, head = weights(trainer.policy), weights(trainer.value_head)
    trainer.train()
    assert not changed(policy, trainer.policy.state_dict())
    assert changed(head, trainer.value_head.state_dict())


def gradients(trainer):
    """Of the first micro-batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs({}))
    loss.backward()
    return {name: p.grad for name, p in trainer.policy.named_parameters() if p.grad is not None}


def test_a_detached_critic_leaves_the_policys_gradient_as_it_is(make):
    with_critic, without = gradients(make(vf_coef=5.0)), gradients(make(vf_coef=0.0))
    assert with_critic.keys() == without.keys()
    assert all(torch.equal(with_critic[name], without[name]) for name in without)
    attached = gradients(make(vf_coef=5.0, value_stop_gradient=False))
    assert any(not torch.equal(attached[name], without[name]) for name in without)


def batch_gradients(trainer):
    """Of the first optimiser step, summed over its micro-batches."""
    trainer.model.zero_grad()
    for _ in range(trainer.args.gradient_accumulation_steps):
        trainer.compute_loss(trainer.model, trainer._prepare_inputs({})).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("aggregation", ["step_mean", "token_mean"])
def test_micro_batches_change_no_gradient(make, aggregation):
    """Sums in another order, float32; a single row has no padding."""
    options = {"loss_aggregation": aggregation, "mask_truncated_completions": True, "kl_coef": 0.0}
    whole = batch_gradients(make(per_device_train_batch_size=4, gradient_accumulation_steps=1, **options))
    cut = batch_gradients(make(per_device_train_batch_size=1, gradient_accumulation_steps=4, **options))
    assert whole.keys() == cut.keys()
    assert any(gradient.any() for gradient in whole.values())
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"policy_loss_level": "step"},
        {"policy_loss_level": "step", "thought_coef": 0.5, "action_start": lambda text: len(text) // 2},
        {"critic_level": "token"},
        {"kl_reference": "none"},
        {"kl_reference": "rollout", "loss_aggregation": "token_mean"},
        {"advantage_estimator": "loo", "num_generations": 2, "max_episode_steps": 4},
        {"value_pooling": "mean_prompt", "value_learning_rate": 0.1, "cliprange_value": 0.1},
        {"mask_truncated_completions": True, "rollout_batch_size": 1},
    ],
    ids=["step", "rl4vlm", "token_critic", "no_kl", "rollout_kl", "loop", "mean_prompt", "masked"],
)
def test_every_switch_trains(make, options):
    trainer = make(total_env_steps=8, **options)
    before = weights(trainer.policy)
    trainer.train()
    assert changed(before, trainer.policy.state_dict())
    assert ("kl" in set().union(*trainer.state.log_history)) == (options.get("kl_reference") != "none")


def test_leave_one_out_compares_episodes_that_began_alike(make):
    trainer = make(
        advantage_estimator="loo",
        num_generations=2,
        max_episode_steps=4,
        rollout_steps=5,
        num_envs=4,
        total_env_steps=20,
    )
    buffer = trainer.collect_rollouts()
    first = [prompt.frames[0].tobytes() for prompt in buffer.prompts[0]]
    assert first[0] == first[1]
    assert first[2] == first[3]
    assert first[0] != first[2]
    assert not buffer.counted[4].any()  # four steps, then none
    advantages, _ = buffer.advantages(estimator="loo", gamma=1.0, lam=1.0, num_generations=2, normalize=False)
    total = buffer.rewards.sum(0)
    torch.testing.assert_close(advantages[0], total - total[[1, 0, 3, 2]])


def test_lora_trains_the_text_model_alone_and_needs_no_copy(make, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make(peft_config=language_lora(r=2, lora_alpha=4))
    assert trainer._reference is None
    assert not caplog.records
    trained = [name for name, p in trainer.policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name and "visual" not in name for name in trained)
    before = weights(trainer.policy)
    trainer.train()
    after = trainer.policy.state_dict()
    assert changed(before, after)
    assert all("lora_" in name for name in changed(before, after))


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(make, policy, lora, tmp_path):
    import copy

    start = weights(policy)

    def run(folder, resume=None):
        policy.load_state_dict(start)
        trainer = make(
            folder=folder, model=copy.deepcopy(policy), rollout_steps=3, total_env_steps=24, save_strategy="steps",
            save_steps=2, peft_config=language_lora(r=2) if lora else None,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert whole.state.global_step == resumed.state.global_step == 8
    assert not changed(whole.policy.state_dict(), resumed.policy.state_dict())
    assert not changed(whole.value_head.state_dict(), resumed.value_head.state_dict())


def test_policy_and_critic_are_saved_side_by_side(make, tmp_path):
    from transformers import AutoModelForImageTextToText

    trainer = make()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2508.04280" in card
    assert "image-text-to-text" in card
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    assert not changed(weights(trainer.policy), again.state_dict())
    head = ValueHead.from_pretrained(tmp_path / "run" / "value_head")
    assert not changed(weights(trainer.value_head), head.state_dict())


def test_evaluate_gives_the_same_figures_twice(make):
    trainer = make(num_eval_episodes=3)
    found = trainer.evaluate()
    assert found["eval_length"] == 4
    assert found["eval_return"] <= 4
    assert found == trainer.evaluate()


def test_a_budget_too_small_for_the_answer_is_said_within_one_update(make, caplog):
    trainer = make(max_completion_length=1)
    with caplog.at_level(logging.WARNING):
        trainer._begin_update()
    assert any("max_completion_length=1" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, "`gamma` must be in"),
        ({"cliprange": 0.0}, "`cliprange` must be"),
        ({"temperature": 0.0}, "`temperature` must be"),
        ({"image_history": 0}, "`image_history` must be"),
        ({"max_completion_length": 0}, "`max_completion_length` must be"),
        ({"kl_reference": "old"}, "`kl_reference` must be one of"),
        ({"top_k": 1}, "`top_k` must be above 1"),
        ({"total_env_steps": 3}, "`total_env_steps` must be at least one update"),
        ({"max_steps": 5}, "`max_steps` follows from"),
        ({"save_strategy": "steps", "save_steps": 3}, "`save_steps` must be a multiple of 2"),
        ({"thought_coef": 0.5}, "`thought_coef` belongs to"),
        ({"critic_level": "token", "policy_loss_level": "step"}, "one for a step"),
        ({"advantage_estimator": "loo", "num_generations": 3}, "`num_envs` must be a multiple"),
        ({"advantage_estimator": "loo", "num_generations": 2}, "`rollout_steps` must be at least"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_models_and_worlds_are_refused(make, processor, policy, colours, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="`model` must be an image-text-to-text model, got one of type llama"):
        make(model=LlamaForCausalLM(text))
    with pytest.raises(TypeError, match="`environment_factory` must be a function"):
        make(factory=None)
    with pytest.raises(TypeError, match="must return a gymnasium.Env, got list"):
        make(factory=list)
    args = VLDACConfig(str(tmp_path / "x"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="`processing_class` must be a processor of images and text"):
        VLDACTrainer(policy, args, colours, processing_class=processor.tokenizer)
    one = colours()
    with pytest.raises(ValueError, match="must make a new environment each time"):
        make(factory=lambda: one)


def test_a_thought_weighs_less_up_to_where_the_action_begins(processor):
    from trainers.vldac.policy import thought_weights

    ids = processor.tokenizer.convert_tokens_to_ids
    tokens = torch.tensor([[*map(ids, "go"), ids("r"), ids("<|im_end|>")], [ids("b"), ids("<|im_end|>"), 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    found = thought_weights(processor, tokens, mask, lambda text: text.index("r") if "r" in text else 0, 0.25)
    assert found.tolist() == [[0.25, 0.25, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    "options", [{}, {"advantage_estimator": "loo", "num_generations": 4}, {"critic_level": "token"}]
)
def test_it_learns_what_is_rewarded(make, colours, options):
    """One letter of 22 is worth 1: from about 1 in 22 at random to most answers in 15 updates of 64 steps."""

    class Wanted(colours):
        def step(self, action):
            look, _, terminated, truncated, info = super().step(action)
            return look, float(action == "r"), terminated, truncated, info

    trainer = make(
        factory=lambda: Wanted(steps=8), num_envs=8, rollout_steps=8, max_episode_steps=8, total_env_steps=15 * 64,
        max_completion_length=1, per_device_train_batch_size=32, gradient_accumulation_steps=1, num_ppo_epochs=2,
        cliprange=0.2, kl_coef=0.01, image_history=1, learning_rate=1e-2, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[0] < 0.3
    assert rewards[-1] > 0.6


def test_every_option_has_help():
    from dataclasses import fields

    own = [f for f in fields(VLDACConfig) if f.name in VLDACConfig.__annotations__]
    assert own
    assert all(f.metadata.get("help") for f in own)
