"""What the steering page computes: vectors from two lists or an adapter, both texts token by token, what vectors say.

- Whatever steers does so in a twin of the model: modules of its own around the same weights. So windows cannot mix
  vectors or scales, the model of the other pages is never touched, and the step that a stopped run has left behind
  changes nobody's text. No lock is needed, and a twin takes hundredths of a second and no memory to speak of.
- The base's text is that of the model itself. So at scale 0 the page compares two models, and is right because adding
  zeros changes no bit.
"""

import copy
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from store import Loaded, Token
from torch import nn

from hf_ext import tiny
from hf_ext.analysis.vector_lens import mean_effects, vector_lens
from hf_ext.sites import anatomy
from hf_ext.steering import add_vectors, contrastive_vectors, read_vectors
from hf_ext.steering.vectors import stream_vectors


LISTS, ADAPTER, BUNDLED = "two lists of prompts", "an adapter", "SmolLM2, trained on sums"
BUNDLED_FOLDER = Path(tiny.__file__).with_name("steering-smollm2")
METHODS = [("mean difference", "mean_difference"), ("PCA", "pca")]
MAX_TOKENS = 4096  # of both lists together
STRENGTH = 2.0  # sum of the scales over the layers that two lists steer: about where SmolLM2 still writes well
STEP = 0.05  # of the scale
WORDS = 6  # tokens at each end of a vector's lens
EFFECT_TOKENS = 24  # of the text that a vector's effect is measured on
FILES = ["adapter_config.json", "adapter_model.safetensors"]
KINDS = "a folder of a steering or BEFT adapter, a .npy or .gguf file, or a Hub id"

Vectors = dict[int, torch.Tensor]
Row = dict[str, Any]

PRESETS = {
    "Joyful, not sad": (
        "I feel wonderful today!\nWhat a happy day!\nThis is the best news I have ever heard.\nI love this place.\n"
        "She smiled with joy.\nThey laughed and danced all night.",
        "I feel terrible today.\nWhat a sad day.\nThis is the worst news I have ever heard.\nI hate this place.\n"
        "She cried with grief.\nThey wept and mourned all night.",
    ),
    "Formal, not casual": (
        "We would be most grateful for your assistance in this matter.\n"
        "I regret to inform you that the meeting has been postponed.\n"
        "Please accept our sincere apologies for the inconvenience.\n"
        "The committee respectfully requests that you attend.\n"
        "It is a great pleasure to make your acquaintance.\n"
        "One must consider the matter with appropriate care.",
        "We'd love it if you could help us out with this thing.\n"
        "Hey, so the meeting got pushed back, sorry.\n"
        "Sorry about that, my bad, won't happen again.\n"
        "The guys really want you to come hang out.\n"
        "Hey, nice to meet you, what's up?\n"
        "Yeah, just chill and don't mess it up, okay?",
    ),
}


@dataclass(frozen=True)
class Settings:
    """What the fields of the page hold."""

    model: str
    source: str
    towards: str
    away: str
    method: str
    adapter: str
    scale: float
    first: int
    last: int
    prompt: str
    chat: bool
    max_new_tokens: int

    @property
    def key(self) -> tuple[str, ...]:
        """What the vectors depend on."""
        where = (self.towards, self.away, self.method) if self.source == LISTS else (self.adapter,)
        return (self.model, self.source, *where)

    def ids(self, loaded: Loaded) -> list[int]:
        """The prompt as tokens."""
        if not self.prompt.strip():
            raise ValueError("The prompt must have a word, got none. Write one.")
        chat = [{"role": "user", "content": self.prompt}]
        return loaded.chat_ids(chat) if self.chat else loaded.text_ids(self.prompt)

    def vectors(self, loaded: Loaded) -> Vectors:
        """Layer -> vector of all that the source has; the errors say what is wrong with it."""
        if self.source == LISTS:
            found = from_lists(loaded, self.towards, self.away, self.method)
        else:
            found = from_adapter(loaded, str(BUNDLED_FOLDER) if self.source == BUNDLED else self.adapter)
        layers = anatomy(loaded.model).num_layers
        if (outside := max(found)) >= layers:
            raise ValueError(
                f"The vectors must be for layers 0 to {layers - 1} of {self.model}, got one for layer {outside}. "
                "Load the model that they were made for."
            )
        return found

    def chosen(self, vectors: Vectors, layers: int) -> Vectors:
        """Those of the layers that are to be steered, of a model with so many."""
        if not 0 <= self.first <= self.last < layers:
            raise ValueError(
                f"The layers must go up within 0 to {layers - 1}, got {self.first} to {self.last}. Move the sliders."
            )
        found = {layer: vector for layer, vector in vectors.items() if self.first <= layer <= self.last}
        if not found:
            raise ValueError(
                f"The layers must have a vector among them, got {self.first} to {self.last}; there are vectors in "
                f"{', '.join(map(str, vectors))}. Move the sliders."
            )
        return found


def sources() -> list[str]:
    """Where vectors may come from; trained ones of SmolLM2 where the package has them."""
    return [LISTS, ADAPTER, *([BUNDLED] if BUNDLED_FOLDER.is_dir() else [])]


def defaults(source: str, layers: int) -> tuple[float, int, int]:
    """Scale, first and last layer to begin with, of so many: an adapter as it is, two lists in the middle."""
    if source != LISTS:
        return 1.0, 0, layers - 1
    first, last = layers // 3, max(2 * layers // 3 - 1, layers // 3)
    return min(1.0, round(STRENGTH / (last - first + 1) / STEP) * STEP), first, last


