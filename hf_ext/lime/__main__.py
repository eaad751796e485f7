"""Other checkpoints become LIMe models.

`convert IN OUT`: a Llama-like model becomes its LIMe twin.
`import-original CHECKPOINT CONFIG OUT`: what the authors' v2 code saved becomes a model that transformers loads.
"""

import argparse

from huggingface_hub.errors import StrictDataclassError

from hf_ext.lime.convert import convert, from_original


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, convert or import, and say what was saved."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_ext.lime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("convert", help="convert a Hub id or folder")
    command.add_argument("source", metavar="IN", help="Hub id or folder of a Llama, Mistral, Qwen2 or Qwen3")
    command.add_argument("folder", metavar="OUT", help="where to save model, code and tokenizer")
    command.add_argument("--routing", default="full", choices=["full", "first", "last", "period"])
    command.add_argument("--routing-window", type=int, help="the number that first, last and period need")
    command = commands.add_parser("import-original", help="import a checkpoint of the authors' v2 code")
    command.add_argument("source", metavar="CHECKPOINT", help="safetensors, .bin, .pt or .pth, or the folder of one")
    command.add_argument("config", metavar="CONFIG", help="config.json of type llama (as they save it) or lime")
    command.add_argument("folder", metavar="OUT", help="where to save model and code")
    args = parser.parse_args(argv)
    try:
        if args.command == "convert":
            model = convert(args.source, args.folder, routing=args.routing, routing_window=args.routing_window)
        else:
            model = from_original(args.source, args.config, args.folder)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        parser.exit(1, f"{error}\n")
    if args.command == "convert":
        routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
        print(f"Saved {args.folder}: the source's weights and {routers:,} router weights, still the identity.")
        print("Train them with Trainer and lime_param_groups; until then the model equals its source.")
    else:
        print(
            f"Saved {args.folder}: {model.num_parameters():,} parameters of {model.config.num_hidden_layers} layers."
        )
        print("Add the tokenizer that the checkpoint was trained with: their files hold none.")


if __name__ == "__main__":
    main()
