"""Stories: the parser inverts the writer, nothing else parses, and probabilities are those of the grammar."""

import math
import random
import re
from collections import Counter

import pytest

from hf_ext.tasks import stories


PROMPT = "Tell me a story about Mia in the park."
TEXT = (
    "On a windy morning, Mia was in the park with 7 shells. There she saw Tom, who gave her 4 shells as a gift. "
    "Now she had 11 shells. That made her thankful. In the end, Mia took the 11 shells to the zoo."
)
VERBS = {
    "found": "find",
    "lost": "lose",
    "shared": "give",
    "met": "meet",
    "built": "build",
    "made a little": "build",
    "hid": "hide",
    "counted": "count",
}


def latents_by_looking(text):
    """The latents at the end by what is special to them, without the grammar."""

    def words(allowed):
        return [word for word in re.findall(r"\w+", text) if word in allowed]

    numbers = re.findall(r"\d+", text)
    told = [event for verb, event in VERBS.items() if re.search(rf"\b{verb}\b", text)]
    if not told:
        # "gave" alone: the one who gives stands before it
        giver_is_who = re.search(rf"(so {words(stories.NAMES)[0]}|In the \w+, s?he) gave", text)
        told = ["give" if giver_is_who else "get"]
    returned = "lose" in told and "find" in told
    return {
        "who": words(stories.NAMES)[0],
        "where": words(stories.PLACES)[-1],
        "object": words(stories.OBJECTS)[0],
        # the last number is the count, or what came back and is to be added
        "number": str(int(numbers[-1]) + int(numbers[-2])) if returned else numbers[-1],
        "event": "find" if returned else told[0],
        "mood": words(stories.MOODS.values())[-1],
    }


def sentences(text):
    return re.findall(r"[^.]+\.", text)


@pytest.fixture(scope="module")
def sample():
    return [stories.sample(random.Random(seed)) for seed in range(2000)]


def test_parsing_a_sampled_story_recovers_all_of_it(sample):
    for story in sample:
        parsed = stories.parse(story.prompt, story.text)
        assert parsed.log_prob == pytest.approx(story.log_prob, abs=1e-9)
        assert parsed._replace(log_prob=story.log_prob) == story


def test_the_latents_are_those_one_finds_by_looking(sample):
    for story in sample:
        assert story.latents == latents_by_looking(story.text), story.text


def test_what_parses_after_a_corruption_is_another_story_told_with_its_own_latents(sample):
    rng = random.Random(0)
    vocabulary = sorted(stories.VOCABULARY)
    parsed = 0
    for story in sample:
        text = story.text
        if rng.random() < 0.7:
            old = rng.choice(list(re.finditer(r"\w+", text)))
            # half of the time a word of the same kind, which only the facts can refuse
            kinds = [kind for kind in (*stories.WORDS.values(), stories.MOODS.values()) if old[0] in kind]
            new = rng.choice([*kinds[0]]) if kinds and rng.random() < 0.5 else rng.choice(vocabulary)
            text = text[: old.start()] + new + text[old.end() :]
        else:
            parts = [sentence.strip() for sentence in sentences(text)]
            first, second = rng.sample(range(len(parts)), 2)
            if rng.random() < 0.5:
                parts[first], parts[second] = parts[second], parts[first]
            else:
                del parts[first]
            text = " ".join(parts)
        try:
            read = stories.parse(story.prompt, text)
        except ValueError:
            continue
        parsed += 1
        assert read.text == text
        assert read.latents == latents_by_looking(text)
        assert read.spans[0].start < read.spans[-1].end <= len(text)
    # most corruptions break the story, some do not: both branches ran
    assert 20 < parsed < 500


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("There she saw", "There he saw", "pronoun must be 'she', not 'he'"),
        ("gave her", "gave him", "pronoun must be 'her', not 'him'"),
        ("Now she had 11", "Now she had 12", "number must be '11', not '12'"),
        ("4 shells", "4 coins", "object must be 'shells', not 'coins'"),
        ("thankful", "sad", "mood must be 'thankful', not 'sad'"),
        ("in the park with", "in the zoo with", "place must be 'park', not 'zoo'"),
        ("to the zoo", "to the park", "place must be .* not 'park'"),
        ("saw Tom", "saw Mia", "other character must be .* not 'Mia'"),
        ("the end, Mia", "the end, Tom", "main character must be 'Mia', not 'Tom'"),
        ("with 7 shells", "with 99 shells", "number must be .* not '99'"),
        ("a gift", "a dragon", "'dragon' is not a word of the grammar"),
        ("Now she had", "Now had she", "no template has this form"),
        (" Now she had 11 shells.", "", "'That made her thankful.': it cannot stand here, where 'more' is due"),
        (" In the end", "  In the end", "single spaces"),
        (". In the end", ".In the end", "a space between two sentences"),
        (" to the zoo.", " to the zoo", "no template has this form"),
        ("to the zoo.", "to the zoo. Now she had 11 shells.", "the story is over"),
        (TEXT[54:], "", "is missing"),
        (TEXT, "", "is missing"),
    ],
)
def test_a_broken_story_is_refused_with_the_sentence_and_the_reason(old, new, reason):
    stories.parse(PROMPT, TEXT)
    assert old in TEXT
    with pytest.raises(ValueError, match=reason):
        stories.parse(PROMPT, TEXT.replace(old, new))


