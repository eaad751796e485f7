"""Page "Lens": talk to a model, see how sure it was of every token, and what it would have said after each layer."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
import torch
from store import MODEL, UNAVAILABLE, Loaded, Message, Store, Token
from views import Cell, heat_map, note, read_example, token_text, view, visible

from hf_ext.analysis.lens import logit_lens


TITLE = "Lens"
INTRO = """\
The answer's tokens are coloured by the probability that the model gave them, and each cell of the map shows what the
model would say next if it stopped after that layer (the *logit lens*).

Papers: the lens and its limits, [arXiv 2303.08112](https://arxiv.org/abs/2303.08112);
SmolLM2, [arXiv 2502.02737](https://arxiv.org/abs/2502.02737) (here de-quantised from 4 bits).
"""
CODE = """\
from hf_ext.analysis.lens import logit_lens
from hf_ext.tiny import load

model, tokenizer = load("smollm2")  # or a folder, or a Hub id
chat = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)

lens = logit_lens(model, ids)  # top_ids and top_probs: [layers + 1, batch, seq, 5]
position = inputs.input_ids.shape[1] - 1  # where the answer's first token is predicted
for layer, guesses in zip(lens.layers, lens.top_ids[:, 0, position]):
    print(layer, [tokenizer.decode(i) for i in guesses])
"""
QUESTION = "What is the capital of France?"
TOP, FINAL = "the cell's own token", "the model's final choice"
COLUMNS = 128  # of the map: the newest positions
MAX_TOKENS = 256  # of a conversation under the lens: every layer is decoded at every position


def build(store: Store) -> None:
    """The page, inside `gr.Blocks`."""
    example = read_example("lens")
    gr.Markdown(INTRO)
    status = gr.Markdown(f"Loading {store.default} ...")
    with gr.Row():
        name = gr.Textbox(store.default, label="Model", info="smollm2, a Hub id or a folder; Enter loads it", scale=2)
        max_new_tokens = gr.Slider(8, 256, 96, step=8, label="Tokens at most")
        temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature")
    chatbot = gr.Chatbot(
        example["messages"], label="Chat", height=260, buttons=[], feedback_options=None, show_label=False
    )
    with gr.Row():
        message = gr.Textbox(show_label=False, label="Message", placeholder="Say something", scale=4, max_lines=4)
        send = gr.Button("Send", variant="primary", min_width=80)
        stop = gr.Button("Stop", min_width=80)
    gr.Markdown("### How sure it was\nThe stronger the colour, the likelier the token was.")
    answer = view(token_text(answer_cells(example)), "Answer")
    gr.Markdown("### Layer by layer\nColumns: the text, a token each. Rows: layers passed, the model's output on top.")
    colour = gr.Radio([TOP, FINAL], value=TOP, label="Colour: probability of")
    lens = view(lens_map(example["lens"], TOP), "Logit lens")
    with gr.Accordion("The same in Python", open=False):
        gr.Code(CODE, language="python", interactive=False, show_label=False, buttons=["copy"], wrap_lines=True)

    written = gr.State({})  # {"name", "ids", "start"} of the newest answer
    seen = gr.State(example["lens"])

    def unavailable(name: str, error: Exception) -> str:
        return f"**{name} is not available.** {error}\n\nWhat you see was computed earlier with {example['model']}."

    def ready(loaded: Loaded) -> str:
        return f"**{loaded.name}** is ready: {loaded.model.num_parameters() / 1e6:,.1f} million parameters."

    def load(name: str) -> Iterator[str]:
        name = name.strip() or store.default
        yield f"Loading {name} ..."
        try:
            yield ready(store.get(name))
        except UNAVAILABLE as error:
            yield unavailable(name, error)

    def respond(
        message: str, history: list[Message], name: str, max_new_tokens: int, temperature: float
    ) -> Iterator[tuple[Any, ...]]:
        if not message.strip():
            raise gr.Error("Write a message first.", print_exception=False)
        history = [plain(turn) for turn in history]
        if history == example["messages"]:
            history = []  # the example is not the user's conversation
        history.append({"role": "user", "content": message})
        name = name.strip() or store.default
        unchanged = [gr.skip()] * 5
        yield *unchanged, f"Loading {name} ..."
        try:
            loaded = store.get(name)
        except UNAVAILABLE as error:
            yield *unchanged, unavailable(name, error)
            return
        yield history, "", note("..."), note("Follows when the answer is complete."), {}, ready(loaded)
        history.append({"role": "assistant", "content": ""})
        tokens: list[Token] = []
        try:
            ids = loaded.chat_ids(history[:-1])
            for token in loaded.write(ids, max_new_tokens=max_new_tokens, temperature=temperature):
                tokens.append(token)
                new_ids = [token.id for token in tokens]
                history[-1]["content"] = loaded.text(new_ids)
                coloured = token_text(answer_cells(answer_example(loaded, tokens)))
                written = {"name": name, "ids": ids + new_ids, "start": len(ids)}
                yield history, "", coloured, gr.skip(), written, gr.skip()
        except ValueError as error:
            yield history[:-1], "", note(str(error)), note(""), {}, gr.skip()

    def look(written: dict[str, Any], seen: dict[str, Any], colour: str) -> Iterator[tuple[Any, Any]]:
        ids = written.get("ids", [])
        if not ids or ids == seen["ids"]:
            yield gr.skip(), gr.skip()
        elif len(ids) > MAX_TOKENS:
            yield note(f"The lens reads at most {MAX_TOKENS} tokens, the chat has {len(ids)}: clear it."), gr.skip()
        else:
            yield note(f"Decoding every layer at {len(ids)} positions ..."), gr.skip()
            try:
                found = lens_example(store.get(written["name"]), ids, written["start"])
            except UNAVAILABLE as error:
                yield note(str(error)), gr.skip()
            else:
                yield lens_map(found, colour), found

    def chat(
        message: str, model: str = store.default, max_new_tokens: int = 96, temperature: float = 0.0
    ) -> Iterator[str]:
        """Answer a message; yields the answer so far, token by token."""
        try:
            loaded = store.get(model)
            ids, new_ids = loaded.chat_ids([{"role": "user", "content": message}]), []
            for token in loaded.write(ids, max_new_tokens=max_new_tokens, temperature=temperature):
                new_ids.append(token.id)
                yield loaded.text(new_ids)
        except UNAVAILABLE as error:
            raise gr.Error(str(error), print_exception=False) from error

    private: dict[str, Any] = {"api_visibility": "private"}
    waiting: dict[str, Any] = {**private, "concurrency_limit": None, "show_progress": "hidden"}
    gr.on(None, partial(load, store.default), None, status, **waiting)
    name.submit(load, name, status, **waiting)
    answering = gr.on(
        [message.submit, send.click],
        respond,
        [message, chatbot, name, max_new_tokens, temperature],
        [chatbot, message, answer, lens, written, status],
        show_progress="hidden",
        **MODEL,
        **private,
    )
    looking: dict[str, Any] = {
        "inputs": [written, seen, colour],
        "outputs": [lens, seen],
        "show_progress": "hidden",
        **MODEL,
        **private,
    }
    answering.success(look, **looking)
    stop.click(None, None, None, cancels=[answering], **private).then(look, **looking)
    chatbot.clear(lambda: (note(""), {}), None, [answer, written], cancels=[answering], **private)
    colour.change(lens_map, [seen, colour], lens, show_progress="hidden", **private)
    gr.api(chat, api_name="chat", **MODEL)


def example(store: Store) -> dict[str, Any]:
    """What the page opens with, computed."""
    loaded = store.get(store.default)
    history = [{"role": "user", "content": QUESTION}]
    ids = loaded.chat_ids(history)
    tokens = list(loaded.write(ids, max_new_tokens=48))
    new_ids = [token.id for token in tokens]
    return {
        "model": loaded.name,
        "messages": [*history, {"role": "assistant", "content": loaded.text(new_ids)}],
        **answer_example(loaded, tokens),
        "lens": lens_example(loaded, ids + new_ids, len(ids)),
    }


def plain(turn: Message) -> Message:
    """A turn as the chatbot gives it back, as a chat template wants it."""
    content = turn["content"]
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return {"role": turn["role"], "content": content}


def answer_example(loaded: Loaded, tokens: list[Token]) -> dict[str, Any]:
    """The answer as the page needs it: tokens [(text, probability, guesses [(text, probability)])]."""
    return {
        "answer": [
            [loaded.text([t.id], special=True), round(t.probability, 4), _guesses(loaded, *zip(*t.top, strict=True))]
            for t in tokens
        ]
    }


def answer_cells(example: dict[str, Any]) -> list[Cell]:
    """Coloured tokens of an answer."""
    return [Cell(text, p, f"{visible(text)} {p:.1%}. Likeliest: {_tip(top)}") for text, p, top in example["answer"]]


def lens_example(loaded: Loaded, ids: list[int], start: int) -> dict[str, Any]:
    """
    The logit lens of `ids` as the page needs it, the newest `COLUMNS` positions.

    Returns:
        `dict`: `ids`, `start` (column of the first token written), `text` (a token for each column), and for each
        layer of `layers` and each column `guesses` [(text, probability)] and `final`, the final choice's probability.
    """
    lens = logit_lens(loaded.model, torch.tensor([ids], device=loaded.model.device))
    first = max(0, len(ids) - COLUMNS)
    top_ids, top_probs = lens.top_ids[:, 0, first:].tolist(), lens.top_probs[:, 0, first:].tolist()
    return {
        "ids": ids,
        "start": max(0, start - first),
        "text": [loaded.text([i], special=True) for i in ids[first:]],
        "layers": lens.layers,
        "guesses": [
            [_guesses(loaded, *cell) for cell in zip(*row, strict=True)]
            for row in zip(top_ids, top_probs, strict=True)
        ],
        "final": [[round(p, 4) for p in row] for row in lens.target_prob[:, 0, first:].tolist()],
    }


def lens_map(found: dict[str, Any], colour: str) -> str:
    """The heat map of a `lens_example`."""
    columns = [visible(text) for text in found["text"]]
    rows = []
    for layer, guesses, final in reversed(list(zip(found["layers"], found["guesses"], found["final"], strict=True))):
        cells = [
            Cell(
                visible(top[0][0]),
                p if colour == FINAL else top[0][1],
                f"After {columns[at]} (position {at}), layer {layer}: {_tip(top)}. Final choice: {p:.1%}",
            )
            for at, (top, p) in enumerate(zip(guesses, final, strict=True))
        ]
        rows.append((str(layer), cells))
    return heat_map("layer", columns, rows, label="Logit lens: layers by positions", start=found["start"])


def _guesses(loaded: Loaded, ids: Any, probabilities: Any) -> list[list[Any]]:
    return [[loaded.text([i], special=True), round(p, 4)] for i, p in zip(ids, probabilities, strict=True)]


def _tip(guesses: list[Any]) -> str:
    return ", ".join(f"{visible(text)} {p:.1%}" for text, p in guesses)
