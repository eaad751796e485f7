"""Write the tables that documents take from data: the systems from the cards, the figures from the result files.

    python model_cards/render.py            # fills the blocks between <!-- name --> and <!-- /name -->
    python model_cards/render.py --check    # exit code 1 if a block is out of date

Nobody types a number: blocks come from the cards' front matter, model_cards/results and tests/benchmarks/results.

- README has one line for each claim and each benchmark, the same table as results/results.md and results/results.csv.
- A card has what concerns its system in full: recipes that test its paper, benchmarks whose name starts with its key
  (or with what its front matter calls `benchmarks`).
"""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from hf_ext.hub import system_cards
from trainers.recipes import report


ROOT = Path(__file__).resolve().parent.parent
RECIPES, BENCHMARKS = ROOT / "model_cards/results", ROOT / "tests/benchmarks/results"
HEAD = ("id", "estimate", "95 % interval", "threshold", "verdict", "command", "date")


def systems() -> str:
    """README's table of the systems, by key."""
    lines = ["| system | paper | status | classes | what it does |", "|---|---|---|---|---|"]
    for key, card in system_cards().items():
        classes = ", ".join(f"`{name}`" for name in card["classes"])
        paper = f"[{card['arxiv']}](https://arxiv.org/abs/{card['arxiv']})"
        lines.append(
            f"| [{card['title']}](model_cards/{key}.md) | {paper} | {card['status']} | {classes} | {card['summary']} |"
        )
    return "\n".join(lines)


def lines(recipes: list[dict[str, Any]], benchmarks: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line for each claim and each benchmark."""
    found = []
    for result in recipes:
        for claim in result["claims"]:
            estimate = "-" if claim["estimate"] is None else f"{claim['estimate']:g}"
            figures = (
                claim["id"],
                estimate,
                report.between(claim["ci95"]),
                f"{claim['threshold']:g}",
                claim["verdict"],
            )
            found.append((*figures, result["command"], result["date"]))
    for row in benchmarks:
        verdict = "met" if row["ratio"] >= row["goal"] else "missed"
        figures = (row["name"], f"{row['ratio']:g} times its peer", "-", f"{row['goal']:g}", verdict)
        found.append((*figures, row["command"], row["date"]))
    return found


def markdown(found: list[tuple[str, ...]]) -> str:
    text = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for *figures, command, date in found:
        text.append(f"| {' | '.join(figures)} | `{command}` | {date} |")
    return "\n".join(text)


def comma_separated(found: list[tuple[str, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEAD, *found])
    return text.getvalue()


def measured(recipes: list[dict[str, Any]], benchmarks: list[dict[str, Any]]) -> str:
    """Benchmarks and recipes in full, each figure beside its command."""
    parts = []
    if benchmarks:
        parts.append("| benchmark | ours | peer | ratio (above 1: ours is better) | goal | command |")
        parts[-1] += "\n|---|---|---|---|---|---|"
        for row in benchmarks:
            ours, peer = row["ours"], row["peer"]
            parts[-1] += (
                f"\n| {row['name']} ({row['unit']}) | {ours['median']} (IQR {ours['iqr']}) "
                f"| {peer['median']} (IQR {peer['iqr']}), {peer['name']} | {row['ratio']} | {row['goal']} "
                f"| `{row['command']}` |"
            )
        devices = sorted({f"{row['device']}, {row['date']}" for row in benchmarks})
        parts.append(f"Devices: {'; '.join(devices)}. Pairs alternate in one run.")
        parts += [f"`{row['name']}`: {row['note']}" for row in benchmarks if row.get("note")]
        for row in benchmarks:
            if "extra_saved_kv_buffers" in row:
                text = f"`{row['name']}` saves {row['extra_saved_kv_buffers']} KV buffers beyond Llama for backward"
                if "peer_extra_saved_kv_buffers" in row:
                    text += f", the peer {row['peer_extra_saved_kv_buffers']}"
                parts.append(text + " (one buffer: the raw keys and values of all layers).")
    for result in recipes:
        parts.append(report.table(result))
        if (RECIPES / f"{result['recipe']}.png").is_file():
            parts.append(f"![{result['recipe']}: plot of the result](results/{result['recipe']}.png)")
    return "\n\n".join(parts)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def rendered(text: str, name: str, block: str) -> str:
    """`text` with its block `name` replaced by what the data say."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(start)
    return f"{before}{start}{block}\n{end}{rest.partition(end)[2]}" if found else text


def documents() -> dict[Path, str]:
    """Every file that is made from data, whole or in part, as it should be."""
    recipes, benchmarks = read(RECIPES), read(BENCHMARKS)
    found = lines(recipes, benchmarks)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = rendered(rendered(readme, "systems", systems()), "measured", markdown(found))
    files = {
        ROOT / "README.md": readme,
        RECIPES / "results.md": f"# All results\n\n{markdown(found)}\n",
        RECIPES / "results.csv": comma_separated(found),
    }
    for key, card in system_cards().items():
        own = [result for result in recipes if any(claim["paper"] == card["arxiv"] for claim in result["claims"])]
        prefix = f"{card.get('benchmarks', key)}_"
        block = measured(own, [row for row in benchmarks if row["name"].startswith(prefix)])
        path = ROOT / f"model_cards/{key}.md"
        files[path] = rendered(path.read_text(encoding="utf-8"), "measured", block)
    return files


def main() -> None:
    stale = []
    for path, text in documents().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        raise SystemExit(f"Out of date: {', '.join(stale)}. Run: python model_cards/render.py")


if __name__ == "__main__":
    main()
