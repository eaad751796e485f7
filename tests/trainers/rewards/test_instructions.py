"""Each verifiable instruction on texts that follow it and texts that do not; IFEval's rows as they come."""

import doctest
import time

import pytest
from datasets import Dataset

from trainers.rewards import instruction_reward, instructions


# the 25 of the paper's table 1 by their ids in the data set, without the one that needs a language detector
IFEVAL_IDS = [
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "combination:repeat_prompt",
    "combination:two_responses",
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:constrained_response",
    "detectable_format:json_format",
    "detectable_format:multiple_sections",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "detectable_format:title",
    "keywords:existence",
    "keywords:forbidden_words",
    "keywords:frequency",
    "keywords:letter_frequency",
    "length_constraints:nth_paragraph_first_word",
    "length_constraints:number_paragraphs",
    "length_constraints:number_sentences",
    "length_constraints:number_words",
    "punctuation:no_comma",
    "startend:end_checker",
    "startend:quotation",
]
AT_LEAST, LESS_THAN = {"relation": "at least"}, {"relation": "less than"}

# id -> arguments, texts that follow, texts that do not
CASES = [
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        ["THE end of IT", "NASA and ESA", "WELL-KNOWN IT"],
        ["THE end", "The End Of", "123 456"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "less than", "capital_frequency": 1},
        ["The end", "1"],
        ["I am"],
    ),
    ("change_case:english_capital", {}, ["HELLO, 1 WORLD!"], ["Hello", "HELLo", "123"]),
    ("change_case:english_lowercase", {}, ["hello, 1 world!"], ["Hello", "hellO", "123"]),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem."},
        ["Write a poem.\n\nRoses", " write a poem. Roses"],
        ["Roses", "Sure. Write a poem."],
    ),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "******\none\n******\ntwo\n******"],
        ["one", "one\n******\none", "one******two******three", "one******", "one************two"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] at [address]", "[a][b][c]"],
        ["[name]", "[name] []", "[name] [ ]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. more", "Bye.\np. s. more"],
        ["Bye.", "Bye. PS more"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more", "p.p.s. more"], ["P.S. more"]),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well: My answer is maybe."],
        ["yes", "My answer is certain.", "my answer is no"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": 1}\n```', "[1]"],
        ["{a: 1}", 'Here: {"a": 1}', "NaN"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "Section 1 a Section 2 b Section 3 c"],
        ["Section 1 a", "Section one Section two", "section 1 section 2"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "List:\n* *a*\n* b"],
        ["* a", "* a\n* b\n* c", "*a*\n*b*", "a - b\na - c", "***\n---"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b c*", "**a** and *b*", "* *a*\n* **b**", "***a*** *b*"],
        ["*a*", "* a * b", "2*3*4", "** **\n**", "*a\nb* *c*"],
    ),
    ("detectable_format:title", {}, ["<<On joy>>\nText", "a <<b>> c"], ["<On joy>", "<<>>", "<< >>", "<<a\nb>>"]),
    ("keywords:existence", {"keywords": ["Sun", "a.b"]}, ["sunny A.B"], ["sunny aXb", "moon"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["sun", "C++"]},
        ["sunny C", "moon"],
        ["The Sun!", "in c++."],
    ),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, **AT_LEAST}, ["Sun, sunny"], ["sun"]),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, **LESS_THAN}, ["sun", "moon"], ["sun sun"]),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": "at least"},
        ["eEe"],
        ["ee", "abc"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 1, "let_relation": "less than"},
        ["plain"],
        ["# title"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ["One.\n\nWeekend, at last.", "One.\n\n\n\n'weekend' two.\n\n"],
        ["One.\n\nThe weekend.", "Weekend.\n\nTwo.", "a\n\nWeekend\n\nc", "One.\n\nWeekends.", "One.\nWeekend."],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"},
        [],
        ["a", "a\n\na"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 0, "first_word": "a"},
        [],
        ["a"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a\n\nb", "a", "a***b***c", "a\n***\n***\nb"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, **AT_LEAST},
        ["One. Two! Three?", "One... Two?! (Three.)", "1. One.\n2. Two.\n3. Three", 'He said "no." Two. Three'],
        ["One. Two.", "Dr. Who is 3.5 m tall, e.g. here.", "One two three", "...", "1. 2. 3."],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, **LESS_THAN}, ["One.", "One"], ["One. Two."]),
    (
        "length_constraints:number_words",
        {"num_words": 3, **AT_LEAST},
        ["one, two three", "a b c d"],
        ["one two", "- ! ?"],
    ),
    ("length_constraints:number_words", {"num_words": 3, **LESS_THAN}, ["one two", "-"], ["one two three"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions?"},
        ["Well. any questions?", '"Well. Any questions?"\n'],
        ["Any questions? No.", "Any questions"],
    ),
    ("startend:quotation", {}, ['"a"', ' "a b" \n', '""'], ["a", '"a', '"', "'a'"]),
]


