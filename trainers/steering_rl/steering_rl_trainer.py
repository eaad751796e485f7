"""GRPO of TRL, set up as arXiv 2505.18706 trains steering vectors, with what those need besides.

    A_i = r_i - 1/(K - 1) sum_{j != i} r_j            among the K completions of a prompt (RLOO)
    loss = -1/N sum_i A_i sum_t log p(y_it)           N: all tokens of the batch's completions

- TRL's advantage is r - mean, which is A (K - 1) / K: it is multiplied by K / (K - 1), K being the completions of the
  prompt that have a reward at all.
- A reward that is NaN or infinite is an error that names function and row; TRL takes NaN for None.
- With `beta`, the reference is the base model, whatever vectors the training starts from.
- The log has norms of vectors, and their ratios to the stream, whose norms are the base model's on a few prompts.
"""

import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from trl import GRPOTrainer

from hf_ext.record import record
from hf_ext.sites import resolve
from hf_ext.steering import SteeringConfig, SteeringLayer
from hf_ext.steering.places import layer_of
from trainers.rewards.calling import RewardError
from trainers.steering_rl.card import steering_card
from trainers.steering_rl.steering_rl_config import SteeringRLConfig


PROBED = 8  # prompts on which norms of the stream are measured
LARGEST_FACTOR = 30.0


