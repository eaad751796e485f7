"""Training a masked diffusion language model: cross-entropy of masked tokens, weighted by 1/t.

- Times are stratified over the batch (MDLM's antithetic sampling); each row has its own.
- Any masked language model can be trained: MDLM, BERT, ModernBERT.
- Evaluation draws the same times and masks every time, so that two evaluations differ by the weights alone. Its loss
  is MDLM's bound in nats per token; `nelbo` in hf_ext.gstar estimates the same with less noise.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_ext import hub
from hf_ext.gstar.noising import MaskedDiffusionCollator, mask_tokens, shift_right, sigma_of, stratified_times
from trainers.mdlm.ema import EMACallback
from trainers.mdlm.mdlm_config import MDLMTrainingArguments
from trainers.script import tokenized


class MDLMTrainer(Trainer):
    """
    Train a denoiser by MDLM's objective (arXiv 2406.07524):

        E_t [ (1/t) sum over masked i of -log p(x_0^i | x_t) ] / tokens,   x_t ~ q(x_t | x_0)

    in nats per token, an upper bound of the negative log-likelihood. Tokens that are padding or a prompt are neither
    masked nor counted.

    Args:
        model (`PreTrainedModel`): A masked language model.
        args ([`MDLMTrainingArguments`]): Options.
        train_dataset, eval_dataset (`Dataset`, *optional*):
            Rows with `input_ids`, or a column of texts; and `prompt_length`, if first tokens are a prompt.
        processing_class (`PreTrainedTokenizerBase`, *optional*): For texts, and saved with the model.
        mask_token_id (`int`, *optional*): The model's or the tokenizer's if not given.
        kwargs: As for `Trainer`.

    Example:

    ```python no-run
    >>> trainer = MDLMTrainer(model, MDLMTrainingArguments("out", max_steps=1000), train_dataset=rows)
    >>> trainer.train()

    ```"""

    _tag_names = ["hf_ext", "gstar", "mdlm"]

    def __init__(
        self,
        model: PreTrainedModel,
        args: MDLMTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        known = (
            mask_token_id,
            getattr(model.config, "mask_token_id", None),
            getattr(processing_class, "mask_token_id", None),
        )
        mask = next((value for value in known if value is not None), None)
        if mask is None:
            raise ValueError("`mask_token_id` must be given: neither the model nor the tokenizer has one.")
        if not 0 <= mask < model.config.vocab_size:
            raise ValueError(f"`mask_token_id` must be in [0, {model.config.vocab_size}), got {mask}.")
        if args.random_prefix and getattr(model.config, "prefix_attention", None) != "causal":
            raise ValueError(
                "`random_prefix` must be False unless the model's prefix_attention is 'causal', got True."
            )
        self.mask_token_id = mask
        limit = getattr(model.config, "max_position_embeddings", None)
        length = min(value for value in (args.max_length, limit, 1 << 30) if value is not None)
        pad = next(
            value
            for value in (getattr(processing_class, "pad_token_id", None), model.config.pad_token_id, 0)
            if value is not None
        )
        if pad == mask:
            raise ValueError(f"`mask_token_id` must differ from the padding's id, got {mask} for both.")
        kwargs.setdefault("data_collator", MaskedDiffusionCollator(pad, length))
        train_dataset, eval_dataset = (
            tokenized(data, processing_class, args.dataset_text_field, args.append_eos)
            for data in (train_dataset, eval_dataset)
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self.ema = None if args.ema_decay is None else EMACallback(self.model, args.ema_decay)
        if self.ema is not None:
            self.add_callback(self.ema)
        self._eval_generator: torch.Generator | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of one batch, in nats per token."""
        generator = None if model.training else self._eval_generator
        ids, keep, fixed = inputs["input_ids"], inputs["attention_mask"], inputs["fixed"]
        prefix = inputs["prompt_length"]
        if self.args.random_prefix:
            share = torch.rand(len(ids), generator=generator).to(ids.device)
            prefix = torch.maximum(prefix, (share * keep.sum(1)).long())
            fixed = fixed | (torch.arange(ids.shape[1], device=ids.device) < prefix[:, None])
        t = stratified_times(len(ids), self.args.noise_eps, generator).to(ids.device)
        noisy = mask_tokens(ids, fixed, t, self.mask_token_id, self.args.noise_eps, generator)
        config = self.accelerator.unwrap_model(model).config
        more = {}
        if getattr(config, "time_conditioning", False):
            more["sigma"] = sigma_of(t, self.args.noise_eps).float()
        if getattr(config, "prefix_attention", "full") == "causal":
            more["prefix_length"] = prefix
        outputs = model(input_ids=noisy, attention_mask=keep, **more)
        logits = shift_right(outputs.logits) if self.args.right_shift_logits else outputs.logits
        masked = noisy == self.mask_token_id
        wanted = logits[masked].float()
        is_mask = torch.arange(wanted.shape[-1], device=wanted.device) == self.mask_token_id
        lost = nn.functional.cross_entropy(wanted.masked_fill(is_mask, -math.inf), ids[masked], reduction="none")
        weight = (1 / t).float()[:, None].expand(ids.shape)[masked]
        loss = (weight * lost).sum() / (~fixed).sum().clamp(min=1)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """The loss alone: logits of all tokens would fill the memory."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """`<prefix>_loss` in nats per token and `<prefix>_perplexity`, of the averaged weights if there are any."""
        self._eval_generator = torch.Generator().manual_seed(self.args.seed)
        if self.ema is None or not self.is_in_train:
            metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        else:
            with self.ema.applied():
                metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the perplexity to an evaluation's figures."""
        for name in [name for name in logs if name.startswith("eval") and name.endswith("_loss")]:
            logs[name.removesuffix("loss") + "perplexity"] = math.exp(min(logs[name], 700.0))
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; at the end the model has the averaged weights, if there are any."""
        result = super().train(*args, **kwargs)
        if self.ema is not None:
            self.ema.copy_to_model()
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of the G-Star system, for this model."""
        if self.is_world_process_zero():
            hub.card(self.accelerator.unwrap_model(self.model), "gstar").save(Path(self.args.output_dir) / "README.md")
