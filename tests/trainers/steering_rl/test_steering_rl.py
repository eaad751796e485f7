"""Steering by RL: the paper's settings and advantages, what moves and what does not, resuming, and bad rewards."""

import json
import math

import pytest
import torch
from datasets import Dataset


@pytest.fixture
def base():
    """`make(seed)`: a tiny Llama of letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed=0):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                vocab_size=63,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=None,
                max_position_embeddings=64,
                initializer_range=0.3,
            )  # fmt: skip
        )

    return make


def share_of_capitals(completions, **columns):
    return [sum("A" <= letter <= "Z" for letter in text) / 4 for text in completions]


ROWS = [{"prompt": letter * 2} for letter in "ABCDEFGH"]


@pytest.fixture
def trainer(base, letters, tmp_path):
    """`make(**options)`: a trainer of 2 prompts x 4 completions a step."""
    from trainers.steering_rl import SteeringRLConfig, SteeringRLTrainer

    def make(reward=share_of_capitals, model=None, folder="out", peft_config=None, **options):
        defaults = {
            "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4, "max_steps": 2,
            "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
            "save_strategy": "no", "learning_rate": 0.05,
        }  # fmt: skip
        args = SteeringRLConfig(output_dir=str(tmp_path / folder), **defaults | options)
        return SteeringRLTrainer(
            base() if model is None else model,
            reward,
            args,
            Dataset.from_list(ROWS),
            processing_class=letters,
            peft_config=peft_config,
        )

    return make


def test_the_defaults_are_the_papers(tmp_path):
    from trainers.steering_rl import SteeringRLConfig

    args = SteeringRLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    wanted = {
        "learning_rate": 1e-3, "num_generations": 16, "loss_type": "dapo", "scale_rewards": "none", "beta": 0.0,
        "num_iterations": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_grad_norm": 2.0,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.03, "mask_truncated_completions": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert args.steps_per_generation == args.gradient_accumulation_steps  # on-policy


def test_advantages_are_leave_one_out_among_the_completions_that_have_a_reward(trainer):
    planted = [1.0, 0.0, None, 0.5, 0.25, 0.25, 0.25, 0.25]
    seen = []

    def reward(completions, **columns):
        return planted

    made = trainer(reward)
    score = made._generate_and_score_completions

    def spy(inputs):
        seen.append(score(inputs)["advantages"].tolist())
        raise StopIteration

    made._generate_and_score_completions = spy
    with pytest.raises(StopIteration):
        made.train()
    left_out = [1 - 0.5 / 2, 0 - 1.5 / 2, 0.0, 0.5 - 1.0 / 2]
    assert seen[0] == pytest.approx([*left_out, 0, 0, 0, 0], abs=1e-6)  # float32


def test_signed_rewards_double_the_advantages(trainer):
    def first(signed):
        made = trainer(lambda completions, **columns: [1.0, 0.0, 0.0, 0.0] * 2, signed_rewards=signed)
        return made._generate_and_score_completions([row for row in ROWS[:2] for _ in range(4)])["advantages"]

    torch.testing.assert_close(first(True), 2 * first(False))


def test_training_moves_the_vectors_and_nothing_else(trainer):
    made = trainer()
    before = {name: weight.clone() for name, weight in made.model.named_parameters()}
    assert not any(vector.any() for vector in made.vectors().values())
    made.train()
    for name, weight in made.model.named_parameters():
        assert torch.equal(weight, before[name]) == ("steering_" not in name), name
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    norms = made.vectors()
    assert logged[-1]["steering/norm/layer_2"] == pytest.approx(float(norms[2].norm()), rel=1e-6)
    assert logged[-1]["steering/norm_mean"] == pytest.approx(sum(float(v.norm()) for v in norms.values()) / 3)
    assert logged[-1]["steering/ratio_mean"] > 0


def test_reward_rises_where_a_vector_can_raise_it(trainer):
    made = trainer(max_steps=60, learning_rate=0.1)
    made.train()
    rewards = [entry["reward"] for entry in made.state.log_history if "reward" in entry]
    # letters are 26 of 63 tokens; a bias towards them is all that is to be found
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_a_stopped_run_goes_on_to_the_same_vectors(trainer):
    whole = trainer(folder="whole", max_steps=4)
    whole.train()
    trainer(folder="cut", max_steps=4, save_strategy="steps", save_steps=2).train()
    resumed = trainer(folder="cut", max_steps=4)
    resumed.train(resume_from_checkpoint=str(resumed.args.output_dir) + "/checkpoint-2")
    for layer, vector in whole.vectors().items():
        assert torch.equal(vector, resumed.vectors()[layer]), layer


def test_learning_rates_follow_the_stream_where_asked_for(trainer, letters):
    made = trainer(depth_scaled_lr=True)
    made.create_optimizer()
    base = made.model.get_base_model()
    streams = []
    with torch.no_grad(), made.model.disable_adapter():
        for row in ROWS:
            hidden = base.model(torch.tensor([letters(row["prompt"])["input_ids"]]), output_hidden_states=True)
            streams.append(torch.stack(hidden.hidden_states[1:-1])[:, 0].norm(dim=-1))
    medians = torch.cat(streams, dim=1).median(dim=1).values.tolist()  # of the layers before the final norm
    rates = [group["lr"] for group in made.optimizer.param_groups]
    assert len(rates) == 3 and rates[0] == 0.05
    assert rates[1] == pytest.approx(0.05 * min(max(medians[1] / medians[0], 1), 30), rel=1e-5)
    assert all(len(group["params"]) == 1 for group in made.optimizer.param_groups)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused_by_name_and_row(trainer, value):
    from trainers.rewards.calling import RewardError

    def broken(completions, **columns):
        return [0.5, value] + [0.0] * 6

    made = trainer(broken)
    with pytest.raises(RewardError, match=r"broken must give finite rewards.*completion 1\."):
        made.train()
    assert not any(vector.any() for vector in made.vectors().values())


@pytest.mark.parametrize("rewards", [[0.5] * 8, [None] * 8])
def test_a_step_without_differences_changes_nothing(trainer, rewards):
    made = trainer(lambda completions, **columns: rewards, max_steps=3)
    made.train()
    assert not any(vector.any() for vector in made.vectors().values())
    last = [entry for entry in made.state.log_history if "loss" in entry][-1]
    assert last["loss"] == 0


async def asks_someone(completions, **columns):
    return share_of_capitals(completions)


def test_async_rewards_and_several_with_weights_are_trls(trainer):
    made = trainer([asks_someone, share_of_capitals], max_steps=1, reward_weights=[0.5, 0.5])
    made.train()
    last = [entry for entry in made.state.log_history if "loss" in entry][-1]
    assert last["rewards/asks_someone/mean"] == last["rewards/share_of_capitals/mean"] == last["reward"]


def test_one_completion_a_prompt_is_refused(trainer):
    with pytest.raises(ValueError, match="at least 2 generations"):
        trainer(num_generations=1)


def test_another_adapter_is_refused_with_the_trainer_for_it(trainer, base):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(TypeError, match="`peft_config` must be of a steering adapter.*LoraConfig.*GRPOTrainer"):
        trainer(peft_config=LoraConfig())
    with pytest.raises(TypeError, match="`model` must be of a steering adapter"):
        trainer(model=get_peft_model(base(), LoraConfig(target_modules=["q_proj"])))


def test_a_loss_that_is_no_number_stops_the_run(trainer, base):
    model = base()
    made = trainer(model=model)
    compute = made._compute_loss
    made._compute_loss = lambda *args: compute(*args) * math.nan
    with pytest.raises(FloatingPointError, match="step 1"):
        made.train()
    assert not any(vector.any() for vector in made.vectors().values())


def test_an_adapter_goes_on_with_its_own_vectors(trainer, base):
    from peft import get_peft_model

    from hf_ext import SteeringConfig

    model = get_peft_model(base(), SteeringConfig(layers_to_transform=[1]))
    start = torch.randn(32, generator=torch.Generator().manual_seed(0))
    model.set_vectors("default", {1: start})
    made = trainer(model=model)
    made.train()
    assert list(made.vectors()) == [1]
    last = [entry for entry in made.state.log_history if "loss" in entry][-1]
    found = float(torch.cosine_similarity(made.vectors()[1], start, dim=0))
    assert last["steering/cos_to_init"] == pytest.approx(found, abs=1e-6) and 0.5 < found < 1


@pytest.mark.parametrize("start", ["none", "zeros", "vectors"])
def test_with_beta_the_reference_is_the_base_itself_whatever_the_training_starts_from(trainer, base, start):
    from peft import get_peft_model

    from hf_ext import SteeringConfig

    model, first = None, {layer: torch.full((32,), 0.5) for layer in range(3)}
    if start != "none":
        model = get_peft_model(base(), SteeringConfig())
    if start == "vectors":
        model.set_vectors("default", first)
    made = trainer(model=model, beta=0.1)
    score, seen = made._generate_and_score_completions, []

    def spy(inputs):
        seen.append(score(inputs))
        return seen[-1]

    made._generate_and_score_completions = spy
    made.train()
    untouched = base().eval()
    for output in seen:
        ids, written = output["prompt_ids"], output["completion_ids"]
        with torch.no_grad():
            logits = untouched(torch.cat((ids, written), dim=1)).logits[:, ids.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(2, written[..., None])[..., 0]
        there = output["completion_mask"].bool()
        torch.testing.assert_close(output["ref_per_token_logps"][there], expected[there], rtol=1e-4, atol=1e-5)
    begun = first if start == "vectors" else dict.fromkeys(range(3), torch.zeros(32))
    assert all(not torch.equal(vector, begun[layer]) for layer, vector in made.vectors().items())
    assert made.vectors().keys() == begun.keys()
    kls = [entry["kl"] for entry in made.state.log_history if "kl" in entry]
    assert (kls[0] > 0.01) == (start == "vectors")  # at zero vectors the policy is the base


def test_what_is_saved_loads_by_the_snippet_of_its_card(trainer, base, letters, tmp_path, run_python):
    base().save_pretrained(tmp_path / "base")
    letters.save_pretrained(tmp_path / "base")
    made = trainer(model=str(tmp_path / "base"), folder="found", save_strategy="steps", save_steps=2)
    made.train()
    made.save_model()
    made.create_model_card(dataset_name="letters")
    card = (tmp_path / "found" / "README.md").read_text()
    assert "| learning_rate | 0.05 |" in card and "`share_of_capitals`" in card and "letters" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    snippet = snippet.replace('"you/found"', repr(str(tmp_path / "found")))
    seen = run_python(f"{snippet}\nimport json\nprint(json.dumps(model.get_vectors('default')[2].tolist()))", block=())
    torch.testing.assert_close(torch.tensor(json.loads(seen.splitlines()[-1])), made.vectors()[2], rtol=0, atol=0)
    state = json.loads((tmp_path / "found" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
