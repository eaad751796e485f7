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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pages.lens import answer_example
from peft import PeftModel
from steering_settings import BUNDLED, BUNDLED_FOLDER, LISTS, Settings, Vectors
from store import Loaded, Token
from torch import nn

from hf_ext.analysis.vector_lens import mean_effects, vector_lens
from hf_ext.sites import anatomy
from hf_ext.steering import add_vectors, contrastive_vectors, read_vectors
from hf_ext.steering.vectors import stream_vectors


MAX_TOKENS = 4096  # of both lists together
WORDS = 6  # tokens at each end of a vector's lens
EFFECT_TOKENS = 24  # of the text that a vector's effect is measured on
FILES = ["adapter_config.json", "adapter_model.safetensors"]
KINDS = "a folder of a steering or BEFT adapter, a .npy or .gguf file, or a Hub id"

Row = dict[str, Any]


def twin(model: nn.Module) -> Any:
    """A model of its own that shares all parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def find_vectors(loaded: Loaded, asked: Settings) -> Vectors:
    """Layer -> vector of all that the source has; the errors say what is wrong with it."""
    if asked.source == LISTS:
        found = from_lists(loaded, asked.towards, asked.away, asked.method)
    else:
        found = from_adapter(loaded, str(BUNDLED_FOLDER) if asked.source == BUNDLED else asked.adapter)
    layers = anatomy(loaded.model).num_layers
    if (outside := max(found)) >= layers:
        raise ValueError(
            f"The vectors must be for layers 0 to {layers - 1} of {loaded.name}, got one for layer {outside}. "
            "Load the model that they were made for."
        )
    return found


def same_vectors(one: Vectors, other: Vectors) -> bool:
    """Whether both are the same to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[layer], other[layer]) for layer in one)


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


def shown_with(asked: Settings) -> dict[str, Any]:
    """What both texts are shown with, before there is a token of them."""
    shown = {name: getattr(asked, name) for name in ("prompt", "chat", "scale", "first", "last")}
    return {**shown, "base": [], "steered": []}


def add_tokens(found: dict[str, Any], loaded: Loaded, tokens: tuple[list[Token], list[Token]]) -> None:
    """Write out those that `found` does not have yet: [text, probability, guesses] each."""
    for name, side in zip(("base", "steered"), tokens, strict=True):
        said = found[name]
        for at in range(len(said), len(side)):
            row = answer_example(loaded, side[at : at + 1])["answer"][0]
            # a character of several tokens is the last one's
            before, now = (loaded.text([token.id for token in side[:end]]) for end in (at, at + 1))
            said.append([now[len(before) :], *row[1:]])


def marks_of(found: Mapping[str, Any]) -> tuple[list[bool], list[bool]]:
    """For each token of both texts, whether it has changed."""
    base, steered = ([text for text, *_ in found[name]] for name in ("base", "steered"))
    return changed(base, steered)


def summary(found: Mapping[str, Any]) -> str:
    """One sentence: how far the texts differ."""
    marks = marks_of(found)
    if not any(map(any, marks)):
        nothing = " Nothing is added at scale 0." if found["scale"] == 0 else ""
        return f"The steered text is the base's own, token by token.{nothing}"
    start = min(side.index(True) for side in marks if True in side)
    return f"{sum(marks[1])} of {len(marks[1])} tokens have changed; the texts part at token {start + 1}."


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
    return " ".join(str(error).split()).split(". ")[0][:160]