def twin(model: nn.Module) -> Any:
    """A model of its own that shares all parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def from_lists(loaded: Loaded, towards: str, away: str, method: str) -> Vectors:
    """Vectors of every layer from prompts, one a line."""
    lists = [[line.strip() for line in text.splitlines() if line.strip()] for text in (towards, away)]
    counts = [len(lines) for lines in lists]
    if counts[0] != counts[1] or not counts[0]:
        raise ValueError(
            "Both lists must have as many prompts, a line each, and one at least, got "
            f"{counts[0]} and {counts[1]}. Add or remove lines."
        )
    limit = min(MAX_TOKENS, getattr(loaded.model.config, "max_position_embeddings", MAX_TOKENS))
    tokens = sum(len(ids) for ids in loaded.tokenizer([*lists[0], *lists[1]])["input_ids"])
    if tokens > limit:
        raise ValueError(f"Both lists must have at most {limit} tokens together, got {tokens}. Shorten them.")
    return contrastive_vectors(twin(loaded.model), loaded.tokenizer, *lists, method=method)


def from_adapter(loaded: Loaded, name: str) -> Vectors:
    """Vectors of an adapter's folder or file, or of one on the Hub; one that is not this model's is refused."""
    if not name:
        raise ValueError(f"`adapter` must be {KINDS}, got nothing.")
    place = Path(name).expanduser()
    if not place.exists():
        place = fetch(name)
    vectors = read_vectors(place)
    if place.is_dir() and json.loads((place / FILES[0]).read_text(encoding="utf-8"))["peft_type"] == "STEERING":
        model = PeftModel.from_pretrained(twin(loaded.model), place)  # knows whether the base is its own
        try:
            return stream_vectors(model, "default")
        except ValueError as error:
            raise ValueError(
                f"The page shows adapters that add to the residual stream at every token, got {name}. Load it with "
                "PeftModel.from_pretrained."
            ) from error
    width, here = len(next(iter(vectors.values()))), loaded.model.config.get_text_config().hidden_size
    if width != here:
        raise ValueError(
            f"The vectors must have the width of {loaded.name}, {here}, got {width}. Load their own model."
        )
    return vectors


def fetch(name: str) -> Path:
    """The folder of an adapter on the Hub."""
    import httpx2
    from huggingface_hub import HfApi, constants, snapshot_download

    is_away = False
    try:
        # snapshot_download would wait for ever for a Hub that takes the call and says nothing
        try:
            HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (ConnectionError, httpx2.TransportError):
            is_away = True
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=is_away))
    except (OSError, ValueError, httpx2.TransportError) as error:
        raise ValueError(f"`adapter` must be {KINDS} that can be reached, got {name} ({_brief(error)}).") from error


def write_both(
    loaded: Loaded, vectors: Vectors, scale: float, ids: list[int], max_new_tokens: int, base: Sequence[Token] = ()
) -> Iterator[tuple[list[Token], list[Token]]]:
    """
    The base's tokens so far and the steered ones, one more each at a time.

    Args:
        loaded (`Loaded`): The base.
        vectors (`dict[int, torch.Tensor]`): What is added, after which layer.
        scale (`float`): Their factor.
        ids (`list[int]`): The prompt.
        max_new_tokens (`int`): At most so many of each.
        base (`Sequence[Token]`, *optional*): The base's tokens, where they are known from before.
    """
    steered = replace(loaded, model=add_vectors(twin(loaded.model), vectors, scale=scale))
    written: tuple[list[Token], list[Token]] = (list(base), [])
    writers = [(written[1], steered.write(ids, max_new_tokens=max_new_tokens))]
    if not base:
        writers.insert(0, (written[0], loaded.write(ids, max_new_tokens=max_new_tokens)))
    while writers:
        for writer in list(writers):
            token = next(writer[1], None)
            if token is None:
                writers.remove(writer)
            else:
                writer[0].append(token)
        yield written


def changed(base: Sequence[str], steered: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """For each token of either text, whether the other lacks it there: the longest common parts are matched."""
    marks = ([True] * len(base), [True] * len(steered))
    for block in difflib.SequenceMatcher(None, base, steered, autojunk=False).get_matching_blocks():
        for marked, start in zip(marks, (block.a, block.b), strict=True):
            marked[start : start + block.size] = [False] * block.size
    return marks


def lens_row(loaded: Loaded, vector: torch.Tensor) -> Row:
    """Length of a vector, and the tokens that it points to and away from, as [text, cosine, dot product]."""
    size = min(len(loaded.tokenizer), loaded.model.get_output_embeddings().weight.shape[0])
    rows = vector_lens(loaded.model, vector, top_k=min(WORDS, size), vocabulary=size).table(loaded.tokenizer)
    return {
        "length": round(float(vector.norm()), 2),
        **{
            end: [[row["token"], round(row["cos"], 4), round(row["dot"], 2)] for row in rows if row["end"] == end]
            for end in ("top", "bottom")
        },
    }


def effect_row(loaded: Loaded, layer: int, vector: torch.Tensor, ids: list[int]) -> Row:
    """The same of what a vector, alone, changes in the last layer on a text that the steered model writes."""
    found = mean_effects(
        twin(loaded.model), {layer: vector}, [torch.tensor(ids)], max_new_tokens=EFFECT_TOKENS, temperature=0.0
    )
    return lens_row(loaded, found[layer])


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
