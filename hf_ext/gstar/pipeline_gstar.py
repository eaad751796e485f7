"""Text from a masked diffusion model, with a sampler that may take tokens back: continue, fill in, or make one up.

- Any masked language model with a mask token is a denoiser: MDLM, BERT, ModernBERT, LLaDA, Dream (whose logits are
  shifted by one). The SUBS projection is the scheduler's.
- One row is one chain of its own: padding stands on the left, random numbers come from the row's generator, and a row
  that did not change, or is finished, is not computed again unless the denoiser is time-conditioned.
- `save_pretrained` writes a repository that loads where hf_ext is not installed: code beside weights, one file for
  each component, as `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` wants it.
- This file is loaded alone from such a repository, so it imports nothing else of ours. It is long, because it may not
  be cut.
"""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from transformers import LogitsProcessorList


@dataclass
class GStarFrame(BaseOutput):
    """
    The chain after one step, B rows of L positions: the answer, or all of them where texts are filled in.

    Attributes:
        step (`int`): 0-based; `num_timesteps` for the frame after the last masks were filled.
        timestep (`float`): t that the step started from, 0 for that last frame.
        phase (`str`): What the step did: `"ancestral"`, `"star"`, `"guided"`, ...; `"fill"` in that last frame.
        sequences (`torch.LongTensor` of shape `(B, L)`): The tokens now, masks among them.
        sampled_tokens (`torch.LongTensor` of shape `(B, L)`): The proposal: a token for every mask.
        transfer_index (`torch.BoolTensor` of shape `(B, L)`): Revealed in this step.
        remask_index (`torch.BoolTensor` of shape `(B, L)`): Taken back in this step.
        error_logits (`torch.Tensor` of shape `(B, L)`, *optional*): What the predictor said of the proposal.
    """

    step: int
    timestep: float
    phase: str
    sequences: torch.Tensor
    sampled_tokens: torch.Tensor
    transfer_index: torch.Tensor
    remask_index: torch.Tensor
    error_logits: torch.Tensor | None = None


@dataclass
class GStarPipelineOutput(BaseOutput):
    """
    Attributes:
        sequences (`torch.LongTensor` of shape `(B, L)`): Answers, or whole texts where masks were filled in.
        texts (`list[str]`, *optional*): The same as text, up to the first end-of-text token; `output_type="text"`.
        history (`list[GStarFrame]`, *optional*): A frame for each step, on the CPU; `return_history=True`.
        remask_counts (`torch.LongTensor` of shape `(B,)`): How often a token of the row was taken back.
        denoiser_nfe (`torch.LongTensor` of shape `(B,)`): Forward passes of the denoiser over the row; guidance costs
            two a step, a cached prompt is not counted.
        predictor_nfe (`torch.LongTensor` of shape `(B,)`): Forward passes of the error predictor; those of a head
            alone are passes of the denoiser.
    """

    sequences: torch.Tensor
    texts: list[str] | None = None
    history: list[GStarFrame] | None = None
    remask_counts: torch.Tensor | None = None
    denoiser_nfe: torch.Tensor | None = None
    predictor_nfe: torch.Tensor | None = None


@dataclass
class _Chain:
    """What a call works on: rows of a batch, and what belongs to them."""

    x: torch.Tensor  # (B, P + L), prompt and answer
    attention_mask: torch.Tensor | None  # None where there is no padding
    fixed: torch.Tensor  # (B, P + L)
    start: int  # P, where the answer starts
    blocks: list[tuple[int, int]]
    options: dict[str, Any]
    mask_token_id: int
    eos_token_id: int | None  # None where masks are filled in
    pad_token_id: int
    context: torch.Tensor  # given tokens, which guidance hides
    remask_counts: torch.Tensor
    denoiser_nfe: torch.Tensor
    predictor_nfe: torch.Tensor
    logits: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    cache: Any = None


