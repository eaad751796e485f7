"""A recipe's result: collected from its cells, read and written as one JSON, all or nothing."""

import errno
import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainers.recipes.statistics import mean_interval


if TYPE_CHECKING:
    from trainers.recipes.runner import Options

SCHEMA = 1


def collect(
    recipe: ModuleType, name: str, options: "Options", facts: dict[str, Any], cells: list[dict[str, Any]]
) -> dict[str, Any]:
    """All cells as one result: a row for each arm and metric, and the claims."""
    import torch
    import transformers

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


def command_of(name: str, options: "Options") -> str:
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


def commit() -> str:
    """The checkout's commit, empty where there is none."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
