"""Expressions against Python's own arithmetic, step by step."""

import random

import pytest

from hf_ext.tasks import expressions
from hf_ext.tasks.expressions import Expression, dataset, decode, encode, final_answer, sample


@pytest.mark.parametrize("operands", [2, 4, 6])
def test_every_step_has_the_value_of_the_expression_and_one_operation_less(operands):
    for item in dataset(300, seed=operands, operands=operands):
        steps = [item.prompt, *item.solution.split(" = ")]
        assert {eval(step) for step in steps} == {item.answer}  # digits, operators and parentheses of our own making
        counts = [sum(token in "+-*" for token in step.split()) for step in steps]
        assert counts == list(range(operands - 1, -1, -1))


def test_all_numbers_are_tokens_and_a_row_can_be_read_back():
    for item in dataset(500, seed=1):
        ids, prompt = encode(item)
        tokens = [expressions.VOCABULARY[i] for i in ids]
        assert (tokens[0], tokens[prompt - 1], tokens[-1]) == ("<bos>", "=", "<eos>")
        assert decode(ids) == f"{item.prompt} = {item.solution}"
        assert final_answer(decode(ids)) == item.answer
    assert len(expressions.VOCABULARY) == len(set(expressions.VOCABULARY)) == 70


def test_the_leftmost_possible_operation_comes_first():
    tree = ("-", ("*", ("+", 3, 5), 2), 7)
    assert expressions._text(tree) == "( 3 + 5 ) * 2 - 7"
    steps = []
    while not isinstance(tree, int):
        tree = expressions._reduce(tree)
        steps.append(expressions._text(tree))
    assert steps == ["8 * 2 - 7", "16 - 7", "9"]


def test_a_seed_gives_distinct_expressions_and_keeps_out_the_excluded():
    first = dataset(400, seed=3)
    assert first == dataset(400, seed=3)
    assert len({item.prompt for item in first}) == 400
    other = dataset(400, seed=4, exclude=[item.prompt for item in first])
    assert not {item.prompt for item in first} & {item.prompt for item in other}


def test_all_operations_occur():
    prompts = " ".join(item.prompt for item in dataset(300, seed=5))
    assert all(prompts.count(operation) > 100 for operation in "+-*")


@pytest.mark.parametrize(
    ("text", "answer"),
    [("3 + 4 = 7", 7), ("3 + 4 = 7 =", None), ("7", None), ("", None), ("3 = x", None), ("= 3", None)],
)
def test_only_a_number_after_the_last_equals_sign_is_an_answer(text, answer):
    assert final_answer(text) == answer


def test_one_operand_is_no_expression():
    with pytest.raises(ValueError, match="`operands` must be at least 2, got 1"):
        sample(random.Random(0), 1)


def test_an_expression_names_its_parts():
    assert Expression("1 + 1", "2", 2)._fields == ("prompt", "solution", "answer")
