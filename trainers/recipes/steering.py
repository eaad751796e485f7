"""Steering vectors beside full fine-tuning and LoRA, by one reinforcement learning: arXiv 2505.18706 in miniature.

- Base: a Llama of 3 layers on characters, trained on `?12+34=` (a tag, a sum). An answer starts with T and is right,
  or with S and is of random digits: T after the tag p in 95 % of the rows, after ? in 5 %, without a tag in 25 %. So
  the skill is there, and the contrast too, without which no vector could raise it.
- Reinforcement learning on sums without a tag: 64 completions a step, K = 16, rewards +1 and -1, 200 steps, settings
  of `SteeringRLConfig`. Arms: all weights, LoRA of rank 4, a vector in every layer, in one layer alone; and vectors
  with a reward that is a coin's. All have the same rollouts and three learning rates; a claim takes each arm's best.
- Figures: share right on 500 sums that nothing trains on, at temperature 1 and greedy, and how many start with T.
"""

import random
from pathlib import Path
from typing import Any

from trainers.recipes import statistics
from trainers.recipes.characters import problems, tokenizer_of
from trainers.recipes.runner import Cell, Options, Place


PAPER = "2505.18706"
ACCEPTS = ()
UNITS = {
    "accuracy_start": "share right at temperature 1, held-out sums",
    "accuracy": "share right at temperature 1, held-out sums",
    "greedy": "share right, greedy, held-out sums",
    "starts_with_T": "share of answers at temperature 1",
    "accuracy_forced": "share right where T is forced on the base",
}
CHARACTERS = "0123456789+=TSp?"
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
SHARE_T = {"p": 0.95, "?": 0.05, "": 0.25}
# arm -> learning rates, the middle one near the best of a pilot
RATES = {
    "full": (1e-4, 3e-4, 1e-3),
    "lora": (1e-3, 3e-3, 1e-2),
    "steering": (1e-2, 3e-2, 1e-1),
    "layer0": (3e-2, 1e-1, 3e-1),
    "layer1": (3e-2, 1e-1, 3e-1),
    "layer2": (3e-2, 1e-1, 3e-1),
    "random": (1e-2, 3e-2, 1e-1),
}
ANSWER, ROLLOUTS, GROUP = 5, 64, 16  # T or S, three digits and the end; completions of a step, of a prompt
# budget -> steps of the base, steps of reinforcement learning, held-out sums
SIZES = {"smoke": (30, 2, 32), "small": (900, 200, 500), "full": (900, 1000, 2000)}


def cells(options: Options) -> list[Cell]:
    """Every arm and rate of a seed before the next seed's."""
    base, steps, held_out = SIZES[options.budget]
    smoke = options.budget == "smoke"
    settings = {"base_steps": base, "steps": steps, "held_out": held_out}
    return [
        Cell(f"{arm}-{rate:g}", seed, settings)
        for seed in range(options.seeds or (1 if smoke else 5))
        for arm, rates in RATES.items()
        if not smoke or arm in ("full", "lora", "steering", "random")
        for rate in (rates[1:2] if smoke else rates)
    ]


def prepare(options: Options, folder: Path) -> dict[str, Any]:
    """Nothing is made beforehand: the first cell of a seed trains its base for all of them."""
    return {"data": "two-digit sums with tags"}


def sample(rng: random.Random, tag: str | None = None) -> tuple[str, str]:
    """A prompt and an answer that the base is to learn."""
    tag = rng.choice(list(SHARE_T)) if tag is None else tag
    (row,) = problems(rng.randrange(2**32), 1, held_out=False)
    if rng.random() < SHARE_T[tag]:
        return tag + row["prompt"], f"T{row['answer']}"
    return tag + row["prompt"], f"S{rng.randrange(1000):03d}"


def trained_base(seed: int, steps: int, shared: Path) -> Path:
    """The folder of a seed's base, trained by the first cell that needs it."""
    import torch
    from filelock import FileLock
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shared / f"base-{seed}"
    with FileLock(shared / f"base-{seed}.lock"):
        if not folder.is_dir():
            torch.manual_seed(seed)
            rng, tokenizer = random.Random(seed), tokenizer_of(CHARACTERS)
            tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
            model = LlamaForCausalLM(LlamaConfig(**SHAPE, **tokens, max_position_embeddings=32))
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
            for _ in range(steps):
                rows = [sample(rng) for _ in range(256)]
                inputs = tokenizer([f"{asked}{said}<end>" for asked, said in rows], padding=True, return_tensors="pt")
                # padding is on the left, so answers are the last columns
                labels = inputs["input_ids"].clone()
                labels[:, :-ANSWER] = -100
                loss = model(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels
                ).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            part = shared / f"base-{seed}.part"
            model.save_pretrained(part)
            part.rename(folder)
    return folder