class GStarPipeline(DiffusionPipeline):
    r"""
    Generate text with a masked diffusion model and a scheduler that may mask tokens again (G-Star, arXiv 2510.08369).

    Args:
        denoiser (`PreTrainedModel`): A masked language model that gives `logits`.
        scheduler ([`StarShapedScheduler`]): Or another one whose `step` takes `model_output, timestep, sample`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): None works with `input_ids` and token output.
        error_predictor ([`ErrorPredictor`], *optional*): For the guided modes of the scheduler.
        mask_token_id (`int`, *optional*): Where neither the tokenizer nor the denoiser's configuration knows it.
        right_shift_logits (`bool`, *optional*, defaults to `False`): Dream: token i is read from the logits at i - 1.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import GStarPipeline, MDLMConfig, MDLMForMaskedLM, StarShapedScheduler

    >>> config = MDLMConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> pipe = GStarPipeline(MDLMForMaskedLM(config), StarShapedScheduler(mode="star_plus"), None, None)
    >>> pipe(input_ids=torch.tensor([[1, 2, 3]]), gen_length=8, num_inference_steps=4).sequences.shape
    torch.Size([1, 8])

    ```"""

    model_cpu_offload_seq = "denoiser->error_predictor"
    _optional_components = ["tokenizer", "error_predictor"]
    _callback_tensor_inputs = ["sample", "sampled_tokens", "transfer_index", "remask_index", "error_logits"]

    # optional components have no default: diffusers would then ignore None where a repository is loaded
    def __init__(
        self,
        denoiser: Any,
        scheduler: Any,
        tokenizer: Any,
        error_predictor: Any,
        mask_token_id: int | None = None,
        right_shift_logits: bool = False,
    ) -> None:
        super().__init__()
        _check_fit(denoiser, error_predictor)
        self.register_modules(
            denoiser=denoiser, scheduler=scheduler, tokenizer=tokenizer, error_predictor=error_predictor
        )
        self.register_to_config(mask_token_id=mask_token_id, right_shift_logits=right_shift_logits)
        self._interrupt = False
        self._num_timesteps = 0

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call, all blocks together."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to end the call after the present step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        messages: list[Any] | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        infill: str | list[str] | torch.LongTensor | None = None,
        fixed: torch.BoolTensor | None = None,
        gen_length: int = 64,
        num_inference_steps: int = 32,
        block_length: int | None = None,
        batch_size: int = 1,
        num_return_sequences: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        logits_processor: Any = None,
        add_special_tokens: bool = False,
        allow_masked_prompt: bool = False,
        eos_token_id: int | None = None,
        eos_early_stop: bool = True,
        mask_token_id: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "text",
        return_history: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> GStarPipelineOutput | tuple[Any, ...]:
        """
        Continue a prompt, answer messages, fill in masks, or, with none of these, write from nothing.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to continue; `""` is an empty prompt.
            messages (`list`, *optional*): A conversation, or a list of them, for the tokenizer's chat template.
            input_ids (`torch.LongTensor` of shape `(B, P)` or `(P,)`, *optional*): What to continue, as tokens.
            attention_mask (`torch.Tensor`, *optional*): Of `input_ids` or `infill`'s tokens: 0 at padding.
            infill (`str`, `list[str]` or `torch.LongTensor`, *optional*):
                Texts with masks, which are filled in; nothing else changes, and `gen_length` is not read.
            fixed (`torch.BoolTensor`, *optional*):
                For `infill` as tokens: True at positions that stay; all others are masked first. Without it, masks
                are open and all else is fixed.
            gen_length (`int`, *optional*, defaults to 64): Length of the answer in tokens.
            num_inference_steps (`int`, *optional*, defaults to 32): Steps T, of each block.
            block_length (`int`, *optional*): Write the answer in blocks of so many tokens, from left to right.
            batch_size (`int`, *optional*, defaults to 1): Rows, where nothing is given to continue.
            num_return_sequences (`int`, *optional*, defaults to 1): Answers for each row, next to each other.
            temperature (`float`, *optional*, defaults to 1.0): Of the tokens; 0 takes the most probable.
            top_p (`float`, *optional*, defaults to 1.0): Nucleus of the tokens.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                g of classifier-free guidance, un + g (cond - un), where un does not see what was given; 1 is off. It
                is LLaDA's w + 1.
            logits_processor (`LogitsProcessor`, `LogitsProcessorList` or a list, *optional*):
                transformers' processors, applied to the logits of every masked position.
            add_special_tokens (`bool`, *optional*, defaults to `False`): Whether tokenizing adds [CLS] or others.
            allow_masked_prompt (`bool`, *optional*, defaults to `False`): Fill in masks of the prompt, too.
            eos_token_id (`int`, *optional*): End-of-text token, the tokenizer's if not given.
            eos_early_stop (`bool`, *optional*, defaults to `True`):
                What stands behind the first final end-of-text token becomes padding and is not computed. It is
                looked for once tokens cannot be taken back any more. Not where masks are filled in.
            mask_token_id (`int`, *optional*): The pipeline's, tokenizer's or denoiser's if not given.
            generator (`torch.Generator` or a list, *optional*):
                One for all, or one for each row (`num_return_sequences` times as many): a row then does not depend
                on the others.
            output_type (`str`, *optional*, defaults to `"text"`): `"text"` or `"seq"`, tokens alone.
            return_history (`bool`, *optional*, defaults to `False`): Keep a [`GStarFrame`] for each step.
            return_dict (`bool`, *optional*, defaults to `True`): A tuple if `False`.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called as `f(pipe, step, timestep, tensors)` after each step; returns a dict, of which `sample`
                replaces the tokens at positions that are not fixed.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["sample"]`):
                Which of `_callback_tensor_inputs` it is given.

        Returns:
            [`GStarPipelineOutput`] or `tuple`

        Raises:
            ValueError: before the model runs, where arguments do not fit each other or the model.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        chain = self._prepare(**given)
        history = []
        with self.progress_bar(total=self._num_timesteps) as bar:
            for frame in self._frames(chain):
                if return_history:
                    history.append(_on_cpu(frame))
                if frame.phase != "fill":
                    bar.update()
        sequences = chain.x[:, chain.start :]
        output = GStarPipelineOutput(
            sequences=sequences,
            texts=self._decode(sequences, chain) if output_type == "text" else None,
            history=history if return_history else None,
            remask_counts=chain.remask_counts,
            denoiser_nfe=chain.denoiser_nfe,
            predictor_nfe=chain.predictor_nfe,
        )
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[GStarFrame]:
        """
        The same call as an iterator of frames, one a step: `for frame in pipe.stream("Once", gen_length=32): ...`

        Takes the arguments of a call; those that shape its output (`output_type`, `return_history`, `return_dict`)
        do nothing. Bad arguments are refused here, not at the first frame.
        """
        bound = inspect.signature(type(self).__call__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        chain = self._prepare(**{**given, "output_type": "seq"})
        return self._stream(chain)

    @torch.no_grad()
    def _stream(self, chain: _Chain) -> Iterator[GStarFrame]:
        yield from self._frames(chain)
        self.maybe_free_model_hooks()

    # 1. inputs

    def check_inputs(self, **given: Any) -> None:
        """Raise `ValueError` for what can be seen before anything is tokenized."""
        sources = [name for name in ("prompt", "messages", "input_ids", "infill") if given[name] is not None]
        if len(sources) > 1:
            raise ValueError(f"Give at most one of `prompt`, `messages`, `input_ids` and `infill`, got {sources}.")
        for name in ("gen_length", "num_inference_steps", "batch_size", "num_return_sequences", "block_length"):
            value = given[name]
            if name == "block_length" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a whole number > 0, got {value!r}.")
        if not 0 <= given["temperature"] < float("inf"):
            raise ValueError(f"`temperature` must be a number >= 0, got {given['temperature']}.")
        if not 0 < given["top_p"] <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {given['top_p']}.")
        if not given["guidance_scale"] >= 0:
            raise ValueError(f"`guidance_scale` must be a number >= 0, got {given['guidance_scale']}.")
        if given["output_type"] not in ("text", "seq"):
            raise ValueError(f"`output_type` must be 'text' or 'seq', got {given['output_type']!r}.")
        needs_tokenizer = given["prompt"] is not None or given["messages"] is not None
        needs_tokenizer |= given["infill"] is not None and not isinstance(given["infill"], torch.Tensor)
        if self.tokenizer is None and needs_tokenizer:
            raise ValueError(f"`{sources[0]}` must be given as tokens, since the pipeline has no tokenizer.")
        for name in ("input_ids", "infill"):
            value = given[name]
            if isinstance(value, torch.Tensor) and (value.dim() not in (1, 2) or value.dtype != torch.long):
                raise ValueError(
                    f"`{name}` must be int64 token ids of 1 or 2 dimensions, got {value.dtype} of shape "
                    f"{tuple(value.shape)}."
                )
        if given["input_ids"] is not None and not isinstance(given["input_ids"], torch.Tensor):
            raise ValueError(f"`input_ids` must be a tensor of int64, got {type(given['input_ids']).__name__}.")
        tokens = given["input_ids"] if given["input_ids"] is not None else given["infill"]
        for name in ("attention_mask", "fixed"):
            value = given[name]
            if value is None:
                continue
            if name == "fixed" and not isinstance(given["infill"], torch.Tensor):
                raise ValueError("`fixed` must be None unless `infill` is given as tokens.")
            if not isinstance(tokens, torch.Tensor):
                raise ValueError(f"`{name}` must be None unless tokens are given: a tokenizer makes its own.")
            if value.shape != tokens.shape:
                raise ValueError(
                    f"`{name}` must have the shape of the tokens, {tuple(tokens.shape)}, got {tuple(value.shape)}."
                )
        if given["fixed"] is not None and given["fixed"].dtype != torch.bool:
            raise ValueError(f"`fixed` must be a bool tensor, got {given['fixed'].dtype}.")
        keys = given["callback_on_step_end_tensor_inputs"] or []
        unknown = [key for key in keys if key not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown}."
            )
        _check_fit(self.denoiser, self.error_predictor)

    def _mask_token_id(self, given: int | None) -> int:
        config = getattr(self.denoiser, "config", None)
        known = (
            given,
            self.config.mask_token_id,
            getattr(self.tokenizer, "mask_token_id", None),
            getattr(config, "mask_token_id", None),
        )
        mask = next((value for value in known if value is not None), None)
        if mask is None:
            raise ValueError(
                "`mask_token_id` must be given: neither pipeline, tokenizer nor the denoiser's configuration has one."
            )
        vocab_size = getattr(config, "vocab_size", None)
        if vocab_size is not None and not 0 <= mask < vocab_size:
            raise ValueError(f"`mask_token_id` must be in [0, {vocab_size}), the denoiser's vocabulary, got {mask}.")
        if mask == getattr(self.tokenizer, "pad_token_id", None):
            raise ValueError(f"`mask_token_id` must differ from the tokenizer's pad token, got {mask} for both.")
        return mask

    def _tokenize(self, given: dict[str, Any]) -> list[list[int]]:
        """Rows of token ids; an empty one where there is nothing to continue."""
        if given["messages"] is not None:
            talks = given["messages"]
            talks = [talks] if talks and isinstance(talks[0], dict) else talks
            return [
                list(self.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False))
                for talk in talks
            ]
        texts = given["prompt"] if given["prompt"] is not None else given["infill"]
        if isinstance(texts, str | list):
            texts = [texts] if isinstance(texts, str) else texts
            add = given["add_special_tokens"]
            return [list(self.tokenizer(text, add_special_tokens=add)["input_ids"]) if text else [] for text in texts]
        tokens = given["input_ids"] if given["input_ids"] is not None else given["infill"]
        if tokens is None:
            return [[]] * given["batch_size"]
        tokens = tokens[None] if tokens.dim() == 1 else tokens
        keep = torch.ones_like(tokens) if given["attention_mask"] is None else given["attention_mask"]
        keep = keep.reshape(tokens.shape).bool()
        return [row[kept].tolist() for row, kept in zip(tokens, keep, strict=True)]

    def _prepare(self, **given: Any) -> _Chain:
        callback = given["callback_on_step_end"]
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        self.check_inputs(**given)
        mask = self._mask_token_id(given["mask_token_id"])
        rows = self._tokenize(given)
        if not rows:
            raise ValueError("`prompt` must hold at least one text, got an empty list.")
        filling = given["infill"] is not None
        eos = given["eos_token_id"]
        eos = getattr(self.tokenizer, "eos_token_id", None) if eos is None else eos
        pad = getattr(self.tokenizer, "pad_token_id", None)
        pad = next(value for value in (pad, eos, 0) if value is not None)
        masked_prompt = any(mask in row for row in rows)
        if masked_prompt and not filling and not given["allow_masked_prompt"]:
            raise ValueError(
                f"`prompt` must not hold the mask (id {mask}). Pass the text as `infill` to fill it in where it is, "
                "or set `allow_masked_prompt`."
            )
        answer = 0 if filling else given["gen_length"]
        longest = max(len(row) for row in rows)
        context = getattr(getattr(self.denoiser, "config", None), "max_position_embeddings", None)
        if context is not None and longest + answer > context:
            raise ValueError(
                f"Prompt and answer must fit the denoiser's {context} positions, got {longest} and {answer}. Shorten "
                "the prompt or lower `gen_length`."
            )
        x = torch.full((len(rows), longest + answer), pad)
        present = torch.zeros_like(x, dtype=torch.bool)
        for i, row in enumerate(rows):
            # prompts end where answers begin, texts to fill in begin together
            place = slice(0, len(row)) if filling else slice(longest - len(row), longest)
            x[i, place] = torch.tensor(row, dtype=torch.long)
            present[i, place] = True
        x[:, longest:], present[:, longest:] = mask, True
        is_open = (x == mask) & present
        if given["fixed"] is not None:
            stays = torch.ones_like(present)
            keep = given["attention_mask"]
            given_fixed = given["fixed"].reshape(len(rows), -1).cpu()
            for i in range(len(rows)):
                kept = given_fixed[i] if keep is None else given_fixed[i][keep.reshape(len(rows), -1)[i].bool().cpu()]
                stays[i, : len(kept)] = kept
            is_open = ~stays & present
            x = torch.where(is_open, mask, x)
        n, device = given["num_return_sequences"], self._execution_device
        x, present, is_open = (part.repeat_interleave(n, 0).to(device) for part in (x, present, is_open))
        generator = given["generator"]
        if isinstance(generator, list | tuple) and len(generator) != len(x):
            raise ValueError(
                f"`generator` must be one generator or a list of {len(x)}, one for each of {len(rows)} rows times "
                f"{n} sequences, got {len(generator)}."
            )
        start = 0 if filling or masked_prompt else longest
        size = given["block_length"] or max(x.shape[1] - start, 1)
        blocks = [(at, min(at + size, x.shape[1])) for at in range(start, x.shape[1], size)]
        self.scheduler.set_timesteps(given["num_inference_steps"], device=device)
        times = self.scheduler.timesteps.tolist()
        if self.error_predictor is None and any(self._ask("needs_error", t, False) for t in times):
            raise ValueError(
                f"`error_predictor` must be there for the guided mode {self.scheduler.config.mode!r}, got None. Set "
                "pipe.error_predictor, or use an unguided mode such as 'star_plus'."
            )
        self._num_timesteps = len(times) * len(blocks)
        self._interrupt = False
        zeros = torch.zeros(len(x), dtype=torch.long, device=device)
        return _Chain(
            x=x,
            attention_mask=None if present.all() else present.long(),
            fixed=~is_open,
            start=start,
            blocks=blocks,
            options=given,
            mask_token_id=mask,
            eos_token_id=None if filling else eos,
            pad_token_id=pad,
            context=present & ~is_open,
            remask_counts=zeros.clone(),
            denoiser_nfe=zeros.clone(),
            predictor_nfe=zeros.clone(),
        )

    # 2. the chain

    def _frames(self, chain: _Chain) -> Iterator[GStarFrame]:
        self._prefill(chain)
        step, times = 0, self.scheduler.timesteps
        takes = set(inspect.signature(self.scheduler.step).parameters)
        options = {name: chain.options[name] for name in ("temperature", "top_p", "generator")}
        at = slice(chain.start, None)
        for first, last in chain.blocks:
            block = torch.ones_like(chain.fixed)
            block[:, first:last] = False
            for k, t in enumerate(times):
                fixed = chain.fixed | block
                if not self._active(chain, fixed, t).any() or self._interrupt:
                    break
                logits = self._logits(chain, fixed, t)
                call = {
                    "model_output": logits,
                    "timestep": t,
                    "sample": chain.x[:, at],
                    "mask_token_id": chain.mask_token_id,
                    "fixed": fixed[:, at],
                    "error_fn": self._error_fn(chain, last),
                    **options,
                }
                out = self.scheduler.step(**{name: value for name, value in call.items() if name in takes})
                before = chain.x[:, at]
                after = torch.where(fixed[:, at], before, out.prev_sample)
                frame = GStarFrame(
                    step=step,
                    timestep=float(t),
                    phase=self._ask("phase", t, "step"),
                    sequences=after,
                    sampled_tokens=out.sampled_tokens,
                    transfer_index=(before == chain.mask_token_id) & (after != chain.mask_token_id),
                    remask_index=(before != chain.mask_token_id) & (after == chain.mask_token_id),
                    error_logits=getattr(out, "error_logits", None),
                )
                chain.remask_counts += frame.remask_index.sum(1)
                chain.x = torch.cat((chain.x[:, : chain.start], after), 1)
                self._call_back(chain, fixed, frame, step)
                if k + 1 < len(times) and not self._ask("may_revise", times[k + 1], True):
                    self._end_texts(chain, last)
                frame.sequences = chain.x[:, at]
                yield frame
                step += 1
            frame = self._fill(chain, chain.fixed | block, step)
            self._end_texts(chain, last)
            if frame is not None:
                frame.sequences = chain.x[:, at]
                yield frame
            if self._interrupt:
                break

    def _ask(self, name: str, t: Any, default: Any) -> Any:
        """What our scheduler says of time `t`; schedulers of others are not asked."""
        method = getattr(self.scheduler, name, None)
        return default if method is None else method(t)

    def _active(self, chain: _Chain, fixed: torch.Tensor, t: Any) -> torch.Tensor:
        """Rows (B,) in which a step from `t` can change something."""
        if self._ask("may_revise", t, True):
            return (~fixed).any(1)
        return ((chain.x == chain.mask_token_id) & ~fixed).any(1)

    def _logits(self, chain: _Chain, fixed: torch.Tensor, t: Any) -> torch.Tensor:
        """Logits of the answer (B, L, V); rows that are as they were are not computed again."""
        conditioned = getattr(self.denoiser.config, "time_conditioning", False)
        needed = self._active(chain, fixed, t)
        if chain.seen is not None and not conditioned:
            needed &= (chain.x != chain.seen).any(1)
        if chain.logits is None or needed.all() or (chain.cache is not None and needed.any()):
            chain.logits = self._forward(chain, slice(None), t)
            chain.denoiser_nfe += self._passes(chain)
            chain.seen = chain.x.clone()
        elif needed.any():
            rows = needed.nonzero()[:, 0]
            chain.logits = chain.logits.index_copy(0, rows, self._forward(chain, rows, t))
            chain.denoiser_nfe[rows] += self._passes(chain)
            chain.seen[rows] = chain.x[rows]
        return chain.logits

    def _passes(self, chain: _Chain) -> int:
        return 2 if chain.options["guidance_scale"] != 1 else 1

    def _forward(self, chain: _Chain, rows: Any, t: Any) -> torch.Tensor:
        x, mask = chain.x[rows], None if chain.attention_mask is None else chain.attention_mask[rows]
        scale = chain.options["guidance_scale"]
        if chain.cache is not None:
            logits = self._run(chain, x[:, chain.start :], mask, t, past_key_values=chain.cache).logits
        elif scale != 1:
            hidden = torch.where(chain.context[rows], chain.mask_token_id, x)
            both = None if mask is None else torch.cat((mask, mask))
            given, alone = self._shift(self._run(chain, torch.cat((x, hidden)), both, t).logits).chunk(2)
            # where both are -infinity the difference is not a number
            logits = torch.where(given == -torch.inf, given, alone + scale * (given - alone))[:, chain.start :]
        else:
            logits = self._shift(self._run(chain, x, mask, t).logits)[:, chain.start :]
        known = len(self.tokenizer) if self.tokenizer is not None else logits.shape[-1]
        if known < logits.shape[-1]:
            logits[..., known:] = -torch.inf  # a vocabulary that was padded to a round size
        if chain.options["logits_processor"] is not None:
            logits = self._process(chain, x, logits)
        return logits

    def _run(self, chain: _Chain, x: torch.Tensor, mask: torch.Tensor | None, t: Any, **more: Any) -> Any:
        """One pass of the denoiser over tokens, with those arguments that it knows."""
        takes = inspect.signature(self.denoiser.forward).parameters
        config = self.denoiser.config
        if mask is not None or "attention_mask" in takes:
            more["attention_mask"] = mask
        if mask is not None and mask.shape == x.shape and "position_ids" in takes:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if getattr(config, "time_conditioning", False):
            more["sigma"] = torch.full((len(x),), 0.0 if t is None else self.scheduler.sigma(t), device=x.device)
        causal = getattr(config, "prefix_attention", "full") == "causal"
        if causal and "past_key_values" not in more and chain.start:
            more["prefix_length"] = chain.start
        return self.denoiser(x, **more)

    def _shift(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat((logits[:, :1], logits[:, :-1]), 1) if self.config.right_shift_logits else logits

    def _prefill(self, chain: _Chain) -> None:
        """Keys and values of the prompt, where the denoiser's prompts do not see the answer."""
        causal = getattr(self.denoiser.config, "prefix_attention", "full") == "causal"
        conditioned = getattr(self.denoiser.config, "time_conditioning", False)
        if not causal or conditioned or not chain.start or chain.options["guidance_scale"] != 1:
            return
        mask = None if chain.attention_mask is None else chain.attention_mask[:, : chain.start]
        prompt = chain.x[:, : chain.start]
        chain.cache = self.denoiser(
            prompt, attention_mask=mask, prefix_length=chain.start, use_cache=True
        ).past_key_values

    def _process(self, chain: _Chain, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """transformers' processors know one position a row, so every masked position becomes a row."""
        processors = chain.options["logits_processor"]
        if not isinstance(processors, LogitsProcessorList):
            processors = LogitsProcessorList(processors if isinstance(processors, list | tuple) else [processors])
        rows, columns = (x[:, chain.start :] == chain.mask_token_id).nonzero(as_tuple=True)
        if len(rows):
            logits = logits.clone()
            logits[rows, columns] = processors(x[rows], logits[rows, columns].float()).to(logits.dtype)
        return logits

    def _error_fn(self, chain: _Chain, last: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The predictor as the scheduler calls it, on answers; it reads prompts, too, but no masks of later blocks."""

        def error_logits(proposal: torch.Tensor) -> torch.Tensor:
            x = torch.cat((chain.x[:, : chain.start], proposal), 1)[:, :last]
            mask = None if chain.attention_mask is None else chain.attention_mask[:, :last]
            chain.predictor_nfe += 1
            if getattr(self.error_predictor.config, "base_config", None) is None:
                states = self._run(chain, x, mask, None, output_hidden_states=True).hidden_states[-1]
                e = self.error_predictor(hidden_states=states).logits
            else:
                where = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
                e = self.error_predictor(x, attention_mask=mask, **where).logits
            padded = torch.zeros(proposal.shape, dtype=torch.float32, device=proposal.device)
            padded[:, : last - chain.start] = e[:, chain.start :].float()
            return padded

        return error_logits

    def _fill(self, chain: _Chain, fixed: torch.Tensor, step: int) -> GStarFrame | None:
        """The most probable token where a mask is left; None where there is none."""
        left = (chain.x == chain.mask_token_id) & ~fixed
        if not left.any() or self._interrupt:
            return None
        rows = left.any(1).nonzero()[:, 0]
        if chain.cache is not None:
            logits, rows = self._forward(chain, slice(None), self.scheduler.timesteps[-1]), slice(None)
        else:
            logits = self._forward(chain, rows, self.scheduler.timesteps[-1])
        chain.denoiser_nfe[rows] += self._passes(chain)
        best = logits.float()
        best[..., chain.mask_token_id] = -torch.inf
        tokens = chain.x[:, chain.start :].clone()
        tokens[rows] = torch.where(left[rows][:, chain.start :], best.argmax(-1), tokens[rows])
        chain.x = torch.cat((chain.x[:, : chain.start], tokens), 1)
        left = left[:, chain.start :]
        return GStarFrame(
            step=step,
            timestep=0.0,
            phase="fill",
            sequences=tokens,
            sampled_tokens=tokens,
            transfer_index=left,
            remask_index=torch.zeros_like(left),
        )

    def _end_texts(self, chain: _Chain, last: int) -> None:
        """Behind a row's first end-of-text token that no mask precedes, all becomes padding and fixed."""
        if chain.eos_token_id is None or not chain.options["eos_early_stop"]:
            return
        answer = chain.x[:, chain.start :]
        ends = (answer == chain.eos_token_id) & ~chain.fixed[:, chain.start :]
        no_mask_yet = (answer == chain.mask_token_id).cumsum(1) == 0
        ended = (ends & no_mask_yet).cumsum(1) > 0
        behind = torch.zeros_like(ended)
        behind[:, 1:] = ended[:, :-1]
        if behind.any():
            chain.x = torch.cat((chain.x[:, : chain.start], torch.where(behind, chain.pad_token_id, answer)), 1)
            chain.fixed = torch.cat((chain.fixed[:, : chain.start], chain.fixed[:, chain.start :] | behind), 1)

    def _call_back(self, chain: _Chain, fixed: torch.Tensor, frame: GStarFrame, step: int) -> None:
        callback = chain.options["callback_on_step_end"]
        if callback is None:
            return
        at = slice(chain.start, None)
        tensors = {
            "sample": chain.x[:, at],
            **{name: getattr(frame, name) for name in self._callback_tensor_inputs[1:]},
        }
        names = chain.options["callback_on_step_end_tensor_inputs"] or ["sample"]
        returned = callback(self, step, frame.timestep, {name: tensors[name] for name in names}) or {}
        sample = returned.pop("sample", None)
        if sample is not None:
            if sample.shape != frame.sequences.shape:
                raise ValueError(
                    f"`callback_on_step_end` must return a sample of shape {tuple(frame.sequences.shape)}, got "
                    f"{tuple(sample.shape)}."
                )
            sample = torch.where(fixed[:, at], chain.x[:, at], sample.to(chain.x))
            chain.x = torch.cat((chain.x[:, : chain.start], sample), 1)

    # 3. outputs

    def _decode(self, sequences: torch.Tensor, chain: _Chain) -> list[str] | None:
        if self.tokenizer is None:
            return None
        rows = []
        for i, row in enumerate(sequences.tolist()):
            if chain.attention_mask is not None:
                kept = chain.attention_mask[i, chain.start :].tolist()
                row = [token for token, keep in zip(row, kept, strict=True) if keep]
            if chain.eos_token_id in row:
                row = row[: row.index(chain.eos_token_id)]
            rows.append(row)
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """
        Save every component and the code of those that are not in diffusers or transformers, so that the folder loads
        by `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` where hf_ext is not installed.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): Upload it too, to `repo_id` or the folder's name.
            kwargs: As in `DiffusionPipeline.save_pretrained` (`safe_serialization`, `variant`, `repo_id`, ...).
        """
        hub = {name: kwargs.pop(name) for name in ("repo_id", "private", "token", "commit_message") if name in kwargs}
        for name in ("denoiser", "error_predictor"):
            module = type(getattr(self, name)).__module__
            if module.startswith("transformers_modules."):
                raise ValueError(
                    f"`{name}` must be a class of transformers or hf_ext to be saved, got one with remote code of its "
                    "own. Save that model by itself, and build the pipeline around it."
                )
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        source = Path(inspect.getsourcefile(type(self)))
        _copy(source, folder)
        index["_class_name"] = [source.stem, type(self).__name__]
        for name in ("denoiser", "scheduler", "tokenizer", "error_predictor"):
            component = getattr(self, name)
            if component is None or type(component).__module__.partition(".")[0] in ("diffusers", "transformers"):
                continue
            source = Path(inspect.getsourcefile(type(component)))
            _copy(source, folder / name)
            index[name] = [source.stem, type(component).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if push_to_hub:
            repo_id = hub.pop("repo_id", folder.name)
            self.push_to_hub(repo_id, **hub, **{k: v for k, v in kwargs.items() if k in ("variant",)})


def _copy(source: Path, folder: Path) -> None:
    # a pipeline that was loaded from this very folder may be saved into it again
    if source.resolve() != (folder / source.name).resolve():
        shutil.copyfile(source, folder / source.name)


def _check_fit(denoiser: Any, predictor: Any) -> None:
    """A predictor reads the denoiser's tokens, and, as a head alone, its hidden states."""
    ours, theirs = getattr(predictor, "config", None), getattr(denoiser, "config", None)
    if ours is None or theirs is None:
        return
    names = ["vocab_size"] + (["hidden_size"] if getattr(ours, "base_config", None) is None else [])
    for name in names:
        mine, wanted = getattr(ours, name, None), getattr(theirs, name, None)
        if mine is not None and wanted is not None and mine != wanted:
            raise ValueError(
                f"`error_predictor` must have the denoiser's {name}, {wanted}, got {mine}. It was made for another "
                "denoiser: use ErrorPredictor.from_denoiser."
            )


def _on_cpu(frame: GStarFrame) -> GStarFrame:
    parts: dict[str, Any] = {name: getattr(frame, name) for name in frame.__dataclass_fields__}
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            parts[name] = part.detach().to("cpu", copy=True)
    return GStarFrame(**parts)


__all__ = ["GStarFrame", "GStarPipeline", "GStarPipelineOutput"]
