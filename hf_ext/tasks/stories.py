"""Micro-stories with known answers: who writes them well keeps track of a small world over several sentences.

    On a windy morning, Mia was in the park with 7 shells. There she saw Tom, who gave her 4 shells as a gift. Now she
    had 11 shells. That made her thankful.

The pronoun follows from the name, the place is the last one reached, the object is the first one named, counts add up,
and the mood follows from the event: so each sampled story is checked exactly, and for each of its tokens it is known
who, where, what, how many, which event and which mood hold. The probability of a story is known too, and with it the
loss of a perfect model.

- One table, `TEMPLATES`, serves the writer and the reader: both walk it with `_Telling.add`, one drawing words, the
  other taking them from the text. There is no second copy of the grammar.
- A slot, {in braces}, has options that depend on what has been told; each is equally likely. A fact that is settled
  leaves one option, so agreement costs nothing and disagreement has probability 0. [lose:lost] marks the words that
  tell the event.
- Choices are made in the order of the text and never yield the same sentence twice, so a text has one derivation and
  the product of its choices is the probability of the text.

Long for a file of ours, as a third of it is the table.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HE = _words("Tom Ben Leo Max Sam Finn Noah Hugo Otto Paul Karl Emil")
SHE = _words("Mia Ada Nora Ella Ruth Lena Iris Clara Zoe Maya Rosa Tess")
NAMES = HE + SHE
PLACES = _words(
    "park garden forest kitchen library market school barn museum village attic cave meadow castle bakery zoo"
)
OBJECTS = _words(
    "shells stones buttons ribbons marbles acorns feathers coins candles pencils books apples "
    "cookies keys kites balls bells cards flowers lemons cups spoons stamps beads"
)
MOODS = {
    "find": "happy",
    "lose": "sad",
    "get": "thankful",
    "give": "glad",
    "meet": "excited",
    "build": "proud",
    "hide": "nervous",
    "count": "calm",
}
EVENTS = tuple(MOODS)
LATENTS = ("who", "where", "object", "number", "event", "mood")

TIMES = ("morning", "afternoon", "evening", "day")
WEATHERS = ("sunny", "rainy", "windy", "cold", "warm", "quiet")
BUILDINGS = ("tower", "bridge", "boat", "house")
SPOTS = tuple(
    f"{where} {what}"
    for where in ("behind", "near", "next to")
    for what in ("a tree", "an old wall", "a big door", "the well")
)

# what a story may be asked for
PROMPTS = (
    "Tell me a story.",
    "Tell me a story about {who}.",
    "Tell me a story about {who} in the {place}.",
    "Tell me a story about {things}.",
)
TEMPLATES = {
    "arrive": (
        "One {weather} {time}, {who} went to the {place}.",
        "On a {weather} {time}, {who} walked alone to the {place}.",
        "{who} came to the {place} one {weather} {time}.",
        "It was a {weather} {time}, and {who} was in the {place}.",
    ),
    "bring": (
        "One {weather} {time}, {who} took {n} {things} to the {place}.",
        "On a {weather} {time}, {who} was in the {place} with {n} {things}.",
        "{who} carried {n} {things} to the {place} one {weather} {time}.",
        "It was a {weather} {time}, and {who} brought {n} {things} to the {place}.",
    ),
    "have": (
        "{He} had {n} {things} in a small bag.",
        "In {his} pocket {he} had {n} {things}.",
        "{who} had {n} {things} and looked at all of them.",
        "{He} carried a box with {n} {things} in it.",
    ),
    "move": (
        "Then {he} went to the {place} with the {objects}.",
        "After that, {who} carried the {objects} to the {place}.",
        "Soon {he} left the {where} and took them to the {place}.",
        "A little later {he} was in the {place}.",
    ),
    "find": (
        "{He} looked around and [find:found] {more} more {objects} {spot}.",
        "In the {where}, {he} [find:found] {more} more of them {spot}.",
        "{who} was lucky and [find:found] {more} {objects} {spot}.",
    ),
    "lose": (
        "In the {where}, {he} [lose:lost] {fewer} of the {objects}.",
        "{who} ran too fast and [lose:lost] {fewer} of the {objects} {spot}.",
        "But {he} fell {spot} and [lose:lost] {fewer} of them.",
    ),
    "get": (
        "{someone} came by and [get:gave] {him} {more} more {objects}.",
        "There {he} saw {someone}, who [get:gave] {him} {more} {objects} as a gift.",
        "In the {where}, {someone} smiled and [get:gave] {who} {more} more of them.",
    ),
    "give": (
        "{someone} had no {objects}, so {who} [give:gave] {friend_him} {fewer} of them.",
        "{He} saw {someone} {spot} and [give:shared] {fewer} {objects} with {friend_him}.",
        "In the {where}, {he} [give:gave] {someone} {fewer} of the {objects}.",
    ),
    "meet": (
        "In the {where}, {he} [meet:met] {someone}, who brought {more} more {objects}.",
        "There {who} [meet:met] {someone}, and {friend_he} came with {more} {objects} too.",
        "{He} [meet:met] {someone} {spot}, and {friend_he} added {more} more {objects}.",
    ),
    "build": (
        "{He} [build:built] a {building} out of {fewer} of the {objects}.",
        "{who} sat down {spot} and [build:built] a {building} with {fewer} {objects}.",
        "In the {where}, {he} [build:made] a little {building} from {fewer} of them.",
    ),
    "hide": (
        "{He} [hide:hid] {fewer} of the {objects} {spot}.",
        "{who} wanted a secret and [hide:hid] {fewer} of them {spot}.",
        "In the {where}, {he} [hide:hid] {fewer} {objects} {spot}.",
    ),
    "count": (
        "{He} sat down {spot} and [count:counted] the {objects} with care.",
        "In the {where}, {he} [count:counted] all of the {objects}.",
        "{who} [count:counted] the {objects} two times {spot}.",
    ),
    "more": (
        "Now {he} had {number} {objects}.",
        "So {who} had {number} {objects} in all.",
        "That made {number} {objects}.",
    ),
    "left": (
        "Now {he} had {number} {objects} left.",
        "So {who} had {number} {objects} left.",
        "Only {number} {objects} were left.",
    ),
    "together": (
        "Together they had {number} {objects}.",
        "Now {who} and {someone} had {number} {objects}.",
        "So there were {number} {objects} for the two of them.",
    ),
    "same": (
        "There were {number} {objects}.",
        "{He} still had {number} {objects}.",
        "Yes, {who} had {number} {objects}.",
    ),
    "mood": (
        "{He} was very {mood}.",
        "{who} felt {mood} for the rest of the {time}.",
        "That made {him} {mood}.",
        "{He} was {mood} on this {weather} {time}.",
    ),
    "close": (
        "Then {he} left the {where} and went home with the {objects}.",
        "In the end, {who} took the {number} {objects} to the {place}.",
        "{He} told {someone} about the {objects}, and {friend_he} laughed.",
        "Later {who} and {someone} went to the {place} and talked about the {objects}.",
    ),
    "return": (
        "Then {someone} [find:found] the {back} {objects}, and {who} was {mood} again.",
        "But {someone} [find:found] all {back} of them {spot}, and {he} felt {mood}.",
        "{someone} helped {him} and [find:found] the {back} {objects}, so now {he} was {mood}.",
    ),
}
# what may follow what; a family that stands twice is twice as likely
FOLLOWS = {
    "start": ("arrive", "bring"),
    "arrive": ("have",),
    "have": (*EVENTS, *["move"] * len(EVENTS)),
    "bring": (*EVENTS, *["move"] * len(EVENTS)),
    "move": EVENTS,
    **dict.fromkeys(("find", "get"), ("more",)),
    **dict.fromkeys(("lose", "give", "build", "hide"), ("left",)),
    "meet": ("together",),
    "count": ("same",),
    **dict.fromkeys(("more", "left", "together", "same"), ("mood",)),
    "mood": ("end", "close", "close"),
    "sad": ("end", "close", "return", "return"),
    "close": ("end",),
    "return": ("end",),
}

# the words of a slot whose fact has not been told yet
WORDS = {
    "who": NAMES,
    "someone": NAMES,
    "place": PLACES,
    "things": OBJECTS,
    "time": TIMES,
    "weather": WEATHERS,
    "building": BUILDINGS,
    "spot": SPOTS,
}
# the fact that a slot tells or repeats, where it is not called like the slot
FACTS = {
    "someone": "friend",
    "place": "where",
    "things": "object",
    "objects": "object",
    "n": "number",
    "back": "change",
}
COUNTS = ("n", "more", "fewer", "number", "back")
PRONOUNS = {
    "he": ("who", "he", "she"),
    "He": ("who", "He", "She"),
    "him": ("who", "him", "her"),
    "his": ("who", "his", "her"),
    "friend_he": ("friend", "he", "she"),
    "friend_him": ("friend", "him", "her"),
}


def _vocabulary() -> frozenset[str]:
    told = [re.sub(r"\{\w+\}|\[\w+:", " ", line) for lines in (PROMPTS, *TEMPLATES.values()) for line in lines]
    chosen = [*MOODS.values(), *(str(n) for n in range(2, 21)), *(w for words in WORDS.values() for w in words)]
    pronouns = [word for _, he, she in PRONOUNS.values() for word in (he, she)]
    return frozenset(re.findall(r"\w+", " ".join([*told, *chosen, *pronouns])))


VOCABULARY = _vocabulary()


class Span(NamedTuple):
    """
    Where one latent has one value.

    Attributes:
        start (`int`): Index in the story's text of the last character of the words that tell the value.
        end (`int`): Index after the last character for which it holds: where the next value begins, or the end.
        latent (`str`): One of `LATENTS`.
        value (`str`): The value.
    """

    start: int
    end: int
    latent: str
    value: str


class Story(NamedTuple):
    """
    A prompt and the story that answers it.

    Attributes:
        prompt (`str`): What the user says.
        text (`str`): The story, 4 to 7 sentences.
        log_prob (`float`): Natural logarithm of the probability of (`prompt`, `text`) under the grammar.
        prompt_log_prob (`float`): That of `prompt`; the difference is the story's, given the prompt.
        latents (`dict[str, str]`): The value of each of `LATENTS` at the end.
        spans (`list[Span]`): Where each latent has which value, by their starts.
    """

    prompt: str
    text: str
    log_prob: float
    prompt_log_prob: float
    latents: dict[str, str]
    spans: list[Span]


def sample(rng: random.Random) -> Story:
    """A random story: on average 35 nats and 50 words."""

    def pick(slot: str, options: Sequence[str]) -> str:
        return rng.choice(options)

    asked = _Telling({})
    asked.add(rng.choice(_PROMPTS), pick)
    asked.log_prob -= math.log(len(_PROMPTS))
    telling, family = _Telling(asked.facts), "start"
    while (family := rng.choice(families := telling.follows(family))) != "end":
        telling.add(rng.choice(_TEMPLATES[family]), pick)
        telling.log_prob += _log(families, family)
    telling.log_prob += _log(families, "end")
    return _story(asked, telling)


def parse(prompt: str, text: str) -> Story:
    """
    The inverse of `sample`: the story that has this prompt and this text.

    Args:
        prompt (`str`): The user's turn.
        text (`str`): The answer.

    Raises:
        ValueError: if the grammar cannot answer `prompt` with `text`; names the sentence and what is wrong with it.
    """
    asked, _ = _read(_Telling({}), {"prompt": _PROMPTS}, prompt, "`prompt`")
    asked.log_prob -= math.log(len(_PROMPTS))
    telling, family = _Telling(asked.facts), "start"
    if text != " ".join(text.split()):
        raise ValueError(f"`text` must have single spaces and no other white space, got {text!r}.")
    for sentence in re.findall(r"[^.]+\.?|\.", text):
        families = telling.follows(family)
        allowed = {name: _TEMPLATES[name] for name in families if name != "end"}
        if not allowed:
            raise ValueError(f"`text` must end before {sentence.strip()!r}: the story is over.")
        telling, family = _read(telling, allowed, sentence.removeprefix(" "), "`text`")
        telling.log_prob += _log(families, family)
    families = telling.follows(family)
    if "end" not in families:
        raise ValueError(
            f"`text` must go on after {telling.text[-60:]!r}: a sentence of the kind {_either(families)} is missing."
        )
    telling.log_prob += _log(families, "end")
    if telling.text != text:
        raise ValueError(f"`text` must have a space between two sentences, got {text!r}.")
    return _story(asked, telling)


def token_latents(story: Story, offsets: Sequence[tuple[int, int]]) -> list[dict[str, str]]:
    """
    The latents in force at the end of each token, thus what a model can know after it has read the token.

    Args:
        story (`Story`): The story.
        offsets (sequence of `(int, int)`): Start and end of each token in `story.text`, as tokenizers return them in
            `offset_mapping`. Empty tokens, (0, 0), have no latents.

    Returns:
        `list[dict[str, str]]`: latent -> value for each token; a latent that has not been told yet is absent.
    """
    return [
        {span.latent: span.value for span in story.spans if span.start < end <= span.end} for start, end in offsets
    ]


def messages(prompt: str, text: str | None = None) -> list[dict[str, str]]:
    """The chat: the user's turn and, if `text` is given, the assistant's."""
    chat = [{"role": "user", "content": prompt}]
    return chat if text is None else [*chat, {"role": "assistant", "content": text}]


def dataset(size: int, seed: int = 0) -> list[dict]:
    """
    `size` random stories as rows of a chat data set.

    Returns:
        `list[dict]`: with `prompt` and `completion` (lists of messages), `latents`, `log_prob` and `prompt_log_prob`
        (see `Story`).
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        story = sample(rng)
        user, assistant = messages(story.prompt, story.text)
        rows.append(
            {
                "prompt": [user],
                "completion": [assistant],
                "latents": story.latents,
                "log_prob": story.log_prob,
                "prompt_log_prob": story.prompt_log_prob,
            }
        )
    return rows


