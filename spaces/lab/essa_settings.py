"""What the ESSA page can search: tasks with exact checkers, rewards of the library, and what its fields hold.

- A task or a reward more is one entry here; the page and the search take what they find.
- Whatever cannot work is said before a model is loaded, where the trainer says it in the trainer's own words.
"""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_ext.tasks import chat, expressions, word_problems
from trainers.essa import ESSAConfig
from trainers.rewards import exact_reward, instruction_reward, json_reward, last_number_reward, length_reward
from trainers.rewards.instructions import CHECKS
from trainers.script import task_reward, task_rows


ROWS_AT_ONCE = 128  # of one call of generate
LONGEST = 3600  # seconds of a search
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
    "exact": "exact_reward: nothing else",
    "last_number": "last_number_reward",
    "json": "json_reward: valid JSON",
    "length": "length_reward: in tokens",
    "instruction": "instruction_reward: IFEval",
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
        self.reward_function()(completions=["-"], completion_ids=[[0]], answer=["0"])  # refuses bad options of its own
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
