"""Run a recipe's cells as one-thread processes, a few at a time, and write what they found as one JSON.

- A cell is (arm, seed, settings). Its folder is named by these and by what all cells share (the corpus's checksum, the
  model), so it is found again by the next run: finished cells are never repeated, failed ones are tried again.
- A cell that was killed goes on from its last checkpoint; what it measures is the same, costs aside.
- A cell holds its folder's lock while it runs, and ends when its parent is gone: a run that was killed and started
  again at once never has two processes at one cell.
- The result is written to a temporary name and moved: an old result stays whole until the new one is.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from trainers.recipes.results import collect, read, write


BUDGETS = ("smoke", "small", "full")


class Cell(NamedTuple):
    """One run: `weight` is its expected cost beside the others', for the progress bar."""

    arm: str
    seed: int
    settings: dict[str, Any]
    weight: float = 1.0


@dataclass(frozen=True)
class Options:
    """What the command line said; `text` holds one or two files, or a Hub id."""

    budget: str = "small"
    seeds: int | None = None
    model: str | None = None
    text: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a cell works: its folder (checkpoints), what `prepare` left for all, the options, and how far it is."""

    folder: Path
    shared: Path
    facts: dict[str, Any]
    options: Options
    progress: Callable[[float], None]


class Skip(Exception):
    """A recipe that cannot run here, in a sentence (its text is absent); no failure."""


def run(recipe: ModuleType, name: str, options: Options, *, work: Path, out: Path, jobs: int = 2) -> dict[str, Any]:
    """
    Run what is not yet done, two cells at a time, and write `out`.

    Args:
        recipe (module): See `trainers.recipes`.
        name (`str`): The recipe's name.
        options ([`Options`]): Budget, seeds, model, text.
        work (`Path`): Folder of the cells.
        out (`Path`): The result's file; one of another schema is left alone.
        jobs (`int`, *optional*, defaults to 2): Cells at a time, of one thread each.

    Returns:
        The result, as written.

    Raises:
        ValueError: for options that the recipe cannot use, or an `out` that another version wrote.
        OSError: where the result cannot be written; the old one is intact.
        Skip: where what the recipe needs is absent.
    """
    read(out)  # another schema is refused before hours are spent
    cells = recipe.cells(options)
    shared = work / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    facts = recipe.prepare(options, shared) if hasattr(recipe, "prepare") else {}
    folders = [work / "cells" / identity(cell, facts) for cell in cells]
    for cell, folder in zip(cells, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        spec = {"recipe": name, "arm": cell.arm, "seed": cell.seed, "settings": cell.settings}
        spec |= {"shared": str(shared), "facts": facts, "options": asdict(options)}
        write(folder / "spec.json", spec)
    run_cells(name, cells, folders, jobs)
    done = [json.loads((folder / "cell.json").read_text(encoding="utf-8")) for folder in folders]
    result = collect(recipe, name, options, facts, done)
    write(out, result)
    return result


def identity(cell: Cell, facts: dict[str, Any]) -> str:
    """The cell's folder: arm, seed, and a hash of all that decides what it computes."""
    text = json.dumps([cell.arm, cell.seed, cell.settings, facts], sort_keys=True)
    return f"{cell.arm}-{cell.seed}-{sha256(text.encode()).hexdigest()[:10]}"


def run_cells(name: str, cells: list[Cell], folders: list[Path], jobs: int) -> None:
    """Start the cells that are not done, `jobs` at a time, with a bar that says what time is left."""
    from tqdm import tqdm

    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM"), "1")
    waiting = [i for i, folder in enumerate(folders) if not is_done(folder)]
    running: dict[int, subprocess.Popen] = {}
    for at in waiting:  # failed before: tried again
        (folders[at] / "cell.json").unlink(missing_ok=True)

    def covered() -> float:
        return round(sum(cell.weight * progress_of(folder) for cell, folder in zip(cells, folders, strict=True)), 3)

    total = round(sum(cell.weight for cell in cells), 3)
    pause = 0.5 if sys.stderr.isatty() else 30  # a log needs fewer lines than a terminal
    bar = tqdm(total=total, initial=covered(), desc=name, bar_format=BAR, mininterval=pause, miniters=0)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                at = waiting.pop(0)
                command = [sys.executable, "-m", "trainers.recipes", "--cell", str(folders[at])]
                with (folders[at] / "log.txt").open("a") as log:
                    running[at] = subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **one_thread}
                    )
            for at, process in list(running.items()):
                if process.poll() is not None:
                    del running[at]
                    if process.returncode and not (folders[at] / "cell.json").is_file():
                        raise RuntimeError(f"A cell was killed; run again to go on. See {folders[at] / 'log.txt'}.")
            bar.set_postfix_str(", ".join(f"{cells[at].arm}-{cells[at].seed}" for at in running), refresh=False)
            bar.update(covered() - bar.n)
            time.sleep(0.2)
        bar.update(bar.total - bar.n)
    finally:
        bar.close()
        for process in running.values():  # stopped by the user: checkpoints are there
            process.terminate()
        for process in running.values():
            process.wait()


BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {elapsed} passed, {remaining} left  {postfix}"


def is_done(folder: Path) -> bool:
    """Whether the cell has ended well."""
    file = folder / "cell.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["status"] == "done"


def progress_of(folder: Path) -> float:
    if (folder / "cell.json").is_file():
        return 1.0
    file = folder / "progress.json"
    return json.loads(file.read_text(encoding="utf-8"))["share"] if file.is_file() else 0.0
