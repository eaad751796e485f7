"""Two chats for instruction models of about 135 M parameters: who learns them gains content, for the form is given.

Few-shot turns fix the format, so a model such as SmolLM2-135M-Instruct answers in the right form from the start, but
is right only in part: neither never nor always, as learning from rewards needs. A gain is then a gain in spelling or
in adding.

- `capitals`: Write the word "cat" in capital letters.  ->  CAT
- `json_sum`: What is 3 + 4?  ->  {"answer": 7}
"""

import json
import random


CAPITALS_MAX_NEW_TOKENS = 12
JSON_SUM_MAX_NEW_TOKENS = 14
SYSTEM = {"role": "system", "content": "Answer briefly."}
CAPITALS_EXAMPLES = (("cat", "CAT"), ("school", "SCHOOL"))
JSON_SUM_EXAMPLES = (((3, 4), '{"answer": 7}'), ((10, 5), '{"answer": 15}'))
OPERANDS = range(2, 21)

_NOUNS = """
apple arm army artist aunt baby bag baker ball banana band bank barn basket bath beach bean bear bed bee bell bird boat
body bone book boot bottle bowl box boy branch bread brick bridge brother brush bucket bus butter button cake camera
camp candle car card carpet castle chain chair cheese child church circle city class clock cloud coat coffee coin corn
corner cottage cousin cow crown cup curtain dance daughter desk dinner dish doctor dog door dream dress drum duck
eagle ear earth egg engine evening eye face family farm farmer father feather fence field finger fire fish flag floor
flower fly forest fork fox friend frog fruit game garden gate ghost gift girl glass goat gold grape grass guest guitar
hair hammer hand harbor hat heart hill honey horse hospital hotel house ice island jacket jar journey judge juice
kettle key king kitchen kite knife ladder lady lake lamp leaf leather lemon letter library lion lunch machine map
market meal meat metal milk minute mirror money monkey month moon morning mother mountain mouse mouth museum music
nail neck needle nest night nose number nurse ocean office oil onion orange oven owl page paint palace paper parent
park party path pencil pepper person piano picture pillow pilot pipe plane planet plant plate pocket pond potato queen
rabbit rain ring river road rock roof room root rope rose sailor salt sand scissors sea season shadow sheep shelf ship
shirt shoe shop sister skirt sky snake snow soap sock soldier song soup spoon spring star station stone storm story
street student sugar summer sun table tail teacher tent thumb ticket tooth tower town toy train tree truck uncle
village voice wall watch water wheel wind window winter witch wolf wood world yard
"""
NOUNS = tuple(_NOUNS.split())


def capitals(size: int, seed: int = 0) -> list[dict]:
    """
    Words to write in capitals; they differ until all of `NOUNS` are used up, then come again.

    Returns:
        `list[dict]`: with `prompt` (messages: system, two examples, the question) and `answer` (`str`, in capitals).
    """
    rng = random.Random(seed)
    words: list[str] = []
    while len(words) < size:
        words += rng.sample(NOUNS, min(len(NOUNS), size - len(words)))
    examples = [(_capitals_question(word), answer) for word, answer in CAPITALS_EXAMPLES]
    return [{"prompt": _chat(examples, _capitals_question(word)), "answer": word.upper()} for word in words]


def json_sum(size: int, seed: int = 0) -> list[dict]:
    """
    Sums of two numbers from 2 to 20, to be answered in JSON.

    Returns:
        `list[dict]`: with `prompt` (messages: system, two examples, the question) and `answer` (`str`, the sum).
    """
    rng = random.Random(seed)
    pairs = [(rng.choice(OPERANDS), rng.choice(OPERANDS)) for _ in range(size)]
    examples = [(_sum_question(a, b), answer) for (a, b), answer in JSON_SUM_EXAMPLES]
    return [{"prompt": _chat(examples, _sum_question(a, b)), "answer": str(a + b)} for a, b in pairs]


def capitals_correct(completion: str, answer: str) -> bool:
    """Whether `completion` is `answer`, capitals included; quotes, a full stop, white space around it do no harm."""
    return completion.strip().strip("\"'.") == answer


def json_sum_correct(completion: str, answer: str) -> bool:
    """Whether `completion` is JSON and nothing else: an object whose `answer` is the right number."""
    try:
        read = json.loads(completion)
    except (ValueError, RecursionError):
        return False
    value = read.get("answer") if isinstance(read, dict) else None
    # JSON's true is an int in Python
    return isinstance(value, int) and not isinstance(value, bool) and value == int(answer)


def _capitals_question(word: str) -> str:
    return f'Write the word "{word}" in capital letters.'


def _sum_question(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def _chat(examples: list[tuple[str, str]], question: str) -> list[dict[str, str]]:
    turns = [
        message
        for asked, answered in examples
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    ]
    return [dict(SYSTEM), *turns, {"role": "user", "content": question}]
