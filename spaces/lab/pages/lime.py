"""Page "LIMe": which earlier layers a layer reads, how that changes the text, and what it does to each layer.

- Converts Llama-like models; the first map and texts are there at once, the sections below them open one by one.
- Entropy and separability are measured in four steps (two models, two figures), so that Stop waits for one at most.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
import torch
from store import MODEL, UNAVAILABLE, Loaded, Store
from views import POINT, Cell, heat_map, key, line_chart, note, read_example, table, view, visible, write_text

from hf_ext.analysis.depth import depthwise_circuits, layer_entropies, separability


TITLE = "LIMe"
INTRO = """\
In LIMe every layer may read the keys and values of all earlier layers, head by head, and each cell shows how strongly
the layer of its row reads the layer of its column.

Paper: LIMe, [arXiv 2502.09245](https://arxiv.org/abs/2502.09245).
"""
TRAINED = "lime.load_state_dict(lime_routers(), strict=False)  # trained routers; SmolLM2 only\n"
CODE = f"""\
from hf_ext import LimeForCausalLM
from hf_ext.analysis.depth import depthwise_circuits, layer_entropies
from hf_ext.tiny import lime_routers, load

model, tokenizer = load("smollm2")  # or a folder, or a Hub id of a Llama, Mistral, Qwen2 or Qwen3
lime = LimeForCausalLM.from_llama(model)  # the same text as the model: nothing is routed yet
{TRAINED}
router = lime.model.layers[-1].self_attn.router
print(router.sources, router.weight.abs().amax((0, 2)))  # how strongly the last layer reads each layer

inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(lime.generate(**inputs, max_new_tokens=40, do_sample=False)[0]))
for circuit in depthwise_circuits(lime, inputs.input_ids, top=3):
    print(circuit)
