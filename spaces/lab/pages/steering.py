"""Page "Steering": add vectors to a model's residual stream, read both texts side by side, and what the vectors say.

- What is computed is in `steering_texts.py`; here is how it looks.
- The base's text is kept while only the vectors change, so that a slider costs one text and not two.
- Vectors, the base's text and the lens are kept in the window's own state, each with what it was made from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr
from pages.lens import answer_cells
from steering_settings import ADAPTER, BUNDLED, LISTS, METHODS, PRESETS, STEP, Settings, defaults, sources
from steering_texts import (
    WORDS,
    Row,
    add_tokens,
    effect_row,
    find_vectors,
    lens_row,
    marks_of,
    same_vectors,
    shown_with,
    summary,
    write_both,
)
from store import MODEL, UNAVAILABLE, Store
from views import Cell, heat_map, note, read_example, token_text, view, visible

from hf_ext.sites import anatomy


TITLE = "Steering"
INTRO = """\
A vector for each layer is added to the residual stream at every token, and nothing else of the model changes. The
vectors are made on the spot from two lists of prompts, as the mean of what the first has and the second lacks, or come
from an adapter that was trained. Coloured tokens are those that the other text does not have at that place.

Papers: vectors as adapters, [arXiv 2505.18706](https://arxiv.org/abs/2505.18706); what they say,
[arXiv 2509.06608](https://arxiv.org/abs/2509.06608); from two lists,
[arXiv 2312.06681](https://arxiv.org/abs/2312.06681) and, by PCA,
[arXiv 2310.01405](https://arxiv.org/abs/2310.01405).
"""
CODE = """\
from hf_ext.analysis.vector_lens import vector_lens
from hf_ext.steering import add_vectors, contrastive_vectors
from hf_ext.tiny import load

model, tokenizer = load("smollm2")  # or a folder, or a Hub id
depth = model.config.num_hidden_layers
vectors = contrastive_vectors(
    model,
    tokenizer,
    positive=["I feel wonderful today!", "What a happy day!", "I love this place."],
    negative=["I feel terrible today.", "What a sad day.", "I hate this place."],
    layers=range(depth // 3, 2 * depth // 3),
)
for layer, vector in vectors.items():  # what each one says
    lens = vector_lens(model, vector, top_k=5, vocabulary=len(tokenizer))
    print(layer, tokenizer.batch_decode(lens.top_ids[:, None]))

prompt = tokenizer("My first day at the new job was", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32, do_sample=False)[0]))
model = add_vectors(model, vectors, scale=0.1)  # or a folder, a .npy or a .gguf file in place of `vectors`
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32, do_sample=False)[0]))
model.set_scale("default", -0.1)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32, do_sample=False)[0]))
model.save_pretrained("joyful")  # an adapter of PEFT
"""
PROMPT, SUM = "My first day at the new job was", "What is 3 + 4? Answer with the number only."
PRESET = "Joyful, not sad"
LENGTH = 40  # tokens
MARK = 0.45  # strength of the colour of a token that has changed
LENS = """\
### What the vectors say
Each vector beside the rows of the unembedding: the tokens that it points to (large cosine) and away from, and its
length. The scale is not in it: a negative one turns it round.
"""
EFFECTS = """\
An early vector is read by what it does in the end: added alone, with its scale, how the last layer's stream changes on
a text that the steered model writes after the prompt, on average over its tokens. The mean change is read as above.
"""


def build(store: Store) -> None:
    """The page, inside `gr.Blocks`."""
    example = read_example("steering")
    layers = example["layers"]
    gr.Markdown(INTRO)
    with gr.Row():
        model = gr.Textbox(
            store.default, label="Model", info="smollm2, a Hub id or a folder; Enter loads it", min_width=240
        )
        source = gr.Radio(sources(), value=LISTS, label="Vectors from", min_width=300)
    with gr.Column() as lists:
        with gr.Row():
            preset = gr.Dropdown(
                list(PRESETS), value=PRESET, label="Lists", info="fills both; then change them", min_width=240
            )
            method = gr.Radio(
                METHODS, value=METHODS[0][1], label="Method", info="how pairs become a direction", min_width=240
            )
        with gr.Row():
            towards = gr.Textbox(
                PRESETS[PRESET][0], label="Towards", info="a prompt a line", lines=6, max_lines=12, min_width=240
            )
            away = gr.Textbox(
                PRESETS[PRESET][1], label="Away from", info="its opposite, line by line", lines=6, max_lines=12,
                min_width=240,
            )  # fmt: skip
    adapter = gr.Textbox(
        "", label="Adapter", info="a folder, a Hub id, a .npy file or a GGUF control vector", visible=False
    )
    with gr.Row():
        scale = gr.Slider(-2, 2, example["scale"], step=STEP, label="Scale", info="0 is the base", min_width=200)
        first = gr.Slider(0, layers - 1, example["first"], step=1, label="First layer", info="from 0", min_width=200)
        last = gr.Slider(0, layers - 1, example["last"], step=1, label="Last layer", info="included", min_width=200)
    with gr.Row(equal_height=False):
        prompt = gr.Textbox(example["prompt"], label="Prompt", max_lines=4, scale=3, min_width=240)
        max_new_tokens = gr.Slider(8, 128, LENGTH, step=8, label="Tokens at most", min_width=160)
        chat = gr.Checkbox(example["chat"], label="As a chat", info="a message to answer", min_width=140)
    with gr.Row():
        write = gr.Button("Write", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=80)
    status = gr.Markdown(f"An example, computed earlier with {example['model']}. {example['status']}")
    with gr.Row():
        with gr.Column(min_width=280):
            base_text = view(texts(example)[0], "Base")
        with gr.Column(min_width=280):
            steered_text = view(texts(example)[1], "Steered")
    gr.Markdown(LENS)
    lens = view(lens_table(example["lens"]), "Lens of the vectors")
    with gr.Accordion("What they do in the last layer", open=False):
        gr.Markdown(EFFECTS)
        with gr.Row():
            measure = gr.Button("Measure", variant="primary", min_width=120)
            stop_measuring = gr.Button("Stop", min_width=80)
        progress = gr.Markdown(f"An example, computed earlier with {example['model']}.")
        effects = view(lens_table(example["effects"]), "Lens of the effects")
    with gr.Accordion("The same in Python", open=False):
        gr.Code(CODE, language="python", interactive=False, show_label=False, buttons=["copy"], wrap_lines=True)

    fields = {
        "model": model, "source": source, "towards": towards, "away": away, "method": method, "adapter": adapter,
        "scale": scale, "first": first, "last": last, "prompt": prompt, "chat": chat, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    known = gr.State({"model": example["model"], "layers": layers})  # what the sliders were set for
    base_seen = gr.State({})  # the base's tokens and what they follow; what was asked and said when both were complete
    made = gr.State({})  # the vectors, and what from; `rows` of their lens
    read = gr.State({})  # the lens of these vectors, by layer
    sliders = [scale, first, last]

    def settings(values: Sequence[Any]) -> Settings:
        given = dict(zip(fields, values, strict=True))
        given["model"] = given["model"].strip() or store.default
        return Settings(**{**given, "adapter": given["adapter"].strip()})

    def place(source: str, model: str, layers: int) -> dict[Any, Any]:
        """The sliders for a model of so many layers, and a note of it."""
        values, ends = defaults(source, layers), (2, layers - 1, layers - 1)
        moved = {one: gr.Slider(value=v, maximum=m) for one, v, m in zip(sliders, values, ends, strict=True)}
        return {**moved, known: {"model": model, "layers": layers}}

    def load(name: str, source: str, at: dict[str, Any], quietly: bool = False) -> Iterator[dict[Any, Any]]:
        name = name.strip() or store.default
        if not quietly:
            yield {status: f"Loading {name} ..."}
        try:
            loaded = store.get(name)
            layers = anatomy(loaded.model).num_layers
        except UNAVAILABLE as error:
            yield {status: f"**{name} cannot be steered.** {error}\n\nWhat you see was computed earlier."}
            return
        # a generator that yields nothing would empty its outputs
        yield place(source, name, layers) if at["model"] != name else {known: at}
        if not quietly:
            yield {status: f"**{name}** is ready: {layers} layers."}

    def prepare(asked: Settings, says: Any, at: dict[str, Any], have: dict[str, Any]) -> Any:
        """Updates of the page, and in the end the model, what is asked of it, and the vectors that are added."""
        yield {says: f"Loading {asked.model} ..."}
        loaded = store.get(asked.model)
        layers = anatomy(loaded.model).num_layers
        if at["model"] != asked.model:
            scale, first, last = defaults(asked.source, layers)
            asked = replace(asked, scale=scale, first=first, last=last)
            yield place(asked.source, asked.model, layers)
        if asked.source != LISTS or have.get("key") != asked.key:  # a file may have changed
            yield {says: "Making the vectors ..." if asked.source == LISTS else "Reading the adapter ..."}
            have = {"key": asked.key, "vectors": find_vectors(loaded, asked)}
        chosen = asked.chosen(have["vectors"], layers)
        yield {made: {**have, "chosen": list(chosen)}}
        return loaded, asked, chosen

    def run(
        at: dict[str, Any], have: dict[str, Any], before: dict[str, Any], *values: Any
    ) -> Iterator[dict[Any, Any]]:
        asked = settings(values)
        try:
            loaded, asked, vectors = yield from prepare(asked, status, at, have)
            ids = asked.ids(loaded)
            key = [asked.model, ids, asked.max_new_tokens]
            base = before["tokens"] if before.get("key") == key else ()
            # a number that is typed steers as the field is left, and Write, pressed for that, would do it again
            if before.get("asked") == asked and same_vectors(before["vectors"], vectors):
                yield {status: before["said"]}
                return
            found = shown_with(asked)
            yield {status: "Writing ...", base_seen: {**before, "asked": None}}
            for tokens in write_both(loaded, vectors, asked.scale, ids, asked.max_new_tokens, base):
                add_tokens(found, loaded, tokens)
                yield dict(zip((base_text, steered_text), texts(found), strict=True))
            said = {"asked": asked, "vectors": vectors, "said": summary(found)}
            yield {status: said["said"], base_seen: {"key": key, "tokens": tokens[0], **said}}
        except UNAVAILABLE as error:
            yield {status: f"**Nothing can be written.** {error}"}

    def look(have: dict[str, Any], seen: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        if not have:
            yield gr.skip(), gr.skip()
            return
        same = seen.get("model") == have["key"][0] and same_vectors(seen["vectors"], have["vectors"])
        rows = seen["rows"] if same else {}
        if same and seen["shown"] == have["chosen"]:
            yield gr.skip(), gr.skip()
            return
        yield note(f"Reading {len(have['chosen'])} vectors ..."), gr.skip()
        try:
            loaded = store.get(have["key"][0])
        except UNAVAILABLE as error:
            yield note(str(error)), gr.skip()
            return
        missing = [layer for layer in have["chosen"] if layer not in rows]
        rows = rows | {layer: lens_row(loaded, have["vectors"][layer]) for layer in missing}
        shown = {layer: rows[layer] for layer in have["chosen"]}
        yield lens_table(shown), {
            "model": have["key"][0], "vectors": have["vectors"], "rows": rows, "shown": have["chosen"]
        }  # fmt: skip

    def measure_effects(at: dict[str, Any], have: dict[str, Any], *values: Any) -> Iterator[dict[Any, Any]]:
        asked = settings(values)
        rows: dict[int, Row] = {}
        try:
            loaded, asked, vectors = yield from prepare(asked, progress, at, have)
            ids = asked.ids(loaded)
            for layer in reversed(vectors):  # the last layer's effect is the vector itself
                yield {progress: f"Layer {layer}: {len(rows)} of {len(vectors)} layers are measured ..."}
                rows[layer] = effect_row(loaded, layer, asked.scale * vectors[layer], ids)
                yield {effects: lens_table(rows)}
            yield {progress: f"**{asked.model}**, scale {asked.scale:g}, after the prompt above."}
        except UNAVAILABLE as error:
            yield {progress: f"**Nothing can be measured.** {error}"}

    def choose(source: str, at: dict[str, Any]) -> dict[Any, Any]:
        moved = place(source, at["model"], at["layers"])
        if source == BUNDLED:
            moved |= {prompt: SUM, chat: True}
        return {lists: gr.Column(visible=source == LISTS), adapter: gr.Textbox(visible=source == ADAPTER), **moved}

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    waiting: dict[str, Any] = {**private, "concurrency_limit": None}
    moved = [*sliders, known]
    gr.on(None, partial(load, store.default, LISTS, quietly=True), known, [status, *moved], **waiting)
    model.submit(load, [model, source, known], [status, *moved], **waiting)
    source.change(choose, [source, known], [lists, adapter, prompt, chat, *moved], **waiting)
    preset.input(PRESETS.get, preset, [towards, away], **waiting)
    writing = gr.on(
        [write.click, prompt.submit, *(one.release for one in sliders)],
        run,
        [known, made, base_seen, *fields.values()],
        [status, base_text, steered_text, base_seen, made, *moved],
        trigger_mode="always_last",  # where a slider rests counts, not where it has been
        **MODEL,
        **private,
    )
    looking: dict[str, Any] = {
        "inputs": [made, read],
        "outputs": [lens, read],
        "trigger_mode": "always_last",
        **waiting,
    }
    writing.success(look, **looking)
    stop.click(lambda: "Stopped.", None, status, cancels=[writing], **private).then(look, **looking)
    measuring = measure.click(
        measure_effects, [known, made, *fields.values()], [progress, effects, made, *moved], **MODEL, **private
    )
    stop_measuring.click(lambda: "Stopped.", None, progress, cancels=[measuring], **private)


def example(store: Store) -> dict[str, Any]:
    """What the page opens with, computed."""
    loaded = store.get(store.default)
    layers = anatomy(loaded.model).num_layers
    scale, first, last = defaults(LISTS, layers)
    towards, away = PRESETS[PRESET]
    asked = Settings(
        store.default, LISTS, towards, away, METHODS[0][1], "", scale, first, last, PROMPT, False, LENGTH
    )  # fmt: skip
    ids, vectors = asked.ids(loaded), asked.chosen(find_vectors(loaded, asked), layers)
    found = shown_with(asked)
    for tokens in write_both(loaded, vectors, scale, ids, LENGTH):
        add_tokens(found, loaded, tokens)
    return {
        "model": loaded.name,
        "layers": layers,
        "chat": asked.chat,
        **found,
        "status": summary(found),
        "lens": {layer: lens_row(loaded, vector) for layer, vector in vectors.items()},
        "effects": {layer: effect_row(loaded, layer, scale * vector, ids) for layer, vector in vectors.items()},
    }


def texts(found: Mapping[str, Any]) -> list[str]:
    """The base's text and the steered one, their prompt before them; coloured where they differ."""
    titles = ["Base", f"Steered: scale {found['scale']:g}, layers {found['first']} to {found['last']}"]
    before = Cell(found["prompt"] + ("\n" if found["chat"] else ""), 0, "")
    shown = []
    for title, name, marks in zip(titles, ("base", "steered"), marks_of(found), strict=True):
        cells = answer_cells({"answer": found[name]})
        cells = [cell._replace(heat=MARK * mark) for cell, mark in zip(cells, marks, strict=True)]
        shown.append(token_text([before, *cells], title))
    return shown


def lens_table(rows: Mapping[Any, Row]) -> str:
    """A row for each layer, the last on top: its vector's length, and the tokens it points to and away from."""
    ends = [(end, name, at) for end, name in (("top", "towards"), ("bottom", "away")) for at in range(WORDS)]
    columns = ["length", *(f"{name} {at + 1}" for _, name, at in ends)]
    full = max((abs(cos) for row in rows.values() for end in ("top", "bottom") for _, cos, _ in row[end]), default=0)
    shown = []
    for layer, row in sorted(rows.items(), key=lambda item: -int(item[0])):
        cells = [Cell(f"{row['length']:.1f}", 0, f"Layer {layer}: length {row['length']:.2f}")]
        for end, name, at in ends:
            text, cos, dot = row[end][at] if at < len(row[end]) else ["", 0.0, 0.0]
            tip = f"Layer {layer}, {name} {at + 1}: {visible(text)}, cosine {cos:.3f}, dot product {dot:.2f}"
            cells.append(Cell(visible(text), abs(cos) / (full or 1), tip))
        shown.append((str(layer), cells))
    return heat_map("layer", columns, shown, label="Lens: layers by the tokens that their vectors point to and from")
