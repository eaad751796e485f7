"""`python -m hf_ext.lime convert IN OUT`: a Llama-like model becomes its LIMe twin."""

import argparse

from hf_ext.lime.convert import convert


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, convert, and say what was saved."""
    parser = argparse.ArgumentParser(prog="python -m hf_ext.lime", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("convert", help="convert a Hub id or folder")
    command.add_argument("source", metavar="IN", help="Hub id or folder of a Llama, Mistral, Qwen2 or Qwen3")
    command.add_argument("folder", metavar="OUT", help="where to save model, code and tokenizer")
    command.add_argument("--routing", default="full", choices=["full", "first", "last", "period"])
    command.add_argument("--routing-window", type=int, help="the number that first, last and period need")
    args = parser.parse_args(argv)
    try:
        model = convert(args.source, args.folder, routing=args.routing, routing_window=args.routing_window)
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")
    routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    print(f"Saved {args.folder}: the source's weights and {routers:,} router weights, still the identity.")
    print("Train them with Trainer and lime_param_groups; until then the model equals its source.")


if __name__ == "__main__":
    main()
