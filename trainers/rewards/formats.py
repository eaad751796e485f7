"""Rewards for the form of a completion, and the readers that the other rewards share.

- A number is a decimal, never a float: 0.1 is 0.1, and two answers are equal or not, without a tolerance.
- Thousands may be set apart by commas or spaces, a minus between two numbers is an operation, and currency signs and
  units around a number do not count.
- JSON is RFC 8259's: NaN and Infinity, which Python's reader lets pass, are not JSON.
"""

import json
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, NoReturn


# spaces that typesetters put between thousands: plain, no-break, thin, narrow no-break
_GROUP_MARKS = ", \u00a0\u2009\u202f"
_NUMBER = re.compile(
    # in "3-4" and "3 - 4" the minus is an operation, in "GPT-4" a hyphen
    r"(?P<minus>(?<![\w)])(?<![0-9)] )[-\u2212])?"
    r"(?:[$\u20ac\u00a3] ?)?"
    rf"(?:(?P<whole>(?<![0-9])[0-9]{{1,3}}(?P<mark>[{_GROUP_MARKS}])[0-9]{{3}}(?:(?P=mark)[0-9]{{3}})*(?![0-9])|[0-9]+)"
    r"(?P<decimals>\.[0-9]+)?|(?P<below_one>(?<![\w.])\.[0-9]+))"
)


def exact_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """
    1.0 where the completion is the answer, white space around both aside, else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`): Texts, or lists of messages.
        answer (`list`): The right text of each row; anything but a string is turned into one.

    Returns:
        `list[float | None]`: None where `answer` is None.

    Raises:
        TypeError: if `completions` holds neither strings nor messages.
        ValueError: if the lists differ in length, or a list of messages has no assistant.

    Example:

        >>> exact_reward([" Paris\\n", "paris"], answer=["Paris", "Paris"])
        [1.0, 0.0]

    Source: exact match, as in SQuAD (arXiv 1606.05250) without its normalisation.
    """
    rows = zip(texts(completions, answer=answer), answer, strict=True)
    return [None if right is None else float(text.strip() == str(right).strip()) for text, right in rows]


def last_number_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """
    1.0 where the last number of the completion is that of the answer, else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`): Texts, or lists of messages.
        answer (`list[str | int | float | Decimal]`): The right number of each row; of a text, its last number.

    Returns:
        `list[float | None]`: None where `answer` has no number.

    Raises:
        TypeError: if `completions` holds neither strings nor messages, or an answer is neither text nor number.
        ValueError: if the lists differ in length, or a list of messages has no assistant.

    Example:

        >>> last_number_reward(["7 + 5 = 12.", "Twelve, or 13"], answer=["12", 12])
        [1.0, 0.0]

    Source: the usual reading of free answers to the word problems of GSM8K, arXiv 2110.14168.
    """
    rows = zip(texts(completions, answer=answer), map(reference_number, answer), strict=True)
    return [None if right is None else float(last_number(text) == right) for text, right in rows]


def json_reward(
    completions: Sequence[Any],
    required_keys: Sequence[Iterable[str] | None] | None = None,
    *,
    allow_fence: bool = False,
    **kwargs: Any,
) -> list[float]:
    """
    1.0 where the entire completion is JSON, else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`): Texts, or lists of messages.
        required_keys (`list[list[str] | None]`, *optional*): Per row, keys that the JSON, then an object, must have.
        allow_fence (`bool`, *optional*, defaults to `False`): Whether a Markdown code fence may surround it.

    Returns:
        `list[float]`: JSON that is nested too deep to be read (about 1,000 levels) counts as none.

    Raises:
        TypeError: if `completions` holds neither strings nor messages.
        ValueError: if the lists differ in length, or a list of messages has no assistant.

    Example:

        >>> json_reward(['{"answer": 7}', "{answer: 7}", '{"sum": 7}'], required_keys=[["answer"]] * 3)
        [1.0, 0.0, 0.0]

    Source: RFC 8259.
    """
    if required_keys is None:
        required_keys = [None] * len(completions)
    rewards = []
    for text, keys in zip(texts(completions, required_keys=required_keys), required_keys, strict=True):
        valid, value = read_json(text, allow_fence=allow_fence)
        has_keys = keys is None or (isinstance(value, dict) and set(keys) <= value.keys())
        rewards.append(float(valid and has_keys))
    return rewards


