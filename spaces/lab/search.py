"""ESSA for its page: a real search in a thread of its own, and what can be seen of it from outside.

- A search loads its own float32 copy of the model, so no other page or session sees a weight that moves.
- One search at a time on a server, which may have two cores: others wait for their turn.
- Stop raises before the model's next forward, wherever that is. The trainer then puts back the mean of the last whole
  generation, which is what is shown and saved.
- What is seen is one dict of JSON, replaced as a whole and never changed; the page's example is such a dict.
"""

import inspect
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from hf_ext import tiny
from hf_ext.tasks import chat, expressions, word_problems
from trainers.essa import ESSAConfig, ESSATrainer
from trainers.essa.cli import task_reward, task_rows
from trainers.essa.rollout import generate_rows
from trainers.rewards import exact_reward, instruction_reward, json_reward, last_number_reward, length_reward
from trainers.rewards.instructions import CHECKS


logger = logging.getLogger(__name__)
SFT_BATCH, SFT_RATE = 8, 1e-3
SHOWN = 16  # held-out prompts that are answered before and after
ROWS_AT_ONCE = 128  # of one call of generate
LONGEST = 3600  # seconds of a search
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # what the paper adapts
HUB_IDS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the base that a saved adapter names
INSTRUCTIONS = [name for name, check in CHECKS.items() if len(inspect.signature(check).parameters) == 1]


class Task(NamedTuple):
    """`rows(held_out)` have a prompt and an answer, `teach(row)` is what supervised steps learn to say."""

    title: str
    rows: Callable[[bool], list[dict[str, Any]]]
    correct: Callable[[str, str], bool]
    max_new_tokens: int
    teach: Callable[[dict[str, Any]], str]


def _rows(task: str) -> Callable[[bool], list[dict[str, Any]]]:
    return lambda held_out: task_rows(task, held_out, None)


def _expressions(held_out: bool) -> list[dict[str, Any]]:
    drawn = expressions.dataset(100, seed=10_000, operands=3)
    if not held_out:
        drawn = expressions.dataset(1000, seed=0, operands=3, exclude=[row.prompt for row in drawn])
    return [{"prompt": f"{row.prompt} =", "answer": str(row.answer), "steps": f" {row.solution}"} for row in drawn]


TASKS = {
    "capitals": Task(
        "Write a word in capitals",
        _rows("capitals"),
        chat.capitals_correct,
        chat.CAPITALS_MAX_NEW_TOKENS,
        lambda row: row["answer"],
    ),
    "json_sum": Task(
        "Add two numbers, answer in JSON",
        _rows("json_sum"),
        chat.json_sum_correct,
        chat.JSON_SUM_MAX_NEW_TOKENS,
        lambda row: f'{{"answer": {row["answer"]}}}',
    ),
    "word_problems": Task(
        "Solve a word problem", _rows("word_problems"), word_problems.correct, 16, lambda row: row["answer"]
    ),
    "expressions": Task(
        "Solve an expression step by step",
        _expressions,
        lambda text, answer: expressions.final_answer(text) == int(answer),
        24,
        lambda row: row["steps"],
    ),
}
REWARDS = {
    "correct": "The task's own checker",
    "exact": "exact_reward: the answer, nothing else",
    "last_number": "last_number_reward: its last number is right",
    "json": "json_reward: it is valid JSON",
    "length": "length_reward: it has so many tokens",
    "instruction": "instruction_reward: it follows an instruction of IFEval",
}


def rewards_of(task: str) -> list[str]:
    """The rewards that can judge a task: the answers of `capitals` are no numbers."""
    return [name for name in REWARDS if (task, name) != ("capitals", "last_number")]


def follows(completions: list[Any], *, instruction: str, **columns: Any) -> list[float | None]:
    """`instruction_reward` of one instruction for every row."""
    return instruction_reward(completions, [[instruction]] * len(completions))