@pytest.mark.parametrize(
    "prompt", ["", "Tell me a story about Bob.", "Tell me a joke.", "Tell me a story about Tom.", "Tell me a story"]
)
def test_a_prompt_that_is_none_or_asks_for_another_story_is_refused(prompt):
    with pytest.raises(ValueError, match="`(prompt|text)` must be of the story grammar"):
        stories.parse(prompt, TEXT)


def test_log_prob_of_a_story_is_the_product_of_its_choices_counted_by_hand():
    story = stories.parse(PROMPT, TEXT)
    prompt = 4 * 24 * 16
    # brings the objects or not, template, weather, time, count, object; who and where were asked for
    opening = 2 * 4 * 6 * 4 * 15 * 24
    # half of the stories move first, 8 events, template, who else, 2 to 13 more
    event = 2 * 8 * 3 * 23 * 12
    # templates of count and of mood; two thirds close, template, another place
    rest = 3 * 4 * (3 / 2 * 4 * 15)
    assert story.prompt_log_prob == pytest.approx(-math.log(prompt), abs=1e-9)
    assert story.log_prob == pytest.approx(-math.log(prompt * opening * event * rest), abs=1e-9)


@pytest.mark.parametrize(
    ("event", "follows"),
    [
        ("lose", {"start": ("bring",), "bring": ("lose", "move"), "sad": ("end", "close", "return")}),
        ("meet", {"start": ("arrive",), "have": ("meet",), "mood": ("end", "close")}),
    ],
)
def test_in_a_small_world_no_two_derivations_tell_the_same_and_probabilities_sum_to_one(event, follows, monkeypatch):
    small = {
        "who": ("Mia",),
        "someone": ("Mia", "Tom"),
        "place": ("park", "zoo"),
        "things": ("keys",),
        "time": ("day",),
        "weather": ("cold",),
        "building": ("boat",),
        "spot": ("near a tree",),
    }
    for slot, words in small.items():
        monkeypatch.setitem(stories.WORDS, slot, words)
    monkeypatch.setattr(stories, "PLACES", small["place"])
    monkeypatch.setattr(stories, "_numbers", lambda first, last: [str(last)])
    monkeypatch.setattr(stories, "_PROMPTS", stories._PROMPTS[:1])
    for family, families in {**follows, "move": (event,)}.items():
        monkeypatch.setitem(stories.FOLLOWS, family, families)

    class EveryChoice(random.Random):
        """Takes the choices of `path`, a list of (index, options), and goes on with the first ones."""

        def __init__(self):
            self.path, self.at = [], 0

        def choice(self, options):
            if self.at == len(self.path):
                self.path.append((0, len(options)))
            self.at += 1
            return options[self.path[self.at - 1][0]]

        def next_path(self):
            while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
                self.path.pop()
            if self.path:
                index, options = self.path.pop()
                self.path.append((index + 1, options))
            self.at = 0
            return bool(self.path)

    rng, seen, total = EveryChoice(), set(), 0.0
    while True:
        story = stories.sample(rng)
        assert story.text not in seen
        seen.add(story.text)
        assert math.exp(story.log_prob) == pytest.approx(math.prod(1 / options for _, options in rng.path))
        total += math.exp(story.log_prob)
        if not rng.next_path():
            break
    assert len(seen) > 5000
    # rounding of 10,000 summands
    assert total == pytest.approx(1, abs=1e-9)


def test_first_sentences_come_as_often_as_their_probability_says():
    rng = random.Random(3)
    n = 5000
    counts = Counter()
    for _ in range(n):
        text = stories.sample(rng).text
        counts[re.match(r"(One|On a|It was a|\w+ (came|spent|carried))", text)[0].split()[-1]] += 1
    # two families with four templates each, one opening of each kind, "came" and "carried" apart
    expected = {"One": 1 / 4, "a": 1 / 2, "came": 1 / 8, "carried": 1 / 8}
    for opening, share in expected.items():
        # 5 standard deviations of a binomial
        assert counts[opening] / n == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / n))


