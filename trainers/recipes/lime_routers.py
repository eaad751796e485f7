"""Are LIMe's routers worth training alone, on a converted pretrained model? Two arms of as many numbers each.

- `routers`: all R_l of the converted model (4,176 for SmolLM2). `gains`: as many other scalars in the same layers,
  each a gain on a block of neighbouring channels of the attention's normed input. Both start as the unchanged model.
- 61,440 tokens, one pass, batches of 2 x 256, AdamW, cosine schedule; 3 seeds draw their own training rows; the
  held-out rows, of other texts, are the same for all.
- Each arm has the learning rate that did best in `LEARNING_RATES` (SmolLM2, one seed and held-out rows that are not
  reported, a third of the budget; the paper's 1e-2 for routers did worse than 3e-3).
- Each cell of `routers` leaves them as `routers.safetensors` in its folder; the package ships those of seed 0.
"""

from pathlib import Path
from typing import Any

from trainers.recipes import statistics, texts
from trainers.recipes.fit import fit, nll, remove_checkpoints
from trainers.recipes.runner import Cell, Options, Place


PAPER = "2502.09245"
ACCEPTS = ("model", "text")
DEFAULT_MODEL, DEFAULT_TEXT = "smollm2", "roneneldan/TinyStories"
UNITS = {
    "nll_before": "nats per token of held-out texts",
    "nll": "nats per token of held-out texts",
    "drop": "nats per token of held-out texts",
    "tokens_per_cpu_s": "training tokens per CPU second",
}
LENGTH, BATCH = 256, 2
# arm -> learning rate -> held-out loss after 20,480 tokens of another seed (3.6825 before)
LEARNING_RATES = {
    "routers": {1e-3: 3.6136, 3e-3: 3.5814, 1e-2: 3.6061, 3e-2: 3.8175},
    "gains": {3e-3: 3.6321, 1e-2: 3.5891, 3e-2: 3.5618, 1e-1: 3.619},
}
# budget -> rows to train on, rows held out
SIZES = {"smoke": (4, 4), "small": (240, 64), "full": (4000, 256)}


def cells(options: Options) -> list[Cell]:
    """Both arms of a seed side by side; a model that cannot become a LIMe is refused before its weights load."""
    from transformers import AutoConfig

    from hf_ext import tiny
    from hf_ext.lime import LimeConfig

    LimeConfig.from_llama_config(AutoConfig.from_pretrained(tiny.path(options.model or DEFAULT_MODEL)))
    rows, held_out = SIZES[options.budget]
    found = []
    for seed in range(options.seeds or (1 if options.budget == "smoke" else 3)):
        for arm, rates in LEARNING_RATES.items():
            _, lr = min((loss, lr) for lr, loss in rates.items())
            found.append(Cell(arm, seed, {"rows": rows, "held_out": held_out, "lr": lr}))
    return found


def prepare(options: Options, folder: Path) -> dict[str, Any]:
    """Token ids of the texts, by the model's tokenizer."""
    from transformers import AutoTokenizer

    from hf_ext import tiny

    model = options.model or DEFAULT_MODEL
    rows, held_out = SIZES[options.budget]
    train, valid, corpus = texts.load(options.text, DEFAULT_TEXT, characters=30 * LENGTH * rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny.path(model))
    facts = {"model": Path(model).name if Path(model).exists() else model, **corpus}
    file = tokens_of(folder, facts)
    # a few times what is needed, so that seeds differ
    train, valid = train[: 20 * rows], valid[: 20 * held_out]
    texts.save_tokens(file, lambda part: tokenizer(part)["input_ids"], tokenizer.eos_token_id, train, valid)
    texts.check_tokens(file, {"train": LENGTH * rows, "held_out": LENGTH * held_out}, options.budget)
    return facts


def tokens_of(folder: Path, facts: dict[str, Any]) -> Path:
    """The tokens of this corpus by this model's tokenizer."""
    return folder / f"{facts['model'].replace('/', '--')}-{facts['data_sha256'][:12]}.safetensors"


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one arm with one seed."""
    import torch
    from safetensors.torch import save_file

    from hf_ext import tiny
    from hf_ext.lime import LimeForCausalLM, lime_param_groups

    rows = cell.settings["rows"]
    file = tokens_of(place.shared, place.facts)
    train = texts.rows(file, "train", rows, LENGTH, cell.seed)
    valid = texts.rows(file, "held_out", cell.settings["held_out"], LENGTH, 0)
    held_out = [{"input_ids": row, "labels": row} for row in valid]
    lime: Any = LimeForCausalLM.from_llama(tiny.load(place.options.model or DEFAULT_MODEL, dtype="float32")[0])
    lime.requires_grad_(False)
    layers = lime.model.layers[1:]
    numbers = sum(layer.self_attn.router.weight.numel() for layer in layers)
    if cell.arm == "gains":
        gains = add_gains(lime, numbers)
        groups = [{"params": gains, "lr": cell.settings["lr"], "weight_decay": 0.0}]
    else:
        for layer in layers:
            layer.self_attn.router.requires_grad_(True)
        groups = lime_param_groups(lime, router_lr=cell.settings["lr"])
    with torch.no_grad():
        before = nll(lime.eval(), held_out, batch_size=1)
    steps = rows // BATCH
    _, speed = fit(
        lime,
        [{"input_ids": row, "labels": row} for row in train],
        place,
        steps=steps,
        batch_size=BATCH,
        groups=groups,
        seed=cell.seed,
        schedule="cosine",
        warmup=max(1, steps // 10),
        save_every=max(1, steps // 4),
        share=0.9,
    )
    with torch.no_grad():
        after = nll(lime.eval(), held_out, batch_size=1)
    if cell.arm == "routers":
        state = {name: p.contiguous() for name, p in lime.state_dict().items() if ".router." in name}
        save_file(state, place.folder / "routers.safetensors", metadata={"format": "pt"})
    remove_checkpoints(place.folder)
    means = {"nll_before": sum(before) / len(before), "nll": sum(after) / len(after)}
    return {
        "params_trained": sum(p.numel() for p in lime.parameters() if p.requires_grad),
        "tokens": steps * BATCH * LENGTH,
        "metrics": {**means, "drop": means["nll_before"] - means["nll"]},
        "cost": {"tokens_per_cpu_s": speed},
    }


def add_gains(model: Any, numbers: int) -> list[Any]:
    """`numbers` scalars in the layers after the first: each scales a block of the attention's input by 1 + gain."""
    import torch

    layers, width = model.model.layers[1:], model.config.hidden_size
    gains = []
    for at, layer in enumerate(layers):
        # the layers share the numbers out, the first ones getting one more where they do not divide
        count = numbers // len(layers) + (at < numbers % len(layers))
        block = torch.arange(width) * count // width
        gain = torch.nn.Parameter(torch.zeros(count))
        layer.self_attn.gain = gain
        layer.input_layernorm.register_forward_hook(
            lambda module, args, out, gain=gain, block=block: out * (1 + gain)[block].to(out.dtype)
        )
        gains.append(gain)
    return gains


def claims(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The threshold, 0, was set before the run."""
    ours, theirs = statistics.by_seed(cells, "drop", "routers", "gains")
    return [
        statistics.claim(
            "lime_routers_beat_gains",
            paper=PAPER,
            statement="Routers alone lower the held-out loss of a converted model more than as many other scalars.",
            statistic="drop of routers minus drop of gains, paired by seed, nats per token",
            found=statistics.paired_interval(ours, theirs) if ours else None,
            threshold=0.0,
            side="above",
            note=f"Student's t, n = {len(ours)}. The paper trains from scratch and does not report it.",
        )
    ]