@dataclass(frozen=True)
class Settings:
    """What the fields of the page hold."""

    model: str = "smollm2"
    task: str = "capitals"
    reward: str = "correct"
    instruction: str = INSTRUCTIONS[0]
    min_tokens: int = 1
    max_tokens: int = 4
    population: int = 12
    prompts: int = 8
    generations: int = 12
    rank: int = 2
    alpha: float = 1.0
    sigma: str = "0.2"
    seed: int = 0
    supervised_steps: int = 4
    adapter: str = ""

    def reward_function(self) -> Callable[..., Any]:
        """The reward, with its own options."""
        return {
            "correct": partial(task_reward, correct=TASKS[self.task].correct),
            "exact": exact_reward,
            "last_number": last_number_reward,
            "json": json_reward,
            "length": partial(length_reward, min_tokens=self.min_tokens, max_tokens=self.max_tokens),
            "instruction": partial(follows, instruction=self.instruction),
        }[self.reward]

    def arguments(self, folder: Path) -> ESSAConfig:
        """The trainer's options; ValueError for what cannot work, before anything is loaded."""
        empty = [name for name, value in asdict(self).items() if value is None]
        if empty:
            raise ValueError(f"`{empty[0]}` must be given, got nothing.")
        for name, least in (("generations", 1), ("rank", 1), ("supervised_steps", 0 if self.adapter else 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be a whole number >= {least}, got {getattr(self, name)}.")
        if self.reward not in rewards_of(self.task):
            raise ValueError(f"`reward` must be one of {', '.join(rewards_of(self.task))}, got {self.reward!r}.")
        self.reward_function()(completions=[], completion_ids=[], answer=[])  # refuses bad options of its own
        args = ESSAConfig(
            output_dir=str(folder),
            population_size=self.population,
            batch_size_per_candidate=self.prompts,
            max_steps=self.generations,
            sigma=self.sigma,
            svd_fraction=self.alpha,
            seed=self.seed,
            max_completion_length=TASKS[self.task].max_new_tokens,
            max_concurrent_sequences=ROWS_AT_ONCE,
            max_wall_time=LONGEST,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        # the trainer refuses these two as well, but after the supervised steps
        rows = len(TASKS[self.task].rows(False))
        if self.prompts > rows:
            raise ValueError(f"`batch_size_per_candidate` must be at most the task's {rows} rows, got {self.prompts}.")
        if not self.adapter and int(round(self.alpha * self.rank, 9)) < 1:
            raise ValueError(f"floor(alpha * rank) must be at least 1, got {self.alpha} * {self.rank}: raise one.")
        return args


class Stopped(Exception):  # noqa: N818  # not an error: somebody pressed Stop
    """Raised in the thread of the search."""


class Search:
    """
    A search that begins at once.

    Args:
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

    def __init__(self, settings: Settings) -> None:
        self.settings, self.task = settings, TASKS[settings.task]
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
        base, tokenizer = tiny.load(settings.model, dtype="float32")
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
        self._show(_summary(self.seen["generations"], answers, stopped), answers=answers)

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
        trainer.model.save_pretrained(self._place)
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
    said = [text if isinstance(p, str) else [{"role": "assistant", "content": text}] for p, text in zip(asked, texts)]
    found = trainer.rewards(asked, said, made.completion_ids, prompts.columns(range(len(prompts)))).rewards
    return texts, [None if np.isnan(reward) else float(reward) for reward in found]


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt) + "\n"
    return {**row, "prompt": text}


def _question(prompt: Any) -> str:
    return (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip().splitlines()[-1]


def _summary(generations: list[dict[str, Any]], answers: list[dict[str, Any]], stopped: bool) -> str:
    mean = [np.mean([row[f"{when}_reward"] or 0.0 for row in answers]) for when in ("before", "after")]
    changed = sum(row["before"] != row["after"] for row in answers)
    took = _duration(sum(one["seconds"] for one in generations))
    return (
        f"{'Stopped' if stopped else 'Finished'} after {len(generations)} generations ({took}). Held-out prompts: mean "
        f"reward {mean[0]:.3f} before, {mean[1]:.3f} after; {changed} of {len(answers)} answers changed."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
