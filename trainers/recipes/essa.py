"""ESSA beside GRPO, random search and full CMA-ES, from one LoRA: arXiv 2507.04453 in miniature.

- Task: two-digit sums, three digits of answer, characters as tokens. A Llama of 3 layers is trained on targets half of
  which are wrong by one ("sloppy persona"); a LoRA of rank 4 on targets of which 35 % are. The skill is there: what a
  reward can do is to bring it out.
- All arms start from the same LoRA and have the same budget of completions. Reward: all three digits right. Figures
  are greedy accuracies on 1,000 sums that no arm trains on, at tenths of the budget.
- `essa`: 24 candidates x 25 prompts, sep-CMA-ES, sigma="auto"; `cma`, `random`: the same with full CMA-ES, and with
  the best of random candidates; `essa_int8`: on base weights rounded to 8 bits by output channel.
- `grpo-LR`: TRL's GRPOTrainer on the LoRA, 8 completions a prompt, 64 a step, without KL; `grpo_sv`: on the same
  singular values that ESSA searches.
"""

import random
from pathlib import Path
from typing import Any

from trainers.recipes import statistics
from trainers.recipes.characters import problems, tokenizer_of
from trainers.recipes.process import forget_peak_rss, peak_rss
from trainers.recipes.runner import Cell, Options, Place


PAPER = "2507.04453"
ACCEPTS = ()
UNITS = {
    "accuracy_start": "share right, greedy, held-out sums",
    "accuracy": "share right, greedy, held-out sums",
    "generated_tokens": "tokens",
    "completions_per_cpu_s": "completions per CPU second",
    "step_memory": "bytes that a step takes at most, above what the process held before",
}
CHARACTERS = "0123456789+="
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
GRPO_RATES = (1e-4, 1e-3, 1e-2)
SV_RATE = 1e-2  # the paper's for SVD-GRPO
POPULATION, PROMPTS, ANSWER = 24, 25, 4
# budget -> steps of the base, completions of each arm, held-out sums
SIZES = {"smoke": (30, 1200, 50), "small": (900, 60_000, 1000), "full": (900, 240_000, 1000)}
# a pilot with another seed: base 0.50; after 12 steps at 1e-3 0.71, after 24 0.90, which leaves little to search for
SFT_STEPS, SFT_RATE, BASE_WRONG, SFT_WRONG = 12, 1e-3, 0.5, 0.35


def cells(options: Options) -> list[Cell]:
    """Every arm of a seed before the next seed's."""
    base, completions, held_out = SIZES[options.budget]
    smoke = options.budget == "smoke"
    arms = ["essa", "random", f"grpo-{GRPO_RATES[1]:g}"]
    if not smoke:
        arms = ["essa", "cma", "random", "essa_int8", *(f"grpo-{rate:g}" for rate in GRPO_RATES), "grpo_sv"]
    settings = {"base_steps": base, "completions": completions, "held_out": held_out}
    return [
        Cell(arm, seed, settings, 3.0 if arm.startswith("grpo") else 1.0)
        for seed in range(options.seeds or (1 if smoke else 3))
        for arm in arms
    ]


def prepare(options: Options, folder: Path) -> dict[str, Any]:
    """Nothing is made beforehand: the first cell of a seed trains its base for all of them."""
    return {"data": "two-digit sums"}


