"""ESSA: align a model by evolution of its LoRA's singular values, in forward passes only (arXiv 2507.04453).

    for each generation:
        prompts    = b rows of the data, the same for all candidates
        X[k]       = m + sigma D z_k,   k = 1..lambda,   z_k a function of (seed, generation, k)
        fitness[k] = mean reward of the completions of prompts by the model at X[k]
        m, sigma, D = what the strategy makes of (X, fitness)

The trainer is a `transformers.Trainer` for arguments, callbacks, state, logging, checkpoints and the Hub; it overrides
the loop, since there is no loss. One step is one generation. What is evaluated, saved and pushed is the mean m: the
best candidate of a generation was chosen by noise.
"""

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_utils import SaveStrategy, TrainOutput, speed_metrics

from trainers.essa.backends import ProcessBackend, write_completions
from trainers.essa.card import essa_card
from trainers.essa.checkpoints import find_checkpoint, read_checkpoint, remove_parts, write_checkpoint
from trainers.essa.essa_config import ESSAConfig
from trainers.essa.loading import named_policy
from trainers.essa.probes import CALIBRATION_PROMPTS, CALIBRATION_TOKENS, calibrate_sigma, mean_token_kl
from trainers.essa.progress import ESSAProgress
from trainers.essa.rollout import RESERVED, Prompts, generate_rows
from trainers.essa.scorer import FINISHED, REWARD, TOKENS, Row, Scorer, candidate_fitness, describe
from trainers.essa.strategies import Strategy, TooFewCandidates, make_strategy
from trainers.essa.svd_lora import SvdLora
from trainers.rewards.calling import Rewards


logger = logging.getLogger(__name__)
MOST_RETRIES = 5


