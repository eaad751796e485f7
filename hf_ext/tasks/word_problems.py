"""Word problems and sums in the words of `stories`: who solves held-out ones can add, not only look sums up.

    Mia has 7 shells. Tom gives her 5 more. How many shells does Mia have now?  ->  12
    What is 9 - 4?  ->  5

- Operands are 2 to 20, answers 0 to 40. A fifth of the unordered operand pairs is held out, for both operations and
  for words and sums alike, by a checksum that is the same everywhere and for good.
- Beside an accuracy belongs that of always giving the commonest answer: `majority_answer`.
"""

import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hf_ext.tasks.stories import NAMES, OBJECTS, SHE


OPERANDS = range(2, 21)
SPLITS = ("train", "held_out", "all")
TEMPLATES = {
    ("sum", "+"): ("What is {a} + {b}?",),
    ("sum", "-"): ("What is {a} - {b}?",),
    ("word", "+"): (
        "{who} has {a} {objects}. {friend} gives {him} {b} more. How many {objects} does {who} have now?",
        "{who} had {a} {objects} and found {b} more. How many {objects} does {he} have now?",
        "{who} has {a} {objects} and {friend} has {b} {objects}. How many {objects} do they have together?",
    ),
    ("word", "-"): (
        "{who} has {a} {objects} and gives {b} of them to {friend}. How many {objects} does {who} have left?",
        "{who} had {a} {objects} and lost {b} of them. How many {objects} does {he} have left?",
        "There were {a} {objects}. {who} took {b} of them. How many {objects} are left?",
    ),
}
KINDS = ("word", "sum")
OPERATIONS = ("+", "-")


class Problem(NamedTuple):
    """
    A question and its answer.

    Attributes:
        question (`str`): The user's turn.
        answer (`str`): The number that solves it.
        operands (`tuple[int, int]`): In the order of the question.
        operation (`str`): `"+"` or `"-"`.
        kind (`str`): `"word"` or `"sum"`.
        log_prob (`float`): Natural logarithm of the probability of `question` under the `sample` that drew it.
    """

    question: str
    answer: str
    operands: tuple[int, int]
    operation: str
    kind: str
    log_prob: float


def held_out(a: int, b: int) -> bool:
    """Whether training never sees these two operands, in any order or operation: about 20 % of all pairs."""
    return zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 5 == 0


def sample(rng: random.Random, split: str = "train", kind: str | None = None) -> Problem:
    """
    A random problem.

    Args:
        rng (`random.Random`): Draws everything.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"held_out"` or `"all"` operand pairs.
        kind (`str`, *optional*): `"word"` or `"sum"`; either by default.

    Raises:
        ValueError: for another split or kind.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)} or None, got {kind!r}.")
    choices = 1

    def pick(options: Sequence[Any]) -> Any:
        nonlocal choices
        choices *= len(options)
        return rng.choice(options)

    kind = kind or pick(KINDS)
    operation = pick(OPERATIONS)
    a, b = pick(_PAIRS[split, operation])
    template = pick(TEMPLATES[kind, operation])
    words = {}
    if kind == "word":
        who = pick(NAMES)
        he, him = ("she", "her") if who in SHE else ("he", "him")
        words = {"who": who, "he": he, "him": him, "objects": pick(OBJECTS)}
        if "{friend}" in template:
            words["friend"] = pick(tuple(name for name in NAMES if name != who))
    answer = a + b if operation == "+" else a - b
    return Problem(template.format(a=a, b=b, **words), str(answer), (a, b), operation, kind, -math.log(choices))


def dataset(size: int, seed: int = 0, split: str = "train", kind: str | None = None) -> list[dict]:
    """
    `size` random problems as rows of a chat data set.

    Args:
        size (`int`): How many; the same problem may come twice.
        seed (`int`, *optional*, defaults to 0): Of the drawing.
        split, kind: As for `sample`.

    Returns:
        `list[dict]`: with `prompt` and `completion` (lists of messages; the completion is the number alone), `answer`
        (`str`) and `log_prob` (of the question).
    """
    rng = random.Random(seed)
    problems = (sample(rng, split, kind) for _ in range(size))
    return [
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "completion": [{"role": "assistant", "content": problem.answer}],
            "answer": problem.answer,
            "log_prob": problem.log_prob,
        }
        for problem in problems
    ]


def correct(completion: str, answer: str) -> bool:
    """Whether the last number of `completion` is `answer`."""
    # a minus between two numbers is an operation, and 12.5 is one number
    numbers = re.findall(r"(?:(?<![0-9])(?<![0-9] )-)?[0-9]+(?:[.,][0-9]+)*", completion)
    return bool(numbers) and re.fullmatch("-?[0-9]+", numbers[-1]) is not None and int(numbers[-1]) == int(answer)


def majority_answer(rows: Iterable[dict]) -> tuple[str, float]:
    """
    The commonest `answer` of `rows` and its share: the accuracy of saying always the same.

    Raises:
        ValueError: without rows.
    """
    counts = Counter(row["answer"] for row in rows)
    if not counts:
        raise ValueError("`rows` must hold at least one problem, got none.")
    answer, count = counts.most_common(1)[0]
    return answer, count / counts.total()


def _pairs(split: str, operation: str) -> tuple[tuple[int, int], ...]:
    return tuple(
        (a, b)
        for a in OPERANDS
        for b in OPERANDS
        if (operation == "+" or a >= b) and (split == "all" or held_out(a, b) == (split == "held_out"))
    )


_PAIRS = {(split, operation): _pairs(split, operation) for split in SPLITS for operation in OPERATIONS}