def score(texts, name, arguments, **options):
    count = len(texts)
    return instruction_reward(
        completions=texts, instruction_id_list=[[name]] * count, kwargs=[[arguments]] * count, **options
    )


def test_the_examples_in_the_docstrings_are_true():
    failed, tried = doctest.testmod(instructions)
    assert (failed, tried) == (0, 4)


def test_every_instruction_of_ifeval_but_the_language_is_supported_and_tried_here():
    assert sorted(instructions.CHECKS) == sorted(IFEVAL_IDS)
    assert len(IFEVAL_IDS) == 24
    assert {name for name, *_ in CASES} == set(IFEVAL_IDS)


@pytest.mark.parametrize(
    ("name", "arguments", "followed", "not_followed"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_check_tells_following_from_not_following(name, arguments, followed, not_followed):
    rewards = dict(zip(followed + not_followed, score(followed + not_followed, name, arguments), strict=True))
    assert rewards == {text: float(text in followed) for text in followed + not_followed}


@pytest.mark.parametrize("name", IFEVAL_IDS)
@pytest.mark.parametrize("strict", [True, False])
def test_an_empty_completion_follows_nothing(name, strict):
    arguments = next(arguments for other, arguments, *_ in CASES if other == name)
    assert score(["", " \n"], name, arguments, strict=strict) == [0.0, 0.0]


ROWS = [
    {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "at least", "num_words": 3}],
    },
    {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["sun", "moon"]}]},
    {"instruction_id_list": [], "kwargs": []},
]


def test_rows_of_a_data_set_work_with_the_gaps_that_it_fills():
    columns = Dataset.from_list(ROWS)[:]
    assert columns["kwargs"][0][0] == {"relation": None, "num_words": None, "keywords": None}, "nothing is filled"
    texts = ["one two, three", "sun and moon", "anything"]
    assert instruction_reward(completions=texts, **columns) == [0.0, 1.0, None]
    assert instruction_reward(completions=texts, **columns, mode="share") == [0.5, 1.0, None]
    as_messages = [[{"role": "assistant", "content": text}] for text in texts]
    unused = {
        "prompts": texts,
        "completion_ids": [[1]] * 3,
        "trainer_state": None,
        "log_extra": None,
        "key": [1, 2, 3],
    }
    assert instruction_reward(completions=as_messages, **columns, **unused) == [0.0, 1.0, None]


def test_instructions_without_arguments_need_no_kwargs():
    assert instruction_reward(["a", "a,"], [["punctuation:no_comma"]] * 2) == [1.0, 0.0]
    assert instruction_reward(["a"], [["punctuation:no_comma"]], kwargs=[None]) == [1.0]
    assert instruction_reward(["a"], [["punctuation:no_comma"]], kwargs=[[None]]) == [1.0]


def test_whole_numbers_may_come_as_floats():
    assert score(["one two three"], "length_constraints:number_words", {"num_words": 3.0, **AT_LEAST}) == [1.0]


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("Sure, here it is:\nhello", "punctuation:no_comma", {}),
        ("hello\nI hope, this helps", "punctuation:no_comma", {}),
        ("Sure, here:\nhello\nDone, bye", "punctuation:no_comma", {}),
        ("**My answer is** yes.", "detectable_format:constrained_response", {}),
        ("Here:\n```json\n{}\n```", "detectable_format:json_format", {}),
    ],
)
def test_the_loose_accuracy_forgives_first_line_last_line_and_asterisks(text, name, arguments):
    assert score([text], name, arguments) == [0.0]
    assert score([text], name, arguments, strict=False) == [1.0]


