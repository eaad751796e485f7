"""A result's JSON as a Markdown table and as a plot; both need the JSON alone, nothing is computed again."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any


def table(result: dict[str, Any]) -> str:
    """Rows (means with intervals over seeds), then the claims with their verdicts."""
    where = ", ".join(str(result[key]) for key in ("model", "data", "device", "date") if result.get(key))
    lines = [
        f"`{result['command']}` ({where}):",
        "",
        "| arm | metric | n | mean | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        interval = between(row["ci95"])
        lines.append(f"| {row['arm']} | {row['metric']} ({row['unit']}) | {row['n']} | {row['mean']:g} | {interval} |")
    for claim in result["claims"]:
        lines += ["", sentence(claim)]
    return "\n".join(lines)


def sentence(claim: dict[str, Any]) -> str:
    """A claim, what was found, and the verdict."""
    found = "not measured" if claim["estimate"] is None else f"{claim['estimate']:g}, 95 % {between(claim['ci95'])}"
    return (
        f"`{claim['id']}`: {claim['statement']} **{claim['verdict']}**: {claim['statistic']}: {found}, threshold "
        f"{claim['threshold']:g}. {claim['note']}"
    ).strip()


def between(interval: list[float | None]) -> str:
    """An interval in brackets; a dash where one run gives none."""
    return "-" if None in interval else f"[{interval[0]:g}, {interval[1]:g}]"


def plot(recipe: ModuleType, result: dict[str, Any], path: Path) -> None:
    """Let the recipe draw its result, and save it as PNG; nothing where the recipe has no plot."""
    if not hasattr(recipe, "plot"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    recipe.plot(result, figure)
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, format="png", dpi=100)
    os.replace(part, path)
