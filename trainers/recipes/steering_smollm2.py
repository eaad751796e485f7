"""Do 17,280 numbers move a real model? SmolLM2-135M-Instruct learns to answer one-digit sums with a bare number.

- `steering`: a vector after each of the 30 layers, 0.013 % of the weights; 12 steps of 64 completions (K = 16),
  rewards +1 and -1, settings of `SteeringRLConfig`. `random`: the same with the reward of a coin. `lora`, `full`: the
  same reinforcement learning of a LoRA of rank 4, and of all weights.
- Figures: share of bare right answers, at temperature 1 and greedy, on one-digit sums that were not trained on, and on
  sums of two-digit numbers, which nothing trained on. Greedy stands beside temperature 1 because part of a gain there
  is a sharper distribution.
- Each cell of `steering` leaves its adapter in its folder; the package ships that of seed 0.
"""

import random
from typing import Any

from trainers.recipes import statistics
from trainers.recipes.runner import Cell, Options, Place
from trainers.recipes.steering import Coin


PAPER = "2505.18706"
ACCEPTS = ("model",)
DEFAULT_MODEL = "smollm2"
UNITS = {
    "accuracy_start": "share right at temperature 1, one-digit sums, base",
    "accuracy": "share right at temperature 1, one-digit sums",
    "greedy_start": "share right, greedy, one-digit sums, base",
    "greedy": "share right, greedy, one-digit sums",
    "two_digits_start": "share right at temperature 1, two-digit sums, base",
    "two_digits": "share right at temperature 1, two-digit sums",
    "two_digits_greedy_start": "share right, greedy, two-digit sums, base",
    "two_digits_greedy": "share right, greedy, two-digit sums",
    "tokens_per_cpu_s": "generated tokens per CPU second",
}
RATES = {"steering": 2e-2, "random": 2e-2, "lora": 1e-3, "full": 1e-5}
ANSWER, GROUP = 6, 16
# budget -> steps, completions of a step, sums that are asked in the end
SIZES = {"smoke": (1, 16, 8), "small": (12, 64, 128), "full": (100, 256, 512)}


def cells(options: Options) -> list[Cell]:
    """Vectors with every seed, the others with the first."""
    steps, rollouts, asked = SIZES[options.budget]
    seeds = options.seeds or (1 if options.budget == "smoke" else 3)
    return [
        Cell(arm, seed, {"steps": steps, "rollouts": rollouts, "asked": asked, "lr": rate})
        for seed in range(seeds)
        for arm, rate in RATES.items()
        if seed == 0 or arm == "steering"
    ]


def prepare(options: Options, folder: Any) -> dict[str, Any]:
    """Nothing but the task is shared."""
    from pathlib import Path

    model = options.model or DEFAULT_MODEL
    return {"data": "sums in words", "model": Path(model).name if Path(model).exists() else model}


def sums(low: int, high: int, seed: int, count: int, held_out: bool) -> list[dict[str, Any]]:
    """Questions and answers; every fifth pair of operands is held out."""
    pairs = [
        (a, b) for a in range(low, high + 1) for b in range(low, high + 1) if ((7 * a + 3 * b) % 5 == 0) == held_out
    ]
    chosen = random.Random(seed).choices(pairs, k=count)
    ask = "What is {a} + {b}? Answer with the number only."
    return [{"prompt": [{"role": "user", "content": ask.format(a=a, b=b)}], "answer": str(a + b)} for a, b in chosen]


def is_right(text: str, answer: str) -> bool:
    return text.strip().rstrip(".") == answer


