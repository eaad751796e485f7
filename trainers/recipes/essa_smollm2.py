"""Does evolution move a real model? SmolLM2-135M-Instruct writes words in capitals: ESSA beside random search.

- Start: a LoRA of rank 2 on q, k, v, o (480 singular values), trained for some supervised steps on the task's own
  answers; the same for both arms of a seed.
- 16 candidates x 8 prompts, 24 generations, sigma="auto". `random`: the best of as many random candidates around the
  start, chosen by the same rewards. Reward: the word, and nothing else, in capitals.
- Figures are greedy, on 100 words that neither supervised steps nor search saw.
"""

import random
from typing import Any

from trainers.recipes import statistics
from trainers.recipes.runner import Cell, Options, Place


PAPER = "2507.04453"
ACCEPTS = ("model",)
UNITS = {
    "reward_start": "share right, greedy, held-out words",
    "reward": "share right, greedy, held-out words",
    "kl": "nats per token of the start's own completions",
    "tokens_per_cpu_s": "generated tokens per CPU second",
}
DEFAULT_MODEL = "smollm2"
# budget -> supervised steps, generations, candidates, prompts of each, held-out words
SIZES = {"smoke": (1, 2, 4, 2, 4), "small": (8, 24, 16, 8, 100), "full": (8, 100, 24, 32, 300)}
RANK, SFT_RATE, SFT_BATCH = 2, 1e-3, 8


def cells(options: Options) -> list[Cell]:
    """Both arms of a seed side by side."""
    names = ("sft_steps", "generations", "population", "prompts", "held_out")
    settings = dict(zip(names, SIZES[options.budget], strict=True))
    seeds = range(options.seeds or (1 if options.budget == "smoke" else 3))
    return [Cell(arm, seed, settings) for seed in seeds for arm in ("essa", "random")]


def prepare(options: Options, folder: Any) -> dict[str, Any]:
    """Nothing but the task is shared."""
    from pathlib import Path

    model = options.model or DEFAULT_MODEL
    return {"data": "hf_ext.tasks.chat.capitals", "model": Path(model).name if Path(model).exists() else model}


def words(seed: int, held_out: int) -> tuple[list[dict], list[dict]]:
    """Rows of the task to learn from, in an order of `seed`, and the held-out ones, which are always the same."""
    from hf_ext.tasks import chat

    rows = chat.capitals(len(chat.NOUNS), seed=10_000)
    known, asked = rows[held_out:], rows[:held_out]
    random.Random(seed).shuffle(known)
    return known, asked


def start(name: str, seed: int, steps: int, rows: list[dict]) -> tuple[Any, Any]:
    """The model with its LoRA after `steps` supervised steps, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from hf_ext import tiny

    torch.manual_seed(seed)
    base, tokenizer = tiny.load(name, dtype="float32")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=SFT_RATE)
    for step in range(steps):
        for row in rows[step * SFT_BATCH : (step + 1) * SFT_BATCH]:
            asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            answer = tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id]
            labels = torch.tensor([[-100] * len(asked) + answer])
            loss = model(torch.tensor([asked + answer]), labels=labels).loss / SFT_BATCH
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Search with one arm and one seed."""
    from transformers import TrainerCallback

    from hf_ext.tasks.chat import CAPITALS_MAX_NEW_TOKENS, capitals_correct
    from trainers.essa import ESSAConfig, ESSATrainer

    settings = cell.settings
    rows, asked = words(cell.seed, settings["held_out"])
    seen = settings["sft_steps"] * SFT_BATCH
    model, tokenizer = start(place.options.model or DEFAULT_MODEL, cell.seed, settings["sft_steps"], rows[:seen])

    def right(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        return [float(capitals_correct(c[0]["content"], a)) for c, a in zip(completions, answer, strict=True)]

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            place.progress(state.global_step / state.max_steps)

    args = ESSAConfig(
        output_dir=str(place.folder / "trainer"),
        optimizer="sep-cma" if cell.arm == "essa" else "random",
        population_size=settings["population"],
        batch_size_per_candidate=settings["prompts"],
        max_steps=settings["generations"],
        max_completion_length=CAPITALS_MAX_NEW_TOKENS,
        max_concurrent_sequences=128,
        kl_probe_prompts=8,
        seed=cell.seed,
        use_cpu=True,
        disable_tqdm=True,
        save_steps=4,
        save_total_limit=1,
        report_to="none",
    )
    train = rows[seen:]
    trainer = ESSATrainer(model, right, args, train, asked, processing_class=tokenizer, callbacks=[Progress()])
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=any((place.folder / "trainer").glob("checkpoint-*")))
    after = trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "sigma" in entry]
    seconds = sum(entry["generation_seconds"] for entry in history)
    return {
        "params_trained": trainer.space.dim,
        "tokens": trainer._counts["tokens"],
        "completions": trainer._counts["completions"],
        "metrics": {"reward_start": before["eval_reward"], "reward": after["eval_reward"], "kl": after["eval_kl"]},
        "series": {name: [entry[name] for entry in history] for name in ("reward", "reward_max", "sigma")},
        "cost": {"tokens_per_cpu_s": round(trainer._counts["tokens"] / seconds, 1)},
    }


def claims(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The threshold is 0, the point from which on ESSA does better at all."""
    ours, theirs = statistics.by_seed(cells, "reward", "essa", "random")
    by_seed = ", ".join(f"{a:.2f} and {b:.2f}" for a, b in zip(ours, theirs, strict=True))
    return [
        statistics.claim(
            "essa_moves_real_model",
            paper=PAPER,
            statement="On SmolLM2 ESSA ends above random search of the same budget.",
            statistic="held-out reward of essa minus random, paired by seed",
            found=statistics.paired_interval(ours, theirs) if ours else None,
            threshold=0.0,
            side="above",
            note=f"Student's t, n = {len(ours)}; by seed {by_seed}.",
        )
    ]


def plot(result: dict[str, Any], figure: Any) -> None:
    """Mean reward of a generation along the way."""
    axis = figure.subplots()
    for cell in (cell for cell in result["cells"] if cell["status"] == "done"):
        rewards = cell["series"]["reward"]
        colour = "#1d63c4" if cell["arm"] == "essa" else "#666666"
        axis.plot(range(1, len(rewards) + 1), rewards, color=colour, label=cell["arm"] if cell["seed"] == 0 else None)
    axis.set(xlabel="generation", ylabel="mean reward of the candidates")
    axis.legend()
