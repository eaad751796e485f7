"""Word problems: right answers, a split for good, known probabilities, a checker that is not fooled."""

import math
import random
import re
from collections import Counter
from itertools import product

import pytest

from hf_ext.tasks import stories, word_problems
from hf_ext.tasks.word_problems import correct, held_out, majority_answer


PAIRS = [(a, b) for a, b in product(range(2, 21), repeat=2) if a <= b]


def test_answers_are_those_of_the_numbers_in_the_question():
    for seed in range(2000):
        problem = word_problems.sample(random.Random(seed), split="all")
        a, b = (int(number) for number in re.findall(r"\d+", problem.question))
        assert problem.operands == (a, b)
        less = re.search(r" - |left|lost|took|gives \d+ of", problem.question) is not None
        assert problem.operation == ("-" if less else "+")
        assert int(problem.answer) == (a - b if less else a + b) >= 0
        assert 2 <= min(a, b) <= max(a, b) <= 20
        assert problem.kind == ("sum" if problem.question.startswith("What is") else "word")


def test_names_and_objects_are_those_of_the_stories_and_pronouns_agree():
    for seed in range(500):
        question = word_problems.sample(random.Random(seed), kind="word").question
        names = [word for word in re.findall(r"\w+", question) if word in stories.NAMES]
        assert len({word for word in re.findall(r"\w+", question) if word in stories.OBJECTS}) == 1
        for pronoun in re.findall(r"\b(he|she|him|her)\b", question):
            assert (pronoun in ("she", "her")) == (names[0] in stories.SHE)


def test_a_fifth_of_the_pairs_is_held_out_in_any_order_and_never_trained_on():
    out = {pair for pair in PAIRS if held_out(*pair)}
    assert all(held_out(b, a) == held_out(a, b) for a, b in PAIRS)
    assert 0.15 < len(out) / len(PAIRS) < 0.25
    for split, allowed in (("train", set(PAIRS) - out), ("held_out", out), ("all", set(PAIRS))):
        problems = [word_problems.sample(random.Random(seed), split) for seed in range(4000)]
        for kind, operation in product(("word", "sum"), "+-"):
            seen = {tuple(sorted(p.operands)) for p in problems if (p.kind, p.operation) == (kind, operation)}
            assert seen <= allowed
            # about 1000 draws among at most 361 pairs
            assert len(seen) > 0.7 * len(allowed)


def test_the_split_never_changes():
    assert [pair for pair in PAIRS if held_out(*pair)][:6] == [(2, 8), (2, 13), (2, 15), (2, 16), (3, 5), (3, 7)]


def test_log_prob_of_a_question_is_the_product_of_its_choices_counted_by_hand():
    found = set()
    for seed in range(200):
        problem = word_problems.sample(random.Random(seed), split="all")
        pairs = 19 * 19 if problem.operation == "+" else 19 * 20 // 2
        choices = 2 * 2 * pairs
        if problem.kind == "word":
            names = {word for word in re.findall(r"\w+", problem.question) if word in stories.NAMES}
            choices *= 3 * 24 * 24 * (23 if len(names) == 2 else 1)
            found.add(len(names))
        assert problem.log_prob == pytest.approx(-math.log(choices), abs=1e-9)
    assert found == {1, 2}


def test_sums_come_as_often_as_their_log_prob_says():
    rng, n = random.Random(0), 20_000
    problems = [word_problems.sample(rng, "held_out", "sum") for _ in range(n)]
    counts = Counter(problem.question for problem in problems)
    probabilities = {problem.question: math.exp(problem.log_prob) for problem in problems}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-9)
    for question, share in probabilities.items():
        # 5 standard deviations of a binomial
        assert counts[question] / n == pytest.approx(share, abs=5 * math.sqrt(share / n))


def test_dataset_rows_are_seeded_chats_whose_completion_is_the_answer():
    rows = word_problems.dataset(50, seed=1, split="held_out", kind="word")
    assert rows == word_problems.dataset(50, seed=1, split="held_out", kind="word")
    assert rows != word_problems.dataset(50, seed=2, split="held_out", kind="word")
    for row in rows:
        assert [message["role"] for message in row["prompt"] + row["completion"]] == ["user", "assistant"]
        assert row["completion"][0]["content"] == row["answer"]
        assert correct(row["completion"][0]["content"], row["answer"])
        assert row["log_prob"] < 0
        assert held_out(*(int(number) for number in re.findall(r"\d+", row["prompt"][0]["content"])))


@pytest.mark.parametrize(
    "completion", ["12", "12.", " 12\n", "7 + 5 = 12", "Mia has 12 shells.", "**12**", "3, no, 12", "012", "24-12"]
)
def test_the_last_number_is_the_answer(completion):
    assert correct(completion, "12")


@pytest.mark.parametrize(
    "completion", ["", "twelve", "13", "12 of 13", "112", "-12", "12.5", "1,200", "12.0", "$12.50", "12 - 1"]
)
def test_other_numbers_are_not(completion):
    assert not correct(completion, "12")


def test_majority_answer_is_the_commonest_one_and_its_share():
    assert majority_answer([{"answer": answer} for answer in ("3", "5", "5", "12")]) == ("5", 0.5)
    with pytest.raises(ValueError, match="`rows` must hold at least one"):
        majority_answer([])


def test_the_majority_answer_is_far_from_what_is_asked_of_a_model():
    _, share = majority_answer(word_problems.dataset(1000, split="held_out"))
    assert share < 0.15


@pytest.mark.parametrize(("argument", "value"), [("split", "test"), ("kind", "sums")])
def test_unknown_splits_and_kinds_are_refused_with_those_there_are(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be one of .*got '{value}'"):
        word_problems.dataset(1, **{argument: value})
