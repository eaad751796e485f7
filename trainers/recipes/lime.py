"""LIMe against Llama, from scratch, at equal parameters: the experiments of arXiv 2502.09245 in miniature.

- (a) `sums-*`: arithmetic expressions of 4 operands, solved step by step; 5 seeds. Constant learning rate after
  warm-up, so that a step means the same early and late; figures are means of the last `LAST` evaluations.
- (b) `text-*`: language modelling, 8 layers, 1.0 M tokens, cosine schedule, 3 seeds; Llama, LIMe, first-4, last-2,
  and v1's static routers with one seed. `identity` is LIMe without the noise of the paper's initial routers: a pilot
  of 256k tokens found that the noise alone puts LIMe behind (Llama 5.663, LIMe 5.814, without noise 5.666; routers at
  3e-3 instead of 1e-2 5.867, since they leave the noise later).
- (c) on the models of (b): matrix Renyi entropy of values and hidden states, and how well is / are / was / were can be
  told apart by them, layer by layer.
- (d) `deep4-*`, `deep16-*`: the same language modelling at depth 4 and 16, 0.5 M tokens, 2 seeds.

Equal parameters: the Llama's MLP is one unit wider, so that it never has fewer than the LIMe with its routers.
Learning rates are the paper's for (a), 1e-3, and 1e-2 for routers; for (b) and (d) the Llama's best of
`LEARNING_RATES` serves all arms. Training is in float32: bfloat16 autocast is slower on CPUs without instructions for
it.
"""

from pathlib import Path
from typing import Any, Literal

from trainers.recipes import statistics, texts
from trainers.recipes.fit import fit, last_figures, nll, remove_checkpoints
from trainers.recipes.process import peak_rss
from trainers.recipes.runner import Cell, Options, Place


PAPER = "2502.09245"
ACCEPTS = ("text",)
DEFAULT_TEXT = "roneneldan/TinyStories"
UNITS = {
    "nll_solution": "nats per token of the solution",
    "accuracy": "share of 256 held-out expressions, greedy",
    "nll": "nats per token of held-out texts",
    "entropy_values": "nats, mean over layers",
    "entropy_hidden": "nats, mean over layers",
    "separability_values": "accuracy of 4, mean over layers",
    "separability_hidden": "accuracy of 4, mean over layers",
    "tokens_per_cpu_s": "training tokens per CPU second",
    "peak_rss_training": "bytes",
}
SEEDS = {"sums": 5, "text": 3, "deep4": 2, "deep16": 2}
LAST, EVERY = 5, 50  # evaluations that make a figure, steps between evaluations
VOCABULARY, LENGTH, BATCH = 4096, 256, 4
VERBS = (" is", " are", " was", " were")
# learning rate -> held-out loss of (b)'s Llama after 256k tokens, of a seed and held-out rows that are not reported
LEARNING_RATES = {1e-3: 5.956, 3e-3: 5.715, 6e-3: 6.327}

