"""What `Rewards` combines is what TRL combines, and nothing wrong passes: each bad answer names function and row."""

import ast
import asyncio
import copy
import doctest
import gc
import math
import pickle
import threading
import time
from fractions import Fraction
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import trainers.rewards as rewards_package
from trainers.rewards import (
    RewardError,
    Rewards,
    boxed_reward,
    calling,
    exact_reward,
    gsm8k_reward,
    instruction_reward,
    json_reward,
    last_number_reward,
    length_reward,
)


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(["What is 3 + 4? 12"], trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, **names)
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="module")
def reward_model():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reward_model, tokenizer):
    path = tmp_path_factory.mktemp("models") / "judge"
    reward_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def call(functions, count=2, columns=None, **options):
    rewards = Rewards(functions, **options)
    return rewards(["p"] * count, ["c"] * count, [[1]] * count, columns or {})


def returns(*values):
    """A reward function that returns `values`, one of which may be the list itself."""

    def planted(**kwargs):
        return list(values)

    return planted


def test_the_examples_in_the_docstrings_are_true():
    failed, tried = doctest.testmod(calling)
    assert (failed, tried) == (0, 6)


def test_the_reward_is_the_weighted_sum_of_what_was_given():
    functions = [returns(1, None, None, 0.5), returns(2, 3, None, None)]
    batch = call(functions, 4, weights=[0.5, -2])
    np.testing.assert_array_equal(batch.rewards, [0.5 - 4, -6, np.nan, 0.25])
    np.testing.assert_array_equal(batch.by_function, [[1, 2], [np.nan, 3], [np.nan, np.nan], [0.5, np.nan]])
    assert batch.rewards.dtype == batch.by_function.dtype == np.float64


def test_numbers_of_every_kind_are_numbers():
    kinds = [
        True,
        2,
        0.5,
        np.float32(0.25),
        np.int64(3),
        np.bool_(True),
        np.array(4.0),
        torch.tensor(5),
        torch.tensor([6.0]),
    ]
    kinds += [torch.tensor(7, dtype=torch.bfloat16), Fraction(1, 4)]
    expected = [1, 2, 0.5, 0.25, 3, 1, 4, 5, 6, 7, 0.25]
    assert call(returns(*kinds), len(kinds)).rewards.tolist() == expected


@pytest.mark.parametrize(
    "output", [(1, None), np.array([1.0, 2.0]), torch.tensor([1, 2]), [1, 2]], ids=lambda x: type(x).__name__
)
def test_lists_tuples_and_arrays_of_one_axis_are_taken(output):
    batch = call(lambda **kwargs: output)
    np.testing.assert_array_equal(batch.rewards, [1, np.nan if isinstance(output, tuple) else 2])


def test_a_function_gets_trls_keywords():
    seen = {}

    def spy(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        seen.update(columns, given=(prompts, completions, completion_ids, trainer_state))
        log_extra("length", [1, 2])
        log_metric("seen", np.float32(0.5))
        log_metric("seen", 1)
        return [0.0, 0.0]

    columns = {"answer": ["a", "b"], "kwargs": [1, 2], "prompt": ["x", "y"], "completion": ["x", "y"]}
    batch = Rewards(spy)(["p", "q"], ["c", "d"], [[1], [2]], columns, trainer_state="state")
    given = (["p", "q"], ["c", "d"], [[1], [2]], "state")
    assert seen == {"answer": ["a", "b"], "kwargs": [1, 2], "given": given}
    assert batch.extra == {"length": [1, 2]}
    assert batch.metrics == {"seen": [0.5, 1.0]}


def test_an_empty_batch_has_no_rewards_and_calls_nobody():
    batch = call(lambda **kwargs: pytest.fail("called"), 0)
    assert batch.rewards.shape == (0,)
    assert batch.by_function.shape == (0, 1)


def test_only_a_batch_without_any_reward_is_warned_of_and_once(caplog):
    rewards = Rewards([returns(None, None), lambda prompts, **kwargs: [None, None if prompts[0] == "p" else 1]])
    for prompt in ("q", "p", "p"):
        batch = rewards([prompt] * 2, ["c"] * 2, [[1]] * 2, {})
    assert np.isnan(batch.rewards).all()
    (record,) = caplog.records
    assert "All reward functions (planted, <lambda>) returned None for every row" in record.message


def reject(message):
    raise LookupError(message)


async def reject_later(**kwargs):
    raise LookupError("late")


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf), 10**400], ids=repr
)
def test_nan_and_infinity_are_errors_that_name_function_and_row(value):
    with pytest.raises(RewardError, match="`planted` must return finite numbers, got .* for row 1") as caught:
        call(returns(0.5, value))
    assert (caught.value.function, caught.value.row) == ("planted", 1)
    assert caught.value.value is value


