"""One cell in a process of its own: measure, and leave `cell.json`."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from trainers.recipes.results import commit, write
from trainers.recipes.runner import Cell, Options, Place, is_done


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
        options = Options(**spec["options"])
        try:
            found = recipe.run(cell, Place(folder, Path(spec["shared"]), spec["facts"], options, progress))
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


def peak_rss() -> int:
    """Bytes that this process has held at most; getrusage's figure is its parent's, where that is more."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_rss() -> None:
    """From here on `peak_rss` is about what follows, where the system can do that (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def check_finite(metrics: dict[str, float]) -> None:
    """A result holds numbers only: NaN and infinity are a cell's failure."""
    bad = {name: value for name, value in metrics.items() if not -float("inf") < value < float("inf")}
    if bad:
        raise FloatingPointError(f"The metrics must be finite, got {bad}. Lower the learning rate or check the data.")
