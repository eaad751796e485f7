"""Forms of completions, and how numbers are read, against planted answers and closed forms."""

import doctest
import json
import time
from decimal import Decimal
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.rewards import exact_reward, formats, json_reward, last_number_reward, length_reward


def messages(text):
    return [{"role": "user", "content": "0"}, {"role": "assistant", "content": text}]


def test_the_examples_in_the_docstrings_are_true():
    failed, tried = doctest.testmod(formats)
    assert (failed, tried) == (0, 6)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 72", "72"),
        ("72.", "72"),
        ("(72)", "72"),
        ("**72**", "72"),
        ("$1,234.50 in all", "1234.50"),
        ("1 234 567", "1234567"),
        ("1\u202f234", "1234"),
        (r"1{,}234 or 1\,234", "1234"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("it is -5", "-5"),
        ("9-4", "4"),
        ("9 - 4", "4"),
        ("(9) -4", "4"),
        ("GPT-4", "4"),
        ("- 5 apples", "5"),
        (".5", "0.5"),
        ("wait...5", "5"),
        ("3, 4", "4"),
        ("1234,567", "567"),
        ("1,2345", "2345"),
        ("50%", "50"),
        ("2021 300", "300"),
        ("007", "7"),
    ],
)
def test_the_last_number_is_what_a_reader_takes_it_for(text, number):
    assert formats.last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "$", "-", "..."])
def test_a_text_without_digits_has_no_number(text):
    assert formats.last_number(text) is None


def test_decimals_are_equal_exactly_and_not_as_floats_are():
    assert last_number_reward(["0.3", "0.30", "0.30000000000000004"], answer=["0.3", 0.3, "0.3"]) == [1.0, 1.0, 0.0]
    assert last_number_reward(["9007199254740993"], answer=["9007199254740992"]) == [0.0]


@pytest.mark.parametrize("missing", [None, "", "no number", float("nan")])
def test_a_row_whose_answer_has_no_number_is_left_out(missing):
    assert last_number_reward(["1", "1"], answer=[missing, 1]) == [None, 1.0]


def test_an_exact_answer_is_equal_up_to_white_space_around_it():
    answers = ["Paris", "Paris", "Paris", 7, None]
    assert exact_reward([" Paris\n", "paris", "Paris!", "7", "x"], answer=answers) == [1.0, 0.0, 0.0, 1.0, None]


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(), lambda x: st.lists(x)))
def test_what_python_writes_as_json_is_json_unless_it_holds_infinity(value):
    assert json_reward([json.dumps(value)]) == [float(not _has_infinity(value))]


def _has_infinity(value):
    return value in (float("inf"), float("-inf")) or (isinstance(value, list) and any(map(_has_infinity, value)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{a: 1}",
        "{'a': 1}",
        '{"a": 1} so',
        '{"a": 1,}',
        '{"a": NaN}',
        "Infinity",
        "[-Infinity]",
        "[" * 100_000 + "]" * 100_000,
        '{"a": 1',
        "\ufeff{}",
    ],
    ids=lambda text: text[:12],
)
def test_what_is_not_json_or_cannot_be_read_is_worth_nothing(text):
    assert json_reward([text]) == [0.0]


def test_json_numbers_may_have_any_number_of_digits():
    assert json_reward(["9" * 10_000, "1e999"]) == [1.0, 1.0]


