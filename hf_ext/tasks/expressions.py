"""Arithmetic expressions, solved step by step: who solves them holds a state and rewrites it, one operation a step.

    ( 3 + 5 ) * 2 - 7 = 8 * 2 - 7 = 16 - 7 = 9

- Numbers are 0 to 60, one token each, every intermediate result included; operations are +, -, *.
- A step carries out one operation: the leftmost of those whose two operands are numbers already.
- Expressions are random binary trees; parentheses stand only where precedence needs them. A tree is drawn from its
  answer downwards, so every number is in range without a second try, all answers are equally likely, and
  multiplication is about as common as addition. A factor is never 0, which would give the product away.

Source: the arithmetic expressions of arXiv 2502.09245, section 4, whose data are not published.
"""

import random
from collections.abc import Iterable
from typing import NamedTuple


LARGEST = 60
OPERATIONS = ("+", "-", "*")
VOCABULARY = [*(str(n) for n in range(LARGEST + 1)), *OPERATIONS, "(", ")", "=", "<bos>", "<eos>", "<pad>"]
IDS = {token: i for i, token in enumerate(VOCABULARY)}
# so many known expressions in a row, and the drawing gives up
REPEATS = 10_000
PRECEDENCE = {"+": 1, "-": 1, "*": 2}

Tree = int | tuple[str, "Tree", "Tree"]


class Expression(NamedTuple):
    """`prompt` is the expression, `solution` its steps joined by " = ", the last of which is `answer`."""

    prompt: str
    solution: str
    answer: int


def sample(rng: random.Random, operands: int = 4) -> Expression:
    """
    A random expression.

    Args:
        rng (`random.Random`): Draws the tree.
        operands (`int`, *optional*, defaults to 4): Numbers in it, at least 2.

    Raises:
        ValueError: for fewer than 2 operands.
    """
    if operands < 2:
        raise ValueError(f"`operands` must be at least 2, got {operands}.")
    answer = rng.randint(0, LARGEST)
    tree = _tree(rng, operands, answer)
    steps = [_text(tree)]
    while not isinstance(tree, int):
        tree = _reduce(tree)
        steps.append(_text(tree))
    return Expression(steps[0], " = ".join(steps[1:]), answer)


def dataset(size: int, seed: int = 0, operands: int = 4, exclude: Iterable[str] = ()) -> list[Expression]:
    """
    `size` distinct expressions.

    Args:
        size (`int`): How many.
        seed (`int`, *optional*, defaults to 0): Of the drawing.
        operands (`int`, *optional*, defaults to 4): Numbers in each.
        exclude (iterable of `str`, *optional*): Prompts that must not occur, for example the held-out ones.

    Raises:
        ValueError: if so many distinct expressions do not exist.
    """
    rng, seen, repeats = random.Random(seed), set(exclude), 0
    found: list[Expression] = []
    while len(found) < size:
        expression = sample(rng, operands)
        if expression.prompt not in seen:
            seen.add(expression.prompt)
            found.append(expression)
            repeats = 0
        elif (repeats := repeats + 1) == REPEATS:
            raise ValueError(
                f"`size` must be at most about {len(found)} with {operands} operands and this `exclude`, "
                f"got {size}: hardly a new expression is left. Lower `size` or raise `operands`."
            )
    return found


def encode(expression: Expression) -> tuple[list[int], int]:
    """`(ids, prompt)`: all ids from <bos> to <eos>, and how many of them, the first "=" included, are the prompt."""
    prompt = ["<bos>", *expression.prompt.split(), "="]
    return [IDS[token] for token in [*prompt, *expression.solution.split(), "<eos>"]], len(prompt)


def decode(ids: Iterable[int]) -> str:
    """Ids as text, without <bos>, <eos> and <pad>."""
    return " ".join(token for token in (VOCABULARY[i] for i in ids) if not token.startswith("<"))


def final_answer(text: str) -> int | None:
    """The number after the last "=", if the text ends with it."""
    before, equals, last = text.rpartition("=")
    return int(last) if equals and before and last.strip().isdecimal() else None


def _tree(rng: random.Random, operands: int, value: int) -> Tree:
    """A tree with that many operands and that value."""
    if operands == 1:
        return value
    split = rng.randint(1, operands - 1)
    operation = rng.choice(OPERATIONS if value else ("+", "-"))
    if operation == "+":
        left = rng.randint(0, value)
        right = value - left
    elif operation == "-":
        left = rng.randint(value, LARGEST)
        right = left - value
    else:
        left = rng.choice([n for n in range(1, value + 1) if value % n == 0])
        right = value // left
    return operation, _tree(rng, split, left), _tree(rng, operands - split, right)


def _reduce(tree: tuple[str, Tree, Tree]) -> Tree:
    """One operation carried out."""
    operation, left, right = tree
    if not isinstance(left, int):
        return operation, _reduce(left), right
    if not isinstance(right, int):
        return operation, left, _reduce(right)
    return left + right if operation == "+" else left - right if operation == "-" else left * right


def _text(tree: Tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    operation, left, right = tree
    sides = []
    for side, is_right in ((left, False), (right, True)):
        text = _text(side)
        # a + (b - c) keeps its parentheses, so that "leftmost" means the same in the text and in the tree
        if not isinstance(side, int) and PRECEDENCE[side[0]] < PRECEDENCE[operation] + is_right:
            text = f"( {text} )"
        sides.append(text)
    return f"{sides[0]} {operation} {sides[1]}"
