"""One autoencoder for every sparsity? HierarchicalTopK beside TopK specialists, on SmolLM2 and a model of known facts.

- All learn the residual stream after the middle layer from one cache of story tokens: 0.8 M samples in batches of
  2048, F = 4096, K = 64, Adam at 1e-3, AuxK; scale and b_dec from the first batch. `hierarchical` takes budgets 1, 2,
  4, ..., 64; `hierarchical_full` 1..64, as in the paper. `topk_8`, ... are specialists; `multi_topk` learns at 16 and
  64; `matryoshka` nests prefixes of the dictionary.
- Explained variance (`ev_global`) is over rows of held-out texts, at every k' = 1..64; specialists are asked for more
  latents than they were trained with, too. Beside it: cross-entropy with the stream replaced, dead latents of the
  held-out tokens, and detection scores (`hf_ext.sae.interpretability`).
- Baselines: `random`, an autoencoder as initialised; `frozen_decoder`, `hierarchical` whose decoder stays random;
  `pca`, k' directions for all tokens.
- `known_*`: the same on the bundled story model, whose grammar says who, where, what, how many, which event and which
  mood hold at each token: F1 of the best latent for each of these. Left out while the package has no such model.
- A cell saves its autoencoder in its folder, `sae`. `small` takes about 80 minutes of one core, the harvest included.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from trainers.recipes import texts
from trainers.recipes.runner import Cell, Options, Place
from trainers.recipes.sae_activations import (
    checksum,
    harvest_stories,
    harvest_texts,
    held_out_file,
    hook_of,
    stories_model,
)
from trainers.recipes.sae_figures import (
    interpretability_figures,
    known_latent_figures,
    language_figures,
    powers,
    reconstruction_figures,
    units,
)


PAPER = "2505.24473"
ACCEPTS = ("model", "text")
DEFAULT_MODEL, DEFAULT_TEXT = "smollm2", "roneneldan/TinyStories"
LEARNING_RATE = 1e-3
CURVE_TOKENS = 2**15  # held-out tokens of explained variance; detection reads all rows


class Size(NamedTuple):
    """
    Of a budget. `documents` are read for the cross-entropy; `latents` are scored that have `least` contexts; `known_`
    is of the story model.
    """

    d_sae: int
    k: int
    samples: int
    batch: int
    cache: int
    rows: int
    documents: int
    latents: int
    least: int
    known_d_sae: int
    known_samples: int
    known_cache: int
    known_test: int


SIZES = {
    "smoke": Size(128, 8, 8 * 256, 256, 2048, 12, 2, 4, 2, 128, 4 * 256, 1024, 1024),
    "small": Size(4096, 64, 390 * 2048, 2048, 1_048_576, 512, 12, 100, 16, 2048, 240 * 2048, 400_000, 60_000),
    "full": Size(16384, 64, 5000 * 2048, 2048, 4_194_304, 2048, 64, 400, 16, 4096, 1000 * 2048, 1_000_000, 200_000),
}
# set before any run
MATCH, TRUNCATED, DETECTION, KNOWN = 0.01, 0.15, -0.02, -0.02


UNITS = units(64)


def cells(options: Options) -> list[Cell]:
    """Of each arm as many seeds as the claims need, those that claims compare first; at smoke one arm of each kind."""
    from tqdm import tqdm
    from transformers import AutoConfig

    from hf_ext import tiny

    AutoConfig.from_pretrained(tiny.path(options.model or DEFAULT_MODEL))
    size, most = SIZES[options.budget], options.seeds or (1 if options.budget == "smoke" else 3)
    k = size.k
    shared: dict[str, Any] = {"d_sae": size.d_sae, "most": k, "batch": size.batch, "lr": LEARNING_RATE}
    shared |= {"documents": size.documents, "latents": size.latents, "least": size.least}
    # arm -> loss, k, seeds, expected cost
    arms: dict[str, tuple[str, int, int, float]] = {
        "hierarchical": ("powers_of_two", k, 3, 1.2),
        f"topk_{k // 8}": ("reconstruction", k // 8, 3, 1.0),
        f"topk_{k}": ("reconstruction", k, 3, 1.1),
        "hierarchical_full": ("full", k, 2, 3.0),
        f"topk_{k // 4}": ("reconstruction", k // 4, 1, 1.0),
        f"topk_{k // 2}": ("reconstruction", k // 2, 1, 1.0),
        "matryoshka": ("matryoshka", k, 1, 1.2),
        "multi_topk": ("multi_topk", k, 1, 1.1),
        "frozen_decoder": ("powers_of_two", k, 1, 1.0),
        "random": ("none", k, 1, 0.5),
        "pca": ("none", k, 1, 0.1),
    }
    if options.budget == "smoke":
        arms = {arm: arms[arm] for arm in ("hierarchical", f"topk_{k}", "matryoshka", "pca")}
    found = [
        Cell(arm, seed, {**shared, "loss": loss, "k": own, "samples": size.samples}, weight)
        for arm, (loss, own, seeds, weight) in arms.items()
        for seed in range(min(seeds, most))
    ]
    folder = stories_model()
    if folder is None:
        tqdm.write("The arms on the bundled story model are left out: the package has no such model.", file=sys.stderr)
        return found
    shared |= {"d_sae": size.known_d_sae, "model": checksum(folder), "samples": size.known_samples}
    known: list[tuple[str, str, int]] = [("known_hierarchical", "powers_of_two", k)]
    known += [(f"known_topk_{own}", "reconstruction", own) for own in (k // 8, k)]
    return found + [
        Cell(arm, seed, {**shared, "loss": loss, "k": own}, 0.3)
        for arm, loss, own in known[: 1 if options.budget == "smoke" else 3]
        for seed in range(min(3, most))
    ]


def prepare(options: Options, folder: Path) -> dict[str, Any]:
    """The cache of activations, and held-out rows."""
    model, size = options.model or DEFAULT_MODEL, SIZES[options.budget]
    # about 4 characters a token; twice that, since some tokens are left out
    train, held_out, corpus = texts.load(options.text, DEFAULT_TEXT, characters=8 * size.cache)
    facts: dict[str, Any] = {"model": Path(model).name if Path(model).exists() else model, **corpus}
    hook = hook_of(model)
    facts |= {"hook": ".".join(hook), "cache_tokens": size.cache}
    harvest_texts(model, hook, train, held_out, cache_of(folder, facts), size.cache, size.rows)
    known = stories_model()
    if known is not None:
        harvest_stories(known, known_file(folder, checksum(known)), size.known_cache, size.known_test)
    return facts


def cache_of(folder: Path, facts: dict[str, Any]) -> Path:
    """The activations of this model on these texts."""
    return folder / f"{facts['model'].replace('/', '--')}-{facts['data_sha256'][:12]}"


def known_file(folder: Path, model: str) -> Path:
    return folder / f"stories-{model}.safetensors"


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one autoencoder and measure it."""
    known = cell.arm.startswith("known_")
    if cell.arm == "pca":
        return _pca(cell, place)
    sae, speed = trained(cell, place)
    sae.save_pretrained(place.folder / "sae")
    params = sum(p.numel() for p in sae.parameters() if p.requires_grad) if cell.settings["loss"] != "none" else 0
    own, most = cell.settings["k"], cell.settings["most"]
    budgets = [most // 8, most]
    if known:
        from safetensors import safe_open

        file = known_file(place.shared, cell.settings["model"])
        with safe_open(file, framework="pt") as content:
            x = content.get_tensor("test").float()
        metrics, curve = reconstruction_figures(sae, x, own, most)
        figures, series = known_latent_figures(sae, file, budgets)
        metrics |= figures
    else:
        ids, x, kept = _held_out(place)
        metrics, curve = reconstruction_figures(sae, x[kept][:CURVE_TOKENS], own, most)
        place.progress(0.7)
        figures, series = interpretability_figures(sae, x, kept, ids, budgets, cell.settings)
        place.progress(0.85)
        model = place.options.model or DEFAULT_MODEL
        metrics |= figures | language_figures(sae, model, ids[: cell.settings["documents"]], budgets)
    trained_on = cell.settings["samples"] if params else 0
    return {
        "params_trained": params,
        "tokens": trained_on,
        "metrics": metrics,
        "series": {"curve": curve, **series},
        "cost": {"tokens_per_cpu_s": speed} if params else {},
    }


def trained(cell: Cell, place: Place) -> tuple[Any, float]:
    """The autoencoder of a cell, in evaluation mode, and training samples per CPU second."""
    import time

    import torch
    from safetensors.torch import load_file
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    from hf_ext.sae import SAEConfig, SAEModel
    from trainers.recipes.fit import remove_checkpoints
    from trainers.sae import SAETrainer, SAETrainingArguments
    from trainers.sae.cache import ActivationCache

    settings, loss = cell.settings, cell.settings["loss"]
    rows: Any
    if "model" in settings:
        rows = load_file(known_file(place.shared, settings["model"]))["train"]
        hook, width = None, rows.shape[1]
    else:
        rows = ActivationCache(cache_of(place.shared, place.facts))
        hook, _, _ = place.facts["hook"].rpartition(".")
        (width,) = rows.widths().values()
    torch.manual_seed(cell.seed)
    sae: Any = SAEModel(
        SAEConfig(d_in=width, d_sae=settings["d_sae"], k=settings["k"], input_norm="scalar", hook_name=hook)
    )
    if cell.arm == "frozen_decoder":
        sae.W_dec.requires_grad_(False)

    class Watch(TrainerCallback):
        steps, seconds, mark = 0, 0.0, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mark = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds, self.steps = self.seconds + time.process_time() - self.mark, self.steps + 1
            place.progress(0.6 * state.global_step / state.max_steps)

    steps = settings["samples"] // settings["batch"]
    watch, folder = Watch(), place.folder / "trainer"
    by_loss: dict[str, dict[str, Any]] = {
        "powers_of_two": {"loss": "hierarchical", "budgets": "powers_of_two"},
        "full": {"loss": "hierarchical"},
        "matryoshka": {"loss": "matryoshka", "groups": groups(settings["d_sae"])},
        "none": {},
    }
    args = SAETrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings["batch"],
        learning_rate=settings["lr"],
        seed=cell.seed,
        logging_steps=max(1, steps // 10),
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        **by_loss.get(loss, {"loss": loss}),
    )
    trainer = SAETrainer(sae=sae, args=args, train_dataset=rows, callbacks=[watch])
    if loss == "none":
        trainer.begin()  # scale and b_dec, as the others have them
    else:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    remove_checkpoints(place.folder)
    speed = round(watch.steps * settings["batch"] / watch.seconds, 1) if watch.seconds else 0.0
    return sae.eval(), speed


def groups(d_sae: int) -> list[int]:
    """Of Matryoshka: prefixes of 1/16, 1/8, 1/4, 1/2 and all of the dictionary."""
    return [d_sae // 16, d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2]


def _held_out(place: Place) -> tuple[Any, Any, Any]:
    from safetensors.torch import load_file

    content = load_file(held_out_file(cache_of(place.shared, place.facts)))
    return content["input_ids"], content["x"].float(), content["kept"]


def _pca(cell: Cell, place: Place) -> dict[str, Any]:
    from hf_ext.sae.metrics import pca_ev_global

    _, x, kept = _held_out(place)
    most = cell.settings["most"]
    found = pca_ev_global(x[kept][:CURVE_TOKENS], range(1, most + 1))
    metrics = {f"ev_global_at_{k}": found[k] for k in powers(most)}
    curve = [round(value, 5) for value in found.values()]
    return {"params_trained": 0, "tokens": 0, "metrics": metrics, "series": {"curve": curve}}


def claims(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Thresholds were set before the run."""
    from trainers.recipes.sae_claims import all_claims

    return all_claims(cells, PAPER, MATCH, TRUNCATED, DETECTION, KNOWN)


def plot(result: dict[str, Any], figure: Any) -> None:
    """Explained variance over k', seed 0 of each arm; to the right how fast each was learned."""
    real, known = figure.subplots(1, 2)
    for cell in result["cells"]:
        if cell["status"] == "done" and cell["seed"] == 0:
            axis = known if cell["arm"].startswith("known_") else real
            curve = cell["series"]["curve"]
            style = "-" if "hierarchical" in cell["arm"] else ":" if cell["arm"] in ("random", "pca") else "--"
            axis.plot(range(1, len(curve) + 1), curve, style, label=cell["arm"].removeprefix("known_"))
    for axis, name in ((real, result["model"]), (known, "story model, known latents")):
        axis.set(xlabel="k', latents of a token", xscale="log", title=name, ylim=(-0.2, 1))
        if axis.lines:
            axis.legend(fontsize=7)
    real.set_ylabel("explained variance (ev_global), held-out tokens")