def test_required_keys_ask_for_an_object_that_has_them():
    texts = ['{"a": 1, "b": 2}', '{"a": 1}', '["a", "b"]', '"ab"', "3"]
    assert json_reward(texts, required_keys=[["a", "b"]] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert json_reward(texts, required_keys=[None, None, None, None, []]) == [1.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("fenced", ['```json\n{"a": 1}\n```', '```\n{"a": 1}\n```', ' ```JSON {"a": 1}```\n'])
def test_a_code_fence_counts_only_where_it_is_allowed(fenced):
    assert json_reward([fenced]) == [0.0]
    assert json_reward([fenced, "``````", '{"a": 1}'], allow_fence=True) == [1.0, 0.0, 1.0]


@settings(deadline=None)
@given(low=st.integers(0, 50), width=st.integers(1, 50), n=st.integers(0, 300))
def test_the_length_reward_is_the_trapezoid_of_its_formula(low, width, n):
    high = low + width
    (reward,) = length_reward(completions=["x"], completion_ids=[[0] * n], min_tokens=low, max_tokens=high)
    if low <= n <= high:
        assert reward == 1
    else:
        # from 1 at the bound to 0 half a width further out
        beyond = max(low - n, n - high) / (width / 2)
        assert reward == pytest.approx(max(0, 1 - beyond), abs=1e-12)  # rounding of numbers below 10


def test_one_allowed_length_is_all_or_nothing():
    exactly_two = partial(length_reward, min_tokens=2, max_tokens=2)
    assert exactly_two(completions=[""] * 3, completion_ids=[[1], [1, 1], [1, 1, 1]]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("bounds", "error", "said"),
    [
        ((5, 4), ValueError, r"`min_tokens` must be in \[0, max_tokens=4\], got 5"),
        ((-1, 4), ValueError, "`min_tokens` must be in"),
        ((0, 4.5), TypeError, "`max_tokens` must be an integer, got 4.5"),
        ((True, 4), TypeError, "`min_tokens` must be an integer, got True"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(bounds, error, said):
    with pytest.raises(error, match=said):
        length_reward(completions=[], completion_ids=[], min_tokens=bounds[0], max_tokens=bounds[1])


@pytest.mark.parametrize(
    ("reward", "columns"),
    [
        (exact_reward, {"answer": ["7", "8"]}),
        (last_number_reward, {"answer": ["7", "8"]}),
        (json_reward, {"required_keys": [None, ["a"]]}),
    ],
)
def test_messages_are_worth_what_their_text_is_worth(reward, columns):
    plain = ["7", '{"a": 8}']
    as_lists = [messages(text) for text in plain]
    unused = {"prompts": ["", ""], "completion_ids": [[1], [2]], "trainer_state": None, "log_extra": None}
    assert reward(completions=as_lists, **columns, **unused) == reward(completions=plain, **columns)


def test_the_last_assistant_message_counts_and_may_have_parts_or_no_content():
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "assistant", "content": "early"}, {"role": "tool", "content": "tool"}]
    read = formats.texts([[*turns, {"role": "assistant", "content": parts}], [{"role": "assistant", "content": None}]])
    assert read == ["ab", ""]
    assert formats.texts([turns]) == ["early"]


@pytest.mark.parametrize(
    ("completions", "answer", "error", "said"),
    [
        (["a", "b"], ["a"], ValueError, "`answer` must have 2 rows, as `completions`, got 1"),
        (["a"], "a", TypeError, "`answer` must be a list with one value per completion, got str"),
        ("a", ["a"], TypeError, "`completions` must be a list"),
        (["a", 5], ["a", "b"], TypeError, "strings or lists of messages, got int in row 1"),
        ([["a"]], ["a"], TypeError, "strings or lists of messages, got list in row 0"),
        ([[{"role": "user", "content": "a"}]], ["a"], ValueError, "got none of 1 in row 0"),
    ],
)
def test_what_is_no_batch_is_refused_by_name(completions, answer, error, said):
    with pytest.raises(error, match=said):
        exact_reward(completions, answer)


@pytest.mark.parametrize("value", [True, [1], {"a": 1}])
def test_an_answer_that_is_neither_text_nor_number_is_refused(value):
    with pytest.raises(TypeError, match="`answer` must hold texts or numbers"):
        last_number_reward(["1"], answer=[value])


@pytest.mark.parametrize("piece", ["1", ",000", "1,000 ", "-", "- ", "$ ", "1.", "1\u2009"])
def test_reading_a_number_takes_time_in_proportion_to_the_text(piece):
    start = time.perf_counter()
    formats.last_number(piece * 200_000)
    # a quadratic reader takes minutes; a linear one a fraction of a second, with a wide margin for a busy machine
    assert time.perf_counter() - start < 10