def exact(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where all digits are right."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def train_on(model: Any, tokenizer: Any, seed: int, steps: int, wrong: float, lr: float, batch: int) -> None:
    """Supervised steps on sums, a share of which is wrong by one; a loop of a second has no use for a Trainer."""
    import torch

    rng = random.Random(seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
        rows = problems(rng.randrange(2**32), batch, held_out=False)
        off = [int(row["answer"]) + (rng.random() < wrong) for row in rows]
        texts = [f"{row['prompt']}{value:03d}<end>" for row, value in zip(rows, off, strict=True)]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        labels = ids.clone()
        labels[:, :6] = -100
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def start(seed: int, base_steps: int, rounded: bool, shared: Path) -> tuple[Any, Any]:
    """The base, its LoRA after supervised steps, and the tokenizer; the same for all arms of a seed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    tokenizer = tokenizer_of(CHARACTERS)
    base = LlamaForCausalLM.from_pretrained(trained_base(seed, base_steps, shared), dtype=torch.float32)
    if rounded:
        round_to_int8(base)
    torch.manual_seed(seed)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    train_on(model, tokenizer, seed + 1000, SFT_STEPS, SFT_WRONG, lr=SFT_RATE, batch=128)
    return model, tokenizer


def trained_base(seed: int, steps: int, shared: Path) -> Path:
    """The folder of a seed's base, trained by the first cell that needs it."""
    import torch
    from filelock import FileLock
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shared / f"base-{seed}"
    with FileLock(shared / f"base-{seed}.lock"):
        if not folder.is_dir():
            torch.manual_seed(seed)
            tokens = {"vocab_size": 2 + len(CHARACTERS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
            base = LlamaForCausalLM(LlamaConfig(**SHAPE, **tokens, max_position_embeddings=32))
            train_on(base, tokenizer_of(CHARACTERS), seed, steps, BASE_WRONG, lr=3e-3, batch=256)
            part = shared / f"base-{seed}.part"
            base.save_pretrained(part)
            part.rename(folder)
    return folder


def round_to_int8(model: Any) -> None:
    """Each linear weight to 8 bits, symmetric, one scale for each output channel; kept in float32."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.data.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            module.weight.data = (module.weight.data / scale).round().clamp(-127, 127) * scale


def accuracy(model: Any, tokenizer: Any, asked: list[dict[str, str]]) -> float:
    """Share of right answers, greedy."""
    from trainers.essa.rollout import generate_rows

    was_training = model.training
    model.eval()
    made = generate_rows(
        model,
        tokenizer([row["prompt"] for row in asked])["input_ids"],
        pad_token_id=0,
        eos_token_ids=[1],
        max_new_tokens=ANSWER,
    )
    model.train(was_training)
    texts = tokenizer.batch_decode(made.completion_ids, skip_special_tokens=True)
    return sum(exact(texts, [row["answer"] for row in asked])) / len(asked)


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one arm with one seed."""
    import time

    settings = cell.settings
    kind, _, rate = cell.arm.partition("-")
    model, tokenizer = start(cell.seed, settings["base_steps"], kind == "essa_int8", place.shared)
    asked = problems(10_000, settings["held_out"], held_out=True)
    curve = [(0, accuracy(model, tokenizer, asked))]
    train = problems(cell.seed, 4000, held_out=False)
    watch = _watch(model, tokenizer, asked, curve, settings["completions"], place)
    cpu = time.process_time()
    if kind in ("grpo", "grpo_sv"):
        tokens = run_grpo(model, tokenizer, train, settings["completions"], cell.seed, kind, rate, place, watch)
    else:
        tokens = run_essa(model, tokenizer, train, settings["completions"], cell.seed, kind, place, watch)
    return {
        "params_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens": tokens,
        "completions": settings["completions"],
        "metrics": {"accuracy_start": curve[0][1], "accuracy": curve[-1][1], "generated_tokens": tokens},
        "series": {"completions": [c for c, _ in curve], "accuracy": [a for _, a in curve]},
        "cost": {
            "completions_per_cpu_s": round(settings["completions"] / (time.process_time() - cpu), 1),
            "step_memory": watch.step_memory,
        },
    }


def _watch(
    model: Any, tokenizer: Any, asked: list[dict[str, str]], curve: list[tuple[int, float]], total: int, place: Place
) -> Any:
    """A callback for either trainer: progress, memory, and the accuracy at tenths of the budget."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        step_memory = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            forget_peak_rss()
            self.before = peak_rss()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step_memory = max(self.step_memory, peak_rss() - self.before)
            done = total * state.global_step // state.max_steps
            place.progress(state.global_step / state.max_steps)
            if done * 10 // total > curve[-1][0] * 10 // total or state.global_step == state.max_steps:
                curve.append((done, accuracy(model, tokenizer, asked)))

    return Watch()


def run_essa(
    model: Any, tokenizer: Any, train: list[dict[str, str]], total: int, seed: int, kind: str, place: Place, watch: Any
) -> int:
    """Generated tokens of a search."""
    from trainers.essa import ESSAConfig, ESSATrainer

    args = ESSAConfig(
        output_dir=str(place.folder / "trainer"),
        population_size=POPULATION,
        batch_size_per_candidate=PROMPTS,
        max_steps=total // (POPULATION * PROMPTS),
        optimizer={"cma": "cma", "random": "random"}.get(kind, "sep-cma"),
        max_completion_length=ANSWER,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    trainer = ESSATrainer(model, exact, args, train, processing_class=tokenizer, callbacks=[watch])
    trainer.train()
    return int(trainer._counts["tokens"])


def run_grpo(
    model: Any,
    tokenizer: Any,
    train: list[dict[str, str]],
    total: int,
    seed: int,
    kind: str,
    rate: str,
    place: Place,
    watch: Any,
) -> int:
    """Generated tokens of TRL's GRPO, on the LoRA or on its singular values."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    if kind == "grpo_sv":
        train_singular_values(model)
    args = GRPOConfig(
        output_dir=str(place.folder / "trainer"),
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=ANSWER,
        max_steps=total // 64,
        learning_rate=SV_RATE if kind == "grpo_sv" else float(rate),
        lr_scheduler_type="constant",
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
    )
    trainer = GRPOTrainer(model, exact, args, Dataset.from_list(train), processing_class=tokenizer, callbacks=[watch])
    trainer.train()
    # TRL counts prompts too, which have six tokens each
    return int(trainer.state.num_input_tokens_seen) - 6 * total


def train_singular_values(model: Any) -> None:
    """Make x, the offsets of ESSA's singular values, the only weights that are trained: W = U diag(s + x) V^T."""
    import torch
    from torch.nn.utils import parametrize

    from trainers.essa.svd_lora import lora_layers

    class Offset(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            U, s, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
            self.U, self.Vt = U.float(), Vt.float()
            self.x = torch.nn.Parameter(torch.zeros(len(s)))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + (self.U * self.x) @ self.Vt

    layers = list(lora_layers(model))
    model.requires_grad_(False)
    for _, module, adapter in layers:
        for factor in (module.lora_A[adapter], module.lora_B[adapter]):
            parametrize.register_parametrization(factor, "weight", Offset(factor.weight.detach()))
            factor.parametrizations.weight.original.requires_grad_(False)


def claims(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Thresholds were set before the run; Student's t over seeds, paired."""
    done = [cell for cell in cells if cell["status"] == "done"]
    rates = sorted({cell["arm"] for cell in done if cell["arm"].startswith("grpo-")})
    best = max(rates, key=lambda arm: _mean(done, arm), default="grpo-0.001")
    spread = ", ".join(f"{arm} {_mean(done, arm):.3f}" for arm in rates)
    found = []
    memory = _mean(done, best, "step_memory") / max(1.0, _mean(done, "essa", "step_memory"))
    rates_note = (
        f"GRPO at its best learning rate; by rate: {spread}; ESSA at sigma=auto {_mean(done, 'essa'):.3f}. A step of "
        f"GRPO takes {memory:.2f} times the memory."
    )
    for id, statement, other, threshold, note in (
        ("within_5_of_grpo", "ESSA ends within 5 points of GRPO at as many completions.", best, -0.05, rates_note),
        ("beats_random", "ESSA ends at least 10 points above random search.", "random", 0.1, ""),
    ):
        ours, theirs = statistics.by_seed(cells, "accuracy", "essa", other)
        differences = ", ".join(f"{a - b:.3f}" for a, b in zip(ours, theirs, strict=True))
        found.append(
            statistics.claim(
                f"essa_{id}",
                paper=PAPER,
                statement=statement,
                statistic=f"accuracy of essa minus {other}, paired by seed",
                found=statistics.paired_interval(ours, theirs) if ours else None,
                threshold=threshold,
                side="above",
                note=f"Student's t, n = {len(ours)}; by seed {differences}. {note}".strip(),
            )
        )
    ours, theirs = statistics.by_seed(cells, "accuracy", "essa_int8", "essa")
    starts = zip(*statistics.by_seed(cells, "accuracy_start", "essa_int8", "essa"), strict=True)
    kept = [(a - x) / (b - y) for a, b, (x, y) in zip(ours, theirs, starts, strict=True) if b != y]
    both = ", ".join(f"{a:.3f} and {b:.3f}" for a, b in zip(ours, theirs, strict=True))
    found.append(
        statistics.claim(
            "essa_int8_keeps_gain",
            paper=PAPER,
            statement="On base weights of 8 bits the search keeps at least 95 % of its gain.",
            statistic="gain of essa_int8 / gain of essa, each over its own start, by seed",
            found=statistics.mean_interval(kept) if kept else None,
            threshold=0.95,
            side="above",
            note=f"Student's t, n = {len(kept)}; accuracies by seed {both}. The paper: 0.844 of 0.847 on PRM800K.",
        )
    )
    ratios = [
        _until(cell, done, best)
        for cell in done
        if cell["arm"] == "essa" and any(c["arm"] == best and c["seed"] == cell["seed"] for c in done)
    ]
    found.append(
        statistics.claim(
            "essa_data_efficiency",
            paper=PAPER,
            statement="ESSA needs fewer completions than GRPO to half of GRPO's gain.",
            statistic="completions of essa / of GRPO until the start plus half of GRPO's final gain, by seed",
            found=statistics.mean_interval(ratios) if ratios else None,
            threshold=1.0,
            side="below",
            note="Read from curves of ten points; an arm that never gets there counts with its whole budget.",
        )
    )
    return found


def _mean(cells: list[dict[str, Any]], arm: str, name: str = "accuracy") -> float:
    values = [(cell["metrics"] | cell["cost"])[name] for cell in cells if cell["arm"] == arm]
    return sum(values) / len(values) if values else float("nan")


def _until(essa: dict[str, Any], cells: list[dict[str, Any]], best: str) -> float:
    grpo = next(cell for cell in cells if cell["arm"] == best and cell["seed"] == essa["seed"])
    curve = grpo["series"]
    level = (curve["accuracy"][0] + curve["accuracy"][-1]) / 2
    first = []
    for cell in (essa, grpo):
        points = list(zip(cell["series"]["completions"], cell["series"]["accuracy"], strict=True))[1:]
        first.append(next((count for count, value in points if value >= level), points[-1][0]))
    return first[0] / first[1]


def plot(result: dict[str, Any], figure: Any) -> None:
    """Accuracy against completions and against CPU time."""
    left, right = figure.subplots(1, 2)
    done = [cell for cell in result["cells"] if cell["status"] == "done"]
    arms = list(dict.fromkeys(cell["arm"] for cell in done))
    for i, arm in enumerate(arms):
        for j, cell in enumerate(c for c in done if c["arm"] == arm):
            counts = cell["series"]["completions"]
            style = {"color": f"C{i}", "alpha": 0.8, "lw": 1.2, "label": arm if j == 0 else None}
            left.plot(counts, cell["series"]["accuracy"], **style)
            seconds = [count / cell["cost"]["completions_per_cpu_s"] for count in counts]
            right.plot(seconds, cell["series"]["accuracy"], **style)
    left.set(xlabel="completions", ylabel="held-out accuracy, greedy")
    right.set(xlabel="CPU seconds, one thread", ylabel="held-out accuracy, greedy")
    left.legend(fontsize=8)