SUMS = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPES = {
    "text": {"hidden_size": 144, "intermediate_size": 336, "num_hidden_layers": 8, "num_attention_heads": 6},
    "deep4": {"hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 6},
    "deep16": {"hidden_size": 104, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 4},
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "lime": {"routing": "full"},
    "first4": {"routing": "first", "routing_window": 4},
    "last2": {"routing": "last", "routing_window": 2},
    "identity": {"routing": "full", "router_init": "identity"},
    "v1_static": {"router_type": "static"},
}
# budget -> steps of (a), tokens of (b), tokens of (d), held-out rows, rows in which the verbs are looked for
SIZES = {
    "smoke": (60, 16 * 1024, 8 * 1024, 8, 32),
    "small": (2500, 1_000_000, 500_000, 128, 384),
    "full": (20_000, 20_000_000, 10_000_000, 512, 1024),
}


def cells(options: Options) -> list[Cell]:
    """Every arm and seed; the two arms of a seed start one after the other, so that they share the machine's mood."""
    steps, tokens, deep_tokens, rows, verb_rows = SIZES[options.budget]
    smoke = options.budget == "smoke"
    found = []
    for part, default in SEEDS.items():
        kinds = list(KINDS) if part == "text" else ["llama", "lime"]
        if smoke:  # one arm of each kind of code
            kinds = {"sums": ["llama", "lime"], "text": ["llama", "v1_static"]}.get(part, [])
        for seed in range(options.seeds or (1 if smoke else default)):
            for kind in kinds:
                if part == "sums":
                    settings = {"steps": steps, "lr": 1e-3, "train": 200 if smoke else 20_000}
                    weight = steps / 2500
                else:
                    budget = tokens if part == "text" else deep_tokens
                    settings = {
                        "tokens": budget,
                        "lr": min(LEARNING_RATES, key=LEARNING_RATES.__getitem__),
                        "rows": rows,
                        "verb_rows": verb_rows * (part == "text"),
                    }
                    weight = budget / 600_000
                if kind != "v1_static" or seed == 0:
                    found.append(Cell(f"{part}-{kind}", seed, settings, round(weight, 3)))
    return found


def prepare(options: Options, folder: Path) -> dict[str, Any]:
    """A tokenizer of the training texts, and all their tokens, for (b) to (d)."""
    _, tokens, _, rows, verb_rows = SIZES[options.budget]
    train, held_out, corpus = texts.load(options.text, DEFAULT_TEXT, characters=6 * tokens)
    tokenizer, file = shared_files(folder, corpus)
    if not tokenizer.is_file():
        texts.train_bpe(train[:4000], VOCABULARY, ["<|end|>"]).save(str(tokenizer))
    texts.save_tokens(file, lambda part: encode(tokenizer, part), 0, train, held_out)
    texts.check_tokens(file, {"train": tokens, "held_out": (rows + verb_rows) * LENGTH}, options.budget)
    return {**corpus, "vocabulary": VOCABULARY}


def shared_files(folder: Path, facts: dict[str, Any]) -> tuple[Path, Path]:
    """The tokenizer and the tokens of this corpus."""
    name = facts["data_sha256"][:12]
    return folder / f"{name}-tokenizer.json", folder / f"{name}-tokens.safetensors"


def encode(tokenizer: Path, part: list[str]) -> list[list[int]]:
    """Token ids of texts."""
    from tokenizers import Tokenizer

    return [encoding.ids for encoding in Tokenizer.from_file(str(tokenizer)).encode_batch(part)]


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train and measure one arm with one seed."""
    part, _, kind = cell.arm.partition("-")
    return run_sums(cell, kind, place) if part == "sums" else run_text(cell, part, kind, place)


def build(shape: dict[str, Any], kind: str, seed: int, **settings: Any) -> Any:
    """A Llama or a LIMe with weights of `seed`; the Llama's MLP is one unit wider in place of routers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_ext import LimeConfig, LimeForCausalLM

    torch.manual_seed(seed)
    if kind == "llama":
        wider = {"intermediate_size": shape["intermediate_size"] + 1}
        return LlamaForCausalLM(LlamaConfig(**{**shape, **wider}, **settings))
    return LimeForCausalLM(LimeConfig(**shape, **KINDS[kind], **settings))


def run_sums(cell: Cell, kind: str, place: Place) -> dict[str, Any]:
    """(a): loss of solutions along the way, and the share of right answers at the end."""
    import torch

    from hf_ext.lime import lime_param_groups
    from hf_ext.tasks import expressions

    steps = cell.settings["steps"]
    held_out = expressions.dataset(256, seed=10_000)
    known = frozenset(expression.prompt for expression in held_out)
    train = expressions.dataset(cell.settings["train"], seed=cell.seed, exclude=known)
    pad = expressions.VOCABULARY.index("<pad>")
    end = expressions.VOCABULARY.index("<eos>")

    def rows_of(items: list[Any]) -> list[dict[str, Any]]:
        rows = []
        encoded = [expressions.encode(item) for item in items]
        for ids, prompt in encoded:
            row = torch.full((LONGEST,), pad)
            row[: len(ids)] = torch.tensor(ids)
            labels = row.masked_fill(row == pad, -100)
            labels[:prompt] = -100
            rows.append({"input_ids": row, "labels": labels})
        return rows

    model = build(SUMS, kind, cell.seed, vocab_size=len(expressions.VOCABULARY), max_position_embeddings=64)
    rows, valid = rows_of(train), rows_of(held_out)
    log, speed = fit(
        model,
        rows,
        place,
        steps=steps,
        batch_size=64,
        groups=lime_param_groups(model, lr=cell.settings["lr"]),
        seed=cell.seed,
        evaluate=lambda model: {"nll_solution": sum(nll(model, valid)) / len(valid)},
        every=EVERY if steps > EVERY * LAST else max(1, steps // 12),
        save_every=max(1, steps // 5),
        share=0.98,
    )
    right = 0
    model.eval()
    for item in held_out:  # prompts differ in length: a row at a time needs no padding
        ids, prompt = expressions.encode(item)
        written = model.generate(
            torch.tensor([ids[:prompt]]),
            attention_mask=torch.ones(1, prompt, dtype=torch.long),
            max_new_tokens=LONGEST - prompt,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )[0].tolist()
        text = expressions.decode(written[: written.index(end)] if end in written else written)
        right += expressions.final_answer(text) == item.answer
    remove_checkpoints(place.folder)
    return {
        "params_trained": sum(p.numel() for p in model.parameters()),
        "tokens": steps * 64 * LONGEST,
        "metrics": {"nll_solution": last_figures(log, "nll_solution", LAST), "accuracy": right / len(held_out)},
        "series": {name: [round(entry[name], 5) for entry in log] for name in ("step", "nll_solution")},
        "cost": {"tokens_per_cpu_s": speed},
    }


LONGEST = 28  # tokens of a row of (a)


def run_text(cell: Cell, part: str, kind: str, place: Place) -> dict[str, Any]:
    """(b), (d): held-out loss, and (c) where `verb_rows` asks for it."""

    from hf_ext.analysis.depth import layer_entropies, separability
    from hf_ext.lime import lime_param_groups

    tokenizer, file = shared_files(place.shared, place.facts)
    count = cell.settings["tokens"] // LENGTH
    train = texts.rows(file, "train", count, LENGTH, cell.seed)
    wanted = cell.settings["rows"] + cell.settings["verb_rows"]
    held_out = texts.rows(file, "held_out", wanted, LENGTH, 0)
    valid, others = held_out[: cell.settings["rows"]], held_out[cell.settings["rows"] :]
    valid_rows = [{"input_ids": row, "labels": row} for row in valid]

    model = build(
        SHAPES[part], kind, cell.seed, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=True
    )
    steps = count // BATCH
    log, speed = fit(
        model,
        [{"input_ids": row, "labels": row} for row in train],
        place,
        steps=steps,
        batch_size=BATCH,
        groups=lime_param_groups(model, lr=cell.settings["lr"], router_lr=1e-2),
        seed=cell.seed,
        schedule="cosine",
        warmup=max(1, steps // 10),
        evaluate=lambda model: {"nll": sum(nll(model, valid_rows, batch_size=8)) / len(valid_rows)},
        every=max(1, steps // 8),
        save_every=max(1, steps // 4),
        share=0.95,
    )
    peak = peak_rss()
    metrics = {"nll": log[-1]["nll"]}
    series = {name: [round(entry[name], 5) for entry in log] for name in ("step", "nll")}
    model.eval()
    if len(others):
        entropies = layer_entropies(model, valid)
        verbs = [ids[0] for ids in encode(tokenizer, list(VERBS))]
        told_apart = separability(model, others, verbs)
        for name, figures in (("entropy", entropies), ("separability", told_apart)):
            for side in ("values", "hidden"):
                layers = [float(x) for x in getattr(figures, side)]
                metrics[f"{name}_{side}"] = sum(layers) / len(layers)
                series[f"{name}_{side}"] = [round(x, 5) for x in layers]
    model.save_pretrained(place.folder / "model")
    remove_checkpoints(place.folder)
    return {
        "params_trained": sum(p.numel() for p in model.parameters()),
        "tokens": steps * BATCH * LENGTH,
        "metrics": metrics,
        "series": series,
        "cost": {"tokens_per_cpu_s": speed, "peak_rss_training": peak},
    }


def steps_to_reach(cell: dict[str, Any], level: float) -> float:
    """First step at which the mean of the last `LAST` evaluations is at most `level`; past the end if never."""
    steps, losses = cell["series"]["step"], cell["series"]["nll_solution"]
    for i in range(LAST, len(steps) + 1):
        if sum(losses[i - LAST : i]) / LAST <= level:
            return steps[i - 1]
    return steps[-1] + EVERY


# id, statement, metric, arm, baseline, side, note: the paired difference is to lie on that side of 0
DIFFERENCES: tuple[tuple[str, str, str, str, str, Literal["above", "below"], str], ...] = (
    ("lime_lower_loss", "LIMe ends at a lower held-out loss (4-operand expressions).",
     "nll_solution", "sums-lime", "sums-llama", "below", ""),
    ("lime_text_lower_loss", "LIMe ends at a lower held-out loss (texts).",
     "nll", "text-lime", "text-llama", "below", "The paper: perplexity -3.4 % at 150M."),
    ("lime_text_first4_lower_loss", "LIMe that reads the first 4 layers ends lower than the Llama (texts).",
     "nll", "text-first4", "text-llama", "below", "The paper: 94 % of the gain of all layers."),
    ("lime_text_last2_lower_loss", "LIMe that reads the last 2 layers ends lower than the Llama (texts).",
     "nll", "text-last2", "text-llama", "below", "The paper: a third of the gain of all layers."),
    ("lime_text_identity_lower_loss", "LIMe that starts as a Llama, its routers without noise, ends lower (texts).",
     "nll", "text-identity", "text-llama", "below", "Added when the arm with noise was seen to be behind."),
    ("lime_values_entropy", "LIMe's values have a higher matrix entropy (texts).",
     "entropy_values", "text-lime", "text-llama", "above", "The paper: higher in all layers."),
    ("lime_values_separable", "LIMe's values tell is / are / was / were apart better (texts).",
     "separability_values", "text-lime", "text-llama", "above", "The paper: in the late layers."),
    ("lime_deep4_lower_loss", "LIMe ends lower at depth 4 (texts).",
     "nll", "deep4-lime", "deep4-llama", "below", ""),
    ("lime_deep16_lower_loss", "LIMe ends lower at depth 16 (texts).",
     "nll", "deep16-lime", "deep16-llama", "below", "The paper: LIMe wins at 32, 64 and 128 layers."),
)  # fmt: skip


def claims(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Thresholds were set before the run; intervals are Student's t over seeds, paired."""
    done = {(cell["arm"], cell["seed"]): cell for cell in cells if cell["status"] == "done"}
    pairs = [(cell, done.get(("sums-lime", seed))) for (arm, seed), cell in done.items() if arm == "sums-llama"]
    ratios = [
        steps_to_reach(lime, llama["metrics"]["nll_solution"]) / llama["series"]["step"][-1]
        for llama, lime in pairs
        if lime
    ]
    found = [
        statistics.claim(
            "lime_fewer_steps",
            paper=PAPER,
            statement="LIMe reaches the Llama's final loss in at most 90 % of the steps (4-operand expressions).",
            statistic=f"steps of LIMe / steps of Llama, held-out loss as the mean of {LAST} evaluations, by seed",
            found=statistics.mean_interval(ratios) if ratios else None,
            threshold=0.9,
            side="below",
            note=f"By seed: {', '.join(f'{ratio:.2f}' for ratio in ratios)}. Student's t. The paper: 15.3 % fewer "
            "FLOPs to the same loss at 1B.",
        )
    ]
    for id, statement, metric, arm, baseline, side, note in DIFFERENCES:
        ours, theirs = statistics.by_seed(cells, metric, arm, baseline)
        found.append(
            statistics.claim(
                id,
                paper=PAPER,
                statement=statement,
                statistic=f"{metric} of {arm} minus {baseline}, paired by seed, {UNITS[metric]}",
                found=statistics.paired_interval(ours, theirs) if ours else None,
                threshold=0.0,
                side=side,
                note=f"Student's t, n = {len(ours)}. {note}".strip(),
            )
        )
    return found


def plot(result: dict[str, Any], figure: Any) -> None:
    """Loss curves of (a), held-out losses of (b) and (d), entropy and separability by layer."""
    done = [cell for cell in result["cells"] if cell["status"] == "done"]
    axes = figure.subplots(2, 2)
    colours = {"llama": "#666666", "lime": "#1d63c4", "first4": "#2a9d8f", "last2": "#e07a1f"}
    colours |= {"identity": "#17a2b8", "v1_static": "#9b2c9b"}

    def draw_lines(axis: Any, arms: list[str], across: str | None, name: str) -> None:
        for arm in arms:
            kind = arm.partition("-")[2]
            for i, cell in enumerate(c for c in done if c["arm"] == arm and name in c["series"]):
                figures = cell["series"][name]
                places = cell["series"][across] if across else range(1, len(figures) + 1)
                axis.plot(places, figures, color=colours[kind], alpha=0.7, lw=1.2, label=kind if i == 0 else None)

    draw_lines(axes[0, 0], ["sums-llama", "sums-lime"], "step", "nll_solution")
    axes[0, 0].set(title="4-operand expressions", xlabel="step", ylabel="held-out loss, nats per token", yscale="log")
    arms = [f"text-{kind}" for kind in KINDS]
    draw_lines(axes[0, 1], arms, "step", "nll")
    axes[0, 1].set(title="texts, 8 layers", xlabel="step", ylabel="held-out loss, nats per token")
    draw_lines(axes[1, 0], arms, None, "entropy_values")
    axes[1, 0].set(title="values: matrix entropy", xlabel="layer", ylabel="nats")
    draw_lines(axes[1, 1], arms, None, "separability_values")
    axes[1, 1].set(title="values: is / are / was / were", xlabel="layer", ylabel="accuracy (chance 0.25)")
    for axis in axes.flat:
        axis.legend(fontsize=8)
