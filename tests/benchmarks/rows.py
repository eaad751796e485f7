"""What benchmarks share: sides that take turns, and one row as JSON, the same fields in every file."""

import json
import os
import platform
import statistics
import subprocess
import sys
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


def take_turns(
    script: str, sides: dict[str, list[str]], pairs: int, same: bool, first: dict[str, str] | None = None
) -> dict[str, list[float]]:
    """
    Seconds of each side, taking turns: each is `script --worker ARGUMENTS` in a process of its own, with one thread.

    A worker prints a line, then answers each line of its input by the seconds of one run. With `same` these first
    lines (hashes of what the sides compute) must be equal; `first` is filled with them.
    """
    from tqdm import tqdm

    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = [sys.executable, script, "--worker"]
    started = {
        side: subprocess.Popen([*run, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for side, args in sides.items()
    }
    said = {side: process.stdout.readline() for side, process in started.items()}
    if not all(said.values()):
        raise SystemExit(f"A side has ended: {', '.join(side for side, line in said.items() if not line)}.")
    if first is not None:
        first |= said
    if same and len(set(said.values())) > 1:
        raise SystemExit(f"The sides must have the same output, but {' and '.join(sides)} do not.")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    names = " against ".join(" ".join(Path(arg).name for arg in args) for args in sides.values())
    for i in tqdm(range(pairs), desc=names):
        for side in list(sides) if i % 2 else list(sides)[::-1]:
            started[side].stdin.write("go\n")
            started[side].stdin.flush()
            seconds[side].append(float(started[side].stdout.readline()))
    for process in started.values():
        process.stdin.close()
        process.wait()
    return seconds
