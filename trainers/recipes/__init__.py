"""Recipes: a paper's headline in miniature, run by one command, with seeds, intervals and a verdict.

    python -m trainers.recipes lime --budget small

A recipe is a module here, listed in `NAMES`. It holds:

- `PAPER`, the arXiv id; `ACCEPTS`, which of the options "model" and "text" it can use; `UNITS`, metric -> unit.
- `cells(options) -> list[Cell]`: what is to be run, in the order of its start. Bad options raise ValueError here.
- `prepare(options, folder) -> dict`: optional; makes what all cells share (a tokenizer, token ids) and returns facts
  for the result (`data`, `model`). Facts are part of a cell's identity.
- `run(cell, place) -> dict`: one cell, in a process of its own; `params_trained`, `tokens`, `metrics` (metric ->
  number) and, where wanted, `completions`, `series` (name -> list of numbers) and `cost` (speeds).
- `claims(cells) -> list[dict]`: made with `statistics.claim`; thresholds stand in the module, before any run.
- `plot(result, figure)`: optional; draws from the result's JSON on a matplotlib figure.
"""

NAMES = (
    "essa",
    "essa_smollm2",
    "lime",
    "lime_routers",
    "sae_hierarchical",
    "steering",
    "steering_smollm2",
    "stories",
)
