"""The bundled language model and its LIMe twin: micro-stories and word problems with known answers.

    python -m trainers.recipes stories --budget small      # the models lie in the cells' folders afterwards
    python -m trainers.recipes.bundle_stories hf_ext/tiny  # copies those of seed 0, with log and card, into a folder

- Both arms see the same rows in the same order: whole chats of stories (about two thirds of the tokens), word problems
  and sums in rows of 160 tokens, in which a chat sees no other one. Only answers are learned. No row comes twice.
- A fifth of the operand pairs is held out (`word_problems.held_out`), in problems, sums and counts of stories alike:
  stories that use one are drawn again. So the entropy of what is seen is that of the grammar plus log Z, where Z is
  the share of stories that pass, estimated from 20 000.
- Everything is measured on the weights as shipped, rounded to bfloat16; the arithmetic is float32.
- The tokenizer is a byte-level BPE of its own: digits stand alone, a chat turn is <|im_start|>role ... <|im_end|>.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.recipes import statistics
from trainers.recipes.fit import fit, nll, remove_checkpoints
from trainers.recipes.runner import Cell, Options, Place


PAPER = "2502.09245"
ACCEPTS = ()
UNITS = {
    "gap": "nats per token above the grammar's entropy, held-out stories",
    "entropy": "nats per token of the grammar",
    "nll": "nats per token of held-out stories, given the prompt",
    "parsed": "share of stories sampled at temperature 1",
    "parsed_greedy": "share of greedy stories",
    "word_problems": "share right, operand pairs that training never saw",
    "word_problems_seen": "share right, operand pairs of training",
    "sums": "share right, operand pairs that training never saw",
    "majority": "share of the commonest answer",
    "tokens_per_cpu_s": "training tokens per CPU second",
}
SHAPE = {
    # wide rather than deep: at 8 x 128 the Llama left some words of a story uncopied for 12,000 steps
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    # names must lie apart to be copied, and side by side to be drawn from 28: with one matrix for both, the held-out
    # loss of a pilot of 1,200 steps was 0.537, with two 0.517
    "tie_word_embeddings": False,
    # at 0.02 queries and keys are so small at this width that a thousand steps pass before names are copied
    "initializer_range": 0.08,
}
VOCABULARY, LENGTH, BATCH = 1024, 160, 6
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# budget -> steps, items that are measured
SIZES = {"smoke": (12, 8), "small": (7_000, 200), "full": (80_000, 1000)}
# metric, split of the operand pairs, kind of the problem
ASKED = (("word_problems", "held_out", "word"), ("word_problems_seen", "train", "word"), ("sums", "held_out", "sum"))
# 2e-3, 4e-3 and 5e-4 learned slower over the first 1,200 steps. What is left after 7,000 (and, tied, after 20,000) is
# a share of 4 % for words that cannot stand there, where many can; without decay of embeddings it may go: not tried
LEARNING_RATE, WEIGHT_DECAY, HELD_OUT_SEED = 1e-3, 0.1, 10_000


def cells(options: Options) -> list[Cell]:
    """The Llama and its twin, for each seed."""
    steps, items = SIZES[options.budget]
    settings = {"steps": steps, "items": items, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    return [Cell(arm, seed, settings) for seed in range(options.seeds or 1) for arm in ("llama", "lime")]


def prepare(options: Options, folder: Path) -> dict[str, Any]:
    """The tokenizer, the same for all cells."""
    from transformers import PreTrainedTokenizerFast

    from trainers.recipes.texts import train_bpe

    if not (folder / "tokenizer.json").is_file():
        rng = random.Random(HELD_OUT_SEED + 1)
        # with the roles, so that "user" and "assistant" are tokens too
        texts = ["\n".join(part for turn in chat(rng) for part in turn.values()) for _ in range(4000)]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_bpe(texts, VOCABULARY, [PAD, START, END]),
            pad_token=PAD,
            eos_token=END,
            additional_special_tokens=[START],
            padding_side="left",
            model_max_length=SHAPE["max_position_embeddings"],
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return {"data": "hf_ext.tasks: stories, word_problems"}


def chat(rng: random.Random) -> list[dict[str, str]]:
    """One training example: a story or a problem with equal chances (a story is about twice as long)."""
    from hf_ext.tasks import stories, word_problems

    if rng.random() < 0.5:
        story = seen_story(rng)
        return stories.messages(story.prompt, story.text)
    problem = word_problems.sample(rng, "train")
    return stories.messages(problem.question, problem.answer)


def seen_story(rng: random.Random) -> Any:
    """A story whose counts use no held-out pair of operands."""
    from hf_ext.tasks import stories

    while uses_held_out(story := stories.sample(rng)):
        pass
    return story


def uses_held_out(story: Any) -> bool:
    """Whether a count of the story adds or takes away a held-out pair."""
    from hf_ext.tasks.word_problems import held_out

    counts = [int(span.value) for span in story.spans if span.latent == "number"]
    return any(held_out(a, abs(b - a)) for a, b in zip(counts, counts[1:], strict=False))


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one arm, round it to bfloat16, save it, and measure it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hf_ext import LimeConfig, LimeForCausalLM
    from hf_ext.lime import lime_param_groups

    tokenizer = AutoTokenizer.from_pretrained(place.shared)
    steps, items = cell.settings["steps"], cell.settings["items"]
    rows = packed(tokenizer, steps * BATCH, cell.seed)
    torch.manual_seed(cell.seed)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    kind = (LlamaConfig, LlamaForCausalLM) if cell.arm == "llama" else (LimeConfig, LimeForCausalLM)
    model = kind[1](kind[0](vocab_size=len(tokenizer), **SHAPE, **tokens))
    with torch.no_grad():  # else what layers write at first drowns the embeddings, and nothing is copied for long
        model.model.embed_tokens.weight.mul_(3)
        layers: Any = model.model.layers
        for layer in layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    held_out = stories_of(tokenizer, items, HELD_OUT_SEED)
    log, speed = fit(
        model,
        rows,
        place,
        steps=steps,
        batch_size=BATCH,
        groups=lime_param_groups(model, lr=cell.settings["lr"], weight_decay=cell.settings["weight_decay"]),
        seed=cell.seed,
        schedule="cosine",
        warmup=max(1, steps // 20),
        evaluate=lambda model: {"nll": mean(nll(model, held_out[:64], batch_size=16))},
        every=max(1, steps // 10),
        save_every=max(1, steps // 5),
        share=0.9,
    )
    model.to(torch.bfloat16).save_pretrained(place.folder / "model")
    tokenizer.save_pretrained(place.folder / "model")
    model.to(torch.float32).eval()
    with torch.no_grad():
        measured = measure(model, tokenizer, held_out, items)
    remove_checkpoints(place.folder)
    return {
        "params_trained": sum(p.numel() for p in model.parameters()),
        "tokens": sum(int((row["input_ids"] != tokenizer.pad_token_id).sum()) for row in rows),
        "series": {name: [round(entry[name], 5) for entry in log] for name in ("step", "nll")} | measured["series"],
        "metrics": measured["metrics"],
        "samples": measured["samples"],
        "cost": {"tokens_per_cpu_s": speed},
    }


def packed(tokenizer: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """
    `count` rows of whole chats, packed until hardly any padding is left; labels are the answers.

    Positions start anew with each chat, by which it sees no other one. No chat is cut: what is copied is always there.
    """
    import torch

    from hf_ext.tasks import stories

    rng = random.Random(seed)
    pad = tokenizer.pad_token_id
    rows: list[tuple[list[int], list[int], list[int]]] = []
    while len(rows) < count:
        chats = [chat(rng) for _ in range(1000)]
        asked = [stories.messages(messages[0]["content"]) for messages in chats]
        texts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        answers = tokenizer([messages[1]["content"] + END for messages in chats])["input_ids"]
        pairs = zip(tokenizer(texts)["input_ids"], answers, strict=True)
        # the longest first, each into the fullest row that has room: almost no padding
        filled: list[tuple[list[int], list[int], list[int]]] = []
        for prompt, answer in sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1])):
            size = len(prompt) + len(answer)
            room = [row for row in filled if len(row[0]) + size <= LENGTH]
            row = max(room, key=lambda row: len(row[0]), default=([], [], []))
            if not room:
                filled.append(row)
            ids, places, labels = row
            ids += prompt + answer
            places += range(size)
            labels += [-100] * len(prompt) + answer
        rng.shuffle(filled)
        rows += filled
    found = []
    for ids, places, labels in rows[:count]:
        left = LENGTH - len(ids)
        parts = {
            "input_ids": ids + [pad] * left,
            "position_ids": [*places, *range(left)],
            "labels": labels + [-100] * left,
        }
        found.append({name: torch.tensor(part) for name, part in parts.items()})
    return found


def stories_of(tokenizer: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """Held-out stories as rows, padded on the right, whose labels are the answers; with their log probability."""
    import torch

    from hf_ext.tasks import stories

    rng, rows = random.Random(seed), []
    for _ in range(count):
        story = seen_story(rng)
        asked = tokenizer.apply_chat_template(
            stories.messages(story.prompt), tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(asked)["input_ids"]
        ids = prompt + tokenizer(story.text + END)["input_ids"]
        row = torch.full((LENGTH,), tokenizer.pad_token_id)
        row[: len(ids)] = torch.tensor(ids)
        labels = torch.full((LENGTH,), -100)
        labels[len(prompt) : len(ids)] = row[len(prompt) : len(ids)]
        rows.append({"input_ids": row, "labels": labels, "log_prob": story.log_prob - story.prompt_log_prob})
    return rows


def measure(model: Any, tokenizer: Any, held_out: list[dict[str, Any]], items: int) -> dict[str, Any]:
    """Everything but the training curve; the figures of single items are kept, for their intervals."""
    import math

    from hf_ext.tasks import stories, word_problems

    rng = random.Random(HELD_OUT_SEED + 2)
    passed = sum(not uses_held_out(stories.sample(rng)) for _ in range(20_000)) / 20_000
    lengths = [int((row["labels"] != -100).sum()) for row in held_out]
    losses = [loss * n for loss, n in zip(nll(model, held_out, batch_size=16), lengths, strict=True)]
    # per story: nats above -log p(story | prompt, no held-out pair), divided by the mean length
    typical = mean(lengths)
    exact = [-row["log_prob"] + math.log(passed) for row in held_out]
    gaps = [(loss - least) / typical for loss, least in zip(losses, exact, strict=True)]

    prompts = [row["prompt"] for row in stories.dataset(items, seed=HELD_OUT_SEED + 3)]
    texts = write(model, tokenizer, prompts, max_new_tokens=160, do_sample=True)
    parsed = [float(parses(prompt[0]["content"], text)) for prompt, text in zip(prompts, texts, strict=True)]
    greedy = write(model, tokenizer, prompts, max_new_tokens=160)
    parsed_greedy = [float(parses(prompt[0]["content"], text)) for prompt, text in zip(prompts, greedy, strict=True)]
    answers: dict[str, list[float]] = {}
    shares = {}
    for name, split, kind in ASKED:
        problems = word_problems.dataset(items, seed=HELD_OUT_SEED + 4, split=split, kind=kind)
        written = write(model, tokenizer, [row["prompt"] for row in problems], max_new_tokens=6)
        answers[name] = [float(word_problems.correct(t, r["answer"])) for t, r in zip(written, problems, strict=True)]
        shares[name] = word_problems.majority_answer(problems)[1]
    metrics = {
        "nll": sum(losses) / sum(lengths),
        "entropy": sum(exact) / sum(lengths),
        "gap": mean(gaps),
        "parsed": mean(parsed),
        "parsed_greedy": mean(parsed_greedy),
        **{name: mean(values) for name, values in answers.items()},
        "majority": shares["word_problems"],
    }
    series = {"gap": [round(gap, 5) for gap in gaps], "parsed": parsed, **answers}
    samples = [[p[0]["content"], text] for p, text in zip(prompts[:10], texts[:10], strict=True)]
    return {"metrics": metrics, "series": series, "samples": samples}


def write(model: Any, tokenizer: Any, prompts: list[list[dict[str, str]]], **options: Any) -> list[str]:
    """The model's answers; greedy, or with `do_sample` from its own distribution."""
    import torch

    if options.get("do_sample"):
        torch.manual_seed(HELD_OUT_SEED)
        options |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    found: list[str] = []
    for start in range(0, len(prompts), 50):
        asked = tokenizer.apply_chat_template(
            prompts[start : start + 50],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        kept = {name: asked[name] for name in ("input_ids", "attention_mask")}
        out = model.generate(**kept, **options)[:, asked["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(out, skip_special_tokens=True)
    return found


def parses(prompt: str, text: str) -> bool:
    """Whether the grammar could have answered so."""
    from hf_ext.tasks import stories

    try:
        stories.parse(prompt, text)
    except ValueError:
        return False
    return True


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def claims(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of seed 0, which is what is bundled; intervals are bootstraps over items."""
    found = []
    for arm, name in (("llama", "stories"), ("lime", "stories_lime")):
        cell = next((c for c in cells if (c["arm"], c["seed"], c["status"]) == (arm, 0, "done")), None)
        for id, statement, metric, threshold, side in (
            ("parse", "Stories sampled at temperature 1 are of the grammar.", "parsed", 0.9, "above"),
            (
                "adds",
                "It solves word problems with operand pairs that training never saw.",
                "word_problems",
                0.6,
                "above",
            ),
            ("entropy", "Its loss on held-out stories is close to the grammar's entropy.", "gap", 0.1, "below"),
        ):
            note = f"Bootstrap over {len(cell['series'][metric])} items." if cell else ""
            if cell and id == "adds":
                note += f" Always saying the commonest answer: {cell['metrics']['majority']:.2f}."
            found.append(
                statistics.claim(
                    f"{name}_{id}",
                    paper=PAPER,
                    statement=statement,
                    statistic=f"{metric} of {arm}-0, {UNITS[metric]}",
                    found=statistics.bootstrap(cell["series"][metric]) if cell else None,
                    threshold=threshold,
                    side=side,  # type: ignore[arg-type]
                    note=note,
                )
            )
    return found


def plot(result: dict[str, Any], figure: Any) -> None:
    """Held-out loss along the way, above the grammar's entropy."""
    axis = figure.subplots()
    for cell in result["cells"]:
        if cell["status"] == "done":
            axis.plot(cell["series"]["step"], cell["series"]["nll"], marker="o", label=f"{cell['arm']}-{cell['seed']}")
            entropy = cell["metrics"]["entropy"]
    axis.axhline(entropy, color="#666666", ls="--", label="the grammar's entropy")
    axis.set(xlabel="step", ylabel="held-out stories, nats per token", yscale="log")
    axis.legend()
