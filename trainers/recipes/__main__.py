"""`python -m trainers.recipes NAME`: run a recipe, write its figures, table and plot."""

import argparse
import difflib
import sys
from importlib import import_module
from pathlib import Path

from trainers.recipes import NAMES, process, report, runner
from trainers.recipes.runner import BUDGETS, Options, Skip


RESULTS = Path("model_cards/results")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainers.recipes", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}; with --all, every one")
    parser.add_argument("--all", action="store_true", help="every recipe")
    parser.add_argument("--budget", choices=BUDGETS, default="small", help="smoke: <= 2 min; small: <= 1 h on 2 cores")
    parser.add_argument("--seeds", type=int, help="seeds of each arm (default: the recipe's)")
    parser.add_argument("--model", help="a Hub id or folder, for recipes that start from a model")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE_OR_HUB_ID", help="training texts [held-out texts]"
    )
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, of one thread each (default 2)")
    parser.add_argument("--work", type=Path, help="folder of cells and checkpoints (default: the user's cache)")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default {RESULTS}; smoke: the work folder)")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell:
        import json

        spec = json.loads((args.cell / "spec.json").read_text(encoding="utf-8"))
        process.run_cell(import_module(f"trainers.recipes.{spec['recipe']}"), args.cell)
        return 0
    try:
        names = _names(args)
        for option in ("seeds", "jobs"):
            value = getattr(args, option)
            if value is not None and value < 1:
                raise ValueError(f"`--{option}` must be at least 1, got {value}.")
        options = Options(args.budget, args.seeds, args.model, tuple(args.text))
        recipes = {name: import_module(f"trainers.recipes.{name}") for name in names}
        if not args.all:
            for name, recipe in recipes.items():
                _check(recipe, name, options)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    code = 0
    for name, recipe in recipes.items():
        work = (args.work or _cache()) / name / args.budget
        out = args.out or (work if args.budget == "smoke" else RESULTS)
        taken = _taken(recipe, options) if args.all else options
        try:
            result = runner.run(recipe, name, taken, work=work, out=out / f"{name}.json", jobs=args.jobs)
        except Skip as reason:
            print(f"{name} is skipped: {reason}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(f"\nStopped. The same command goes on where {name} was.", file=sys.stderr)
            return 130
        except (OSError, RuntimeError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            code = 1
            continue
        report.plot(recipe, result, out / f"{name}.png")
        print(report.table(result))
        failed = [cell for cell in result["cells"] if cell["status"] == "failed"]
        for cell in failed:
            print(f"{name}: cell {cell['arm']}-{cell['seed']} failed: {cell['error']}", file=sys.stderr)
        code = code or bool(failed)
    return code


def _names(args: argparse.Namespace) -> list[str]:
    if args.all or not args.names:
        if not args.all:
            raise ValueError(f"NAME must be a recipe, got none. There are {', '.join(NAMES)}, or --all.")
        return list(NAMES)
    for name in args.names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.3) or NAMES
            raise ValueError(f"NAME must be a recipe, got {name!r}. The nearest are {', '.join(near)}.")
    return args.names


def _check(recipe: object, name: str, options: Options) -> None:
    for option in ("model", "text"):
        if getattr(options, option) and option not in recipe.ACCEPTS:  # type: ignore[attr-defined]
            raise ValueError(f"`--{option}` is not for the recipe {name}, which does not use one. Leave it out.")


def _taken(recipe: object, options: Options) -> Options:
    """With --all, each recipe takes of the options those that it can use."""
    accepts = recipe.ACCEPTS  # type: ignore[attr-defined]
    model, text = ("model" in accepts, "text" in accepts)
    return Options(options.budget, options.seeds, options.model if model else None, options.text if text else ())


def _cache() -> Path:
    from hf_ext.tiny.smollm2 import cache_dir

    return cache_dir() / "recipes"


if __name__ == "__main__":
    sys.exit(main())