class ESSATrainer(Trainer):
    """
    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): A model with a trained LoRA: a `PeftModel`, or the
            folder or Hub id of an adapter. A plain model needs `peft_config`, which starts from an untrained
            LoRA (a warning).
        reward_funcs (callable, `str`, `PreTrainedModel` or list of these): As in TRL's GRPOTrainer, sync or async:
            called with `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`, `log_metric` and
            every other column of the dataset; returns a list of float or None. A str is a reward model (one label).
        args ([`ESSAConfig`], *optional*): Options.
        train_dataset, eval_dataset (`Dataset` or list of dict): Rows with `prompt` (a text or messages) and what the
            rewards need. `eval_dataset` may be a dict of several: `{"task": ..., "off_task": ...}`.
        processing_class (`PreTrainedTokenizerBase`, *optional*): By default that of the model's id.
        reward_processing_classes (tokenizer or list, *optional*): Of reward models.
        callbacks (list of `TrainerCallback`, *optional*): As in `Trainer`.
        quantization_config (*optional*): For a `model` given by name; the base may be quantised, the LoRA is not.
        peft_config (`LoraConfig`, *optional*): For a plain model.

    Attributes:
        space ([`SearchSpace`]): What is searched.
        strategy ([`Strategy`]): Mean, step size and covariance, from `train` on.
        fitness (`np.ndarray` [population_size]): Of the candidates of the last generation; NaN for those that failed.

    Raises:
        ValueError, TypeError: for what cannot be searched or scored, before any generation.

    Example:

    ```python
    from trainers.essa import ESSAConfig, ESSATrainer
    from trainers.rewards import gsm8k_reward

    trainer = ESSATrainer(
        model="you/sft-adapter",
        reward_funcs=gsm8k_reward,
        args=ESSAConfig(output_dir="essa", population_size=24, batch_size_per_candidate=25, max_steps=100),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["hf_ext", "essa"]
    _name = "ESSA"
    state: TrainerState
    control: TrainerControl

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: ESSAConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        args = args if args is not None else ESSAConfig(output_dir="essa")
        if train_dataset is None:
            raise ValueError("`train_dataset` must be given: rows with a prompt.")
        for name in args.generation_kwargs or {}:
            if name in RESERVED:
                raise ValueError(f"`generation_kwargs` must not set {name!r}: ESSAConfig or the trainer does.")
        if args.temperature and (args.generation_kwargs or {}).get("num_beams", 1) > 1:  # type: ignore[union-attr]
            raise ValueError("`num_beams` needs temperature=0: beams are searched, not sampled.")
        policy = named_policy(model, processing_class, peft_config, quantization_config, args.model_init_kwargs)
        tokenizer, self._room = policy.tokenizer, _room(policy.context, args.max_completion_length)
        self.prompts = self._read(train_dataset, tokenizer, "train_dataset", args)
        if args.batch_size_per_candidate > len(self.prompts):
            raise ValueError(
                f"`batch_size_per_candidate` must be at most the {len(self.prompts)} rows of train_dataset, got "
                f"{args.batch_size_per_candidate}."
            )
        named = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        self.eval_prompts = {
            name: self._read(data, tokenizer, f"eval_dataset {name}".strip(), args)
            for name, data in named.items()
            if data is not None
        }
        self.rewards = Rewards(
            reward_funcs,
            args.reward_weights,
            reward_processing_classes,
            time_limit=args.reward_time_limit,
            device=args.device,
        )
        super().__init__(
            model=policy.load(),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ESSAProgress())
        self.model.eval()
        self.space = SvdLora(self.model, args.svd_fraction, args.sigma_mode, args.clamp_min)
        self._strategy: Strategy | None = None
        self._new_strategy(1.0)  # refuses options that do not fit, before anything is generated
        self.scorer = Scorer(self.model, self.space, tokenizer, self.rewards, args)
        self.backend: Any = ProcessBackend(self.scorer, self.accelerator)
        if args.candidate_backend == "ray":
            from trainers.essa.ray_backend import RayBackend

            self.backend = RayBackend(self.scorer, args.num_workers)
        self._counts = _no_counts()
        self.fitness: np.ndarray | None = None
        self._starts: dict[str, tuple[list[list[int]], list[list[int]]]] = {}

    def _read(self, data: Any, tokenizer: Any, name: str, args: ESSAConfig) -> Prompts:
        return Prompts(data, tokenizer, self._room, args.chat_template_kwargs, name)  # type: ignore[arg-type]

    # ---- the loop ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """
        Search until `max_steps` generations, `target_reward`, `stop_patience` or `max_wall_time`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint, or True for the last in `output_dir`.
                The search goes on bit for bit as if it had not stopped.

        Returns:
            `TrainOutput`: without a loss (0). The model then holds the mean, or with `load_best_model_at_end` that of
            the best evaluation.

        Raises:
            RewardError: where a reward function fails. The state is that of the last whole generation, and is saved.
            ValueError: where a checkpoint is of another dataset, dimension, population, optimizer or adapter.
        """
        if kwargs:
            raise TypeError(f"`train` must be called with resume_from_checkpoint alone, got {', '.join(kwargs)}.")
        args, started = self.args, time.time()
        checkpoint = find_checkpoint(args.output_dir, resume_from_checkpoint)
        epochs = math.ceil(self._batches_an_epoch * args.num_train_epochs)
        most = args.max_steps if args.max_steps > 0 else epochs
        self._begin(most, checkpoint)
        first, before = self.state.global_step, self._counts["seconds"]
        self.is_in_train = True
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start and self.eval_prompts and not self.state.global_step:
            self.evaluate()
        saved = self.state.global_step
        try:
            while self.state.global_step < most and not self.control.should_training_stop:
                logs = self._generation()
                self._counts["seconds"] = before + time.time() - started
                if self._log_evaluate_save(logs):
                    saved = self.state.global_step
        except (Exception, KeyboardInterrupt):
            self._keep(saved)
            raise
        finally:
            self.is_in_train = False
            self.backend.close()
        return self._finish(started, first)

    def _keep(self, saved: int) -> None:
        """After an error or Ctrl-C: the mean back into the model, and a checkpoint of what was not saved yet."""
        if self.strategy.generation != self.state.global_step:  # it has learned from what was not counted any more
            self.strategy.load_state_dict(*self._before)
        self.space.write(self.strategy.mean)  # candidates one by one leave theirs
        alone = self.args.world_size == 1  # other processes would not come to the save
        if alone and self.state.global_step > saved and self.args.save_strategy != SaveStrategy.NO:
            self._save_checkpoint(self.model, None)
            logger.warning(
                "%d generations are saved: train(resume_from_checkpoint=True) goes on.", self.state.global_step
            )

    def _begin(self, most: int, checkpoint: str | None) -> None:
        self.state = TrainerState(
            stateful_callbacks=[
                callback
                for callback in [*self.callback_handler.callbacks, self.control]
                if isinstance(callback, ExportableState)
            ]
        )
        if checkpoint is not None:
            self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
            self._load_callback_state()
        self.state.compute_steps(self.args, most)
        self.state.max_steps, self.state.num_train_epochs = most, math.ceil(most / self._batches_an_epoch)
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.control.should_training_stop = False
        if self.args.should_save:
            remove_parts(self.args.output_dir)
        sigma = self.args.first_sigma if checkpoint is None else 1.0  # a checkpoint brings its own
        self._strategy = self._new_strategy(sigma if sigma is not None else self._calibrated())
        self._counts = _no_counts()
        if checkpoint is not None:
            self._counts = read_checkpoint(self, Path(checkpoint), self._identity())["counts"]
            self.backend.close()  # workers of an earlier evaluation have other bases
        self.space.write(self.strategy.mean)

    @property
    def strategy(self) -> Strategy:
        """Mean, step size and covariance of the search, from the call of `train` on."""
        if self._strategy is None:
            raise RuntimeError("There is no search yet: call `train` first.")
        return self._strategy

    @property
    def _seed(self) -> int:
        return self.args.seed if self.args.noise_seed is None else self.args.noise_seed

    @property
    def _batches_an_epoch(self) -> int:
        return math.ceil(len(self.prompts) / self.args.batch_size_per_candidate)

    def _new_strategy(self, sigma: float) -> Strategy:
        options = {"min_population_fraction": self.args.min_population_fraction, **(self.args.optimizer_kwargs or {})}
        return make_strategy(
            self.args.optimizer, self.space.dim, self.args.population_size, sigma, self._seed, **options
        )

    def _calibrated(self) -> float:
        prompts, completions = self._start_samples("", self.prompts, CALIBRATION_PROMPTS, CALIBRATION_TOKENS)
        sigma, tried = calibrate_sigma(self.model, self.space, prompts, completions, self.args.sigma_kl, self._seed)
        logger.info("sigma=%g, by the mean KL of candidates to the start at each: %s", sigma, tried)
        return sigma

    def _generation(self) -> dict[str, float]:
        """One step: ask, score, tell; the state changes at its end alone."""
        args, strategy = self.args, self.strategy
        self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
        generation, started = self.state.global_step, time.time()
        rows = self._rows(generation)
        for _ in range(MOST_RETRIES):
            scored = self.backend.score(strategy.ask(), rows, self.prompts, generation, self.state)
            fitness = candidate_fitness(scored.values, rows, args.population_size)
            self._before = strategy.state_dict()
            try:
                told = strategy.tell(fitness)
                break
            except TooFewCandidates as error:
                strategy.sigma /= 2
                logger.warning("%s Trying the generation again with half the step size, %g.", error, strategy.sigma)
        else:
            raise RuntimeError(
                f"Generation {generation} must have finite logits, but failed {MOST_RETRIES} times, down to sigma="
                f"{strategy.sigma:g}. Check the model in this dtype, or set a smaller `sigma`."
            )
        self.backend.check_agreement(strategy.fingerprint(), generation)
        self.space.write(strategy.mean)
        seconds = time.time() - started
        tokens = int(scored.values[:, TOKENS].sum())
        self._counts["completions"] += len(rows)
        self._counts["tokens"] += tokens
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self._batches_an_epoch
        logs = describe(scored.values, self.rewards.names, scored.metrics)
        logs |= {
            "reward": float(np.nanmean(fitness)),
            "reward_std": float(np.nanstd(fitness)),
            "reward_max": float(np.nanmax(fitness)),
            "sigma": told.sigma,
            "mean_norm": float(np.linalg.norm(self.space.scale * strategy.mean)),
            "candidates/scored": told.effective_population,
            "candidates/failed": int(np.isnan(fitness).sum()),
            "candidates/ties": told.ties,
            "completions_total": self._counts["completions"],
            "num_tokens": self._counts["tokens"],
            "generation_seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        if generation == 0 and not scored.values[:, FINISHED].any():
            logger.warning(
                "Every completion was cut at max_completion_length=%d: rewards may judge unfinished answers. Raise "
                "it, or check that the model ends its turns.",
                args.max_completion_length,
            )
        self._last, self.fitness = (scored, rows), fitness
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        if self.state.global_step % self._batches_an_epoch == 0:
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
        return logs

    def _rows(self, generation: int) -> list[Row]:
        """Candidate and prompt of every completion, a function of seed and generation; short prompts first."""
        args = self.args
        rows = []
        for candidate in range(args.population_size):
            batch = {"generation": generation, "candidate": generation * args.population_size + candidate, "never": 0}
            prompts = self.prompts.batch(batch[args.resample], args.batch_size_per_candidate, self._seed)
            rows += [Row(candidate, i) for i in sorted(prompts, key=lambda i: len(self.prompts.ids[i]))]
        return rows

    def _log_evaluate_save(self, logs: dict[str, float]) -> bool:
        """What the callbacks ask for after a step; True where a checkpoint was written."""
        if self.control.should_log:
            self.log(logs)
            if self.args.log_completions:
                rank = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
                name = f"completions_{self.state.global_step:05d}{rank}.jsonl"
                write_completions(Path(self.args.output_dir) / "completions" / name, *self._last, self.prompts)
        reached = logs["reward"]
        judged = not self.eval_prompts
        if self.control.should_evaluate and self.eval_prompts:
            metrics = self.evaluate()
            best = self._determine_best_metric(metrics, None)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = best
            reached, judged = metrics[self._main_metric], True
        if judged:
            self._judge(reached)
        if self.args.max_wall_time and self._counts["seconds"] >= self.args.max_wall_time:
            self.control.should_training_stop = True
        last = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        if self.control.should_save or (last and self.args.save_strategy == SaveStrategy.STEPS):
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            return True
        return False

    @property
    def _main_metric(self) -> str:
        """The reward of the only, or of the first, evaluation dataset."""
        name = next(iter(self.eval_prompts))
        return f"eval_{name}_reward" if name else "eval_reward"

    def _judge(self, reward: float) -> None:
        """Early stop, on what was judged last: an evaluation of the mean, or without one a generation."""
        args, counts = self.args, self._counts
        better = counts["best"] is None or reward > counts["best"]
        counts["best"] = reward if better else counts["best"]
        counts["stale"] = 0 if better else counts["stale"] + 1
        reached = args.target_reward is not None and reward >= args.target_reward
        if reached or (args.stop_patience and counts["stale"] >= args.stop_patience):
            self.control.should_training_stop = True

    def _finish(self, started: float, first: int) -> TrainOutput:
        steps = self.state.global_step - first
        metrics = speed_metrics("train", started, num_steps=steps)
        self.log(metrics)
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            self.strategy.load_state_dict(*Strategy.load(best).state_dict())
            self.space.write(self.strategy.mean)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._finish_current_push()
        return TrainOutput(self.state.global_step, 0.0, metrics)

    # ---- evaluation of the mean ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Reward of the mean, greedy or sampled as in training, on every row.

        Args:
            eval_dataset (`Dataset`, list of dict or dict of these, *optional*): By default the trainer's own.

        Returns:
            `dict[str, float]`: `eval_reward`, `eval_reward_std`, `eval_rewards/<function>/mean`,
            `eval_completions/...` and, with `kl_probe_prompts`, `eval_kl`: nats per token of the start's own
            completions. With several datasets `eval_<name>_...`.
        """
        if eval_dataset is None:
            named = self.eval_prompts
        else:
            given = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
            named = {
                name: self._read(data, self.scorer.tokenizer, "eval_dataset", self.args)
                for name, data in given.items()
            }
        if not named:
            raise ValueError("`eval_dataset` must be given, here or to the trainer.")
        x = np.zeros(self.space.dim) if self._strategy is None else self._strategy.mean
        metrics: dict[str, float] = {}
        for name, prompts in named.items():
            started, prefix = time.time(), f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
            rows = [Row(0, i) for i in sorted(range(len(prompts)), key=lambda i: len(prompts.ids[i]))]
            # the generation of evaluations is -1, so that sampled ones differ from those of training
            scored = self.backend.score(x[None], rows, prompts, -1, self.state)
            rewards = scored.values[:, REWARD]
            if np.isnan(rewards).all():
                raise ValueError(f"Reward functions must reward some completion of {prefix[:-1]}, but all were None.")
            found = {f"{prefix}reward": float(np.nanmean(rewards)), f"{prefix}reward_std": float(np.nanstd(rewards))}
            found |= describe(scored.values, self.rewards.names, scored.metrics, prefix)
            if self.args.kl_probe_prompts:
                samples = self._start_samples(name, prompts, self.args.kl_probe_prompts, CALIBRATION_TOKENS)
                found[f"{prefix}kl"] = float(mean_token_kl(self.model, self.space, x[None], *samples)[0])
            found |= speed_metrics(prefix[:-1], started, num_samples=len(prompts))
            metrics |= found
        self.space.write(x)  # the sequential backend leaves its last candidate in the adapter
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _start_samples(
        self, name: str, prompts: Prompts, count: int, tokens: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The first prompts, and what the start samples for them: the same in every process and after a resume."""
        key = f"{name}/{len(prompts)}/{count}"
        if key not in self._starts:
            asked = prompts.ids[:count]
            with self.space.candidates(np.zeros((1, self.space.dim)), [0] * len(asked)):
                made = generate_rows(
                    self.model,
                    asked,
                    pad_token_id=self.scorer.tokenizer.pad_token_id,
                    eos_token_ids=self.scorer.eos_token_ids,
                    max_new_tokens=min(tokens, self.args.max_completion_length),
                    temperature=1.0,
                    noise_keys=[(self._seed, -2, i) for i in range(len(asked))],
                )
            self._starts[key] = asked, made.completion_ids
        return self._starts[key]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        write_checkpoint(self, {"run": self._identity(), "counts": self._counts})

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that was stopped, beside the strategy's own state."""
        options = ("batch_size_per_candidate", "resample", "sigma_mode", "svd_fraction")
        shared = {name: getattr(self.args, name) for name in options}
        return {"dataset": self.prompts.fingerprint, "adapter": self.space.fingerprint, **shared}

    # ---- what gradients would need, and the card ----

    def create_optimizer(self, model: Any = None) -> Any:
        raise NotImplementedError("ESSA has no gradients and no torch optimizer: see `trainer.strategy`.")

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ESSA has no training step: a step is a generation, see `train`.")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write README.md into `output_dir`: what was searched, with which options, and what came of it."""
        if self.is_world_process_zero():
            essa_card(self, model_name, dataset_name, tags).save(Path(self.args.output_dir) / "README.md")


def _no_counts() -> dict[str, Any]:
    """Of a run that begins: what was spent, and what early stopping knows."""
    return {"completions": 0, "tokens": 0, "seconds": 0.0, "best": None, "stale": 0}


def _room(context: int | None, completion: int) -> int:
    """Most tokens that a prompt may have, beside a completion, in the model's context."""
    if context is None:
        return 10**9
    if completion >= context:
        raise ValueError(
            f"`max_completion_length` must be below the model's context of {context} tokens, got {completion}."
        )
    return context - completion
