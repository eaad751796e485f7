"""Page "LIMe": which earlier layers a layer reads, and how that changes the text; converts Llama-like models."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
from store import MODEL, UNAVAILABLE, Loaded, Store
from views import Cell, heat_map, read_example, view, write_text


TITLE = "LIMe"
INTRO = """\
In LIMe every layer may read the keys and values of all earlier layers, head by head, and each cell shows how strongly
the layer of its row reads the layer of its column.

Paper: LIMe, [arXiv 2502.09245](https://arxiv.org/abs/2502.09245).
"""
TRAINED = "lime.load_state_dict(lime_routers(), strict=False)  # trained routers; SmolLM2 only\n"
CODE = f"""\
from hf_ext import LimeForCausalLM
from hf_ext.tiny import lime_routers, load

model, tokenizer = load("smollm2")  # or a folder, or a Hub id of a Llama, Mistral, Qwen2 or Qwen3
lime = LimeForCausalLM.from_llama(model)  # the same text as the model: nothing is routed yet
{TRAINED}
router = lime.model.layers[-1].self_attn.router
print(router.sources, router.weight.abs().amax((0, 2)))  # how strongly the last layer reads each layer

inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(lime.generate(**inputs, max_new_tokens=40, do_sample=False)[0]))
lime.save_pretrained("my-lime")  # trains like any model; loads with trust_remote_code where hf_ext is absent
"""
PROMPT = "A little girl named Lily found a key in the garden. She"
LENGTH = 48  # tokens
NOTHING = "Nothing is routed yet: every layer reads its own keys and values, so the text is the original's."
ALL, MAX, SUM = "all", "largest", "sum"


def build(store: Store) -> None:
    """The page, inside `gr.Blocks`."""
    example = read_example("lime")
    known = routers_of(example)
    gr.Markdown(INTRO)
    with gr.Row():
        name = gr.Textbox(
            store.default, label="Model", info="smollm2, a Hub id or a folder (Llama, Mistral, Qwen2, Qwen3)", scale=4
        )
        convert = gr.Button("Convert to LIMe", variant="primary", min_width=140)
    status = gr.Markdown(f"An example, computed earlier: {describe(example['model'], known)}")
    gr.Markdown("The strongest colour is the largest weight between two layers; on the diagonal a layer reads itself.")
    with gr.Row():
        amount = gr.Radio([MAX, SUM], value=MAX, label="|R| over the heads chosen")
        target = gr.Dropdown(_heads(known), value=ALL, label="Head that reads")
        source = gr.Dropdown(_heads(known), value=ALL, label="Head that is read")
    shown = view(router_map(known, MAX, ALL, ALL), "Routers")
    gr.Markdown("### The same prompt, both models\nGreedy: always the likeliest token.")
    with gr.Row():
        prompt = gr.Textbox(example["prompt"], label="Prompt", scale=4, max_lines=4)
        write = gr.Button("Write", variant="primary", min_width=80)
        stop = gr.Button("Stop", min_width=80)
    with gr.Row():
        with gr.Column(min_width=280):
            original = view(write_text("Original", example["prompt"], example["original"]), "Original")
        with gr.Column(min_width=280):
            routed = view(write_text("LIMe", example["prompt"], example["lime"]), "LIMe")
    with gr.Accordion("The same in Python", open=False):
        gr.Code(CODE, language="python", interactive=False, show_label=False, buttons=["copy"], wrap_lines=True)

    seen = gr.State(known)

    def read_routers(name: str, amount: str) -> Iterator[tuple[Any, ...]]:
        name = name.strip() or store.default
        unchanged = [gr.skip()] * 4
        yield f"Converting {name} ...", *unchanged
        try:
            routers = model_routers(store.lime(name))
        except UNAVAILABLE as error:
            yield f"**{name} cannot be converted.** {error}", *unchanged
            return
        heads = gr.Dropdown(_heads(routers), value=ALL)
        yield describe(name, routers), router_map(routers, amount, ALL, ALL), heads, heads, routers

    def compare(name: str, prompt: str) -> Iterator[tuple[Any, ...]]:
        def both(title: str = "LIMe") -> tuple[Any, ...]:
            return write_text("Original", prompt, texts[0]), write_text(title, prompt, texts[1]), gr.skip()

        name = name.strip() or store.default
        texts = ["...", "..."]
        try:
            twin, plain = store.lime(name), store.get(name)
            pair = [plain, twin] if plain is not twin else [twin]
            if plain is twin:
                texts[0] = " (none: this is a LIMe model already)"
            yield both()
            for at, loaded in enumerate(pair, start=2 - len(pair)):
                for text in continuation(loaded, prompt):
                    texts[at] = text
                    yield both()
        except UNAVAILABLE as error:
            yield gr.skip(), gr.skip(), f"**{name} cannot write.** {error}"
            return
        if texts[0] == texts[1]:
            yield both("LIMe (the same text)")

    private: dict[str, Any] = {"api_visibility": "private"}
    gr.on(
        [convert.click, name.submit],
        read_routers,
        [name, amount],
        [status, shown, target, source, seen],
        show_progress="hidden",
        **MODEL,
        **private,
    )
    gr.on(
        [amount.change, target.change, source.change],
        router_map,
        [seen, amount, target, source],
        shown,
        show_progress="hidden",
        **private,
    )
    writing = gr.on(
        [write.click, prompt.submit],
        compare,
        [name, prompt],
        [original, routed, status],
        show_progress="hidden",
        **MODEL,
        **private,
    )
    stop.click(None, None, None, cancels=[writing], **private)


def example(store: Store) -> dict[str, Any]:
    """What the page opens with, computed."""
    plain, lime = store.get(store.default), store.lime(store.default)
    routers = [{"sources": sources, "weight": weight.round(4).tolist()} for sources, weight in model_routers(lime)]
    texts = [list(continuation(loaded, PROMPT))[-1] for loaded in (plain, lime)]
    return {"model": plain.name, "routers": routers, "prompt": PROMPT, "original": texts[0], "lime": texts[1]}


Routers = list[tuple[list[int], np.ndarray]]  # for each layer: sources, R [G, S, G]; the first reads itself alone


def routers_of(example: dict[str, Any]) -> Routers:
    """The routers of a computed example."""
    return [(router["sources"], np.array(router["weight"])) for router in example["routers"]]


def model_routers(loaded: Loaded) -> Routers:
    """The routers of a LIMe model; a layer without one reads itself alone."""
    heads = loaded.model.config.num_key_value_heads
    alone = np.eye(heads)[:, None]
    routers = []
    for at, layer in enumerate(loaded.model.model.layers):
        router = layer.self_attn.router
        read = ([at], alone) if router is None else (router.sources, router.weight.detach().cpu().numpy())
        routers.append(read)
    return routers


def describe(name: str, routers: Routers) -> str:
    """One line: whether anything is routed."""
    numbers = sum(weight.size for _, weight in routers[1:])
    if all(np.array_equal(weight, _identity(weight)) for _, weight in routers):
        return f"**{name}** as a LIMe model. {NOTHING}"
    change = max(np.abs(weight - _identity(weight)).max() for _, weight in routers)
    return f"**{name}** as a LIMe model: {numbers:,} router weights, at most {change:.2f} away from the original's."


def router_map(routers: Routers, amount: str, target: str, source: str) -> str:
    """Heat map, layers by the layers they read; |R| over the heads chosen, signed where one pair is left."""
    reader = slice(None) if target == ALL else slice(int(target), int(target) + 1)
    read = slice(None) if source == ALL else slice(int(source), int(source) + 1)
    chosen = [(sources, weight[reader, :, read]) for sources, weight in routers]
    signed = target != ALL and source != ALL
    values = [
        weight[0, :, 0] if signed else getattr(np.abs(weight), "max" if amount == MAX else "sum")((0, 2))
        for _, weight in chosen
    ]
    others = [abs(value) for layer in values for value in layer[:-1]]
    full = max(others, default=0.0) or 1.0
    rows = []
    for at, ((sources, weight), layer) in enumerate(zip(chosen, values, strict=True)):
        cells = [Cell("", 0, f"Layer {at} cannot read layer {column}.") for column in range(len(routers))]
        for place, (column, value) in enumerate(zip(sources, layer, strict=True)):
            pair = np.unravel_index(np.abs(weight[:, place]).argmax(), weight[:, place].shape)
            tip = (
                f"Layer {at} reads layer {column}: {value:.3f}. Strongest: head {pair[0] + (reader.start or 0)} reads "
                f"head {pair[1] + (read.start or 0)} by {weight[pair[0], place, pair[1]]:.3f}."
            )
            cells[column] = Cell(_number(value), abs(value) / full, tip)
        rows.append((str(at), cells))
    columns = [str(column) for column in range(len(routers))]
    return heat_map("layer", columns, rows, label="Routers: layers by the layers they read")


def continuation(loaded: Loaded, prompt: str) -> Iterator[str]:
    """The greedy continuation of a text, longer and longer."""
    ids = loaded.text_ids(prompt)
    new: list[int] = []
    for token in loaded.write(ids, max_new_tokens=LENGTH):
        new.append(token.id)
        yield loaded.text(new)


def _identity(weight: np.ndarray) -> np.ndarray:
    identity = np.zeros_like(weight)
    identity[:, -1] = np.eye(len(weight))
    return identity


def _heads(routers: Routers) -> list[str]:
    return [ALL, *(str(head) for head in range(len(routers[0][1])))]


def _number(value: float) -> str:
    text = f"{abs(value):.2f}".rstrip("0").rstrip(".")
    return text if text == "0" else ("-" if value < 0 else "") + text.removeprefix("0")