class _Template(NamedTuple):
    """Parts ("text" | "slot" | event, words), and a pattern that takes any word or number for a slot."""

    parts: tuple[tuple[str, str], ...]
    pattern: re.Pattern


class _Telling:
    """What has been told: its text, its facts, where each fact was told, and the probability of the choices."""

    def __init__(self, asked: dict[str, str]) -> None:
        self.asked = asked
        self.facts: dict[str, str] = {}
        self.text = ""
        self.marks: list[tuple[int, str, str]] = []
        self.log_prob = 0.0

    def copy(self) -> "_Telling":
        other = _Telling(self.asked)
        other.facts, other.text = dict(self.facts), self.text
        other.marks, other.log_prob = list(self.marks), self.log_prob
        return other

    def follows(self, family: str) -> tuple[str, ...]:
        return FOLLOWS["sad" if family == "mood" and self.facts["event"] == "lose" else family]

    def add(self, template: _Template, pick: Callable[[str, Sequence[str]], str]) -> None:
        """Writes one sentence; `pick(slot, options)` chooses."""
        self.text += " " if self.text else ""
        for kind, words in template.parts:
            if kind == "slot":
                options = self.options(words)
                self.log_prob -= math.log(len(options))
                value = pick(words, options)
                self.text += value
                self.settle(words, value)
            else:
                self.text += words
                if kind != "text":
                    self.know("event", kind)

    def options(self, slot: str) -> Sequence[str]:
        """The words that may fill a slot now, all equally likely."""
        facts, fact = self.facts, FACTS.get(slot, slot)
        # all counts, before and after, stay in 2 to 20
        if slot == "n":
            return _numbers(4, 18)
        if slot == "more":
            return _numbers(2, 20 - int(facts["number"]))
        if slot == "fewer":
            return _numbers(2, int(facts["number"]) - 2)
        if slot == "place":
            told = "where" in facts or "where" not in self.asked
            return [place for place in PLACES if place != facts.get("where")] if told else [self.asked["where"]]
        if slot == "mood":
            return [MOODS[facts["event"]]]
        if slot in PRONOUNS:
            person, he, she = PRONOUNS[slot]
            return [she if facts[person] in SHE else he]
        known = facts.get(fact) or self.asked.get(fact)
        return [known] if known else [word for word in WORDS[slot] if word != facts.get("who")]

    def settle(self, slot: str, value: str) -> None:
        """Takes note of what a filled slot tells."""
        if slot in ("more", "fewer", "back"):
            self.facts["change"] = value
            change = -int(value) if slot == "fewer" else int(value)
            self.know("number", str(int(self.facts["number"]) + change))
        elif slot not in PRONOUNS and slot not in ("spot", "building"):
            self.know(FACTS.get(slot, slot), value)

    def know(self, fact: str, value: str) -> None:
        if fact in LATENTS and self.facts.get(fact) != value:
            self.marks.append((len(self.text) - 1, fact, value))
        self.facts[fact] = value