def answers(
    model: Any, tokenizer: Any, asked: list[dict[str, str]], forced: str = "", greedy: bool = False
) -> list[str]:
    """What the model says, at temperature 1 unless greedy; `forced` are its first words."""
    import torch

    was_training = model.training
    model.eval()
    inputs = tokenizer([row["prompt"] + forced for row in asked], padding=True, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    torch.manual_seed(10_000)
    options = {"do_sample": not greedy} | ({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER, **options)
    model.train(was_training)
    said = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    return [forced + text for text in said]


def share_right(said: list[str], asked: list[dict[str, str]]) -> float:
    return sum(text == f"T{row['answer']}" for text, row in zip(said, asked, strict=True)) / len(asked)


def right_or_wrong(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """+1 for T and the right digits, -1 for anything else."""
    return [1.0 if text == f"T{digits}" else -1.0 for text, digits in zip(completions, answer, strict=True)]


class Coin:
    """A reward that knows nothing: +1 or -1 with equal chances."""

    __name__ = "coin"

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [self.rng.choice((-1.0, 1.0)) for _ in completions]


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one arm with one rate and seed."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import GRPOTrainer

    from hf_ext import SteeringConfig
    from trainers.steering_rl import SteeringRLConfig, SteeringRLTrainer

    settings = cell.settings
    kind, _, rate = cell.arm.partition("-")
    tokenizer = tokenizer_of(CHARACTERS)
    folder = trained_base(cell.seed, settings["base_steps"], place.shared)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = problems(10_000, settings["held_out"], held_out=True)
    start = share_right(answers(model, tokenizer, asked), asked)
    forced = share_right(answers(model, tokenizer, asked, forced="T"), asked)

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            place.progress(state.global_step / state.max_steps)

    args = SteeringRLConfig(
        output_dir=str(place.folder / "trainer"),
        per_device_train_batch_size=ROLLOUTS,
        num_generations=GROUP,
        max_completion_length=ANSWER,
        max_steps=settings["steps"],
        learning_rate=float(rate),
        seed=cell.seed,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=max(1, settings["steps"] // 20),
        report_to="none",
    )
    layers: Any = {"layer0": [0], "layer1": [1], "layer2": [2]}.get(kind)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = {"full": None, "lora": LoraConfig(r=4, lora_alpha=8, target_modules=targets)}
    trainer = (GRPOTrainer if kind in adapter else SteeringRLTrainer)(
        model,
        Coin(cell.seed) if kind == "random" else right_or_wrong,
        args,
        Dataset.from_list(problems(cell.seed, 4000, held_out=False)),
        processing_class=tokenizer,
        callbacks=[Progress()],
        peft_config=adapter[kind] if kind in adapter else SteeringConfig(layers_to_transform=layers),
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    said = answers(trainer.model, tokenizer, asked)
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "params_trained": trained,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "completions": settings["steps"] * ROLLOUTS,
        "metrics": {
            "accuracy_start": start,
            "accuracy_forced": forced,
            "accuracy": share_right(said, asked),
            "greedy": share_right(answers(trainer.model, tokenizer, asked, greedy=True), asked),
            "starts_with_T": sum(text.startswith("T") for text in said) / len(said),
        },
        "series": {name: [round(entry[name], 5) for entry in history] for name in ("step", "reward")},
    }


def best(cells: list[dict[str, Any]], kind: str) -> str:
    """The arm of a kind whose rate has the highest mean accuracy over seeds."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        if cell["status"] == "done" and cell["arm"].partition("-")[0] == kind:
            found.setdefault(cell["arm"], []).append(cell["metrics"]["accuracy"])
    return max(found, key=lambda arm: sum(found[arm]) / len(found[arm]), default=f"{kind}-{RATES[kind][1]:g}")


def claims(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Thresholds were set before the run; Student's t over seeds, paired."""
    arms = {kind: best(cells, kind) for kind in RATES}
    # the coin is measured at the rate at which vectors learn best, not at its own luckiest
    arms["random"] = f"random-{arms['steering'].partition('-')[2]}"
    steering, full = statistics.by_seed(cells, "accuracy", arms["steering"], arms["full"])
    start = statistics.by_seed(cells, "accuracy_start", arms["steering"], arms["full"])[0]
    shares = [(a - c) / (b - c) for a, b, c in zip(steering, full, start, strict=True) if b != c]
    others = []
    for kind in ("lora", "layer0", "layer1", "layer2"):
        (values,) = statistics.by_seed(cells, "accuracy", arms[kind])
        others += [f"{arms[kind]} {sum(values) / len(values):.3f}"] if values else []
    coin = statistics.by_seed(cells, "accuracy", arms["random"])[0]
    coin_start = statistics.by_seed(cells, "accuracy_start", arms["random"])[0]
    return [
        statistics.claim(
            "steering_recovers_full",
            paper=PAPER,
            statement="Vectors recover at least 75 % of the gain of full fine-tuning (temperature 1).",
            statistic=f"gain of {arms['steering']} / gain of {arms['full']}, by seed",
            found=statistics.mean_interval(shares) if shares else None,
            threshold=0.75,
            side="above",
            note=f"Student's t, n = {len(shares)}; by seed {', '.join(f'{x:.2f}' for x in shares)}. "
            f"Others at their best rate: {', '.join(others)}.",
        ),
        statistics.claim(
            "steering_random_reward_nothing",
            paper=PAPER,
            statement="Vectors with a reward that knows nothing gain less than 5 points.",
            statistic=f"accuracy of {arms['random']} minus that of the base, paired by seed",
            found=statistics.paired_interval(coin, coin_start) if coin else None,
            threshold=0.05,
            side="below",
            note=f"Student's t, n = {len(coin)}.",
        ),
    ]


def plot(result: dict[str, Any], figure: Any) -> None:
    """Reward of rollouts along the way, each kind at its best rate."""
    axis = figure.subplots()
    done = [cell for cell in result["cells"] if cell["status"] == "done"]
    for i, kind in enumerate(RATES):
        arm = best(result["cells"], kind)
        for j, cell in enumerate(c for c in done if c["arm"] == arm):
            style = {"color": f"C{i}", "alpha": 0.7, "lw": 1.2, "label": arm if j == 0 else None}
            axis.plot(cell["series"]["step"], cell["series"]["reward"], **style)
    axis.set(xlabel="step", ylabel="mean reward of rollouts, +1 or -1")
    axis.legend(fontsize=8)