class SteeringRLTrainer(GRPOTrainer):
    """
    TRL's [`GRPOTrainer`] for steering vectors; arguments are TRL's.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): A base model, or one with a steering adapter to go on with.
        reward_funcs: As in TRL: functions, async ones, reward models, or a list of these.
        args ([`SteeringRLConfig`], *optional*): Options.
        peft_config ([`SteeringConfig`], *optional*, defaults to `SteeringConfig()`): Where vectors are added.
        train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
            quantization_config, tools, rollout_func, environment_factory: As in TRL.

    Raises:
        TypeError: for an adapter that is none of steering.
        RewardError: for a reward that is NaN or infinite, with function and row.
        FloatingPointError: where the loss is NaN or infinite, with the step.

    Example:

    ```python
    from trainers import SteeringRLConfig, SteeringRLTrainer
    from trainers.rewards import gsm8k_reward

    trainer = SteeringRLTrainer(
        model="you/model",
        reward_funcs=gsm8k_reward,
        args=SteeringRLConfig(output_dir="steered", per_device_train_batch_size=64, max_steps=100),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    optimizer: Any
    _tag_names = ["hf_ext", "steering", "steering-rl"]
    _name = "Steering-RL"
    _paper = {"title": "Steering LLM Reasoning Through Bias-Only Adaptation", "id": "2505.18706"}

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: SteeringRLConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: SteeringConfig | None = None,
        **more: Any,
    ) -> None:
        has_adapter = isinstance(model, PeftModel)
        found = model.active_peft_config if has_adapter else peft_config
        if found is not None and not isinstance(found, SteeringConfig):
            raise TypeError(
                f"`{'model' if has_adapter else 'peft_config'}` must be of a steering adapter (SteeringConfig), got "
                f"{type(found).__name__}. For other adapters take trl's GRPOTrainer."
            )
        if peft_config is None and not has_adapter:
            peft_config = SteeringConfig()
        given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        self._rloo = torch.ones(0)
        self._stream_norms: dict[int, float] | None = None
        super().__init__(
            model=model,
            reward_funcs=[_checked(function) for function in given],
            args=args if args is not None else SteeringRLConfig(output_dir="steering-rl"),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **more,
        )
        self._first = {layer: vector.clone() for layer, vector in self.vectors().items() if vector.any()}

    def vectors(self) -> dict[int, torch.Tensor]:
        """Layer -> its vector `[d]`, float32, as it is added."""
        policy = self.accelerator.unwrap_model(self.model)
        return policy.base_model.get_vectors(policy.active_adapter)

    def stream_norms(self) -> dict[int, float]:
        """Layer -> median norm of the base model's residual stream after it, over the tokens of the first prompts."""
        if self._stream_norms is None:
            policy = self.accelerator.unwrap_model(self.model)
            layers = list(self.vectors())
            hooks = {str(layer): resolve(policy, "resid_post", layer) for layer in layers}
            norms: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
            training = policy.training
            policy.eval()
            with torch.no_grad(), policy.disable_adapter():
                for at in range(min(PROBED, len(self.train_dataset))):
                    with record(policy, hooks) as seen:
                        policy(self._prompt_ids(self.train_dataset[at]["prompt"]))
                    for layer in layers:
                        norms[layer].append(seen[str(layer)][0].float().norm(dim=-1).flatten())
            policy.train(training)
            self._stream_norms = {layer: float(torch.cat(parts).median()) for layer, parts in norms.items()}
        return self._stream_norms

    def _prompt_ids(self, prompt: Any) -> torch.Tensor:
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        return torch.tensor([ids], device=self.accelerator.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """With `depth_scaled_lr`, a group of parameters for each layer."""
        if self.optimizer is None and self.args.depth_scaled_lr:
            policy = self.accelerator.unwrap_model(self.model)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, policy)
            norms = self.stream_norms()
            first = next(iter(norms.values()))
            groups = []
            for module in policy.modules():
                if isinstance(module, SteeringLayer):
                    # `vectors` has refused an adapter with more than one vector in a layer, or outside of layers
                    norm = norms[layer_of(module.name)]  # type: ignore[index]
                    factor = min(max(norm / first, 1.0), LARGEST_FACTOR)
                    vectors = [vector for vector in module.steering_bias.values() if vector.requires_grad]
                    groups.append({"params": vectors, "lr": self.args.learning_rate * factor})
            self.optimizer = kind(groups, **options | {"weight_decay": self.args.weight_decay})
        return super().create_optimizer(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # [completions of all processes, functions]
        if torch.isinf(rewards).any():  # of a reward model: functions were asked before
            row, function = torch.isinf(rewards).nonzero()[0].tolist()
            raise RewardError(
                f"{self.reward_func_names[function]} must give finite rewards, got {float(rewards[row, function])} "
                f"for completion {row}.", self.reward_func_names[function], row, float(rewards[row, function]),
            )  # fmt: skip
        group = self.num_generations if self.model.training else self.num_generations_eval
        counted = (~rewards.isnan().all(dim=1)).view(-1, group).sum(dim=1)
        # a completion without others to compare with has advantage 0, whatever it is multiplied by
        self._rloo = (counted / (counted - 1).clamp(min=1)).repeat_interleave(group)
        return 2 * rewards - 1 if self.args.signed_rewards else rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.scale_rewards == "none" and self.multi_objective_aggregation == "sum_then_normalize":
            local = len(output["advantages"])
            start = self.accelerator.process_index * local
            output["advantages"] = output["advantages"] * self._rloo[start : start + local]
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise FloatingPointError(
                f"The loss must be finite, got {float(loss)} in step {self.state.global_step + 1}. Lower the learning "
                "rate, or check the base model on these prompts. The last checkpoint is as it was."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            logs = logs | self._steering_figures()
        super().log(logs, start_time)

    def _steering_figures(self) -> dict[str, float]:
        """Norms of the vectors, and how long they are beside the stream that they are added to."""
        vectors, streams = self.vectors(), self.stream_norms()
        norms = {layer: float(vector.norm()) for layer, vector in vectors.items()}
        if not all(map(math.isfinite, norms.values())):
            raise FloatingPointError(
                f"The vectors must be finite, got {norms} at step {self.state.global_step}. Lower the learning rate."
            )
        figures = {f"steering/norm/layer_{layer}": norm for layer, norm in norms.items()}
        figures["steering/norm_mean"] = sum(norms.values()) / len(norms)
        figures["steering/ratio_mean"] = sum(norm / streams[layer] for layer, norm in norms.items()) / len(norms)
        if self._first:
            cosines = [torch.cosine_similarity(vectors[layer], first, dim=0) for layer, first in self._first.items()]
            figures["steering/cos_to_init"] = float(sum(cosines) / len(cosines))
        return figures

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the vectors into `output_dir`."""
        if self.is_world_process_zero():
            model_name = model_name or Path(self.args.hub_model_id or self.args.output_dir).name
            steering_card(self, model_name, dataset_name, tags).save(f"{self.args.output_dir}/README.md")


def _checked(function: Any) -> Any:
    """A reward function whose NaN and infinite values are errors; models, and ids of models, are left alone."""
    if not callable(function) or isinstance(function, torch.nn.Module):
        return function
    named = function if hasattr(function, "__name__") else getattr(function, "func", function)  # of a partial
    name: str = getattr(named, "__name__", type(named).__name__)

    def finite(values: Any) -> Any:
        for row, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise RewardError(
                    f"{name} must give finite rewards, or None where it does not apply, got {value} for completion "
                    f"{row}.", name, row, value,
                )  # fmt: skip
        return values

    call: Callable[..., Any]
    if inspect.iscoroutinefunction(function):

        async def call(*args: Any, **kwargs: Any) -> Any:
            return finite(await function(*args, **kwargs))
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return finite(function(*args, **kwargs))

    functools.update_wrapper(call, function)
    call.__name__ = name
    return call
