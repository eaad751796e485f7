"""`python -m trainers METHOD --config run.yaml`: train from a file of options, as with TRL's command line."""

import difflib
import sys
from importlib import import_module


METHODS = {
    "error_predictor": "trainers.error_predictor.cli",
    "essa": "trainers.essa.cli",
    "mdlm": "trainers.mdlm.cli",
    "sae": "trainers.sae.cli",
    "sft": "trainers.sft",
    "steering_rl": "trainers.steering_rl.cli",
}


def main(argv: list[str] | None = None) -> int:
    """Run the method's own command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"python -m trainers METHOD --config run.yaml\nMETHOD is one of {', '.join(METHODS)}; add --help for its"
        )
        print("options. Options on the command line go before those of the file.")
        return 0 if argv else 2
    if argv[0] not in METHODS:
        near = difflib.get_close_matches(argv[0], METHODS)
        asked = f" Did you mean {near[0]}?" if near else ""
        print(f"METHOD must be one of {', '.join(METHODS)}, got {argv[0]}.{asked}", file=sys.stderr)
        return 2
    try:
        import_module(METHODS[argv[0]]).main(argv[1:])
    except (OSError, ValueError, TypeError, ImportError) as error:  # what was asked cannot be done: one sentence
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