def _log(families: Sequence[str], family: str) -> float:
    """Of the probability of `family` and of one of its templates; the end has none."""
    templates = len(_TEMPLATES[family]) if family != "end" else 1
    return math.log(families.count(family) / len(families) / templates)


class _Wrong(Exception):
    """A word that its slot does not allow."""


def _meaning(slot: str) -> str:
    if slot in PRONOUNS:
        return "pronoun"
    return {"who": "main character", "friend": "other character", "where": "place", "change": "count"}.get(
        fact := FACTS.get(slot, slot), "count" if slot in ("more", "fewer") else fact
    )


def _numbers(first: int, last: int) -> list[str]:
    return [str(n) for n in range(first, last + 1)]


def _compile(template: str) -> _Template:
    parts: list[tuple[str, str]] = []
    pattern = ""
    for part in re.split(r"(\{\w+\}|\[\w+:[^\]]+\])", template):
        if part.startswith("{"):
            slot = part[1:-1]
            parts.append(("slot", slot))
            pattern += f"({'|'.join(SPOTS)})" if slot == "spot" else r"(\d+)" if slot in COUNTS else r"(\w+)"
        else:
            kind, words = part[1:-1].split(":") if part.startswith("[") else ("text", part)
            parts.append((kind, words))
            pattern += re.escape(words)
    return _Template(tuple(parts), re.compile(pattern))