print(layer_entropies(model, inputs.input_ids).values, layer_entropies(lime, inputs.input_ids).values)
lime.save_pretrained("my-lime")  # trains like any model; loads with trust_remote_code where hf_ext is absent
"""
PROMPT = "A little girl named Lily found a key in the garden. She"
LENGTH = 48  # tokens
NOTHING = "Nothing is routed yet: every layer reads its own keys and values, so the text is the original's."
ALL, MAX, SUM = "all", "largest", "sum"
VERBS = (" is", " are", " was", " were")
MAX_TOKENS = 4096  # of a text whose layers are measured
KINDS = ("Original", "LIMe")
SIDES = {"values": "values", "hidden": "hidden states"}
ENTROPY, ACCURACY = "entropy, nats", "told apart, share right"
DEPTH = f"""\
Measured at every token of the text, a row a line. **Entropy**: how many directions the vectors of a layer use (matrix
Renyi entropy, order 1/2). **Told apart**: how often a linear classifier that has not seen a place knows which of the
verbs{",".join(VERBS)} stands there (chance is 0.25). **Values** are what attention reads, in LIMe the routed ones;
**hidden states** are the residual stream after the layer.
"""
CIRCUITS = """\
Which key/value head (layer/head, counted from 0) fetches what from which earlier layer. **Strength**: the size of what
it fetches there, relative to all that the head reads, on average over the text. **Tokens**: those for which most is
fetched.
"""
ONES = ["The cat", "My brother", "The old house", "Her garden", "The winter"]
MANY = ["The cats", "My brothers", "The old houses", "Her flowers", "The winters"]
ENDS = ["near the door.", "quiet at night.", "full of surprises.", "not what we expected.", "older than the town."]
STORY = (
    "A little girl named Lily found a key in the garden. She showed the key to her brother Tom, who was reading under "
    "the tree. Tom said that the key was very old and that it opened a small wooden box. They looked for the box in "
    "the house, in the kitchen and under the bed, but it was nowhere. Then Lily remembered the shed behind the house. "
    "The box was there, and the key turned easily. Inside were seven letters that their grandmother had written."
)


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
    with gr.Accordion("Entropy and separability by layer", open=False):
        gr.Markdown(DEPTH)
        text = gr.Textbox(example["text"], label="Text, a row a line", lines=4, max_lines=8)
        with gr.Row():
            measure = gr.Button("Measure", variant="primary", min_width=120)
            stop_measuring = gr.Button("Stop", min_width=80)
        progress = gr.Markdown(f"An example, computed earlier with {example['model']}.")
        depth = view(depth_charts(example["depth"]), "Entropy and separability by layer")
    with gr.Accordion("Depthwise circuits", open=False):
        gr.Markdown(CIRCUITS)
        story = gr.Textbox(example["story"], label="Text", lines=3, max_lines=8)
        find = gr.Button("Find circuits", variant="primary", min_width=120)
        found = gr.Markdown(f"An example, computed earlier with {example['model']}.")
        circuits = view(circuit_table(example["circuits"]), "Depthwise circuits")
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

    def measure_layers(name: str, text: str) -> Iterator[tuple[Any, Any]]:
        name = name.strip() or store.default
        yield f"Loading {name} ...", gr.skip()
        try:
            for doing, figures in layer_figures(store, name, text):
                yield doing, depth_charts(figures) if figures else gr.skip()
        except UNAVAILABLE as error:
            yield f"**{name} cannot be measured.** {error}", gr.skip()

    def find_circuits(name: str, text: str) -> Iterator[tuple[Any, Any]]:
        name = name.strip() or store.default
        yield f"Loading {name} ...", gr.skip()
        try:
            rows = circuit_rows(store.lime(name), text)
        except UNAVAILABLE as error:
            yield f"**{name} cannot be searched.** {error}", gr.skip()
        else:
            yield f"The strongest circuits of **{name}** as a LIMe model.", circuit_table(rows)

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
    measuring = measure.click(
        measure_layers, [name, text], [progress, depth], show_progress="hidden", **MODEL, **private
    )
    # what is shown stays: the figures so far, or those before
    stop_measuring.click(lambda: "Stopped.", None, progress, cancels=[measuring], **private)
    find.click(find_circuits, [name, story], [found, circuits], show_progress="hidden", **MODEL, **private)


def example(store: Store) -> dict[str, Any]:
    """What the page opens with, computed."""
    plain, lime = store.get(store.default), store.lime(store.default)
    routers = [{"sources": sources, "weight": weight.round(4).tolist()} for sources, weight in model_routers(lime)]
    texts = [list(continuation(loaded, PROMPT))[-1] for loaded in (plain, lime)]
    text = default_text()
    return {
        "model": plain.name,
        "routers": routers,
        "prompt": PROMPT,
        "original": texts[0],
        "lime": texts[1],
        "text": text,
        "depth": list(layer_figures(store, store.default, text))[-1][1],
        "story": STORY,
        "circuits": circuit_rows(lime, STORY),
    }


def default_text() -> str:
    """100 short sentences, 25 with each verb, in turn."""
    pairs = [(subject, end) for end in ENDS for subject in zip(ONES, MANY, strict=True)]
    return "\n".join(
        f"{one if verb in (' is', ' was') else many}{verb} {end}" for (one, many), end in pairs for verb in VERBS
    )


Routers = list[tuple[list[int], np.ndarray]]  # for each layer: sources, R [G, S, G]; the first reads itself alone


def routers_of(example: dict[str, Any]) -> Routers:
    """The routers of a computed example."""
    return [(router["sources"], np.array(router["weight"])) for router in example["routers"]]


def model_routers(loaded: Loaded) -> Routers:
    """The routers of a LIMe model; a layer without one reads itself alone."""
    if (kind := loaded.model.config.router_type) != "kv":
        raise ValueError(
            f"The map needs routers over keys and values, got {kind!r}. hf_ext.analysis.depth.router_map shows others."
        )
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
    return (
        f"**{name}** as a LIMe model: {numbers:,} router weights, at most {change:.2f} away from those of layers that "
        "read themselves alone."
    )


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


Figures = dict[str, dict[str, dict[str, list[float]]]]  # measure -> "Original" or "LIMe" -> side -> by layer


def layer_figures(store: Store, name: str, text: str) -> Iterator[tuple[str, Figures]]:
    """What is being done and the figures so far, step by step; those that there are, in the end."""
    twin, plain = store.lime(name), store.get(name)
    figures: Figures = {ENTROPY: {}, ACCURACY: {}}
    remark, size = "", ""
    for title, loaded in [("Original", plain), ("LIMe", twin)] if plain is not twin else [("LIMe", twin)]:
        ids, mask = rows_of(loaded, text)
        size = f"{int(mask.sum())} tokens in {len(ids)} rows"
        yield f"{title}: entropy of {size} ...", {}
        entropies = layer_entropies(loaded.model, ids, attention_mask=mask, max_tokens=MAX_TOKENS)
        figures[ENTROPY][title] = {side: _rounded(getattr(entropies, side)) for side in SIDES}
        yield f"{title}: telling {len(VERBS)} verbs apart ...", figures
        try:
            apart = separability(loaded.model, ids, verb_ids(loaded), attention_mask=mask)
        except ValueError as error:
            remark = f" **The verbs cannot be told apart here.** {error}"
        else:
            figures[ACCURACY][title] = {side: _rounded(getattr(apart, side)) for side in SIDES}
            remark = f" Told apart at {min(apart.counts.values())} places of each verb: small differences are chance."
    yield f"**{name}**, {size}.{remark}", figures


def rows_of(loaded: Loaded, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The lines of a text as tokens [N, T] and their mask."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("The text must have a line, got none. Write a sentence.")
    inputs = loaded.tokenizer(lines, return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    room = getattr(loaded.model.config, "max_position_embeddings", MAX_TOKENS)
    if mask.sum() > MAX_TOKENS or ids.shape[1] > room:
        raise ValueError(
            f"The text must have at most {MAX_TOKENS} tokens, {room} a line, got {int(mask.sum())}, and "
            f"{ids.shape[1]} in the longest line. Shorten it."
        )
    return ids, mask


def verb_ids(loaded: Loaded) -> list[int]:
    """The token of each verb, in the middle of a text."""
    before = loaded.tokenizer("x", add_special_tokens=False)["input_ids"]
    found = {verb: loaded.tokenizer(f"x{verb}", add_special_tokens=False)["input_ids"] for verb in VERBS}
    split = [verb for verb, ids in found.items() if len(ids) != len(before) + 1 or ids[:-1] != before]
    if split:
        raise ValueError(f"Each verb must be one token, got several for {', '.join(map(repr, split))} in this model.")
    return [ids[-1] for ids in found.values()]


def depth_charts(figures: Figures) -> str:
    """Two charts for each measure, and the numbers in a table."""
    parts = [f'<div class="lab-line" aria-live="polite">{POINT}</div>', key(["Original", "LIMe"])]
    for measure, found in figures.items():
        if not found:
            continue
        charts = [
            line_chart(f"{name}: {measure}", [(title, found.get(title, {}).get(side, [])) for title in KINDS])
            for side, name in SIDES.items()
        ]
        columns = [
            (side if title == KINDS[0] else f"{side}, {title}", lines[side])
            for side in SIDES
            for title, lines in found.items()
        ]
        rows = [
            (
                str(layer),
                [Cell(f"{line[layer]:.3f}", 0, f"Layer {layer}, {head}: {line[layer]}") for head, line in columns],
            )
            for layer in range(len(columns[0][1]))
        ]
        numbers = table("layer", [head for head, _ in columns], rows, label=f"{measure} by layer")
        parts += [f'<div class="lab-charts">{"".join(charts)}</div>', "<details><summary>The numbers</summary>"]
        parts += [numbers, "</details>"]
    return "".join(parts)


def circuit_rows(loaded: Loaded, text: str) -> list[dict[str, Any]]:
    """The strongest circuits of a LIMe model on a text, their tokens written out."""
    ids = loaded.text_ids(text)
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"The text must have at most {MAX_TOKENS} tokens, got {len(ids)}. Shorten it.")
    return [
        {
            "reader": [circuit.layer, circuit.head],
            "source": [circuit.source_layer, circuit.source_head],
            "strength": round(circuit.strength, 3),
            "tokens": [loaded.text([token], special=True) for token in circuit.tokens],
        }
        for circuit in depthwise_circuits(loaded.model, torch.tensor([ids]))
    ]


def circuit_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row for each circuit."""
    if not rows:
        return note(NOTHING)
    shown, full = [], max(row["strength"] for row in rows)
    for row in rows:
        (layer, head), (source, source_head), strength = row["reader"], row["source"], row["strength"]
        tip = f"Layer {layer}, head {head} fetches {strength:.2f} from layer {source}, most from head {source_head}."
        words = Cell(" ".join(map(visible, row["tokens"])), 0, "")
        reads = Cell(f"{source}/{source_head}", 0, tip)
        shown.append((f"{layer}/{head}", [reads, Cell(f"{strength:.2f}", strength / full, tip), words]))
    columns = ["reads", "strength", "tokens"]
    return heat_map("head", columns, shown, label="Circuits: heads by the layers and heads they read")


def _rounded(figures: torch.Tensor) -> list[float]:
    return [round(figure, 4) for figure in figures.tolist()]


def _identity(weight: np.ndarray) -> np.ndarray:
    identity = np.zeros_like(weight)
    identity[:, -1] = np.eye(len(weight))
    return identity


def _heads(routers: Routers) -> list[str]:
    return [ALL, *(str(head) for head in range(len(routers[0][1])))]


def _number(value: float) -> str:
    text = f"{abs(value):.2f}".rstrip("0").rstrip(".")
    return text if text == "0" else ("-" if value < 0 else "") + text.removeprefix("0")
