"""Training an error predictor: the frozen denoiser fills in what was masked, the predictor says what is wrong.

- Targets are made on the fly: x_0 -> x_t -> x^_0 in one step at temperature 1; wrong is what differs from x_0.
- The figures that matter are logged beside the loss: the share of wrong tokens, F1 at 0.5, and the AUC of the ranks in
  four parts of [0, 1], since the sampler uses ranks, at late times above all.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_ext import hub
from hf_ext.gstar.noising import (
    MaskedDiffusionCollator,
    mask_tokens,
    propose,
    shift_right,
    sigma_of,
    stratified_times,
)
from trainers.error_predictor.error_predictor_config import ErrorPredictorTrainingArguments
from trainers.error_predictor.losses import bce_loss, rank_auc, ranknet_loss
from trainers.script import tokenized


BUCKETS = 4


class ErrorPredictorTrainer(Trainer):
    """
    Train g_phi of G-Star (arXiv 2510.08369) against a frozen denoiser.

    Args:
        model ([`ErrorPredictor`]): As `ErrorPredictor.from_denoiser` made it.
        denoiser (`PreTrainedModel`): A masked language model. It is frozen; use the weights that will be sampled with.
        args ([`ErrorPredictorTrainingArguments`]): Options.
        train_dataset, eval_dataset (`Dataset`, *optional*):
            Rows with `input_ids`, or a column of texts; and `prompt_length`, if first tokens are a prompt.
        processing_class (`PreTrainedTokenizerBase`, *optional*): For texts, and saved with the model.
        mask_token_id (`int`, *optional*): The denoiser's or the tokenizer's if not given.
        kwargs: As for `Trainer`.
    """

    _tag_names = ["hf_ext", "gstar", "error-predictor"]

    def __init__(
        self,
        model: PreTrainedModel,
        denoiser: PreTrainedModel,
        args: ErrorPredictorTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        known = (
            mask_token_id,
            getattr(denoiser.config, "mask_token_id", None),
            getattr(processing_class, "mask_token_id", None),
        )
        mask = next((value for value in known if value is not None), None)
        if mask is None:
            raise ValueError("`mask_token_id` must be given: neither the denoiser nor the tokenizer has one.")
        for name in ["vocab_size"] + (["hidden_size"] if model.config.base_config is None else []):
            ours, theirs = getattr(model.config, name), getattr(denoiser.config, name)
            if ours != theirs:
                raise ValueError(
                    f"`model` must have the denoiser's {name}, {theirs}, got {ours}. Make it by "
                    "ErrorPredictor.from_denoiser."
                )
        self.mask_token_id = mask
        limit = getattr(denoiser.config, "max_position_embeddings", None)
        length = min(value for value in (args.max_length, limit, 1 << 30) if value is not None)
        pad = next(
            value
            for value in (getattr(processing_class, "pad_token_id", None), denoiser.config.pad_token_id, 0)
            if value is not None
        )
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
        self.denoiser = denoiser.requires_grad_(False).eval().to(self.accelerator.device)
        self._eval_generator: torch.Generator | None = None
        self._seen: dict[str, list[tuple[torch.Tensor, ...]]] = {"train": [], "eval": []}

    @torch.no_grad()
    def targets(
        self, inputs: dict[str, torch.Tensor], generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """
        A proposal for each row, and what is wrong with it.

        Returns:
            `dict`: `proposal` `(B, L)`; `wrong` and `counted`, bool `(B, L)`; `t` `(B,)`.
        """
        ids, keep, fixed = inputs["input_ids"], inputs["attention_mask"], inputs["fixed"]
        t = stratified_times(len(ids), self.args.noise_eps, generator).to(ids.device)
        noisy = mask_tokens(ids, fixed, t, self.mask_token_id, self.args.noise_eps, generator)
        logits = self._denoise(noisy, inputs, sigma_of(t, self.args.noise_eps)).logits
        logits = shift_right(logits) if self.args.right_shift_logits else logits
        if generator is not None and logits.device.type != "cpu":
            logits = logits.cpu()
        proposal = propose(logits, noisy.to(logits.device), self.mask_token_id, generator).to(ids.device)
        masked = noisy == self.mask_token_id
        counted = masked if self.args.positions == "generated" else ~fixed
        return {"proposal": proposal, "wrong": proposal != ids, "counted": counted, "t": t, "attention_mask": keep}

    def _denoise(self, ids: torch.Tensor, inputs: dict[str, torch.Tensor], sigma: torch.Tensor, **more: Any) -> Any:
        config = self.denoiser.config
        if getattr(config, "time_conditioning", False):
            more["sigma"] = sigma.float()
        if getattr(config, "prefix_attention", "full") == "causal":
            more["prefix_length"] = inputs["prompt_length"]
        return self.denoiser(input_ids=ids, attention_mask=inputs["attention_mask"], **more)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of one batch."""
        made = self.targets(inputs, None if model.training else self._eval_generator)
        if self.accelerator.unwrap_model(model).config.base_config is None:
            with torch.no_grad():
                zero = torch.zeros_like(made["t"])
                states = self._denoise(made["proposal"], inputs, zero, output_hidden_states=True).hidden_states[-1]
            outputs = model(hidden_states=states)
        else:
            outputs = model(input_ids=made["proposal"], attention_mask=made["attention_mask"])
        e, y, counted = outputs.logits, made["wrong"], made["counted"]
        if self.args.loss == "bce":
            loss = bce_loss(e, y, counted, self.args.class_balance)
        else:
            loss = ranknet_loss(e, y, counted)
        bucket = (made["t"] * BUCKETS).long().clamp(max=BUCKETS - 1)[:, None].expand(e.shape)
        seen = (part[counted].detach().cpu() for part in (e.float(), y, bucket))
        self._seen["train" if model.training else "eval"].append(tuple(seen))
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """The loss alone; figures are collected on the way."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The loss and the figures of the class's description, on the same times, masks and proposals every time."""
        self._eval_generator = torch.Generator().manual_seed(self.args.seed)
        self._seen["eval"].clear()
        return super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the figures of the batches since the last entry, of each process its own."""
        prefix = next(
            (name.removesuffix("loss") for name in logs if name.startswith("eval") and name.endswith("_loss")), None
        )
        if prefix is not None or "loss" in logs:
            logs.update(self._figures("train" if prefix is None else "eval", prefix or ""))
        super().log(logs, *args, **kwargs)

    def _figures(self, kind: str, prefix: str) -> dict[str, float]:
        seen, self._seen[kind] = self._seen[kind], []
        if not seen:
            return {}
        e, y, bucket = (torch.cat(parts) for parts in zip(*seen, strict=True))
        said = e > 0
        hit, missed, false = int((said & y).sum()), int((~said & y).sum()), int((said & ~y).sum())
        figures = {
            "error_rate": float(y.float().mean()) if len(y) else math.nan,
            "f1": 2 * hit / max(2 * hit + missed + false, 1),
            "auc": rank_auc(e, y),
        }
        for i in range(BUCKETS):
            figures[f"auc_t{i / BUCKETS:g}_{(i + 1) / BUCKETS:g}"] = rank_auc(e[bucket == i], y[bucket == i])
        return {prefix + name: value for name, value in figures.items()}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of the G-Star system, for this model."""
        if self.is_world_process_zero():
            hub.card(self.accelerator.unwrap_model(self.model), "gstar").save(Path(self.args.output_dir) / "README.md")
