"""Capitals and JSON sums: the chats as measured, and checkers that let no wrong answer pass."""

import json

import pytest

from hf_ext.tasks import chat


def test_the_capitals_chat_is_the_one_that_was_measured():
    assert chat.CAPITALS_MAX_NEW_TOKENS == 12
    (row,) = chat.capitals(1)
    word = row["answer"].lower()
    assert row["prompt"] == [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": 'Write the word "cat" in capital letters.'},
        {"role": "assistant", "content": "CAT"},
        {"role": "user", "content": 'Write the word "school" in capital letters.'},
        {"role": "assistant", "content": "SCHOOL"},
        {"role": "user", "content": f'Write the word "{word}" in capital letters.'},
    ]


def test_the_json_chat_is_the_one_that_was_measured():
    assert chat.JSON_SUM_MAX_NEW_TOKENS == 14
    for row in chat.json_sum(50):
        *shown, question = row["prompt"]
        assert shown == [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "What is 3 + 4?"},
            {"role": "assistant", "content": '{"answer": 7}'},
            {"role": "user", "content": "What is 10 + 5?"},
            {"role": "assistant", "content": '{"answer": 15}'},
        ]
        a, b = (int(number) for number in question["content"].removeprefix("What is ").rstrip("?").split(" + "))
        assert 2 <= min(a, b) <= max(a, b) <= 20
        assert int(row["answer"]) == a + b
        assert chat.json_sum_correct(json.dumps({"answer": a + b}), row["answer"])
        assert not chat.json_sum_correct(json.dumps({"answer": a + b + 1}), row["answer"])


def test_words_are_many_plain_and_new_until_all_are_used():
    assert len(set(chat.NOUNS)) == len(chat.NOUNS) >= 200
    assert all(noun.isascii() and noun.isalpha() and noun.islower() for noun in chat.NOUNS)
    # the examples give no answer away
    assert not {"cat", "school"} & set(chat.NOUNS)
    answers = [row["answer"] for row in chat.capitals(len(chat.NOUNS) + 5)]
    assert len(set(answers[: len(chat.NOUNS)])) == len(chat.NOUNS)


@pytest.mark.parametrize("task", [chat.capitals, chat.json_sum])
def test_rows_follow_the_seed(task):
    assert task(20, seed=1) == task(20, seed=1) != task(20, seed=2)
    assert task(0) == []


@pytest.mark.parametrize("completion", ["BRIDGE", '"BRIDGE"', "BRIDGE.", " BRIDGE\n", "'BRIDGE'.", '"BRIDGE."'])
def test_a_word_in_capitals_is_right_with_quotes_or_a_full_stop(completion):
    assert chat.capitals_correct(completion, "BRIDGE")


@pytest.mark.parametrize(
    "completion", ["", "bridge", "Bridge", "BRIDGES", "BRID GE", "The word is BRIDGE", "BRIDGE BRIDGE", "BRIDGE!", "."]
)
def test_anything_else_is_not(completion):
    assert not chat.capitals_correct(completion, "BRIDGE")


@pytest.mark.parametrize("completion", ['{"answer": 7}', ' {"answer":7}\n', '{"answer": 7, "why": "3 + 4"}'])
def test_json_with_the_right_number_is_right(completion):
    assert chat.json_sum_correct(completion, "7")


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "7",
        '{"answer": 8}',
        '{"answer": "7"}',
        '{"answer": 7',
        '{"Answer": 7}',
        '[{"answer": 7}]',
        '{"answer": 7.5}',
        'The answer: {"answer": 7}',
        '{"answer": null}',
        "null",
        "NaN",
        pytest.param("[" * 100_000, id="too deep"),
        pytest.param('{"answer": ' + "7" * 5000 + "}", id="too long"),
    ],
)
def test_json_that_does_not_parse_or_holds_another_value_is_wrong(completion):
    assert not chat.json_sum_correct(completion, "7")


def test_true_is_not_the_number_one():
    assert not chat.json_sum_correct('{"answer": true}', "1")
