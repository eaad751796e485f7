"""Expressions: every number in range, every step true, by Python's own parser."""

import ast
import random
from collections import Counter

import pytest

from hf_ext.tasks import expressions


def value_and_numbers(text):
    """By the syntax tree: the value, and all numbers that occur on the way to it."""
    numbers = []

    def walk(node):
        if isinstance(node, ast.Constant):
            number = node.value
        else:
            left, right = walk(node.left), walk(node.right)
            number = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]
        numbers.append(number)
        return number

    return walk(ast.parse(text, mode="eval").body), numbers


@pytest.mark.parametrize("operands", [2, 4, 6])
def test_every_step_has_the_answer_as_its_value_and_one_operation_less_than_the_step_before(operands):
    for expression in expressions.dataset(300, seed=1, operands=operands):
        steps = [expression.prompt, *expression.solution.split(" = ")]
        assert len(steps) == operands
        for i, step in enumerate(steps):
            value, numbers = value_and_numbers(step)
            assert value == expression.answer
            assert all(0 <= number <= 60 for number in numbers)
            assert sum(token.isdecimal() for token in step.split()) == operands - i
        assert steps[-1] == str(expression.answer)


def test_each_step_reduces_the_leftmost_operation_whose_operands_are_numbers():
    for expression in expressions.dataset(300, seed=2):
        steps = [expression.prompt, *expression.solution.split(" = ")]
        for before, after in zip(steps, steps[1:], strict=False):
            operations = [
                node
                for node in ast.walk(ast.parse(before, mode="eval"))
                if isinstance(node, ast.BinOp)
                and isinstance(node.left, ast.Constant)
                and isinstance(node.right, ast.Constant)
            ]
            first = min(operations, key=lambda node: node.col_offset)
            value, _ = value_and_numbers(before[first.col_offset : first.end_col_offset])
            reduced = f"{before[: first.col_offset]}{value}{before[first.end_col_offset :]}"
            # a number needs no parentheses
            assert after == reduced.replace(f"( {value} )", str(value))


def test_parentheses_stand_only_where_leaving_them_out_changes_the_order():
    def unparse(text):
        return ast.unparse(ast.parse(text, mode="eval"))

    for expression in expressions.dataset(300, seed=3):
        assert expression.prompt.replace("( ", "(").replace(" )", ")") == unparse(expression.prompt)


def test_ids_go_there_and_back_and_the_prompt_ends_with_the_equals_sign():
    assert len(set(expressions.VOCABULARY)) == len(expressions.VOCABULARY) == 70
    for expression in expressions.dataset(100):
        ids, prompt = expressions.encode(expression)
        assert expressions.VOCABULARY[ids[0]] == "<bos>"
        assert expressions.VOCABULARY[ids[-1]] == "<eos>"
        assert expressions.decode(ids) == f"{expression.prompt} = {expression.solution}"
        assert expressions.decode(ids[:prompt]) == f"{expression.prompt} ="
        assert expressions.final_answer(expressions.decode(ids)) == expression.answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 + 2 = 3", 3),
        ("1 + 2 = 3 +", None),
        ("1 + 2 =", None),
        ("3", None),
        ("", None),
        ("= 3", None),
        ("1 = x", None),
    ],
)
def test_final_answer_is_the_number_after_the_last_equals_sign_or_none(text, answer):
    assert expressions.final_answer(text) == answer


def test_dataset_is_seeded_distinct_and_disjoint_from_what_it_excludes():
    held_out = expressions.dataset(500, seed=5)
    assert held_out == expressions.dataset(500, seed=5) != expressions.dataset(500, seed=6)
    prompts = {expression.prompt for expression in held_out}
    assert len(prompts) == 500
    # the same seed draws the same ones first
    train = expressions.dataset(500, seed=5, exclude=prompts)
    assert not prompts & {expression.prompt for expression in train}


def test_multiplication_is_as_common_as_the_others_and_no_answer_is_common():
    sample = expressions.dataset(4000)
    counts = Counter(token for expression in sample for token in expression.prompt.split() if token in "+-*")
    # a third each, less the products that 0 rules out (a few percent)
    assert all(0.28 < counts[operation] / counts.total() < 0.38 for operation in "+-*")
    _, most = Counter(expression.answer for expression in sample).most_common(1)[0]
    # 66 of each of 61 answers are expected: 5 standard deviations above
    assert most < 66 + 5 * 66**0.5


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="`operands` must be at least 2"):
        expressions.sample(random.Random(0), operands=1)
    # sums, differences and products of two numbers: fewer than 2 * 61 * 62 / 2 + 61 * 6
    with pytest.raises(ValueError, match="Lower `size`"):
        expressions.dataset(5000, operands=2)
