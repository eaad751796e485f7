"""The lab: talk to small models and look inside, offline.

    python spaces/lab/app.py [--model ID_OR_FOLDER] [--only PAGE]
    python spaces/lab/app.py --make-examples      # computes the examples that the pages open with

- One page, one module in `pages` with `build(store)`; `PAGES` is the only list of them.
- GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where it listens.
- No analytics, fonts of the system, no request to anywhere but this server.
"""

import argparse
import os
import sys
from typing import Any

import gradio as gr
import torch
from pages import essa, lens, lime, steering
from store import Store
from views import CSS, THEME, write_example


PAGES = {"lens": lens, "lime": lime, "steering": steering, "essa": essa}
LAUNCH: dict[str, Any] = {"theme": THEME, "css": CSS, "footer_links": []}
PORT = 7860


def build_demo(model: str = "smollm2", only: str | None = None) -> gr.Blocks:
    """
    The app; its default model begins to load in the background.

    Args:
        model (`str`, *optional*, defaults to `"smollm2"`): The model to open with: a name that `hf_ext.tiny.load`
            takes ("smollm2", a folder, a Hub id).
        only (`str`, *optional*): Show this page alone.

    Returns:
        `gr.Blocks`; launch it with `LAUNCH`.

    Raises:
        ValueError: if there is no such page.
    """
    if only is not None and only not in PAGES:
        raise ValueError(f"`only` must be one of {', '.join(PAGES)}, got {only!r}.")
    store = Store(model)
    store.start()
    with gr.Blocks(title="hf_ext lab", analytics_enabled=False) as demo:
        for name in [only] if only else PAGES:
            with gr.Tab(PAGES[name].TITLE, id=name):
                PAGES[name].build(store)
        if only in (None, "essa"):
            demo.unload(essa.leave)
    return demo


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="The hf_ext lab.")
    parser.add_argument("--model", default="smollm2", help="the model to open with: smollm2, a folder or a Hub id")
    parser.add_argument("--only", choices=list(PAGES), help="show one page alone")
    parser.add_argument("--make-examples", action="store_true", help="compute the pages' examples and end")
    options = parser.parse_args(arguments)
    # one core stays free for the browser and the server: on a busy core one thread of torch holds up all the others
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    if options.make_examples:
        store = Store(options.model)
        for name in [options.only] if options.only else PAGES:
            sys.stderr.write(f"{write_example(name, PAGES[name].example(store))}\n")
        return 0
    port = int(os.environ.get("GRADIO_SERVER_PORT") or PORT)
    demo = build_demo(options.model, options.only)
    try:
        demo.launch(server_port=port, **LAUNCH)
    except OSError as error:
        if "port" not in str(error).lower():
            raise
        sys.stderr.write(f"Port {port} is in use. Choose another one, for example GRADIO_SERVER_PORT={port + 1}.\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
