"""One benchmark row as JSON, the same fields in every file."""

import json
import platform
import statistics
import subprocess
from datetime import date
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and interquartile range."""
    quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": round(statistics.median(seconds), 4), "iqr": round(quarters[2] - quarters[0], 4)}


def write(
    name: str, command: str, unit: str, ours: list[float], peer: tuple[str, str, list[float]], goal: float, **more: Any
) -> None:
    """Write and print the row `name`; its ratio is the median over pairs of peer / ours (above 1: ours is better)."""
    import torch

    peer_name, version, theirs = peer
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    row = {
        "name": name,
        "command": command,
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}",
        "unit": unit,
        "ours": summary(ours),
        "peer": {"name": peer_name, "version": version, **summary(theirs)},
        "ratio": round(statistics.median(t / o for o, t in zip(ours, theirs, strict=True)), 4),
        "goal": goal,
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row, indent=2) + "\n")
    part.replace(path)
    print(json.dumps(row, indent=2))
