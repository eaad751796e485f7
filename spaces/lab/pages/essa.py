"""Page "ESSA": search a LoRA's singular values for reward, live, and compare what the model says before and after.

- What runs is `essa_search.py`; here is how it looks. The example is what a search once showed.
- A session has one search. Its event streams what is seen until the search ends; `leave` ends one nobody looks at.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from essa_search import Search
from essa_settings import INSTRUCTIONS, REWARDS, TASKS, Settings, rewards_of
from store import Store
from views import POINT, Cell, heat_map, key, line_chart, note, read_example, view


TITLE = "ESSA"
INTRO = """\
ESSA gives a small trained adapter (LoRA) other singular values and keeps those whose answers earn more reward; no
gradient is computed. A dot of the first chart is a candidate's mean reward in one generation (a larger dot: several),
and the table marks the held-out answers that the search has changed.

Paper: ESSA, [arXiv 2507.04453](https://arxiv.org/abs/2507.04453).
"""
CODE = """\
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer
from hf_ext.tasks.chat import capitals
from hf_ext.tiny import load
from trainers.essa import ESSAConfig, ESSATrainer
from trainers.rewards import exact_reward

model, tokenizer = load("smollm2")  # or a folder, or a Hub id
rows = capitals(300)  # prompt, answer
lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
model = get_peft_model(model.float(), lora)

# some supervised steps: a LoRA that was never trained has no singular values to search
taught = [{"prompt": r["prompt"], "completion": [{"role": "assistant", "content": r["answer"]}]} for r in rows[:32]]
args = SFTConfig("sft", max_steps=4, learning_rate=1e-3, bf16=False, gradient_checkpointing=False, report_to="none")
SFTTrainer(model, args, train_dataset=Dataset.from_list(taught), processing_class=tokenizer).train()

args = ESSAConfig(
    "essa", population_size=12, batch_size_per_candidate=8, max_steps=12, sigma="0.2", max_completion_length=12,
    max_concurrent_sequences=128,
)
trainer = ESSATrainer(model.eval(), exact_reward, args, rows, rows[32:48], processing_class=tokenizer)
print(trainer.evaluate()["eval_reward"])
trainer.train()
print(trainer.evaluate()["eval_reward"], trainer.space.dim, "singular values")
trainer.save_model("essa-adapter")  # an ordinary LoRA of PEFT
"""
LOAD = """\
from hf_ext.tiny import load
from peft import PeftModel

model, tokenizer = load("{model}", dtype="float32")  # or AutoModelForCausalLM.from_pretrained
model = PeftModel.from_pretrained(model, "essa-adapter")  # the folder that the zip was unpacked into
"""
BUSY = "A search of this window is running: press Stop, or wait until it has ended."
NOTHING_YET = "Follows with the first generation."
SESSIONS: dict[str, Search] = {}
_BEGINNING = threading.Lock()


def build(store: Store) -> None:
    """The page, inside `gr.Blocks`."""
    example = read_example("essa")
    start_with = Settings(model=store.default)
    gr.Markdown(INTRO)
    with gr.Row():
        model = gr.Textbox(store.default, label="Model", info="a Hub id, a folder, or smollm2", min_width=200)
        task = gr.Dropdown(
            [(task.title, name) for name, task in TASKS.items()],
            value=start_with.task,
            label="Task",
            info="drawn anew, with exact answers",
            min_width=240,
        )
        reward = gr.Dropdown(
            _rewards(start_with.task), value=start_with.reward, label="Reward", info="what counts", min_width=240
        )
    with gr.Row(visible=False) as lengths:
        min_tokens = _number(start_with.min_tokens, "Tokens at least", "min_tokens")
        max_tokens = _number(start_with.max_tokens, "Tokens at most", "max_tokens")
    instruction = gr.Dropdown(INSTRUCTIONS, value=start_with.instruction, label="Instruction", visible=False)
    with gr.Row():
        population = _number(start_with.population, "Population", "candidates in a generation")
        prompts = _number(start_with.prompts, "Prompts", "that each candidate answers")
        generations = _number(start_with.generations, "Generations", "an hour at most")
    with gr.Accordion("More settings", open=False):
        with gr.Row():
            rank = _number(start_with.rank, "Rank", "of the LoRA")
            alpha = gr.Number(start_with.alpha, label="Alpha", info="share of the singular values", min_width=140)
            sigma = gr.Textbox(start_with.sigma, label="Sigma", info='step size, or "auto"', min_width=140)
            seed = _number(start_with.seed, "Seed", "of LoRA, prompts, candidates")
        with gr.Row():
            steps = _number(start_with.supervised_steps, "Supervised steps", "that train the LoRA first")
            adapter = gr.Textbox("", label="Adapter", info="a LoRA of yours instead: folder or Hub id", scale=3)
    with gr.Row():
        start = gr.Button("Start", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=80)
    status = gr.Markdown(f"An example, computed earlier with {example['model']}. {example['status']}")
    charts = view(reward_charts(example), "Rewards and step size by generation")
    gr.Markdown("### Before and after\nGreedy answers to held-out prompts; coloured where the search changed them.")
    table = view(answer_table(example), "Answers before and after")
    download = gr.DownloadButton("Download the adapter", interactive=False)
    with gr.Accordion("How to load it", open=False):
        loading = gr.Code(LOAD.format(model=store.default), language="python", **_CODE)
    with gr.Accordion("The same in Python", open=False):
        gr.Code(CODE, language="python", **_CODE)

    fields = {
        "model": model, "task": task, "reward": reward, "instruction": instruction, "min_tokens": min_tokens,
        "max_tokens": max_tokens, "population": population, "prompts": prompts, "generations": generations,
        "rank": rank, "alpha": alpha, "sigma": sigma, "seed": seed, "supervised_steps": steps, "adapter": adapter,
    }  # fmt: skip

    def run(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        given = {name: v.strip() if isinstance(v, str) else v for name, v in zip(fields, values, strict=True)}
        given["model"] = given["model"] or store.default
        try:
            search = begin(store, str(request.session_hash), Settings(**given))
        except gr.Error:  # a ValueError too, which the browser shows above the page
            raise
        except ValueError as error:
            yield f"**Not started.** {error}", *[gr.skip()] * 4
            return
        yield search.seen["status"], note(NOTHING_YET), note(""), _download(None), LOAD.format(model=given["model"])
        for seen in watch(search):
            found = (reward_charts(seen), answer_table(seen)) if seen["answers"] else [gr.skip()] * 2
            yield seen["status"], *found, gr.skip(), gr.skip()
        if search.adapter is not None:
            yield *[gr.skip()] * 3, _download(search.adapter), gr.skip()

    def end(request: gr.Request) -> Any:
        search = SESSIONS.get(str(request.session_hash))
        if search is None or not search.running:
            return "No search is running."
        search.stop()
        return gr.skip()

    def choose(task: str, reward: str) -> tuple[Any, ...]:
        choices = _rewards(task)
        reward = reward if reward in dict(map(reversed, choices)) else "correct"
        return gr.Dropdown(choices, value=reward), *options(reward)

    def options(reward: str) -> tuple[Any, Any]:
        return gr.Row(visible=reward == "length"), gr.Dropdown(visible=reward == "instruction")

    private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
    start.click(
        run,
        list(fields.values()),
        [status, charts, table, download, loading],
        trigger_mode="multiple",  # a second start is answered, not swallowed
        **private,
    )
    stop.click(end, None, status, **private)
    task.change(choose, [task, reward], [reward, lengths, instruction], **private)
    reward.change(options, reward, [lengths, instruction], **private)


def begin(store: Store, session: str, settings: Settings) -> Search:
    """The search of a session; gr.Error where one is running, ValueError for settings that cannot work."""
    with _BEGINNING:
        if session in SESSIONS and SESSIONS[session].running:
            raise gr.Error(BUSY, print_exception=False)
        SESSIONS[session] = Search(store, settings)
        return SESSIONS[session]


def leave(request: gr.Request) -> None:
    """End the search of a session that is over."""
    search = SESSIONS.pop(str(request.session_hash), None)
    if search is not None:
        search.close()


def example(store: Store) -> dict[str, Any]:
    """What the page opens with, computed."""
    search = Search(store, Settings(model=store.default, population=8, generations=8, sigma="0.3"))
    search.wait()
    # how fast it went says something of the machine it ran on, and nothing to who looks at it elsewhere
    unknown = {"seconds": None, "tokens_per_second": None}
    return {**search.seen, "generations": [one | unknown for one in search.seen["generations"]]}


def watch(search: Search) -> Iterator[dict[str, Any]]:
    """What is seen of a search whenever it changes, until it has ended."""
    shown = None
    while True:
        running, seen = search.running, search.seen
        if seen is not shown:
            yield seen
            shown = seen
        if not running:
            return
        time.sleep(0.1)


def reward_charts(seen: dict[str, Any]) -> str:
    """Rewards of the population and the step size, by generation."""
    found = seen["generations"]
    if not found:
        return note(NOTHING_YET)
    rewards = [[reward for reward in one["fitness"] if reward is not None] for one in found]
    middle = [tuple(np.quantile(one, (0.25, 0.75)).tolist()) for one in rewards]
    tips = [
        f"; the middle half of {len(one)} candidates from {low:.3f} to {high:.3f}"
        for one, (low, high) in zip(rewards, middle, strict=True)
    ]
    room = 10
    while room < len(found):
        room *= 2
    axes: dict[str, Any] = {"axis": "generation", "first": 1, "length": min(room, seen["planned"])}
    best, mean = [max(one) for one in rewards], [float(np.mean(one)) for one in rewards]
    population = line_chart(
        "Rewards of the population; shaded: its middle half",
        [("best", best), ("mean", mean)],
        dots=rewards,
        band=middle,
        tips=tips,
        **axes,
    )
    sigma = line_chart("Sigma, the step size", [("", []), ("sigma", [one["sigma"] for one in found])], **axes)
    said = f"{seen['task']}. Reward: {seen['reward']}. {seen['dim']} singular values are searched."
    if (speed := found[-1]["tokens_per_second"]) is not None:
        said += f" {speed:,.0f} tokens/s, {found[-1]['seconds']:.1f} s a generation."
    return (
        f'{note(said)}<div class="lab-line" aria-live="polite">{POINT}</div>{key(["best", "mean"])}'
        f'<div class="lab-charts">{population}{sigma}</div>'
    )


def answer_table(seen: dict[str, Any]) -> str:
    """Question, right answer, and the model's before and after; coloured where they differ."""
    if not seen["answers"]:
        return note(NOTHING_YET)
    rows = []
    for row in seen["answers"]:
        before, after = (_said(row, when) for when in ("before", "after"))
        tip = f"{row['question']} Right: {row['answer']}. Before: {before}. After: {after}."
        changed = "after" in row and row["after"] != row["before"]
        cells = [
            Cell(row["before"], 0, tip, words=True),
            Cell(row.get("after", "..."), float(changed), tip, words=True),
            Cell(row["question"], 0, ""),
        ]
        rows.append((row["answer"], cells))
    return heat_map("right answer", ["before", "after", "question"], rows, label="Answers before and after")


def _said(row: dict[str, Any], when: str) -> str:
    if when not in row:
        return "..."
    reward = row[f"{when}_reward"]
    return f"{row[when]!r} ({'no reward' if reward is None else f'reward {reward:g}'})"


def _rewards(task: str) -> list[tuple[str, str]]:
    return [(REWARDS[name], name) for name in rewards_of(task)]


def _number(value: int, label: str, info: str) -> gr.Number:
    return gr.Number(value, label=label, info=info, precision=0, min_width=140)


def _download(file: Path | None) -> Any:
    return gr.DownloadButton(value=file, interactive=file is not None)


_CODE: dict[str, Any] = {"interactive": False, "show_label": False, "buttons": ["copy"], "wrap_lines": True}
