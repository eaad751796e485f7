"""Rewards for following instructions that a program can verify: IFEval's, with its names, so that its data set works.

- Each check is a small function of the text and of the arguments that IFEval names; `CHECKS` maps ids to checks.
- Ids and arguments are checked for all rows before anything is scored: a typing error never looks like a bad model.
- Written from the paper's descriptions, in plain string operations. Two differences from its code are meant: sentences
  are counted by punctuation (no download), and no language is detected, so `language:response_language` is refused and
  the two `change_case:english_*` look at the case alone. So scores are close to published ones, not equal.
- Keywords are matched inside words and without regard to case, except forbidden ones, which are whole words.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from trainers.rewards.formats import read_json, texts


Relation = Literal["at least", "less than"]
Mode = Literal["all", "share"]

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_BULLET = re.compile(r"^[ \t]*[*+-][ \t]+\S", re.MULTILINE)
_LIST_NUMBER = re.compile(r"^[ \t]*\d+[.)]\s", re.MULTILINE)
# as in Markdown: no space inside the stars
_HIGHLIGHT = re.compile(r"\*\*(?![\s*])[^\n*]+(?<!\s)\*\*|\*(?![\s*])[^\n*]+(?<!\s)\*")
_SENTENCE_ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
_CLOSING_MARKS = "\"'\u2019\u201d)]*_"
_ABBREVIATIONS = {"mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "vs.", "e.g.", "i.e.", "fig.", "no."}
_FIXED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_NEEDS_LANGUAGE_DETECTOR = {"language:response_language"}


def instruction_reward(
    completions: Sequence[Any],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[dict[str, Any] | None] | None] | None = None,
    *,
    mode: Mode = "all",
    strict: bool = True,
    **columns: Any,
) -> list[float | None]:
    """
    Whether all verifiable instructions of a row are followed, or the share that is.

    Args:
        completions (`list[str]` or `list[list[dict]]`): Texts, or lists of messages.
        instruction_id_list (`list[list[str]]`): Ids of `CHECKS`, those of IFEval, for each row.
        kwargs (`list[list[dict]]`, *optional*): For each row the arguments of each instruction; the data set's column
            of this name. Arguments that are None count as absent (`datasets` fills gaps so).
        mode (`str`, *optional*, defaults to `"all"`): `"all"` gives 1.0 or 0.0 (IFEval's prompt-level accuracy),
            `"share"` the fraction of instructions that are followed (instruction-level).
        strict (`bool`, *optional*, defaults to `True`): IFEval's strict accuracy. If False, its loose one: an
            instruction also counts as followed if it is without the first line, the last line, all asterisks, or any
            combination of these.
        **columns: Not read.

    Returns:
        `list[float | None]`: None where a row has no instruction. An empty completion follows none.

    Raises:
        TypeError: if `completions` holds neither strings nor messages, or an argument has a wrong type.
        ValueError: if an id is unknown, an argument is missing or superfluous, or lengths differ.

    Example:

        >>> ids = [["punctuation:no_comma", "length_constraints:number_words"]]
        >>> arguments = [[{}, {"relation": "less than", "num_words": 4}]]
        >>> instruction_reward(["Short and sweet."], ids, kwargs=arguments)
        [1.0]
        >>> instruction_reward(["Short, and sweet."], ids, kwargs=arguments, mode="share")
        [0.5]

    Source: IFEval, arXiv 2311.07911, table 1 and the definitions of strict and loose accuracy.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"`mode` must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
    arguments = [None] * len(completions) if kwargs is None else kwargs
    contents = texts(completions, instruction_id_list=instruction_id_list, kwargs=arguments)
    rows = [_read(row, *given) for row, given in enumerate(zip(instruction_id_list, arguments, strict=True))]
    rewards: list[float | None] = []
    for text, checks in zip(contents, rows, strict=True):
        versions = [version for version in ([text] if strict else _loose_versions(text)) if version.strip()]
        followed = [any(check(version, **given) for version in versions) for check, given in checks]
        if not followed:
            rewards.append(None)
        else:
            rewards.append(float(all(followed)) if mode == "all" else sum(followed) / len(followed))
    return rewards


def keywords_exist(text: str, keywords: list[str]) -> bool:
    """Each keyword is there."""
    return all(_count(text, keyword) for keyword in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: Relation) -> bool:
    """The keyword is there often, or seldom, enough."""
    return _holds(_count(text, keyword), relation, frequency)


def no_forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """None of the words is there as a whole word."""
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    """The letter, small or capital, is there often, or seldom, enough."""
    return _holds(_count(text, letter), let_relation, let_frequency)


def number_words(text: str, num_words: int, relation: Relation) -> bool:
    """Runs of letters, digits and underscores are enough, or few enough."""
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


def number_sentences(text: str, num_sentences: int, relation: Relation) -> bool:
    """Sentences, by their punctuation, are enough, or few enough."""
    return _holds(_sentences(text), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs with `***` between them."""
    paragraphs = _parts(text, "***")
    return len(paragraphs) == num_paragraphs and all(paragraphs)


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs with empty lines between them, and the n-th, from 1, starts with the word."""
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    start = rf"\W*{re.escape(first_word)}(?!\w)"
    return re.match(start, paragraphs[nth_paragraph - 1], re.IGNORECASE) is not None


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many `[placeholders]`."""
    return sum(bool(inner.strip()) for inner in re.findall(r"\[([^\[\]]+)\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """The marker is there, such as `P.S.` or `P.P.S`."""
    letters = re.findall(r"[^.]+\.?|\.", postscript_marker)  # "P.S." may be written "P. S."
    return re.search(r"\s?".join(map(re.escape, letters)), text, re.IGNORECASE) is not None


def number_bullets(text: str, num_bullets: int) -> bool:
    """Exactly so many Markdown bullets."""
    return len(_BULLET.findall(text)) == num_bullets


def constrained_response(text: str) -> bool:
    """One of the three fixed answers is there."""
    return any(answer in text for answer in _FIXED_ANSWERS)


def number_highlights(text: str, num_highlights: int) -> bool:
    """At least so many `*sections*` or `**sections**` in Markdown."""
    return len(_HIGHLIGHT.findall(text)) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections, each marked by the word and a number."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    """Nothing but JSON, in a code fence or not."""
    return read_json(text, allow_fence=True)[0]


def title(text: str) -> bool:
    """A title in `<<double angular brackets>>`."""
    return any(inner.strip() for inner in re.findall(r"<<([^\n<>]+)>>", text))


def two_responses(text: str) -> bool:
    """Two different responses with `******` between them."""
    responses = _parts(text, "******")
    return len(responses) == 2 and all(responses) and responses[0] != responses[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The request stands first, word by word."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_phrase(text: str, end_phrase: str) -> bool:
    """Nothing comes after the phrase."""
    return text.strip().strip('"').strip().lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """Double quotation marks stand around everything."""
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def capital_words(text: str, capital_frequency: int, capital_relation: Relation) -> bool:
    """Words in all capitals are enough, or few enough."""
    return _holds(sum(word.isupper() for word in _WORD.findall(text)), capital_relation, capital_frequency)


def all_capital(text: str) -> bool:
    """No small letter, and a capital one."""
    return text.isupper()


def all_lowercase(text: str) -> bool:
    """No capital letter, and a small one."""
    return text.islower()


def no_comma(text: str) -> bool:
    """No comma."""
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": all_capital,
    "change_case:english_lowercase": all_lowercase,
    "combination:repeat_prompt": repeat_prompt,
    "combination:two_responses": two_responses,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:json_format": json_format,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:number_bullet_lists": number_bullets,
    "detectable_format:number_highlighted_sections": number_highlights,
    "detectable_format:title": title,
    "keywords:existence": keywords_exist,
    "keywords:forbidden_words": no_forbidden_words,
    "keywords:frequency": keyword_frequency,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "punctuation:no_comma": no_comma,
    "startend:end_checker": end_phrase,
    "startend:quotation": quotation,
}
_ARGUMENTS = {
    name: {
        key: parameter.annotation for key, parameter in inspect.signature(check).parameters.items() if key != "text"
    }
    for name, check in CHECKS.items()
}


def _read(
    row: int, ids: Sequence[str], arguments: Sequence[dict[str, Any] | None] | None
) -> list[tuple[Callable[..., bool], dict[str, Any]]]:
    """The checks of a row, with their arguments; refuses whatever is not as it must be."""
    if isinstance(ids, str):
        raise TypeError(f"`instruction_id_list` must hold a list of ids per row, got {ids!r} in row {row}.")
    arguments = [{}] * len(ids) if arguments is None else arguments
    if len(arguments) != len(ids):
        raise ValueError(
            f"`kwargs` must hold {len(ids)} dicts in row {row}, one per instruction, got {len(arguments)}."
        )
    checks = []
    for name, padded in zip(ids, arguments, strict=True):
        if name in _NEEDS_LANGUAGE_DETECTOR:
            raise ValueError(
                f"`instruction_id_list` must hold supported ids, got {name!r} in row {row}, which needs a language "
                f"detector. Drop such rows; supported are {', '.join(CHECKS)}."
            )
        if name not in CHECKS:
            near = difflib.get_close_matches(str(name), CHECKS, n=3, cutoff=0.4) or list(CHECKS)
            raise ValueError(
                f"`instruction_id_list` must hold ids of IFEval, got {name!r} in row {row}. "
                f"Near it: {', '.join(near)}."
            )
        given = {key: value for key, value in (padded or {}).items() if value is not None}
        wanted = _ARGUMENTS[name]
        if given.keys() != wanted.keys():
            raise ValueError(
                f"`kwargs` of {name} in row {row} must be {', '.join(wanted) or 'empty'}, "
                f"got {', '.join(given) or 'none'}. Correct the data set."
            )
        place = f"of {name} in row {row}"
        checks.append((CHECKS[name], {key: _typed(given[key], kind, key, place) for key, kind in wanted.items()}))
    return checks


def _typed(value: Any, kind: Any, key: str, place: str) -> Any:
    if (
        kind is int
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value >= 0
        and value % 1 == 0
    ):
        return int(value)  # a column with gaps may come as floats
    if kind is Relation and value in get_args(Relation):
        return value
    if kind is str and isinstance(value, str) and value:
        return value
    if (
        kind == list[str]
        and isinstance(value, list | tuple)
        and value
        and all(isinstance(w, str) and w for w in value)
    ):
        return value
    names = {int: "an integer of at least 0", str: "a text", Relation: "'at least' or 'less than'"}
    error = ValueError if kind is Relation or isinstance(value, kind if kind in (int, str) else list) else TypeError
    raise error(f"`{key}` {place} must be {names.get(kind, 'a list of texts')}, got {value!r}. Correct the data set.")


def _holds(count: int, relation: Relation, bound: int) -> bool:
    return count >= bound if relation == "at least" else count < bound


def _count(text: str, part: str) -> int:
    return text.casefold().count(part.casefold())


def _parts(text: str, separator: str) -> list[str]:
    """What stands between separators; nothing before the first or after the last is no part."""
    parts = [part.strip() for part in text.split(separator)]
    first, last = (0 if parts[0] else 1), (len(parts) if parts[-1] else len(parts) - 1)
    return parts[first:last]


def _sentences(text: str) -> int:
    """Stretches with a word in them that end in . ! ? or the text's end; numbers of lists and abbreviations do not."""
    count, has_word = 0, False
    for token in _LIST_NUMBER.sub(" ", text).split():
        has_word = has_word or _WORD.search(token) is not None
        core = token.rstrip(_CLOSING_MARKS)
        if has_word and core.endswith(_SENTENCE_ENDS) and core.lower() not in _ABBREVIATIONS:
            count, has_word = count + 1, False
    return count + has_word


def _loose_versions(text: str) -> Iterator[str]:
    lines = text.split("\n")
    for first in (0, 1):
        for last in (len(lines), len(lines) - 1):
            version = "\n".join(lines[first:last]).strip() if first or last < len(lines) else text
            yield version
            yield version.replace("*", "")