def length_reward(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    min_tokens: int,
    max_tokens: int,
    **kwargs: Any,
) -> list[float]:
    """
    1.0 for `min_tokens` to `max_tokens` tokens; beyond, falling linearly to 0 at twice the distance from their middle.

    With middle c = (min_tokens + max_tokens) / 2 and half width h = (max_tokens - min_tokens) / 2, a completion of n
    tokens is worth min(1, max(0, 2 - |n - c| / h)), and 1 or 0 where h = 0.

    Args:
        completions (`list`): As many as `completion_ids`; not read.
        completion_ids (`list[list[int]]`): The tokens of each completion.
        min_tokens (`int`): At least 0.
        max_tokens (`int`): At least `min_tokens`.

    Returns:
        `list[float]`: in [0, 1].

    Raises:
        TypeError: if a bound is no integer.
        ValueError: if the bounds are negative or reversed, or the lists differ in length.

    Example:

        >>> from functools import partial
        >>> about_six = partial(length_reward, min_tokens=4, max_tokens=8)
        >>> about_six(completions=["", "", ""], completion_ids=[[0] * 4, [0] * 9, [0] * 20])
        [1.0, 0.5, 0.0]

    Source: this project; with two sides, what DAPO's overlong penalty (arXiv 2503.14476, equation 13) is for one.
    """
    for name, value in (("min_tokens", min_tokens), ("max_tokens", max_tokens)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an integer, got {value!r}. Count in tokens.")
    if not 0 <= min_tokens <= max_tokens:
        raise ValueError(
            f"`min_tokens` must be in [0, max_tokens={max_tokens}], got {min_tokens}. Exchange or widen the bounds."
        )
    if len(completion_ids) != len(completions):
        raise ValueError(
            f"`completion_ids` must have {len(completions)} rows, as `completions`, got {len(completion_ids)}."
        )
    middle, half = (min_tokens + max_tokens) / 2, (max_tokens - min_tokens) / 2
    away = [abs(len(ids) - middle) for ids in completion_ids]
    if not half:
        return [float(distance == 0) for distance in away]
    return [min(1.0, max(0.0, 2 - distance / half)) for distance in away]


def texts(completions: Sequence[Any], **columns: Sequence[Any]) -> list[str]:
    """
    The text of each completion: itself, or the content of its last assistant message.

    Args:
        completions (`list[str]` or `list[list[dict]]`): Texts, or lists of messages; a content may have text parts.
        **columns (`list`): Further columns, which must be as long.

    Returns:
        `list[str]`

    Raises:
        TypeError: if a completion is neither, or a column is no list.
        ValueError: if a column is longer or shorter, or a list of messages has no assistant.
    """
    for name, values in {"completions": completions, **columns}.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise TypeError(f"`{name}` must be a list with one value per completion, got {type(values).__name__}.")
        if len(values) != len(completions):
            raise ValueError(f"`{name}` must have {len(completions)} rows, as `completions`, got {len(values)}.")
    return [_text(completion, row) for row, completion in enumerate(completions)]


def last_number(text: str) -> Decimal | None:
    """The last number of `text`, or None: `"$1,234.50 in all."` -> `Decimal("1234.50")`."""
    found = None
    for match in _NUMBER.finditer(text.replace("{,}", ",").replace("\\,", "\u2009")):  # LaTeX
        found = match
    if found is None:
        return None
    whole = re.sub(f"[{_GROUP_MARKS}]", "", found["whole"] or "0")
    return Decimal(f"{'-' if found['minus'] else ''}{whole}{found['decimals'] or found['below_one'] or ''}")


def reference_number(value: Any) -> Decimal | None:
    """
    The number that a data set gives as an answer: of a text its last one, None where there is none.

    Raises:
        TypeError: if `value` is neither text nor number.
    """
    if value is None or isinstance(value, str):
        return last_number(value or "")
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError(f"`answer` must hold texts or numbers, got {value!r} ({type(value).__name__}).")
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    return number if number.is_finite() else None


def read_json(text: str, *, allow_fence: bool = False) -> tuple[bool, Any]:
    """`(True, value)` if `text` is JSON, else `(False, None)`; integers stay texts, for Python bounds their digits."""
    if allow_fence:
        stripped = text.strip()
        if len(stripped) > 6 and stripped.startswith("```") and stripped.endswith("```"):
            text = re.sub("^json", "", stripped[3:-3], flags=re.IGNORECASE)
    try:
        return True, json.loads(text, parse_int=str, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False, None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _text(completion: Any, row: int) -> str:
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list | tuple) or not all(isinstance(message, dict) for message in completion):
        raise TypeError(
            f"`completions` must hold strings or lists of messages, got {type(completion).__name__} in row {row}."
        )
    for message in reversed(completion):
        if message.get("role") == "assistant":
            content = message.get("content") or ""  # None beside tool calls
            if isinstance(content, str):
                return content
            return "".join(part.get("text") or "" for part in content)
    raise ValueError(f"`completions` must end in an assistant's message, got none of {len(completion)} in row {row}.")