@pytest.mark.parametrize(
    "value", ["1", 1j, np.complex64(1), torch.tensor([1.0, 2.0]), np.zeros(2), [1.0], np.str_("1")], ids=repr
)
def test_what_is_no_number_is_a_type_error_that_names_function_and_row(value):
    with pytest.raises(TypeError, match=r"`planted` must return numbers or None, got .* for row 1"):
        call(returns(0.5, value))


@pytest.mark.parametrize(
    "output", [None, 1.0, "ab", {0: 1, 1: 2}, np.array(1.0), iter([1, 2])], ids=lambda x: type(x).__name__
)
def test_what_is_no_list_is_a_type_error(output):
    with pytest.raises(TypeError, match="`<lambda>` must return a list with a number or None per completion, got"):
        call(lambda **kwargs: output)


def test_an_async_function_that_hides_is_a_type_error():
    with pytest.raises(TypeError, match="must return a list .*, got coroutine"):
        call(lambda **kwargs: reject_later())


@pytest.mark.parametrize("values", [(1.0,), (1.0, 2.0, 3.0), ()])
def test_a_wrong_length_is_an_error_with_both_lengths(values):
    with pytest.raises(ValueError, match=f"`planted` must return 2 rewards, one per completion, got {len(values)}"):
        call(returns(*values))


@pytest.mark.parametrize("options", [{}, {"time_limit": 30}])
@pytest.mark.parametrize("function", [lambda **kwargs: reject("late"), reject_later], ids=["sync", "async"])
def test_an_error_of_a_function_is_passed_on_with_its_name(function, options):
    with pytest.raises(RewardError, match="` raised LookupError: late") as caught:
        call([returns(1, 1), function], **options)
    assert isinstance(caught.value.__cause__, LookupError)
    assert caught.value.function in ("<lambda>", "reject_later")


def test_a_missing_column_is_told_by_the_functions_own_error():
    with pytest.raises(RewardError, match="`gsm8k_reward` raised TypeError: .*'answer'"):
        call(gsm8k_reward)


def test_a_sum_that_overflows_is_an_error():
    with pytest.raises(RewardError, match="weighted sum of planted must be finite, got inf for row 1") as caught:
        call(returns(1, 1e308), weights=[100])
    assert caught.value.row == 1


def test_nothing_of_a_failed_call_is_kept():
    def log_then_fail(log_extra, log_metric, prompts, **kwargs):
        log_extra("x", [1, 2])
        log_metric("y", 1)
        return [math.nan] * 2 if prompts[0] == "bad" else [1, 1]

    rewards = Rewards(log_then_fail)
    with pytest.raises(RewardError):
        rewards(["bad"] * 2, ["c"] * 2, [[1]] * 2, {})
    batch = rewards(["good"] * 2, ["c"] * 2, [[1]] * 2, {})
    assert (batch.extra, batch.metrics) == ({"x": [1, 2]}, {"y": [1.0]})


def test_an_error_survives_a_journey_to_another_process():
    error = pickle.loads(pickle.dumps(RewardError("said", "name", 3, math.inf)))
    assert (str(error), error.function, error.row, error.value) == ("said", "name", 3, math.inf)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"answer": ["a"]}, "`answer` must have 2 rows, as `prompts`, got 1"),
        ({"log_extra": ["a", "b"]}, "`columns` must not hold 'log_extra'"),
        ({"prompts": ["a", "b"]}, "`columns` must not hold 'prompts'"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, said):
    with pytest.raises(ValueError, match=said):
        call(returns(1, 1), columns=columns)


