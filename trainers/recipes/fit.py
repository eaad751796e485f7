"""Training of small models for recipes: transformers' Trainer, set up to be resumed with the same result.

Trainer's checkpoints hold weights, optimiser, schedule, random states and the log, so a cell that was killed goes on
as if nothing had happened; on a CPU, with one thread, to the last bit (a test compares).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.recipes.runner import Place


def fit(
    model: Any,
    rows: Any,
    place: Place,
    *,
    steps: int,
    batch_size: int,
    groups: list[dict[str, Any]],
    seed: int,
    schedule: str = "constant_with_warmup",
    warmup: int = 100,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    every: int = 100,
    save_every: int = 500,
    share: float = 1.0,
) -> tuple[list[dict[str, float]], float]:
    """
    Train `model` on `rows` in float32, each step on `batch_size` rows in an order drawn from `seed`.

    Args:
        model (`PreTrainedModel`): A causal LM; trained in place.
        rows (sequence of dicts of tensors): What the model's forward takes, `labels` among it.
        place ([`Place`]): Checkpoints go into its folder, progress to its callback.
        steps, batch_size (`int`): Optimiser steps, and rows a step.
        groups (`list[dict]`): Parameter groups for AdamW (betas 0.9, 0.95), see `lime_param_groups`.
        seed (`int`): Of the order of the rows. The caller seeds the model's initial weights.
        schedule (`str`, *optional*, defaults to `"constant_with_warmup"`): A name that TrainingArguments knows.
        warmup (`int`, *optional*, defaults to 100): Steps of linear warm-up.
        evaluate (`Callable`, *optional*): model -> figures, called every `every` steps; kept in the log.
        save_every (`int`, *optional*, defaults to 500): Steps between checkpoints.
        share (`float`, *optional*, defaults to 1.0): The part of the cell's work that this is, for its progress.

    Returns:
        `(log, tokens per CPU second)`: each entry of the log holds `step` and what `evaluate` returned.

    Raises:
        FloatingPointError: as soon as a loss is NaN or infinite, with the step.
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Watch(TrainerCallback):
        """Evaluates, reports, and leaves evaluation time out of the measured speed."""

        def __init__(self) -> None:
            self.steps, self.seconds, self.mark = 0, 0.0, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mark = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds += time.process_time() - self.mark
            self.steps += 1
            if evaluate is not None and (state.global_step % every == 0 or state.global_step == steps):
                model.eval()
                with torch.no_grad():
                    found = evaluate(model)
                model.train()
                if not all(map(_finite, found.values())):
                    raise FloatingPointError(f"The loss must be finite, got {found} at step {state.global_step}.")
                state.log_history.append({"step": state.global_step, "figures": found})
            place.progress(share * state.global_step / steps)

    watch = Watch()
    folder = place.folder / "trainer"
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        max_grad_norm=1.0,
        seed=seed,
        logging_steps=save_every,
        logging_nan_inf_filter=False,
        save_steps=save_every,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=rows,
        callbacks=[watch],
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "betas": (0.9, 0.95)}),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    log = [{"step": entry["step"], **entry["figures"]} for entry in trainer.state.log_history if "figures" in entry]
    tokens = watch.steps * batch_size * rows[0]["input_ids"].numel()
    return log, round(tokens / watch.seconds, 1) if watch.seconds else 0.0


def nll(model: Any, rows: Any, batch_size: int = 64) -> list[float]:
    """Mean negative log-likelihood of each row's labels, in nats per token; rows as in `fit`."""
    import torch

    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids = torch.stack([row["input_ids"] for row in batch])
        labels = torch.stack([row["labels"] for row in batch])[:, 1:]
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        found += (losses.sum(1) / (labels != -100).sum(1)).tolist()
    return found


def last_figures(log: list[dict[str, float]], name: str, count: int = 1) -> float:
    """Mean of the last `count` entries of the log."""
    return sum(entry[name] for entry in log[-count:]) / count


def remove_checkpoints(folder: Path) -> None:
    """What a finished cell needs no more."""
    import shutil

    shutil.rmtree(folder / "trainer", ignore_errors=True)


def _finite(value: float) -> bool:
    return -float("inf") < value < float("inf")
