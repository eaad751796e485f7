"""What the command lines of trainers share: data, rewards and models by their names.

- A data set is a Hub id, a file, or a task of `hf_ext.tasks`, whose rows to evaluate on are never those to learn from.
- A reward is a function of `trainers.rewards`, the checker of a task, or a reward model.
"""

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hf_ext.tasks import chat, stories, word_problems


@dataclass
class ScriptArguments:
    """Data and rewards of a run from the command line; the rest are options of trainer and model."""

    dataset_name: str = field(
        metadata={
            "help": "A Hub id, a file (.json, .jsonl, .csv, .parquet, packed or not) or a task of hf_ext: "
            "tasks:capitals, tasks:json_sum, tasks:word_problems."
        }
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names in trainers.rewards, rewards of tasks (capitals, json_sum, word_problems), or models."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Like dataset_name; by default its test split."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to search on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    completion_column: str = field(default="answer", metadata={"help": "For sft: column of the right answers."})
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column that holds the prompts, texts or messages."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "A system message before texts; makes them chats."}
    )
    chat: bool = field(default=False, metadata={"help": "Make a chat of texts, without a system message."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})


def model_path(name: str | None) -> str:
    """A Hub id or folder as it is; "stories" and "smollm2" are models of `hf_ext.tiny`."""
    if not name:
        raise ValueError("`model_name_or_path` must be given: a Hub id or folder of an adapter or a model.")
    from hf_ext import tiny

    return str(tiny.path(name)) if name in ("stories", "smollm2") and not Path(name).exists() else name


def task_reward(
    completions: list[Any], answer: list[str], *, correct: Callable[[str, str], bool], **_: Any
) -> list[float]:
    """1 where the task's own checker finds a completion right."""
    from trainers.rewards.formats import texts

    return [float(correct(text, right)) for text, right in zip(texts(completions), answer, strict=True)]


TASKS: dict[str, tuple[Callable[..., list[dict]], Callable[[str, str], bool]]] = {
    "capitals": (chat.capitals, chat.capitals_correct),
    "json_sum": (chat.json_sum, chat.json_sum_correct),
    "word_problems": (word_problems.dataset, word_problems.correct),
}


def reward_function(name: str) -> Any:
    """A reward by its name: of `trainers.rewards`, of a task, or else a model's id or folder."""
    import trainers.rewards as known

    if name in TASKS:
        return partial(task_reward, correct=TASKS[name][1])
    if name in dir(known) and inspect.isfunction(function := getattr(known, name)):
        return function
    if "/" in name or Path(name).is_dir():
        return name
    names = [*TASKS, *(name for name in known.__all__ if name.endswith("_reward"))]
    raise ValueError(f"`reward_funcs` must be of {', '.join(names)}, or a reward model's id or folder, got {name!r}.")


def task_rows(task: str, held_out: bool, most: int | None) -> list[dict[str, Any]]:
    """At most 100 rows to evaluate on, or 1000 to learn from (or `most`), among which none of those 100 is."""
    make = TASKS[task][0]
    if task == "word_problems":  # has operand pairs of its own to evaluate on
        return make(most or (100 if held_out else 1000), seed=0, split="held_out" if held_out else "train")
    asked = make(100, seed=10_000)
    if held_out:
        return asked[:most]
    questions = {row["prompt"][-1]["content"] for row in asked}
    return [row for row in make(2000, seed=0) if row["prompt"][-1]["content"] not in questions][: most or 1000]


def read(script: ScriptArguments, name: str, split: str, most: int | None) -> Any:
    """A data set with a column `prompt`, of a task, a file or the Hub."""
    from datasets import Dataset, load_dataset

    if name.startswith("tasks:"):
        task = name.removeprefix("tasks:")
        if task not in TASKS:
            raise ValueError(f"`dataset_name` must be one of {', '.join(f'tasks:{t}' for t in TASKS)}, got {name!r}.")
        return Dataset.from_list(task_rows(task, split == script.dataset_test_split, most))
    kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    path = Path(name)
    kind = next((kinds[suffix] for suffix in path.suffixes if suffix in kinds), None)
    if path.is_file() and kind is None:
        raise ValueError(f"`dataset_name` must be a file of {', '.join(kinds)}, got {name}.")
    if path.is_file():
        data = load_dataset(kind, data_files=name, split="train")
    else:
        data = load_dataset(name, script.dataset_config, split=split)
    if script.prompt_column not in data.column_names:
        raise ValueError(
            f"`prompt_column` must be one of {', '.join(data.column_names)}, the columns of {name}, got "
            f"{script.prompt_column!r}."
        )
    if script.prompt_column != "prompt":
        data = data.rename_column(script.prompt_column, "prompt")
    data = data.select(range(min(most or len(data), len(data))))
    if script.system_prompt or script.chat:
        before = [{"role": "system", "content": script.system_prompt}] if script.system_prompt else []
        data = data.map(lambda row: {"prompt": [*before, {"role": "user", "content": row["prompt"]}]})
    return data


def read_texts(name: str, split: str, text_field: str, held_out: bool, config: str | None = None) -> Any:
    """A data set with a column of texts or tokens: tasks:stories, a file, or the Hub."""
    from datasets import Dataset, load_dataset

    if name == "tasks:stories":
        rng = random.Random(1 if held_out else 0)
        return Dataset.from_list([{text_field: stories.sample(rng).text} for _ in range(500 if held_out else 20_000)])
    kinds = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    path = Path(name)
    kind = next((kinds[suffix] for suffix in path.suffixes if suffix in kinds), None)
    if path.is_file() and kind is None:
        raise ValueError(f"`dataset_name` must be a file of {', '.join(kinds)}, got {name}.")
    data = (
        load_dataset(kind, data_files=name, split="train")
        if path.is_file()
        else load_dataset(name, config, split=split)
    )
    if text_field not in data.column_names and "input_ids" not in data.column_names:
        raise ValueError(
            f"`dataset_text_field` must be one of {', '.join(data.column_names)}, the columns of {name}, got "
            f"{text_field!r}."
        )
    return data


def tokenized(data: Any, tokenizer: Any, text_field: str, append_eos: bool) -> Any:
    """Rows with `input_ids`: as they are where they have them, or from their texts."""
    if data is None:
        return None
    if isinstance(data, dict):
        return {name: tokenized(part, tokenizer, text_field, append_eos) for name, part in data.items()}
    columns = getattr(data, "column_names", None) or list(next(iter(data), {}))
    if "input_ids" in columns:
        return data
    if text_field not in columns:
        raise ValueError(f"`dataset_text_field` must be one of {', '.join(columns)}, got {text_field!r}.")
    if tokenizer is None:
        raise ValueError("`processing_class` must be given for rows of texts, got None. Pass a tokenizer.")
    end = [tokenizer.eos_token_id] if append_eos and tokenizer.eos_token_id is not None else []

    def tokens(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(row[text_field], add_special_tokens=False)["input_ids"] + end}

    return data.map(tokens) if hasattr(data, "map") else [{**row, **tokens(row)} for row in data]