def test_logged_columns_need_a_value_per_row():
    with pytest.raises(RewardError, match="`values` of 'x' must have 2 entries, one per row, got 1"):
        call(lambda log_extra, **kwargs: log_extra("x", [1]))


@pytest.mark.parametrize(
    ("functions", "options", "error", "said"),
    [
        ([], {}, ValueError, "`reward_funcs` must hold at least one function, got none"),
        ([returns(), 5], {}, TypeError, r"`reward_funcs` must hold functions, .* got 5 \(int\)"),
        (None, {}, TypeError, "`reward_funcs` must hold functions"),
        (["no/such", 5], {}, TypeError, "got 5"),
        (["no/such"], {"weights": [1, 2]}, ValueError, "`weights` must have 1 entries, one per function, got 2"),
        (["no/such"], {"weights": [math.nan]}, ValueError, "`weights` must be finite, got nan"),
        (["no/such"], {"weights": ["1"]}, TypeError, "`weights` must hold numbers, got '1'"),
        (["no/such"], {"weights": [True]}, TypeError, "`weights` must hold numbers, got True"),
        (
            ["no/such"],
            {"processing_classes": [None, None]},
            ValueError,
            "`processing_classes` must have 1 entries, .* got 2",
        ),
        (
            ["no/such"],
            {"time_limit": 0},
            ValueError,
            "`time_limit` must be a positive number of seconds or None, got 0",
        ),
        (["no/such"], {"time_limit": math.nan}, ValueError, "`time_limit` must be a positive number"),
        (["no/such"], {"time_limit": "5"}, TypeError, "`time_limit` must be a number of seconds or None, got '5'"),
        ([torch.nn.Linear(1, 1), "no/such"], {}, ValueError, "one label, got Linear with num_labels=None"),
    ],
)
def test_wrong_arguments_are_refused_before_any_model_is_loaded(functions, options, error, said, monkeypatch):
    monkeypatch.setattr(calling, "_load", lambda name: pytest.fail("loads a model"))
    with pytest.raises(error, match=said):
        Rewards(functions, **options)


class Judge:
    def __call__(self, **kwargs):
        return [1, 1]

    def method(self, **kwargs):
        return [1, 1]


def test_names_are_those_of_functions_and_models_and_differ(reward_model, tokenizer, folder):
    def f(**kwargs): ...

    def f_2(**kwargs): ...

    functions = [f, f_2, f, partial(partial(f, a=1), b=2), Judge(), Judge().method, reward_model, str(folder) + "/"]
    rewards = Rewards(functions, processing_classes=[None] * 6 + [tokenizer, None])
    assert rewards.names == ["f", "f_2", "f_3", "f_4", "Judge", "method", "LlamaForSequenceClassification", "judge"]


def test_the_callers_list_stays_as_it_was(folder):
    functions = [str(folder)]
    Rewards(functions)
    assert functions == [str(folder)]


def test_async_functions_run_at_the_same_time_and_keep_their_loop():
    loops, meeting = [], {}

    async def first(**kwargs):
        loops.append(asyncio.get_running_loop())
        meeting["event"] = asyncio.Event()
        await asyncio.wait_for(meeting["event"].wait(), 60)  # only the other one, running beside it, ends this
        return [1, 1]

    async def second(**kwargs):
        while "event" not in meeting:
            await asyncio.sleep(0)
        meeting.pop("event").set()
        return [2, None]

    class Third:
        async def __call__(self, **kwargs):
            return [3, 3]

    rewards = Rewards([first, returns(4, 4), partial(second, option=1), Third()])
    for _ in range(2):
        batch = rewards(["p"] * 2, ["c"] * 2, [[1]] * 2, {})
        np.testing.assert_array_equal(batch.by_function, [[1, 4, 2, 3], [1, 4, np.nan, 3]])
    assert loops[0] is loops[1]


def test_async_functions_work_where_a_loop_is_running_already():
    async def later(**kwargs):
        await asyncio.sleep(0.001)
        return [1, 2]

    async def as_in_a_notebook():
        return call(later).rewards.tolist()

    assert asyncio.run(as_in_a_notebook()) == [1, 2]


