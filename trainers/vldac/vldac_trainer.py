"""Train a vision-language policy in Gymnasium worlds by VL-DAC (arXiv 2508.04280).

    for each update:
        play T steps in N environments: encode frames and text, sample a response, hand its text to the world
        advantages over environment steps, one for all tokens of a response
        for each epoch, for each batch of steps:
            loss = L_pi + beta L_KL + alpha L_V        (alpha L_V alone in the first updates)

The trainer is a `transformers.Trainer`: arguments, callbacks, logging, schedules, checkpoints and the Hub are its.
What it saves is a plain model or adapter with a folder `value_head` beside it.

- A rollout is a function of the weights, the worlds, and (seed, process, update), so that resuming needs no random
  state. Worlds with `get_state()` and `set_state()` go on where they were, and a resumed run is then the uninterrupted
  one; others begin a new episode, the next in their count.
- Dropout is off throughout, so the ratio of a first pass is 1.
- One file of 500 lines, since playing, learning and saving share the trainer's state and little else.
"""

import copy
import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, set_seed

from hf_ext import hub
from hf_ext.vldac import ValueHead
from trainers.vldac import losses
from trainers.vldac.buffer import RolloutBuffer
from trainers.vldac.loading import factories, load, without_dropout
from trainers.vldac.policy import (
    ActorCritic,
    Prompt,
    VisionPolicy,
    encode,
    placeholders,
    respond,
    score,
    thought_weights,
)
from trainers.vldac.rollout import Episode, World, episode_seed, evaluate, figures
from trainers.vldac.vldac_config import VLDACConfig


logger = logging.getLogger(__name__)
STATE = "vldac_state.json"
RECENT = 50  # episodes of the success rate, as in the paper