def test_the_loose_accuracy_forgives_nothing_else():
    assert score(["a\nb, c\nd"], "punctuation:no_comma", {}, strict=False) == [0.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("keywords:existance", "got 'keywords:existance' in row 1. Near it: keywords:existence"),
        ("length_constraints:words", "Near it: .*length_constraints:number_words"),
        ("zzzz", "Near it: change_case:capital_word_frequency"),
        (
            "language:response_language",
            "needs a language detector. Drop such rows; supported are .*startend:quotation",
        ),
    ],
)
def test_an_unknown_id_is_refused_before_anything_is_scored(name, said, monkeypatch):
    monkeypatch.setitem(instructions.CHECKS, "punctuation:no_comma", lambda text: pytest.fail("scored"))
    with pytest.raises(ValueError, match=said):
        instruction_reward(["a", "b"], [["punctuation:no_comma"], [name]], kwargs=[[{}], [{"language": "en"}]])


WORDS = "length_constraints:number_words"


@pytest.mark.parametrize(
    ("name", "arguments", "error", "said"),
    [
        (WORDS, {"num_words": 3}, ValueError, "must be num_words, relation, got num_words. Correct"),
        (WORDS, {}, ValueError, "must be num_words, relation, got none"),
        (
            WORDS,
            {"num_words": 3, "relation": "about"},
            ValueError,
            "`relation` of .* 'at least' or 'less than', got 'about'",
        ),
        (WORDS, {"num_words": "3", **AT_LEAST}, TypeError, "`num_words` of .* an integer of at least 0, got '3'"),
        (WORDS, {"num_words": 2.5, **AT_LEAST}, TypeError, "an integer of at least 0, got 2.5"),
        (WORDS, {"num_words": -1, **AT_LEAST}, ValueError, "an integer of at least 0, got -1"),
        ("punctuation:no_comma", {"keyword": "a"}, ValueError, "must be empty, got keyword"),
        ("keywords:existence", {"keywords": "sun"}, TypeError, "`keywords` of .* a list of texts, got 'sun'"),
        ("keywords:existence", {"keywords": []}, ValueError, "a list of texts, got \\[\\]"),
        ("keywords:existence", {"keywords": ["sun", ""]}, ValueError, "a list of texts, got"),
        ("startend:end_checker", {"end_phrase": ""}, ValueError, "`end_phrase` of .* a text, got ''"),
        ("startend:end_checker", {"end_phrase": 5}, TypeError, "a text, got 5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name_and_row(name, arguments, error, said):
    with pytest.raises(error, match=said) as caught:
        score(["a"], name, arguments)
    assert "in row 0" in str(caught.value)


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`kwargs` must hold 1 dicts in row 0, one per instruction, got 2"):
        instruction_reward(["a"], [["punctuation:no_comma"]], kwargs=[[{}, {}]])
    with pytest.raises(ValueError, match="`instruction_id_list` must have 1 rows"):
        instruction_reward(["a"], [])
    with pytest.raises(TypeError, match="a list of ids per row, got 'punctuation:no_comma' in row 0"):
        instruction_reward(["a"], ["punctuation:no_comma"])
    with pytest.raises(ValueError, match="`mode` must be one of all, share, got 'any'"):
        instruction_reward(["a"], [[]], mode="any")


@pytest.mark.parametrize(
    "piece", ["*", "* ", "**a", "[", "<<", "<<a", "\n", "\n* ", "P.", "******", "a ", "1. ", "```", '"', "Section "]
)
def test_checking_takes_time_in_proportion_to_the_text(piece):
    first = {name: arguments for name, arguments, *_ in reversed(CASES)}
    start = time.perf_counter()
    for name, arguments in first.items():
        score([piece * (100_000 // len(piece))], name, arguments)
    # linear checks take a second together, a quadratic one minutes: a wide margin for a busy machine
    assert time.perf_counter() - start < 20