def test_the_loops_thread_ends_with_the_rewards():
    async def later(**kwargs):
        return [1, 2]

    rewards = Rewards(later)
    rewards(["p"] * 2, ["c"] * 2, [[1]] * 2, {})
    thread = rewards._loop.thread
    del rewards
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_rewards_travel_to_other_processes_after_use():
    rewards = Rewards([exact_reward, reject_later])
    with pytest.raises(RewardError):
        rewards(["p"], ["c"], [[1]], {"answer": ["c"]})
    assert pickle.loads(pickle.dumps(rewards)).names == ["exact_reward", "reject_later"]


@pytest.mark.parametrize("kind", ["sync", "async", "async that blocks its loop"])
def test_a_function_that_hangs_is_given_up_and_the_next_call_works(kind):
    release = threading.Event()

    def hangs(**kwargs):
        release.wait(60)

    async def blocks(**kwargs):
        release.wait(60)

    async def waits(**kwargs):
        await asyncio.sleep(60)

    async def quick(prompts, **kwargs):
        return [1] * len(prompts)

    slow = {"sync": hangs, "async": waits}.get(kind, blocks)
    switched = {"on": True}

    def sync_switch(**kwargs):
        return slow(**kwargs) if switched["on"] else [0, 0]

    async def async_switch(**kwargs):
        return await slow(**kwargs) if switched["on"] else [0, 0]

    rewards = Rewards([sync_switch if kind == "sync" else async_switch, quick], time_limit=1.0)
    start = time.perf_counter()
    with pytest.raises(RewardError, match="did not answer within 1 seconds") as caught:
        rewards(["p"] * 2, ["c"] * 2, [[1]] * 2, {})
    assert 1 <= time.perf_counter() - start < 30  # far from the 60 s of the hang, for a busy machine
    assert "_switch" in caught.value.function
    switched["on"] = False
    batch = rewards(["p"] * 2, ["c"] * 2, [[1]] * 2, {})
    assert batch.rewards.tolist() == [1, 1]
    release.set()


def test_a_quick_function_is_not_touched_by_a_time_limit():
    def timeout(**kwargs):
        raise TimeoutError("of a server")

    assert call(returns(1, 2), time_limit=60).rewards.tolist() == [1, 2]
    with pytest.raises(RewardError, match="`timeout` raised TimeoutError: of a server"):
        call(timeout, time_limit=60)


def alone(model, tokenizer, texts):
    """The score of each text by itself: no padding, no batch."""
    with torch.no_grad():
        ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids for text in texts]
        return [model(one).logits.item() for one in ids]


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_a_reward_model_scores_prompt_and_completion(place, reward_model, tokenizer, folder):
    rewards = Rewards(reward_model, processing_classes=tokenizer) if place == "memory" else Rewards(str(folder))
    prompts, completions = [f"What is {i} + 4?" for i in range(20)], [" " + "12" * i for i in range(20)]
    batch = rewards(prompts, completions, [[1]] * 20, {})
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    # float32 sums in another order, for padding changes the kernels' shapes
    np.testing.assert_allclose(batch.rewards, alone(reward_model, tokenizer, texts), atol=1e-5)
    assert np.ptp(batch.rewards) > 1e-3, "the model tells nothing apart"


def test_a_reward_model_scores_chats_by_its_own_template(reward_model, tokenizer):
    prompts = [[{"role": "user", "content": "What is 3 + 4?"}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("7", "seven")]
    batch = Rewards([reward_model], processing_classes=[tokenizer])(prompts, completions, [[1]] * 2, {})
    texts = [f"<|user|>What is 3 + 4?<|assistant|>{text}</s>" for text in ("7", "seven")]
    np.testing.assert_allclose(batch.rewards, alone(reward_model, tokenizer, texts), atol=1e-5)


def test_a_reward_model_is_evaluated_on_its_device_without_gradients(reward_model, tokenizer):
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**SHAPE, num_labels=1, attention_dropout=0.5))
    rewards = Rewards(model.train(), processing_classes=tokenizer, device="cpu")
    first, second = (rewards(["What is"], [" 12"], [[1]], {}).rewards.tolist() for _ in range(2))
    assert first == second
    assert not model.training


