"""ESSA for its page: a real search in a thread of its own, and what can be seen of it from outside.

- A search loads its own float32 copy of the model, so no other page or session sees a weight that moves.
- One search at a time on a server, which may have two cores: others wait for their turn.
- Stop raises before the model's next forward, wherever that is. The trainer then puts back the mean of the last whole
  generation, which is what is shown and saved.
- What is seen is one dict of JSON, replaced as a whole and never changed; the page's example is such a dict.
"""

import logging
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from essa_settings import REWARDS, TASKS, Settings
from store import Store
from transformers import PrinterCallback, TrainerCallback

from trainers.essa import ESSATrainer
from trainers.essa.rollout import generate_rows


logger = logging.getLogger(__name__)
SFT_BATCH, SFT_RATE = 8, 1e-3
SHOWN = 16  # held-out prompts that are answered before and after
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # what the paper adapts
HUB_IDS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the base that a saved adapter names


class Stopped(Exception):  # noqa: N818  # not an error: somebody pressed Stop
    """Raised in the thread of the search."""


class Search:
    """
    A search that begins at once.

    Args:
        store ([`Store`]): Where the copy of the model comes from.
        settings ([`Settings`]): What to search.

    Attributes:
        seen (`dict`): Settings, `status` (a sentence), `planned`, `dim`, `generations` (for each `fitness`, `sigma`,
            `seconds`, `tokens_per_second`) and `answers` (`question`, `answer`, `before`, `after` and their rewards).
        running (`bool`): Whether the thread still works.
        adapter (`Path`, *optional*): The zip of the adapter, once there is one.

    Raises:
        ValueError: for settings that cannot work.
    """

    _turn = threading.Lock()

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings, self.task = store, settings, TASKS[settings.task]
        self._folder = tempfile.TemporaryDirectory(prefix="hf_ext-essa-")
        self._place = Path(self._folder.name) / "essa-adapter"
        self._args = settings.arguments(self._place)
        self.adapter: Path | None = None
        self.seen: dict[str, Any] = {
            "model": settings.model,
            "task": self.task.title,
            "reward": REWARDS[settings.reward],
            "status": "Waiting for another search on this server to end ...",
            "planned": settings.generations,
            "dim": None,
            "generations": [],
            "answers": [],
        }
        self._stop, self._close, self._over = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the search soon; the mean so far is kept, shown and saved."""
        self._stop.set()

    def close(self) -> None:
        """End it without a result: nobody looks any more."""
        self._close.set()
        self._stop.set()

    def wait(self) -> None:
        """Until the thread has ended."""
        self._thread.join()

    def _show(self, status: str, **seen: Any) -> None:
        self.seen = {**self.seen, "status": status, **seen}

    def check(self, *_: Any) -> None:
        """A hook before each forward of the model; once the search is over, only a closed page stops what is left."""
        if (self._close if self._over else self._stop).is_set():
            raise Stopped

    def _run(self) -> None:
        try:
            while not self._turn.acquire(timeout=0.2):
                self.check()
            try:
                self._work()
            finally:
                self._turn.release()
        except Stopped:
            self._show("Stopped before the first generation was over: there is nothing to show or save.")
        except Exception as error:  # whatever it is, the page must say so
            logger.warning("The search failed.", exc_info=True)
            self._show(f"**The search cannot go on.** {error}")

    def _work(self) -> None:
        settings = self.settings
        rows, asked = self.task.rows(False), self.task.rows(True)[:SHOWN]
        self._show(f"Loading {settings.model} ...")
        loaded = self.store.copy(settings.model)
        base, tokenizer = loaded.model, loaded.tokenizer
        base.register_forward_pre_hook(self.check)
        if tokenizer.chat_template is None:  # a model without one continues texts
            rows, asked = ([_as_text(row) for row in some] for some in (rows, asked))
        model = self._adapted(base) if settings.adapter else self._supervised(base, tokenizer, rows)
        trainer = ESSATrainer(
            model, settings.reward_function(), self._args, rows, asked, processing_class=tokenizer
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Watch(self, trainer))
        self._show("Answering the held-out prompts before the search ...", dim=trainer.space.dim)
        answers = [
            {"question": _question(row["prompt"]), "answer": row["answer"], "before": text, "before_reward": reward}
            for row, text, reward in zip(asked, *answer(trainer), strict=True)
        ]
        self._show("Looking for a step size ..." if settings.sigma == "auto" else "Generation 1 ...", answers=answers)
        stopped = False
        try:
            trainer.train()
        except Stopped:
            if not self.seen["generations"]:
                raise
            stopped = True
        self._over = True
        self._show("Answering them again ...")
        texts, rewards = answer(trainer)
        answers = [
            {**row, "after": text, "after_reward": reward}
            for row, text, reward in zip(answers, texts, rewards, strict=True)
        ]
        self.adapter = self._save(trainer)
        self._show(_summary(len(self.seen["generations"]), answers, stopped), answers=answers)

    def _adapted(self, base: Any) -> Any:
        """The model with the adapter that was named."""
        from huggingface_hub import snapshot_download
        from peft import PeftModel

        name, wanted = self.settings.adapter, ["adapter_config.json", "adapter_model.safetensors"]
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = Path(snapshot_download(name, allow_patterns=wanted))
        for file in wanted:
            if not (folder / file).is_file():
                raise ValueError(f"`adapter` must be a folder or Hub id of a LoRA, got {name!r} without {file}.")
        try:
            return PeftModel.from_pretrained(base, folder).eval()
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"`adapter` must be one of {self.settings.model}, got {name!r} ({first}).") from error

    def _supervised(self, base: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
        """The model with a LoRA after some supervised steps: at B = 0 there is no singular value to search."""
        from datasets import Dataset
        from peft import LoraConfig, get_peft_model
        from trl import SFTConfig, SFTTrainer

        settings, search = self.settings, self
        self._show("Preparing the supervised steps ...")
        found = [name for name in ATTENTION if any(path.endswith(name) for path, _ in base.named_modules())]
        torch.manual_seed(settings.seed)
        # other families have attention by other names: PEFT knows them
        lora = LoraConfig(
            r=settings.rank, lora_alpha=2 * settings.rank, target_modules=found or None, task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, lora)

        class Steps(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if logs and "loss" in logs:
                    step = f"Supervised step {state.global_step} of {state.max_steps}"
                    search._show(f"{step}, loss {float(logs['loss']):.3f} ...")

        def pair(row: dict[str, Any]) -> dict[str, Any]:
            text, chats = self.task.teach(row), not isinstance(row["prompt"], str)
            said = [{"role": "assistant", "content": text}] if chats else text
            return {"prompt": row["prompt"], "completion": said}

        args = SFTConfig(
            output_dir=str(self._place),
            max_steps=settings.supervised_steps,
            per_device_train_batch_size=SFT_BATCH,
            learning_rate=SFT_RATE,
            seed=settings.seed,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = Dataset.from_list([pair(row) for row in rows[: settings.supervised_steps * SFT_BATCH]])
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[Steps()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.model.eval()

    def _save(self, trainer: ESSATrainer) -> Path:
        """The adapter as PEFT saves it, with tokenizer and card, in a zip."""
        name = HUB_IDS.get(self.settings.model, self.settings.model)
        trainer.model.peft_config["default"].base_model_name_or_path = name
        trainer.model.save_pretrained(self._place, save_embedding_layers=False)  # or it asks the Hub about the base
        trainer.processing_class.save_pretrained(self._place)
        trainer.create_model_card(dataset_name=self.task.title)
        return Path(shutil.make_archive(str(self._place), "zip", self._place))


class Watch(TrainerCallback):
    """Tells a search what each generation brought."""

    def __init__(self, search: Search, trainer: ESSATrainer) -> None:
        self.search, self.trainer = search, trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "sigma" not in logs:
            return
        fitness = [None if np.isnan(reward) else round(float(reward), 4) for reward in self.trainer.fitness]
        found = {
            "fitness": fitness,
            "sigma": float(f"{logs['sigma']:.4g}"),
            "seconds": logs["generation_seconds"],
            "tokens_per_second": logs["tokens_per_second"],
        }
        generations = [*self.search.seen["generations"], found]
        seconds = float(np.median([one["seconds"] for one in generations]))
        left = seconds * (state.max_steps - state.global_step)
        self.search._show(
            f"Generation {state.global_step} of {state.max_steps}: mean reward {logs['reward']:.3f}, best "
            f"{logs['reward_max']:.3f}, sigma {logs['sigma']:.3g}, {logs['tokens_per_second']:.0f} tokens/s, about "
            f"{_duration(left)} left.",
            generations=generations,
        )


def answer(trainer: ESSATrainer) -> tuple[list[str], list[float | None]]:
    """What the model as it stands says to the held-out prompts, greedily, and the rewards."""
    prompts, tokenizer = trainer.eval_prompts[""], trainer.processing_class
    made = generate_rows(
        trainer.model,
        prompts.ids,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_ids=trainer.scorer.eos_token_ids,
        max_new_tokens=trainer.args.max_completion_length,
    )
    texts = tokenizer.batch_decode(made.completion_ids, skip_special_tokens=True)
    asked = [row["prompt"] for row in prompts.rows]
    said = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(asked, texts, strict=True)
    ]
    found = trainer.rewards(asked, said, made.completion_ids, prompts.columns(range(len(prompts)))).rewards
    return texts, [None if np.isnan(reward) else float(reward) for reward in found]


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt) + "\n"
    return {**row, "prompt": text}


def _question(prompt: Any) -> str:
    return (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip().splitlines()[-1]


def _summary(generations: int, answers: list[dict[str, Any]], stopped: bool) -> str:
    mean = [np.mean([row[f"{when}_reward"] or 0.0 for row in answers]) for when in ("before", "after")]
    changed = sum(row["before"] != row["after"] for row in answers)
    ended = f"{'Stopped' if stopped else 'Finished'} after {generations} generation{'s' * (generations != 1)}"
    return (
        f"{ended}. Held-out prompts: mean reward {mean[0]:.3f} before, {mean[1]:.3f} after; {changed} of "
        f"{len(answers)} answers changed."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
