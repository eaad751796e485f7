"""`python -m hf_ext.sae COMMAND ...`; each command tells its options with `--help`."""

import sys
from collections.abc import Callable
from importlib import import_module


# command -> the module whose `main(argv)` it is
COMMANDS = {
    "eval": "hf_ext.sae.evaluation_cli",
    "convert": "hf_ext.sae.convert",
    "index": "hf_ext.sae.feature_index_cli",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that is named first."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: python -m hf_ext.sae {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        if argv and argv[0] not in ("-h", "--help"):
            print(f"The command must be one of {', '.join(COMMANDS)}, got {argv[0]!r}.", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    command: Callable[[list[str]], int | None] = import_module(COMMANDS[argv[0]]).main
    return command(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
