"""Train sparse autoencoders on the activations of any language model, several of them in one pass over it.

    for each step:
        x      = a batch of activations from a shuffled stream, a cache, or memory; one for each hook
        loss   = sum over SAEs of error / variance + AuxK / 32
        before the optimiser: what would only change norms of decoder rows is dropped; each SAE is clipped by itself
        after it:             decoder rows have norm 1 again

The trainer is a `transformers.Trainer`: arguments, callbacks, logging, schedules, checkpoints and the Hub are its.
What it trains is a [`Bundle`]; what it saves are the SAEs, which load where hf_ext is not installed.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, set_seed
from transformers.trainer_callback import ProgressCallback

from hf_ext import hub
from hf_ext.sae import SAEModel, fused
from hf_ext.sae.metrics import budget_curve, reconstruction_metrics
from trainers.sae.bundle import Bundle
from trainers.sae.cache import ActivationCache, RowBatches, describe, harvest
from trainers.sae.card import sae_card
from trainers.sae.checkpoints import read_state, remove_parts, weights, write_checkpoint
from trainers.sae.loading import (
    Plan,
    cache_tokens,
    holds_texts,
    load_model,
    places_of_rows,
    planned,
    rows_of,
    step_tokens,
)
from trainers.sae.progress import SAEProgress
from trainers.sae.sae_config import SAETrainingArguments
from trainers.sae.streaming import ModelSource, ShuffledStream, TokenRows


DEAD_AFTER = 10_000_000


class SAETrainer(Trainer):
    """
    Args:
        model (`str` or `PreTrainedModel`, *optional*): The language model whose activations are learned, or its Hub id
            or folder; only read. None where `train_dataset` holds activations.
        sae ([`SAEModel`], [`SAEConfig`] or dict of these): What is trained, or name -> what is trained: any number, of
            any activation, size and hook (`hook_name`, `hook_io` of its configuration).
        args ([`SAETrainingArguments`], *optional*): Options.
        train_dataset: Texts (rows with a text or input_ids; `datasets`, streaming ones too, or a list); or
            activations: a tensor (N, d_in), a dict name of SAE -> tensor, or an [`ActivationCache`].
        eval_dataset: Like `train_dataset`.
        processing_class (`PreTrainedTokenizerBase`, *optional*): By default that of the model's id.
        loss_funcs (`Callable` or dict, *optional*): Name of SAE -> name of a loss as in `args.loss`, or
            `f(x', codes, W_dec, b_dec) -> (loss, reconstruction)`, for example
            `functools.partial(hierarchical_loss, budgets=[1, 8, 64])`. One for all if it is no dict.
        callbacks, optimizers: As in `Trainer`.

    Attributes:
        saes (`dict[str, SAEModel]`): The SAEs; a single one is called "sae".
        tokens_since_fired (`dict[str, torch.Tensor]`): Name -> (d_sae,), tokens since each latent fired.

    Raises:
        ValueError, TypeError: for what cannot be trained, before weights load wherever that can be known.

    Example:

    ```python
    from hf_ext import SAEConfig
    from trainers.sae import SAETrainer, SAETrainingArguments

    trainer = SAETrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        sae=SAEConfig(d_in=576, d_sae=4096, k=64, hook_name="model.layers.15"),
        args=SAETrainingArguments("sae", loss="hierarchical", train_tokens=10_000_000),
        train_dataset=dataset,
    )
    trainer.train()
    trainer.saes["sae"].push_to_hub("you/sae")
    ```
    """

    _tag_names = ["hf_ext", "sae"]
    _name = "SAE"
    args: SAETrainingArguments
    control: TrainerControl

    def __init__(
        self,
        model: Any = None,
        sae: Any = None,
        args: SAETrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        loss_funcs: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args if args is not None else SAETrainingArguments(output_dir="sae")
        set_seed(args.seed)
        self._several = isinstance(sae, dict)
        given = sae if isinstance(sae, dict) else {"sae": sae}
        plan = planned(model, given, args, train_dataset, processing_class, loss_funcs)
        fused.register()
        saes = {name: one if isinstance(one, SAEModel) else SAEModel(one) for name, one in given.items()}
        super().__init__(
            model=Bundle(saes, plan.places, plan.losses, args),
            args=args,
            eval_dataset=eval_dataset,
            processing_class=plan.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args._n_gpu = min(self.args.n_gpu, 1)  # more GPUs take more processes: accelerate launch
        self.train_dataset = train_dataset
        self.saes, self.places, self.hooks = saes, plan.places, plan.hooks
        self.language_model = load_model(model, args) if plan.hooks else None
        for one in saes.values():
            name = getattr(getattr(self.language_model, "config", None), "_name_or_path", None)
            if hub.is_hub_id(name):
                one.config.base_model_name_or_path = name
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(SAEProgress())
        self.add_callback(_Constrain(self))
        self.batches = self._batches(plan)
        self.tokens_since_fired = {
            name: torch.zeros(one.config.d_sae, dtype=torch.long, device=args.device) for name, one in saes.items()
        }
        self._dead_after = args.dead_after_tokens or min(
            DEAD_AFTER, max(args.max_steps * step_tokens(self.args) // 20, 1)
        )
        self._sums: dict[str, torch.Tensor] = {}
        self._window = (0, time.perf_counter())  # steps since the last log entry, and when that was
        self._evaluated: dict[str, torch.Tensor] | None = None
        self._began = False

    @property
    def _batch_tokens(self) -> int:
        return self.args.per_device_train_batch_size * self.args.world_size

    # ---- where activations come from ----

    def _source(self, dataset: Any, world: int = 1) -> ModelSource:
        args, tokenizer = self.args, self.processing_class
        special = set(getattr(tokenizer, "all_special_ids", None) or ()) if args.drop_special_tokens else set()
        return ModelSource(
            self.language_model,
            self.hooks,
            TokenRows(dataset, tokenizer, args.context_size, args.dataset_text_field),
            rows_at_once=args.rows_at_once,
            skip_positions=args.skip_positions,
            special_ids=special,
            max_norm_ratio=args.max_norm_ratio,
            dtype=None if args.activation_dtype == "auto" else getattr(torch, args.activation_dtype),
            rank=args.process_index if world > 1 else 0,
            world=world,
            gather=self.accelerator.gather if world > 1 else lambda tensor: tensor,
        )

    def _batches(self, plan: Plan) -> RowBatches | ShuffledStream:
        args, rows = self.args, plan.rows
        part = {"rank": args.process_index, "world": args.world_size}
        if rows is None and args.activation_cache is not None:
            rows = self._cache(args.activation_cache)
        if rows is not None:
            return RowBatches(rows, self._batch_tokens, args.seed, **part)
        capacity = max(args.buffer_tokens, self._batch_tokens)
        source = self._source(self.train_dataset, args.world_size)
        return ShuffledStream(source, self._batch_tokens, capacity, args.buffer_mix, args.seed, **part)

    def _cache(self, folder: str) -> ActivationCache:
        args = self.args
        tokens = cache_tokens(args)
        source = self._source(self.train_dataset)
        dtype = source.dtype or next(source.model.parameters()).dtype
        widths = {place: self.saes[name].config.d_in for name, place in self.places.items()}
        info = describe(self.language_model, source, widths, dtype, self.train_dataset)
        with args.main_process_first(desc="harvest of activations"):
            harvest(folder, source, info, tokens, progress=not args.disable_tqdm)
        return ActivationCache(folder, sorted(set(self.places.values())), tokens)

    def get_train_dataloader(self) -> Any:
        """The batches of activations; nothing is fetched ahead, so that their position is that of the training."""
        return _Endless(self)

    # ---- the step ----

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the SAEs' losses; their figures go to the log."""
        dead = [self.tokens_since_fired[name] >= self._dead_after for name in self.saes]
        loss, figures = model(inputs, dead)
        self._note(figures, dead)
        return (loss, figures) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As in `Trainer`; then gradients of decoder rows lose what is along the row."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss must be finite, got {float(loss)} at step {self.state.global_step + 1}. Lower the learning "
                "rate, or train in float32."
            )
        if self.accelerator.sync_gradients:
            for one in self.saes.values():
                one.remove_parallel_gradient_()
        return loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Each SAE by itself: none slows another down. Returns the largest norm."""
        most = self.args.max_grad_norm
        return torch.stack(
            [self.accelerator.clip_grad_norm_(one.parameters(), most) for one in self.saes.values()]
        ).max()

    def _note(self, figures: list[dict[str, torch.Tensor]], dead: list[torch.Tensor]) -> None:
        distributed = self.args.world_size > 1
        for (name, since), found, mask in zip(self.tokens_since_fired.items(), figures, dead, strict=True):
            fired = found["fired"].int()
            if distributed:
                torch.distributed.all_reduce(fired)
            since += self._batch_tokens
            since[fired > 0] = 0
            for key in ("fvu", "l0", "auxk"):
                full = self._key(name, key)
                self._sums[full] = self._sums.get(full, 0) + found[key].detach()
            self._sums[self._key(name, "dead_fraction")] = mask.float().mean()
        self._window = (self._window[0] + 1, self._window[1])

    def _key(self, name: str, figure: str) -> str:
        return f"{name}/{figure}" if self._several else figure

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the SAEs' means since the last entry, tokens seen, and tokens per second."""
        batches, began = self._window
        if "loss" in logs and batches:
            for key, total in self._sums.items():
                mean = float(self._mean_over_processes(total))
                logs[key] = mean if key.endswith("dead_fraction") else mean / batches
            logs["num_tokens"] = self.state.global_step * step_tokens(self.args)
            logs["tokens_per_second"] = round(batches * self._batch_tokens / (time.perf_counter() - began), 1)
            self._sums, self._window = {}, (0, time.perf_counter())
        super().log(logs, start_time)

    # ---- begin, save, go on ----

    def begin(self) -> None:
        """Before the first step: scales of inputs that shall have one, and b_dec, from the first batch."""
        if self.args.should_save:
            remove_parts(self.args.output_dir)
        if self._began:
            return
        self._began = True
        state = self.batches.state()
        batch = self.batches.next()
        self.batches.load(state)
        for name, one in self.saes.items():
            x = batch[self.places[name]].to(self.args.device, one.dtype)
            if one.config.input_norm == "scalar" and one.config.input_scale == 1:
                norm = self._mean_over_processes(x.norm(dim=1).mean())
                one.config.input_scale = float(one.config.d_in**0.5 / norm)
            if self.args.init_b_dec and not one.b_dec.any():
                with torch.no_grad():
                    one.b_dec.copy_(self._mean_over_processes(one.normalize(x).mean(0)))

    def _mean_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, "mean") if self.args.world_size > 1 else value

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self._several:
            hub.save_many(folder, self.saes)
        else:
            self.saes["sae"].save_pretrained(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        tensors, facts = self.batches.state()
        since = {f"since.{name}": tensor for name, tensor in self.tokens_since_fired.items()}
        stream = {f"stream.{name}": tensor for name, tensor in tensors.items()}
        run = {"saes": {name: one.config.to_diff_dict() for name, one in self.saes.items()}}
        write_checkpoint(self, ({**since, **stream}, {"stream": facts, **run}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights, counts of dead latents, and the position in the data."""
        folder = Path(resume_from_checkpoint)
        tensors, facts = read_state(folder)
        if set(facts["saes"]) != set(self.saes):
            raise ValueError(
                f"`resume_from_checkpoint` must be of the same SAEs, but {folder} has {', '.join(facts['saes'])} and "
                f"this run {', '.join(self.saes)}."
            )
        for name, one in self.saes.items():
            there, here = facts["saes"][name], one.config.to_diff_dict()
            for option in ("d_in", "d_sae", "k", "activation", "hook_name", "hook_io"):
                if there.get(option) != here.get(option):
                    raise ValueError(
                        f"`resume_from_checkpoint` must be of the same {option} of {name!r}, but {folder} has "
                        f"{there.get(option)!r} and this run {here.get(option)!r}."
                    )
            one.config.input_scale = there.get("input_scale", 1.0)
            one.load_state_dict(weights(folder / name if self._several else folder))
            self.tokens_since_fired[name].copy_(tensors[f"since.{name}"])
        stream = {n.removeprefix("stream."): t for n, t in tensors.items() if n.startswith("stream.")}
        self.batches.load((stream, facts["stream"]))
        self._began = True

    def _load_best_model(self) -> None:
        for name, one in self.saes.items():
            folder = Path(self.state.best_model_checkpoint or "")
            one.load_state_dict(weights(folder / name if self._several else folder))

    # ---- evaluation and card ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Reconstruction of `eval_tokens` tokens that are held out, for each SAE.

        Returns:
            `dict[str, float]`: `eval_ev_global`, `eval_ev_centered`, `eval_ev_per_token`, `eval_l0`,
            `eval_dead_fraction` (of those tokens), ... (see `hf_ext.sae.metrics`), and for `topk`
            `eval_ev_global_at_<k>` at powers of two. With several SAEs `eval_<name>/...`.
        """
        started = time.perf_counter()
        activations = self._eval_activations(eval_dataset)
        found: dict[str, float] = {}
        for name, one in self.saes.items():
            training = one.training
            one.eval()
            x = activations[self.places[name]].to(self.args.device)
            figures = reconstruction_metrics(one, x)
            if one.config.activation == "topk":
                budgets = [2**i for i in range(one.config.k.bit_length())]
                figures |= {f"ev_global_at_{k}": ev for k, ev in budget_curve(one, x, budgets).items()}
            found |= {f"{metric_key_prefix}_{self._key(name, key)}": value for key, value in figures.items()}
            one.train(training)
        seconds = time.perf_counter() - started
        found[f"{metric_key_prefix}_runtime"] = round(seconds, 3)
        self._window = (self._window[0], self._window[1] + seconds)  # the speed logged is that of training
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _eval_activations(self, dataset: Any) -> dict[str, torch.Tensor]:
        if dataset is None and self._evaluated is not None:
            return self._evaluated
        given = dataset if dataset is not None else self.eval_dataset
        if given is None:
            raise ValueError("`eval_dataset` must be given, here or to the trainer.")
        most = self.args.eval_tokens
        if not holds_texts(given):
            configs = {name: one.config for name, one in self.saes.items()}
            rows = rows_of(given, configs)
            found = rows.gather(torch.arange(min(most, len(rows))))
            of = places_of_rows(given, configs)
            found = {self.places[name]: found[of[name]] for name in self.saes}
        elif self.language_model is None:
            raise ValueError("`eval_dataset` must hold activations, as `train_dataset` does: there is no model.")
        else:
            parts: list[dict[str, torch.Tensor]] = []
            source, count = self._source(given), 0
            while count < most:
                chunk = source.next()
                if parts and source.rows.epoch:  # held-out texts are not counted twice
                    break
                parts.append(chunk.activations)
                count += len(chunk.token_ids)
            found = {place: torch.cat([part[place] for part in parts])[:most] for place in self.hooks}
        if dataset is None:
            self._evaluated = found
        return found

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """Write README.md into `output_dir`: what was trained, with which options, and what came of it."""
        if self.is_world_process_zero():
            sae_card(self, model_name, dataset_name, tags).save(Path(self.args.output_dir) / "README.md")


class _Endless:
    """What Trainer iterates: the trainer's batches, as many as it asks for."""

    def __init__(self, trainer: SAETrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> "_Endless":
        self.trainer.begin()
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        return self.trainer.batches.next()


class _Constrain(TrainerCallback):
    """After the optimiser: decoder rows of norm 1, thresholds not below 0; an epoch is the run, also a resumed one."""

    def __init__(self, trainer: SAETrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._window = (0, time.perf_counter())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for one in self.trainer.saes.values():
            one.constrain_()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps
