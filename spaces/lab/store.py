"""The models behind the pages: loaded once, at most two at a time, and how they write.

- The page is there at once: the default model loads in a thread of its own, and whoever needs it waits for it.
- Two models fit, since the LIMe page compares two; the one used longest ago goes first.
- Pages run the models under one concurrency id (`MODEL`), one event at a time: hooks see every forward of a model.
- Text is decoded step by step here, not by `generate`: a page that stops asking stops the computation, and each
  token's probabilities are at hand. Without temperature it writes what `generate` writes (a test compares them).
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ext import tiny
from hf_ext.lime import LimeForCausalLM


MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # options of every event that runs a model
UNAVAILABLE = (ImportError, OSError, TypeError, ValueError)  # what `Store.get` raises, in one sentence
KEEP = 2
TOP_K = 5

Message = dict[str, Any]


class Token(NamedTuple):
    """One token written: its probability, and the likeliest ones as (id, probability)."""

    id: int
    probability: float
    top: list[tuple[int, float]]


@dataclass
class Loaded:
    """A model with its tokenizer, as asked for by `name`."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def chat_ids(self, messages: list[Message]) -> list[int]:
        """The conversation as tokens; a model without a chat template continues the texts, one a paragraph."""
        if self.tokenizer.chat_template is None:
            return self.text_ids("\n".join(message["content"] for message in messages))
        inputs: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return inputs["input_ids"]

    def text_ids(self, text: str) -> list[int]:
        """Plain text as tokens, at least one."""
        ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError("The text must have a token, got none. Write a word.")
        return ids

    def text(self, ids: list[int], *, special: bool = False) -> str:
        """Tokens as text; an unfinished character at the end waits for the rest of its bytes."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=not special))
        return text if special else text.rstrip("\ufffd")

    def write(self, ids: list[int], *, max_new_tokens: int, temperature: float = 0.0) -> Iterator[Token]:
        """
        Continue `ids`, a token at a time, up to an end token (not yielded), `max_new_tokens` or the context's end.

        Args:
            ids (`list[int]`): The prompt.
            max_new_tokens (`int`): At most so many.
            temperature (`float`, *optional*, defaults to 0.0): 0 takes the likeliest token; above, tokens are drawn
                from softmax(logits / temperature). The probabilities reported are the model's own, at temperature 1.

        Raises:
            ValueError: if the prompt fills the model's context.
        """
        room = getattr(self.model.config, "max_position_embeddings", len(ids) + max_new_tokens) - len(ids)
        if room < 1:
            raise ValueError(f"The text must be shorter than the model's context, got {len(ids)} tokens. Start anew.")
        cache, feed = None, ids
        for _ in range(min(max_new_tokens, room)):
            logits, cache = self._step(feed, cache)
            probabilities = logits.softmax(-1)
            if temperature > 0:
                new = int((logits / temperature).softmax(-1).multinomial(1))
            else:
                new = int(logits.argmax())
            if new in self._ends():
                return
            values, best = probabilities.topk(min(TOP_K, len(probabilities)))
            yield Token(new, float(probabilities[new]), list(zip(best.tolist(), values.tolist(), strict=True)))
            feed = [new]

    @torch.inference_mode()  # per step: a page may resume the generator in another thread
    def _step(self, ids: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        inputs = torch.tensor([ids], device=self.model.device)
        output = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float(), output.past_key_values

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}


class Store:
    """
    Args:
        default (`str`, *optional*, defaults to `"smollm2"`): The model that the pages open with: a name that
            `hf_ext.tiny.load` takes.
    """

    def __init__(self, default: str = "smollm2") -> None:
        self.default = default
        self._models: OrderedDict[tuple[str, str], Loaded] = OrderedDict()
        self._lock = threading.RLock()

    def start(self) -> None:
        """Begin to load the default model in the background; errors come up where the model is asked for."""

        def load() -> None:
            try:
                self.get(self.default)
            except UNAVAILABLE as error:
                print(error, flush=True)  # noqa: T201  # the terminal; the pages ask again and show it

        threading.Thread(target=load, daemon=True).start()

    def get(self, name: str) -> Loaded:
        """The model called `name` (the default if empty); loads it if need be and raises what `tiny.load` raises."""
        name = name.strip() or self.default
        return self._keep((name, "plain"), lambda: Loaded(name, *tiny.load(name)))

    def lime(self, name: str) -> Loaded:
        """The LIMe twin of a Llama-like model, with the trained routers where we have them (SmolLM2)."""

        with self._lock:
            plain = self.get(name)
            if isinstance(plain.model, LimeForCausalLM):
                return plain

            def convert() -> Loaded:
                twin = LimeForCausalLM.from_llama(plain.model)
                if plain.name == "smollm2":
                    twin.load_state_dict(tiny.lime_routers(), strict=False)
                return Loaded(plain.name, twin, plain.tokenizer)

            return self._keep((plain.name, "lime"), convert)

    def copy(self, name: str) -> Loaded:
        """A model in float32 for one caller, who may change it; loaded anew and not kept."""
        name = name.strip() or self.default
        with self._lock:  # loading sets torch's default dtype, for all threads: never two at once
            return Loaded(name, *tiny.load(name, dtype="float32"))

    def __len__(self) -> int:
        return len(self._models)

    def _keep(self, key: tuple[str, str], load: Callable[[], Loaded]) -> Loaded:
        with self._lock:
            if key not in self._models:
                # first make room, so that there are never more than KEEP in memory
                while len(self._models) >= KEEP:
                    self._models.popitem(last=False)
                self._models[key] = load()
            self._models.move_to_end(key)
            return self._models[key]
