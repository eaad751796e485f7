"""Run a recipe's cells as one-thread processes, a few at a time, and write what they found as one JSON.

- A cell is (arm, seed, settings). Its folder is named by these and by what all cells share (the corpus's checksum, the
  model), so it is found again by the next run: finished cells are never repeated, failed ones are tried again.
- A cell that was killed goes on from its last checkpoint; what it measures is the same, costs aside.
- A cell holds its folder's lock while it runs, and ends when its parent is gone: a run that was killed and started
  again at once never has two processes at one cell.
- The result is written to a temporary name and moved: an old result stays whole until the new one is.
"""

import errno
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


SCHEMA = 1
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
    """Where a cell works: its own folder (checkpoints), the folder that all cells share, and how far it is."""

    folder: Path
    shared: Path
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
        spec = {"arm": cell.arm, "seed": cell.seed, "settings": cell.settings}
        write(folder / "spec.json", {"recipe": name, "shared": str(shared), **spec})
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


def run_cell(recipe: ModuleType, folder: Path) -> None:
    """The process of one cell: measure, and leave `cell.json`."""
    import torch
    from filelock import FileLock

    parent, written = os.getppid(), 0.0
    wall, cpu = time.perf_counter(), time.process_time()

    def spent() -> dict[str, float]:
        now = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        return {name: round(earlier.get(name, 0) + value, 1) for name, value in now.items()}

    def progress(share: float) -> None:
        nonlocal written
        if time.perf_counter() - written < 1:
            return
        if os.getppid() != parent:
            raise SystemExit("The run that started this cell is gone.")
        written = time.perf_counter()
        write(folder / "progress.json", {"share": share, **spent()})

    torch.set_num_threads(1)
    with FileLock(folder / "lock"):
        if is_done(folder):
            return
        before = folder / "progress.json"
        earlier = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
        spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
        cell = Cell(spec["arm"], spec["seed"], spec["settings"])
        head: dict[str, Any] = {"arm": cell.arm, "seed": cell.seed, "settings": cell.settings, "commit": commit()}
        try:
            found = recipe.run(cell, Place(folder, Path(spec["shared"]), progress))
            check_finite(found["metrics"])
            head |= {"status": "done", **found}
        except Exception as error:  # the run goes on with the other cells, and the result says which failed and why
            import traceback

            traceback.print_exc()
            head |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
            head |= {"params_trained": 0, "metrics": {}, "tokens": 0}
        cost = {
            "tokens": head.pop("tokens"),
            "completions": head.pop("completions", 0),
            **spent(),
            "peak_rss": peak_rss(),
            **head.pop("cost", {}),
        }
        write(folder / "cell.json", {**head, "cost": cost})


def collect(
    recipe: ModuleType, name: str, options: Options, facts: dict[str, Any], cells: list[dict[str, Any]]
) -> dict[str, Any]:
    """All cells as one result: a row for each arm and metric, and the claims."""
    import torch
    import transformers

    from trainers.recipes.statistics import mean_interval

    rows = []
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        done = [c for c in cells if c["arm"] == arm and c["status"] == "done"]
        for metric in dict.fromkeys(metric for c in done for metric in (*c["metrics"], *c["cost"])):
            if metric not in recipe.UNITS:
                continue
            values = [(c["metrics"] | c["cost"])[metric] for c in done]
            mean, ci95 = mean_interval(values)
            row = {"arm": arm, "metric": metric, "unit": recipe.UNITS[metric], "n": len(values)}
            rows.append({**row, "mean": round(mean, 5), "ci95": [x if x is None else round(x, 5) for x in ci95]})
    return {
        "schema": SCHEMA,
        "recipe": name,
        "command": command_of(name, options),
        "commit": commit(),
        "date": date.today().isoformat(),
        "budget": options.budget,
        "device": f"{platform.machine()} CPU, one thread a cell",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **facts,
        "cells": cells,
        "rows": rows,
        "claims": recipe.claims(cells),
    }


def command_of(name: str, options: Options) -> str:
    """The command as a user would type it: files by their bare names, since folders are somebody's machine."""
    text = f"python -m trainers.recipes {name} --budget {options.budget}"
    if options.seeds is not None:
        text += f" --seeds {options.seeds}"
    if options.model is not None:
        text += f" --model {Path(options.model).name if Path(options.model).exists() else options.model}"
    for i, place in enumerate(options.text):
        text += " --text " * (i == 0) + " " * (i > 0) + (Path(place).name if Path(place).exists() else place)
    return text


def read(path: Path) -> dict[str, Any] | None:
    """A result, None where there is none yet; refuses what another version of the runner wrote."""
    if not path.exists():
        return None
    cure = "Move it away, or write elsewhere with --out."
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The results file must be JSON, got {path} ({error}). {cure}") from error
    found = result.get("schema") if isinstance(result, dict) else None
    if found != SCHEMA:
        raise ValueError(f"The results file must be of schema {SCHEMA}, got {path} of schema {found!r}. {cure}")
    return result


def write(path: Path, value: dict[str, Any]) -> None:
    """JSON, all or nothing."""
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        cure = "Make room or name another place with --out, and run again: finished cells are kept."
        raise OSError(f"{path} could not be written: {why}; what it held before is intact. {cure}") from error


def is_done(folder: Path) -> bool:
    """Whether the cell has ended well."""
    file = folder / "cell.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["status"] == "done"


def progress_of(folder: Path) -> float:
    if (folder / "cell.json").is_file():
        return 1.0
    file = folder / "progress.json"
    return json.loads(file.read_text(encoding="utf-8"))["share"] if file.is_file() else 0.0


def peak_rss() -> int:
    """Bytes that this process has held at most; getrusage's figure is its parent's, where that is more."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def commit() -> str:
    """The checkout's commit, empty where there is none."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def check_finite(metrics: dict[str, float]) -> None:
    """A result holds numbers only: NaN and infinity are a cell's failure."""
    bad = {name: value for name, value in metrics.items() if not -float("inf") < value < float("inf")}
    if bad:
        raise FloatingPointError(f"The metrics must be finite, got {bad}. Lower the learning rate or check the data.")