class VLDACTrainer(Trainer):
    """
    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): An image-text-to-text model, or its Hub id or folder.
        args ([`VLDACConfig`], *optional*): Options.
        environment_factory (`Callable[[], Env]` or a list of these): Makes an environment.
        eval_environment_factory (`Callable[[], Env]`, *optional*): For `evaluate`; by default the first of the others.
        processing_class (`ProcessorMixin`, *optional*): By default that of the model's id.
        value_head ([`ValueHead`], *optional*): A critic to go on with; by default a new one.
        peft_config (`PeftConfig`, *optional*): An adapter to train, for example `language_lora()`.
        action_start (`Callable[[str], int]`, *optional*):
            Where in a response its action begins, as a number of characters; for `thought_coef`.
        callbacks, optimizers: As in `Trainer`.

    Example:

    ```python
    trainer = VLDACTrainer(
        model="Qwen/Qwen2.5-VL-3B-Instruct",
        args=VLDACConfig("agent", bf16=True),
        environment_factory=make_world,
        peft_config=language_lora(),
    )
    trainer.train()
    ```
    """

    _tag_names = ["hf_ext", "vldac"]
    _name = "VL-DAC"
    args: VLDACConfig
    control: TrainerControl
    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: VLDACConfig | None = None,
        environment_factory: Any = None,
        eval_environment_factory: Callable[[], Any] | None = None,
        processing_class: Any = None,
        value_head: ValueHead | None = None,
        peft_config: Any = None,
        action_start: Callable[[str], int] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args if args is not None else VLDACConfig(output_dir="vldac")
        set_seed(args.seed)
        makers = factories(environment_factory, args.num_envs)
        if (args.thought_coef != 1) != (action_start is not None):
            raise ValueError(
                f"`action_start` must be given for a thought_coef other than 1 and for no other, got "
                f"thought_coef={args.thought_coef}."
            )
        restarts = args.env_max_restarts if args.on_env_error == "restart" else 0
        self.worlds = [
            World(make, i, args.image_history, args.max_episode_steps, restarts) for i, make in enumerate(makers)
        ]
        if len({id(world.env) for world in self.worlds}) < len(self.worlds):
            raise ValueError("`environment_factory` must make a new environment each time, got one of them twice.")
        self._evaluated = eval_environment_factory if eval_environment_factory is not None else makers[0]
        policy, processing_class = load(model, processing_class)
        if peft_config is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, peft_config)
        without_dropout(policy)
        if value_head is None:
            value_head = ValueHead.for_policy(policy, hidden_sizes=args.value_hidden_sizes, pooling=args.value_pooling)
        value_head.config.stop_gradient = args.value_stop_gradient
        value_head.requires_grad_(args.advantage_estimator != "loo")
        super().__init__(
            model=ActorCritic(policy, value_head),
            args=args,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = True  # by the number of steps in the whole batch
        self.policy, self.value_head = policy, value_head
        self.action_start = action_start
        self.suppressed = placeholders(policy, processing_class)
        self._reference = None
        if args.kl_reference == "initial" and args.kl_coef and not hasattr(policy, "disable_adapter"):
            logger.warning("The initial policy is kept as a second model in memory. An adapter needs none.")
            self._reference = copy.deepcopy(policy).requires_grad_(False).to(self.args.device).eval()
        self.update = 0  # updates that have begun
        self.episodes: deque[Episode] = deque(maxlen=RECENT)
        self._counts = [0] * args.num_envs
        self._playing = False
        self._queue: deque[dict[str, Any]] = deque()
        self._sums: dict[str, list[float]] = defaultdict(list)
        self.buffer: RolloutBuffer | None = None

    # ---- playing ----

    def _start(self, n: int, count: int | None = None, group: int = 1) -> None:
        """Begin the next episode of world n; worlds of a group begin alike."""
        self._counts[n] += 1
        path = (self.args.seed, self.args.process_index, n // group, self._counts[n] if count is None else count)
        self.worlds[n].start(episode_seed(*path))

    def collect_rollouts(self) -> RolloutBuffer:
        """Play `rollout_steps` in each environment; with leave-one-out one whole episode in each."""
        args = self.args
        whole = args.advantage_estimator == "loo"
        if whole or not self._playing:
            for n in range(args.num_envs):
                if whole:
                    self._start(n, self.update, args.num_generations)
                else:
                    self._start(n)
        self._playing = True
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(episode_seed(args.seed, args.process_index, self.update, 2**20))
            return self._play(whole)

    @torch.no_grad()
    def _play(self, whole: bool) -> RolloutBuffer:
        args = self.args
        shape = (args.rollout_steps, args.num_envs)
        reward, final = torch.zeros(shape), torch.zeros(shape)
        terminated, truncated, valid, counted, ended = (torch.zeros(shape, dtype=torch.bool) for _ in range(5))
        prompts: list[list[Prompt]] = []
        rows: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        active = list(range(args.num_envs))
        for t in range(args.rollout_steps):
            prompts.append([world.prompt for world in self.worlds])
            if not active:
                break
            texts = []
            for part in self._chunks(active):
                inputs = encode(self.processing_class, [prompts[t][n] for n in part], args.device)
                sampling = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
                said = respond(
                    self.policy, self.processing_class, inputs, self.suppressed, args.max_completion_length,
                    args.temperature, **sampling,
                )  # fmt: skip
                logprobs, values = self._scored(self.model, inputs, said.tokens, said.mask)
                for i, n in enumerate(part):
                    rows[t, n] = (said.tokens[i].cpu(), said.mask[i].cpu(), logprobs[i].cpu(), values[i].cpu())
                    ended[t, n] = said.ended[i]
                texts += said.texts
            cut: list[tuple[int, Prompt]] = []
            for n, text in zip(list(active), texts, strict=True):
                outcome = self.worlds[n].step(text)
                reward[t, n] = outcome.reward - args.invalid_action_penalty * (not outcome.valid)
                terminated[t, n], truncated[t, n] = outcome.terminated, outcome.truncated
                valid[t, n], counted[t, n] = outcome.valid, outcome.counted
                if outcome.episode is not None:
                    self.episodes.append(outcome.episode)
                if outcome.truncated and outcome.counted and args.bootstrap_truncated and not whole:
                    cut.append((n, self.worlds[n].prompt))
                if outcome.terminated or outcome.truncated:
                    if whole:
                        active.remove(n)
                    else:
                        self._start(n)
            if cut:
                final[t, [n for n, _ in cut]] = self._values([prompt for _, prompt in cut])
        last = torch.zeros(args.num_envs) if whole else self._values([world.prompt for world in self.worlds])
        tokens, mask, scores, critic = self._padded(rows, shape)
        return RolloutBuffer(
            prompts, tokens, mask, scores, critic, reward, terminated, truncated, valid, counted, final, last, ended
        )

    def _padded(self, rows: dict[tuple[int, int], Any], shape: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        length = max(len(tokens) for tokens, *_ in rows.values())
        tokens = torch.zeros(*shape, length, dtype=torch.long)
        mask = torch.zeros(*shape, length, dtype=torch.bool)
        logprobs = torch.zeros(*shape, length)
        values = torch.zeros(*shape, length) if self.args.critic_level == "token" else torch.zeros(shape)
        for (t, n), (row, kept, scores, value) in rows.items():
            tokens[t, n, : len(row)], mask[t, n, : len(row)], logprobs[t, n, : len(row)] = row, kept, scores
            if value.dim():
                values[t, n, : len(value)] = value
            else:
                values[t, n] = value
        return tokens, mask, logprobs, values

    def _chunks(self, places: list[Any]) -> list[list[Any]]:
        size = self.args.rollout_batch_size or len(places)
        return [places[i : i + size] for i in range(0, len(places), size)]

    def _scored(self, model: Any, inputs: Any, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
        with self.compute_loss_context_manager():
            return model(
                inputs, tokens, mask, self.suppressed, self.args.temperature, self.args.critic_level == "token"
            )

    def _values(self, prompts: list[Prompt]) -> torch.Tensor:
        """The critic's values of observations, `(number,)`."""
        found = []
        for part in self._chunks(prompts):
            inputs = encode(self.processing_class, part, self.args.device)
            nothing = inputs["input_ids"][:, :0]
            found.append(self._scored(self.model, inputs, nothing, nothing.bool())[1].view(len(part)).cpu())
        return torch.cat(found)

    # ---- learning ----

    def get_train_dataloader(self) -> Any:
        """Placeholders: steps are played when they are needed."""
        return _Endless()

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The next micro-batch; a new rollout where all have been used."""
        if not self._queue:
            self._begin_update()
        return self._queue.popleft()

    def _begin_update(self) -> None:
        args = self.args
        self.buffer = self.collect_rollouts()
        self.advantages, self.returns = self.buffer.advantages(
            estimator=args.advantage_estimator,
            gamma=args.gamma,
            lam=args.lam,
            num_generations=args.num_generations,
            normalize=args.normalize_advantages,
        )
        shuffled = torch.Generator().manual_seed(episode_seed(args.seed, args.process_index, self.update, 2**20 + 1))
        self.learned = self.buffer.mask
        if args.mask_truncated_completions:
            self.learned = self.learned & self.buffer.ended[..., None]
        learned = self.learned.flatten(0, 1)
        for parts in self.buffer.batches(
            args.num_ppo_epochs, args.steps_per_epoch, args.gradient_accumulation_steps, shuffled
        ):
            everything = torch.cat(parts)
            whole = {"steps": len(everything), "items": self._items(learned[everything])}
            self._queue += [{"indices": part, **whole} for part in parts]
        self.update += 1
        self._note_rollout()

    def _items(self, learned: torch.Tensor) -> int:
        """What the policy's loss is a mean of: steps or tokens, at least 1."""
        kept = learned if self.args.loss_aggregation == "token_mean" else learned.any(1)
        return max(int(kept.sum()), 1)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """L = L_pi + beta L_KL + alpha L_V of one micro-batch, its share of the whole batch."""
        args, buffer, indices = self.args, self.buffer, inputs["indices"]
        if buffer is None or not len(indices):
            return sum((0.0 * p.sum() for p in self.model.parameters() if p.requires_grad), torch.zeros(()))
        device = args.device
        mask = buffer.mask.flatten(0, 1)[indices]
        length = int(mask.sum(1).max())
        mask = mask[:, :length].to(device)
        tokens = buffer.tokens.flatten(0, 1)[indices, :length].to(device)
        old = buffer.logprobs.flatten(0, 1)[indices, :length].to(device)
        learned = self.learned.flatten(0, 1)[indices, :length].to(device)
        prompts = [buffer.prompts[i // args.num_envs][i % args.num_envs] for i in indices.tolist()]
        encoded = encode(self.processing_class, prompts, device)
        logprobs, values = self._scored(model, encoded, tokens, mask)
        of_tokens = buffer.values.dim() == 3

        def picked(tensor: torch.Tensor) -> torch.Tensor:
            flat = tensor.flatten(0, 1)[indices]
            return (flat[:, :length] if of_tokens else flat).to(device)

        loss = torch.zeros((), device=device)
        if args.advantage_estimator == "gae":
            value = losses.value_loss(
                values,
                picked(self.returns),
                mask if of_tokens else torch.ones_like(values, dtype=torch.bool),
                old_values=picked(buffer.values),
                cliprange_value=args.cliprange_value,
                num_items=inputs["steps"],
            )
            loss = loss + args.vf_coef * value
            self._sums["value_loss"].append(float(value.detach()) * inputs["steps"] / len(indices))
        if self.update > args.value_warmup_updates:
            items = inputs["items"]
            weights = None
            if self.action_start is not None:
                weights = thought_weights(self.processing_class, tokens, mask, self.action_start, args.thought_coef)
            policy, found = losses.policy_loss(
                logprobs, old, picked(self.advantages), learned, cliprange=args.cliprange,
                level=args.policy_loss_level, aggregation=args.loss_aggregation, weights=weights, num_items=items,
            )  # fmt: skip
            loss = loss + policy
            for name, figure in found.items():
                self._sums[name].append(float(figure))
            if args.kl_reference != "none" and args.kl_coef:
                reference = self._reference_logprobs(encoded, tokens, mask, old)
                options = {"estimator": args.kl_estimator, "aggregation": args.loss_aggregation}
                kl = losses.kl_loss(logprobs, reference, learned, **options, num_items=items)
                loss = loss + args.kl_coef * kl
                self._sums["kl"].append(float(kl.detach()) * items / self._items(learned))
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"The loss must be finite, got {float(loss)} at step {self.state.global_step + 1}. Lower the learning "
                "rate, or train in float32."
            )
        return (loss, {"logprobs": logprobs, "values": values}) if return_outputs else loss

    @torch.no_grad()
    def _reference_logprobs(
        self, inputs: Any, tokens: torch.Tensor, mask: torch.Tensor, old: torch.Tensor
    ) -> torch.Tensor:
        if self.args.kl_reference == "rollout":
            return old
        with self.compute_loss_context_manager():
            if self._reference is not None:
                return score(self._reference, inputs, tokens, mask, self.suppressed, self.args.temperature)[0]
            with self.policy.disable_adapter():
                return score(self.policy, inputs, tokens, mask, self.suppressed, self.args.temperature)[0]

    def create_optimizer(self, model: Any = None) -> Any:
        """As in `Trainer`; the critic may have a learning rate of its own."""
        if self.optimizer is None and self.args.value_learning_rate is not None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            policy = [p for p in self.policy.parameters() if p.requires_grad]
            head = {"params": list(self.value_head.parameters()), "lr": self.args.value_learning_rate}
            self.optimizer = kind([{"params": policy, "weight_decay": self.args.weight_decay}, head], **options)
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    # ---- figures ----

    def _note_rollout(self) -> None:
        buffer = self.buffer
        assert buffer is not None
        counted = buffer.counted
        number = max(int(counted.sum()), 1)
        chosen = counted[..., None] & buffer.mask if buffer.values.dim() == 3 else counted
        noted = {
            "reward": float(buffer.rewards[counted].mean()) if number else 0.0,
            "invalid_rate": float((~buffer.valid & counted).sum()) / number,
            "truncated_completions": float((~buffer.ended & counted).sum()) / number,
            "completion_length": float(buffer.mask.sum(-1)[counted].float().mean()),
            "explained_variance": losses.explained_variance(buffer.values[chosen], self.returns[chosen]),
        }
        for name, value in noted.items():
            self._sums[name].append(value)
        for name in ("invalid_rate", "truncated_completions"):
            if noted[name] > 0.9:
                logger.warning(
                    "%s is %.2f in update %d: hardly any answer can be used. Raise max_completion_length=%d, or teach "
                    "the format first.", name, noted[name], self.update, self.args.max_completion_length,
                )  # fmt: skip

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with means since the last entry, and figures of the last 50 finished episodes."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._sums.items() if values}
            self._sums.clear()
            if self.episodes:
                logs |= {f"episode/{name}": value for name, value in figures(self.episodes).items()}
            logs["env_steps"] = self.update * self.args.num_envs * self.args.rollout_steps * self.args.world_size
            logs["env/restarts"] = sum(world.restarts for world in self.worlds)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Play `num_eval_episodes` episodes, the same ones every time, sampling as in training.

        Returns:
            `dict[str, float]`: `eval_success_rate`, `eval_return`, `eval_length`, `eval_invalid_rate`.
        """
        args = self.args
        policy = VisionPolicy(self.policy, self.processing_class, args.max_completion_length, args.temperature)
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(args.seed)
            found = evaluate(
                policy,
                self._evaluated,
                args.num_eval_episodes,
                num_envs=args.num_envs,
                image_history=args.image_history,
                max_episode_steps=args.max_episode_steps,
                seed=episode_seed(args.seed, 2**20 + 2),
            )
        found = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, found)
        return found

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        hub.save_many(folder, {"value_head": self.value_head})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        state = {
            "update": self.update,
            "counts": self._counts,
            "episodes": [vars(episode) for episode in self.episodes],
            "worlds": [world.state() for world in self.worlds],
        }
        name = STATE if self.args.world_size == 1 else f"{self.args.process_index}_{STATE}"
        (folder / name).write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Policy or adapter, critic, and the worlds' place in their episodes."""
        folder = Path(resume_from_checkpoint)
        name = STATE if self.args.world_size == 1 else f"{self.args.process_index}_{STATE}"
        if not (folder / name).is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must be a checkpoint of VLDACTrainer, but {folder} has no {name}."
            )
        state = json.loads((folder / name).read_text(encoding="utf-8"))
        if len(state["counts"]) != self.args.num_envs:
            raise ValueError(
                f"`num_envs` must be that of the checkpoint, {len(state['counts'])}, got {self.args.num_envs}."
            )
        self._load_weights(folder)
        self.update, self._counts = state["update"], state["counts"]
        self.episodes.extend(Episode(**episode) for episode in state["episodes"])
        for n, (world, saved) in enumerate(zip(self.worlds, state["worlds"], strict=True)):
            if saved is None:
                self._start(n)
            else:
                world.load_state(saved)
        self._playing = True

    def _load_weights(self, folder: Path) -> None:
        if hasattr(self.policy, "peft_config"):
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.policy, load_peft_weights(str(folder), device="cpu"))
        else:
            self.policy.load_state_dict(type(self.policy).from_pretrained(folder).state_dict())
        self.value_head.load_state_dict(ValueHead.from_pretrained(folder / "value_head").state_dict())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of the VL-DAC system, for this policy."""
        if self.is_world_process_zero():
            card: Any = hub.card(self.policy, "vldac")
            card.data.pipeline_tag = "image-text-to-text"
            card.save(Path(self.args.output_dir) / "README.md")

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint or ""))


class _Endless:
    """As many placeholders as Trainer asks for."""

    def __iter__(self) -> "_Endless":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        return {"step": torch.zeros(1)}
