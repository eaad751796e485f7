"""Run benchmarks by name, each a script of this folder in a process of its own; from the root of the checkout:

    python -m tests.benchmarks lime_training_step [--pairs 2]
    python -m tests.benchmarks --all            # those without a result of this commit: a stopped run goes on

A script writes one JSON for each row it measures into `results/`, whose name starts with the script's.
"""

import argparse
import difflib
import json
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent
SCHEMA = {"name", "command", "commit", "date", "device", "unit", "ours", "peer", "ratio", "goal"}


def names() -> list[str]:
    """The scripts of this folder that measure something."""
    scripts = (path for path in HERE.glob("[!_]*.py") if "rows.write(" in path.read_text(encoding="utf-8"))
    return sorted(path.stem for path in scripts)


def results(name: str, folder: Path = HERE / "results") -> list[dict]:
    """The rows that a script has written; refuses what is none."""
    found = []
    for path in sorted(folder.glob(f"{name}-*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(row, dict) or not row.keys() >= SCHEMA:
            raise SystemExit(f"{path} is no benchmark's row (it lacks fields). Move it away, or run {name} anew.")
        found.append(row)
    return found


def commit() -> str:
    """Of the checkout; empty where files differ from it, since no result then tells what it measured."""
    run = {"cwd": HERE, "capture_output": True, "text": True, "check": False}
    if subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip():
        return ""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(names())}")
    parser.add_argument("--all", action="store_true", help="every benchmark without a result of this commit")
    args, rest = parser.parse_known_args(argv)
    if args.name is None and not args.all:
        parser.exit(2, f"NAME must be a benchmark, got none. There are {', '.join(names())}, or --all.\n")
    if args.name is not None and args.name not in names():
        near = difflib.get_close_matches(args.name, names(), cutoff=0.3) or names()
        parser.exit(2, f"NAME must be a benchmark, got {args.name!r}. The nearest are {', '.join(near)}.\n")
    chosen, code, now = [args.name] if args.name else names(), 0, commit()
    for at, name in enumerate(chosen, start=1):
        rows = results(name)
        if args.all and now and rows and all(row["commit"] == now for row in rows):
            print(f"[{at}/{len(chosen)}] {name} is done at {now}", flush=True)
            continue
        print(f"[{at}/{len(chosen)}] {name}", flush=True)
        if subprocess.run([sys.executable, str(HERE / f"{name}.py"), *rest], check=False).returncode:
            print(f"{name} failed: its rows are as they were.", file=sys.stderr)
            code = 1
    for name in chosen:
        for row in results(name):
            mark = "met" if row["ratio"] >= row["goal"] else "missed"
            print(f"{row['name']}: ratio {row['ratio']}, goal {row['goal']}: {mark} ({row['commit']}, {row['date']})")
    return code


if __name__ == "__main__":
    sys.exit(main())