_PROMPTS = tuple(_compile(prompt) for prompt in PROMPTS)
_TEMPLATES = {family: tuple(_compile(template) for template in templates) for family, templates in TEMPLATES.items()}


def _read(
    telling: _Telling, allowed: dict[str, tuple[_Template, ...]], sentence: str, argument: str
) -> tuple[_Telling, str]:
    """`telling` with `sentence` added, and the one family of `allowed` that has it."""
    found, complaints = [], []
    for family, templates in allowed.items():
        for template in templates:
            if match := template.pattern.fullmatch(sentence):
                words, attempt = list(match.groups()), telling.copy()

                def pick(slot: str, options: Sequence[str], words: list[str] = words) -> str:
                    if words[0] not in options:
                        raise _Wrong(f"the {_meaning(slot)} must be {_either(options)}, not {words[0]!r}")
                    return words.pop(0)

                try:
                    attempt.add(template, pick)
                    found.append((attempt, family))
                except _Wrong as error:
                    complaints.append((len(words), str(error)))
    if found:
        assert len(found) == 1, f"two derivations of {sentence!r}"
        return found[0]
    # of several readings, the one that went furthest is the one that was meant
    if complaints:
        reason = min(complaints)[1]
    elif unknown := [word for word in re.findall(r"\w+", sentence) if word not in VOCABULARY]:
        reason = f"{unknown[0]!r} is not a word of the grammar"
    elif any(t.pattern.fullmatch(sentence) for templates in _TEMPLATES.values() for t in templates):
        reason = f"it cannot stand here, where {_either(tuple(allowed))} is due"
    else:
        reason = "no template has this form"
    raise ValueError(f"{argument} must be of the story grammar, got {sentence!r}: {reason}.")


def _either(options: Sequence[str]) -> str:
    options = list(dict.fromkeys(options))
    return f"{', '.join(options[:-1])} or {options[-1]}" if len(options) > 1 else repr(options[0])


def _story(asked: _Telling, telling: _Telling) -> Story:
    ends: dict[str, int] = {}
    spans = []
    for start, latent, value in reversed(telling.marks):
        spans.append(Span(start, ends.get(latent, len(telling.text)), latent, value))
        ends[latent] = start
    latents = {latent: telling.facts[latent] for latent in LATENTS}
    log_prob = asked.log_prob + telling.log_prob
    return Story(asked.text, telling.text, log_prob, asked.log_prob, latents, spans[::-1])