@pytest.mark.parametrize(
    ("kind", "labels"), [(LlamaForSequenceClassification, 2), (LlamaForCausalLM, 2), (LlamaForCausalLM, 1)]
)
def test_a_model_that_is_no_reward_model_is_refused(kind, labels, tokenizer):
    model = kind(LlamaConfig(**SHAPE, num_labels=labels))
    with pytest.raises(ValueError, match=f"with one label, got {kind.__name__} with num_labels={labels}"):
        Rewards(model, processing_classes=tokenizer)


def test_a_folder_with_a_language_model_is_refused(tmp_path, tokenizer):
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks score.weight, as a language model does"):
        Rewards(str(tmp_path))


def test_a_tokenizer_needs_a_pad_token_and_a_model_without_a_name_a_tokenizer(reward_model, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.pad_token = None
    with pytest.raises(ValueError, match="pad token, and that of LlamaForSequenceClassification has none"):
        Rewards(reward_model, processing_classes=without)
    with pytest.raises(ValueError, match="must hold a tokenizer for a model without a name, got None"):
        Rewards(reward_model)


def test_trl_trains_on_these_rewards_and_combines_them_alike(tmp_path, tokenizer, folder):
    from trl import GRPOConfig, GRPOTrainer

    calls = []

    def keep(**kwargs):
        calls.append(kwargs)
        return [0.0] * len(kwargs["prompts"])

    def every_other(completions, **kwargs):
        return [None if i % 2 else i / 8 for i in range(len(completions))]

    async def negative(prompts, **kwargs):
        return [-1.0] * len(prompts)

    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + 4?"}],
            "answer": f"{i} + 4\n#### {i + 4}" if i % 4 else "unknown",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"relation": "less than", "num_words": 3}],
            "required_keys": ["a"],
        }
        for i in range(16)
    ]
    length = partial(length_reward, min_tokens=2, max_tokens=4)
    functions = [keep, gsm8k_reward, boxed_reward, last_number_reward, exact_reward, json_reward, length]
    functions += [partial(instruction_reward, mode="share"), every_other, negative, str(folder)]
    weights = [1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 0.25, 3.0, 4.0, 0.125, 10.0]
    torch.manual_seed(0)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        reward_weights=weights,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
        reward_funcs=list(functions),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()

    ours = Rewards(functions, weights=weights)
    assert trainer.reward_func_names == ours.names
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(calls) == len(logged) == 2
    for kwargs, mean in zip(list(calls), logged, strict=True):
        given = [kwargs.pop(name) for name in ("prompts", "completions", "completion_ids", "trainer_state")]
        columns = {name: values for name, values in kwargs.items() if not name.startswith("log_")}
        batch = ours(*given[:3], columns, trainer_state=given[3])
        # TRL sums in float32
        assert np.nanmean(batch.rewards) == pytest.approx(mean, rel=1e-5)
    # TRL keeps the last batch
    theirs = np.array([trainer._logs["rewards"][name] for name in ours.names]).T
    np.testing.assert_allclose(batch.by_function, theirs, rtol=1e-5, atol=1e-6)
    assert np.isnan(batch.by_function[:, ours.names.index("every_other")]).sum() == 4
    assert len(np.unique(batch.rewards)) > 2, "the batch tells nothing apart"


def test_the_public_names_are_importable_sorted_and_known_to_type_checkers():
    body = ast.parse(Path(rewards_package.__file__).read_text(encoding="utf-8")).body
    (block,) = [node for node in body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert rewards_package.__all__ == sorted(typed)
    for name, module in typed.items():
        assert getattr(rewards_package, name) is getattr(import_module(module), name)
        assert name in dir(rewards_package)


IMPORTS_LITTLE = """
import sys
from trainers.rewards import *
from trainers.rewards.instructions import CHECKS
def planted(completions, **kwargs):
    return [1.0 for _ in completions]
assert Rewards([planted, gsm8k_reward])(["p"], ["#### 1"], [[1]], {"answer": ["1"]}).rewards.tolist() == [2.0]
heavy = {"torch", "transformers", "sympy", "math_verify", "trl"} & set(sys.modules)
assert not heavy, f"calling functions loads {heavy}"
"""


def test_calling_functions_loads_none_of_the_heavy_libraries(run_python):
    run_python(IMPORTS_LITTLE, block=())
