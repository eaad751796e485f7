"""A vision-language model as a policy: frames and text in, sampled tokens, their log-probabilities and values out.

- Prompts are padded on the left and responses on the right, so one position (the last of the prompt) predicts the
  first response token of every row, and logits are computed for responses alone.
- A response is never tokenised again: the sampled tokens are scored.
- Placeholders of images must not be sampled, or the model would look for images that are not there. They are
  suppressed while sampling, and so have probability 0 in the scores, too.
- Scores are those of the sampling temperature. Top-p, top-k and min-p are not part of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel


# what a processor gives for each token of the prompt; a response is text, so it continues them with 0
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class Prompt:
    """
    What a policy sees before it answers.

    Attributes:
        frames (`tuple[np.ndarray, ...]`): The last frames, oldest first, each uint8 `(H, W, 3)`.
        text (`str`): Task and state in words.
    """

    frames: tuple[np.ndarray, ...]
    text: str

    def message(self) -> dict[str, Any]:
        """One message of a user: the frames, then the text."""
        return {
            "role": "user",
            "content": [{"type": "image"}] * len(self.frames) + [{"type": "text", "text": self.text}],
        }


@dataclass
class Responses:
    """Sampled tokens `(B, L)`, the mask `(B, L)` of those up to the first end, texts, and who ended `(B,)`."""

    tokens: torch.Tensor
    mask: torch.Tensor
    texts: list[str]
    ended: torch.Tensor


class ActorCritic(nn.Module):
    """Policy and head in one module, for one forward pass through DDP."""

    def __init__(self, policy: PreTrainedModel, value_head: Any) -> None:
        super().__init__()
        self.policy, self.value_head = policy, value_head

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The policy's."""
        self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def forward(
        self,
        inputs: dict[str, torch.Tensor],
        tokens: torch.Tensor,
        mask: torch.Tensor,
        suppressed: list[int],
        temperature: float = 1.0,
        token_values: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Score responses.

        Args:
            inputs (`dict[str, torch.Tensor]`): Of the processor, padded on the left.
            tokens, mask (`torch.Tensor` of shape `(B, L)`): Responses; L may be 0.
            suppressed (`list[int]`): Tokens that have probability 0.
            temperature (`float`, *optional*, defaults to 1.0): Of the distribution that is scored.
            token_values (`bool`, *optional*, defaults to `False`): A value before each token, not one for a row.

        Returns:
            `(logprobs, values)`: `(B, L)` in nats, 0 outside of `mask`; `(B,)` or `(B, L)`. Both float32.
        """
        logprobs, hidden = score(
            self.policy, inputs, tokens, mask, suppressed, temperature, layer=self.value_head.config.layer
        )
        prompt = inputs["input_ids"].shape[1]
        if token_values:
            return logprobs, self.value_head(hidden[:, prompt - 1 : prompt - 1 + max(tokens.shape[1], 1)])
        prompt_mask = torch.zeros_like(hidden[..., 0], dtype=torch.bool)
        prompt_mask[:, :prompt] = inputs["attention_mask"].bool()
        return logprobs, self.value_head(hidden, prompt_mask)


def score(
    policy: Any,
    inputs: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    mask: torch.Tensor,
    suppressed: list[int],
    temperature: float = 1.0,
    layer: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of responses, and the policy's hidden states at `layer` where that is given.

    Returns:
        `(logprobs, hidden)`: `(B, L)` in float32, 0 outside of `mask`; `(B, P + L, D)`, or an empty tensor.
    """
    length = tokens.shape[1]
    full = dict(inputs)
    full["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    full["attention_mask"] = torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"].dtype)], 1)
    for name in _TOKEN_TYPES:
        if name in inputs:
            full[name] = torch.cat([inputs[name], torch.zeros_like(tokens).to(inputs[name].dtype)], 1)
    outputs = policy(**full, logits_to_keep=length + 1, output_hidden_states=layer is not None, use_cache=False)
    logits = outputs.logits[:, -length - 1 : -1].float()
    if suppressed:
        closed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        closed[suppressed] = True
        logits = logits.masked_fill(closed, -torch.inf)
    chosen = (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    hidden = outputs.hidden_states[layer] if layer is not None else logits.new_empty(0)
    return torch.where(mask, chosen, 0.0), hidden


def encode(processing_class: Any, prompts: Sequence[Prompt], device: Any) -> dict[str, torch.Tensor]:
    """Prompts as the model's inputs, padded on the left."""
    from PIL import Image

    texts = [
        processing_class.apply_chat_template([prompt.message()], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    images = [[Image.fromarray(frame) for frame in prompt.frames] for prompt in prompts]
    given = {"images": images} if any(images) else {}
    encoded = processing_class(text=texts, **given, padding=True, padding_side="left", return_tensors="pt")
    return {name: value.to(device) for name, value in encoded.items() if isinstance(value, torch.Tensor)}


def placeholders(policy: Any, processing_class: Any) -> list[int]:
    """The tokens that stand for images, videos and their borders: of the model's configuration and the processor."""
    found = set()
    for source in (policy.config, processing_class):
        for name in dir(source):
            words = ("image", "video", "vision", "audio", "boi_", "eoi_")
            if name.endswith(("_token_id", "_token_index")) and name.startswith(words):
                value = getattr(source, name, None)
                if isinstance(value, int):
                    found.add(value)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    vocabulary = policy.config.get_text_config().vocab_size
    return sorted(
        i for i in found if 0 <= i < vocabulary and i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    )


@torch.no_grad()
def respond(
    policy: Any,
    processing_class: Any,
    inputs: dict[str, torch.Tensor],
    suppressed: list[int],
    max_new_tokens: int,
    temperature: float | None = 1.0,
    **sampling: Any,
) -> Responses:
    """
    Sample one response for each row; `temperature=None` takes the most probable tokens instead.

    Args:
        inputs, suppressed: Of [`encode`] and [`placeholders`].
        max_new_tokens (`int`): L, at most.
        sampling: `top_p`, `top_k`, `min_p` and further options of generation.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    ends = policy.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [ends] if isinstance(ends, int) else list(ends)
    drawn = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    # everything a model's own generation_config may bring along is set, or scores would be of another distribution
    whole = {"top_k": 0, "top_p": 1.0} if temperature is not None else {}
    options = {"repetition_penalty": 1.0, **whole, **drawn, **{k: v for k, v in sampling.items() if v is not None}}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        suppress_tokens=suppressed or None,
        **options,
    )
    tokens = policy.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device))
    mask = is_end.cumsum(1) - is_end.long() == 0  # no end before this token
    texts = [
        tokenizer.decode(row[keep & ~end], skip_special_tokens=True)
        for row, keep, end in zip(tokens, mask, is_end, strict=True)
    ]
    return Responses(tokens, mask, texts, is_end.any(1))


def thought_weights(
    processing_class: Any,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    action_start: Callable[[str], int],
    thought_coef: float,
) -> torch.Tensor:
    """
    RL4VLM's lambda: `thought_coef` at tokens that end before the action begins, 1 from there on.

    Args:
        tokens, mask (`torch.Tensor` of shape `(B, L)`): Responses.
        action_start (`Callable[[str], int]`): A response's text -> where its action begins, in characters.

    Returns:
        `torch.Tensor` of shape `(B, L)`. The place is found in the text, however that was tokenised.
    """
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    weights = torch.ones(tokens.shape, device=tokens.device)
    for row, (ids, kept) in enumerate(zip(tokens.tolist(), mask.sum(1).tolist(), strict=True)):
        start = action_start(tokenizer.decode(ids[:kept], skip_special_tokens=True))
        for i in range(kept):
            if len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) > start:
                break
            weights[row, i] = thought_coef
    return weights


class VisionPolicy:
    """
    A model with its processor as what [`evaluate`] calls: a list of [`Prompt`] in, a list of texts out.

    Args:
        model (`PreTrainedModel` or a PEFT model): An image-text-to-text model.
        processing_class (`ProcessorMixin`): Its processor.
        max_new_tokens (`int`, *optional*, defaults to 256): Of an answer.
        temperature (`float`, *optional*): For sampling; without it the most probable tokens.
    """

    def __init__(
        self, model: Any, processing_class: Any, max_new_tokens: int = 256, temperature: float | None = None
    ) -> None:
        self.model, self.processing_class = model, processing_class
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.suppressed = placeholders(model, processing_class)

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        """Answers, in the order of the prompts."""
        training = self.model.training
        self.model.eval()
        inputs = encode(self.processing_class, prompts, self.model.device)
        answers = respond(
            self.model, self.processing_class, inputs, self.suppressed, self.max_new_tokens, self.temperature
        )
        self.model.train(training)
        return answers.texts
