"""Write the tables that documents take from data: the systems from the cards, the figures from the result files.

    python model_cards/render.py            # fills the blocks between <!-- name --> and <!-- /name -->
    python model_cards/render.py --check    # exit code 1 if a block is out of date

Nobody types a number: blocks come from the cards' front matter, model_cards/results and tests/benchmarks/results.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from hf_ext.hub import system_cards


ROOT = Path(__file__).resolve().parent.parent


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


def measured() -> str:
    """Benchmarks and recipes, each figure beside its command."""
    parts = []
    rows = [read(path) for path in sorted((ROOT / "tests/benchmarks/results").glob("*.json"))]
    if rows:
        parts.append(
            "| benchmark | ours | peer | ratio (above 1: ours is better) | goal | command |\n|---|---|---|---|---|---|"
        )
        for row in rows:
            ours, peer = row["ours"], row["peer"]
            parts[-1] += (
                f"\n| {row['name']} ({row['unit']}) | {ours['median']} (IQR {ours['iqr']}) "
                f"| {peer['median']} (IQR {peer['iqr']}), {peer['name']} | {row['ratio']} | {row['goal']} "
                f"| `{row['command']}` |"
            )
        devices = sorted({f"{row['device']}, {row['date']}" for row in rows})
        parts.append(f"Devices: {'; '.join(devices)}. Pairs alternate in one run.")
        parts += [f"`{row['name']}`: {row['note']}" for row in rows if row.get("note")]
        for row in rows:
            if "extra_saved_kv_buffers" in row:
                text = f"`{row['name']}` saves {row['extra_saved_kv_buffers']} KV buffers beyond Llama for backward"
                if "peer_extra_saved_kv_buffers" in row:
                    text += f", the peer {row['peer_extra_saved_kv_buffers']}"
                parts.append(text + " (one buffer: the raw keys and values of all layers).")
    for path in sorted((ROOT / "model_cards/results").glob("*.json")):
        result = read(path)
        table = "| arm | metric | n | mean | 95 % interval |\n|---|---|---|---|---|"
        for row in result["rows"]:
            table += (
                f"\n| {row['arm']} | {row['metric']} ({row['unit']}) | {row['n']} | {row['mean']} | {row['ci95']} |"
            )
        parts += [
            f"`{result['command']}` ({result['model']}; {result['data']}; {result['device']}; {result['date']}):",
            table,
        ]
        for claim in result["claims"]:
            parts.append(
                f"`{claim['id']}`: {claim['statement']} **{claim['verdict']}**: {claim['statistic']} "
                f"{claim['estimate']}, 95 % interval {claim['ci95']}, threshold {claim['threshold']}. {claim['note']}"
            )
    return "\n\n".join(parts)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def rendered(text: str, blocks: dict[str, str]) -> str:
    """`text` with each of its blocks replaced by what the data say."""
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
    return text


def main() -> None:
    blocks, stale = {"systems": systems(), "measured": measured()}, []
    for path in (ROOT / "README.md", ROOT / "model_cards/lime.md"):
        before = path.read_text(encoding="utf-8")
        after = rendered(before, blocks)
        if after != before:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if "--check" in sys.argv and stale:
        raise SystemExit(f"Out of date: {', '.join(stale)}. Run: python model_cards/render.py")


if __name__ == "__main__":
    main()