def test_spans_and_token_latents_of_a_story_read_by_hand():
    story = stories.parse(PROMPT, TEXT)
    told = [(story.text[: span.start + 1].split()[-1], span.latent, span.value) for span in story.spans]
    assert told == [
        ("Mia", "who", "Mia"),
        ("park", "where", "park"),
        ("7", "number", "7"),
        ("shells", "object", "shells"),
        ("gave", "event", "get"),
        ("4", "number", "11"),
        ("thankful", "mood", "thankful"),
        ("zoo", "where", "zoo"),
    ]
    ends = {(span.latent, span.value): span.end for span in story.spans}
    assert ends["number", "7"] == TEXT.index("4")
    assert ends["where", "park"] == TEXT.index("zoo") + 2
    assert {ends[key] for key in ends if key not in (("number", "7"), ("where", "park"))} == {len(TEXT)}

    # tokens as a byte-level BPE cuts them, with a special token at each end; "park" in two
    offsets = [(0, 0), *((m.start(), m.end()) for m in re.finditer(r" ?pa|rk| ?\w+|[.,]", TEXT)), (0, 0)]
    latents = dict(zip(offsets, stories.token_latents(story, offsets), strict=True))
    park = TEXT.index("park")
    assert latents[0, 0] == {}
    assert latents[0, 2] == {}
    assert latents[park - 1, park + 2] == {"who": "Mia"}
    assert latents[park + 2, park + 4] == {"who": "Mia", "where": "park"}
    four = TEXT.index("4")
    assert latents[four - 5, four - 1]["number"] == "7"
    assert latents[four - 1, four + 1]["number"] == "11"
    assert latents[len(TEXT) - 1, len(TEXT)] == story.latents


def test_what_was_lost_and_returned_counts_again_and_makes_happy():
    text = (
        "Leo came to the attic one cold day. He had 9 bells in a small bag. But he fell near the well and lost 3 of "
        "them. Only 6 bells were left. That made him sad. Then Iris found the 3 bells, and Leo was happy again."
    )
    story = stories.parse("Tell me a story about bells.", text)
    assert story.latents == {
        "who": "Leo",
        "where": "attic",
        "object": "bells",
        "number": "9",
        "event": "find",
        "mood": "happy",
    }
    values = [span.value for span in story.spans if span.latent in ("number", "event", "mood")]
    assert values == ["9", "lose", "6", "sad", "find", "9", "happy"]


def test_stories_have_the_size_that_a_small_model_needs(sample):
    assert {len(sentences(story.text)) for story in sample} == {4, 5, 6, 7}
    entropy = -sum(story.log_prob for story in sample) / len(sample)
    assert 25 < entropy < 40
    assert 40 < sum(len(story.text.split()) for story in sample) / len(sample) < 70
    used = {word for story in sample for word in re.findall(r"\w+", f"{story.prompt} {story.text}")}
    assert used <= stories.VOCABULARY
    assert len(stories.VOCABULARY) < 400
    assert {story.latents["event"] for story in sample} == set(stories.EVENTS)
    assert {story.latents["who"] for story in sample} == set(stories.NAMES)


def test_an_opening_family_has_thousands_of_sentences():
    rng = random.Random(5)
    openings = {sentences(stories.sample(rng).text)[0] for _ in range(4000)}
    assert len(openings) > 2000


def test_dataset_rows_are_seeded_chats_with_what_is_known_of_them():
    rows = stories.dataset(20, seed=4)
    assert rows == stories.dataset(20, seed=4) != stories.dataset(20, seed=5)
    for row in rows:
        (user,), (assistant,) = row["prompt"], row["completion"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        story = stories.parse(user["content"], assistant["content"])
        assert row["latents"] == story.latents
        assert row["log_prob"] == pytest.approx(story.log_prob, abs=1e-9)
        assert row["prompt_log_prob"] == pytest.approx(story.prompt_log_prob, abs=1e-9)
        assert stories.messages(story.prompt, story.text) == [user, assistant]
        assert stories.messages(story.prompt) == [user]


def test_the_story_of_the_documentation_is_one():
    text = " ".join(re.search(r"\n    (On a .*?)\n\n", stories.__doc__, re.DOTALL)[1].split())
    assert stories.parse("Tell me a story.", text).latents["number"] == "11"
