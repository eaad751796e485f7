"""What the steering page can be asked: where vectors come from, ready lists of prompts, and what its fields hold.

- A pair of lists more is one entry here.
- What the fields alone or the model's depth can tell is wrong is said here; the rest where the vectors are made.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from store import Loaded

from hf_ext import tiny


LISTS, ADAPTER, BUNDLED = "two lists of prompts", "an adapter", "SmolLM2, trained on sums"
BUNDLED_FOLDER = Path(tiny.__file__).with_name("steering-smollm2")
METHODS = [("mean difference", "mean_difference"), ("PCA", "pca")]
STRENGTH = 2.0  # sum of the scales over the layers that two lists steer: about where SmolLM2 still writes well
STEP = 0.05  # of the scale

Vectors = dict[int, torch.Tensor]

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