def right_or_wrong(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """+1 for the bare right number, -1 for anything else."""
    return [1.0 if is_right(c[0]["content"], a) else -1.0 for c, a in zip(completions, answer, strict=True)]


def share_right(model: Any, tokenizer: Any, rows: list[dict[str, Any]], greedy: bool) -> float:
    """Share of right answers, 64 rows at a time."""
    import torch

    was_training = model.training
    model.eval()
    torch.manual_seed(10_000)
    options = {"do_sample": not greedy} | ({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    right = 0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        asked = tokenizer.apply_chat_template(
            [row["prompt"] for row in part], add_generation_prompt=True, padding=True, return_tensors="pt",
            return_dict=True,
        )  # fmt: skip
        with torch.no_grad():
            made = model.generate(**asked, max_new_tokens=ANSWER, **options)[:, asked["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(made, skip_special_tokens=True)
        right += sum(is_right(text, row["answer"]) for text, row in zip(said, part, strict=True))
    model.train(was_training)
    return right / len(rows)


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one arm with one seed."""
    import time

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from hf_ext import SteeringConfig, tiny
    from trainers.steering_rl import SteeringRLConfig, SteeringRLTrainer

    settings = cell.settings
    model, tokenizer = tiny.load(place.options.model or DEFAULT_MODEL, dtype="float32")
    small, large = (sums(*span, 10_000, settings["asked"], held_out=True) for span in ((1, 9), (10, 49)))

    def figures(policy: Any, end: str) -> dict[str, float]:
        return {
            f"{name}{end}": share_right(policy, tokenizer, rows, greedy)
            for name, rows, greedy in (
                ("accuracy", small, False),
                ("greedy", small, True),
                ("two_digits", large, False),
                ("two_digits_greedy", large, True),
            )
        }

    before = figures(model, "_start")

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            place.progress(state.global_step / state.max_steps)

    args = SteeringRLConfig(
        output_dir=str(place.folder / "trainer"),
        per_device_train_batch_size=settings["rollouts"],
        num_generations=GROUP,
        max_completion_length=ANSWER,
        max_steps=settings["steps"],
        learning_rate=settings["lr"],
        seed=cell.seed,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
    )
    adapter = {
        "full": None,
        "lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    }
    trainer = (GRPOTrainer if cell.arm in adapter else SteeringRLTrainer)(
        model,
        Coin(cell.seed) if cell.arm == "random" else right_or_wrong,
        args,
        Dataset.from_list(sums(1, 9, cell.seed, 1000, held_out=False)),
        processing_class=tokenizer,
        callbacks=[Progress()],
        peft_config=adapter[cell.arm] if cell.arm in adapter else SteeringConfig(),
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    cpu = time.process_time()
    trainer.train()
    seconds = time.process_time() - cpu
    if cell.arm == "steering":
        trainer.model.save_pretrained(place.folder / "adapter")
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    completions = settings["steps"] * settings["rollouts"]
    tokens = round(sum(entry["completions/mean_length"] for entry in history) * settings["rollouts"])
    return {
        "params_trained": trained,
        "tokens": tokens,
        "completions": completions,
        "metrics": before | figures(trainer.model, ""),
        "series": {"reward": [round(entry["reward"], 5) for entry in history]},
        "cost": {"tokens_per_cpu_s": round(tokens / seconds, 1)},
    }


def claims(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Thresholds were set before the run."""
    (reached,) = statistics.by_seed(cells, "accuracy", "steering")
    start = statistics.by_seed(cells, "accuracy_start", "steering")[0]
    greedy = statistics.by_seed(cells, "greedy", "steering")[0]
    coin, coin_start = (statistics.by_seed(cells, name, "random")[0] for name in ("accuracy", "accuracy_start"))
    return [
        statistics.claim(
            "steering_real_model_gain",
            paper=PAPER,
            statement="SmolLM2 with trained vectors answers at least 70 % of one-digit sums (temperature 1).",
            statistic="accuracy of steering, by seed",
            found=statistics.mean_interval(reached) if reached else None,
            threshold=0.7,
            side="above",
            note=f"Student's t, n = {len(reached)}; the base: {start[0] if start else float('nan'):.2f}; greedy with "
            f"vectors: {', '.join(f'{value:.2f}' for value in greedy)}.",
        ),
        statistics.claim(
            "steering_smollm2_random_reward_nothing",
            paper=PAPER,
            statement="With the reward of a coin it ends no better than the base.",
            statistic="accuracy of random minus that of the base, one seed",
            found=statistics.mean_interval([a - b for a, b in zip(coin, coin_start, strict=True)]) if coin else None,
            threshold=0.0,
            side="below",
            note="One seed has no interval, so this can be read but not decided; run more with --seeds.",
        ),
    ]


def plot(result: dict[str, Any], figure: Any) -> None:
    """Reward of rollouts, step by step."""
    axis = figure.subplots()
    for i, arm in enumerate(RATES):
        for j, cell in enumerate(c for c in result["cells"] if (c["arm"], c["status"]) == (arm, "done")):
            rewards = cell["series"]["reward"]
            axis.plot(range(1, len(rewards) + 1), rewards, color=f"C{i}", label=arm if j == 0 else None)
    axis.set(xlabel="step", ylabel="mean reward of rollouts, +1 or -1")
    axis.legend(fontsize=8)
