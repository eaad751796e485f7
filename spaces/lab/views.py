"""What the pages look like: escaped tokens, heat maps as tables, one style for light and dark.

- A heat map is an HTML table: every cell holds text that can be read, selected and spoken, and it scrolls inside its
  own box, so a page stays as wide as the phone.
- Colour is a share of one accent mixed into the background, so text keeps its contrast in both themes.
- Pointing at a cell (or touching it) writes its details into the line above the map: phones have no hover.
- Everything that comes from a model or a user is escaped here.
"""

import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr


EXAMPLES = Path(__file__).with_name("examples")
POINT = "Point at a token or a cell, or touch it, for its details."

THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(  # the theme's own greys are too pale to read
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)

CSS = """
.lab-view { --lab-heat: #78b7ff; }
.dark .lab-view { --lab-heat: #1d63c4; }
.lab-view td, .lab-view th, .lab-text span { background: transparent; color: var(--body-text-color); }
.lab-view .heat { background: color-mix(in srgb, var(--lab-heat) calc(var(--p) * 1%), transparent); }
.lab-view .at { outline: 2px solid var(--color-accent); outline-offset: -2px; }
.lab-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; font-size: var(--text-lg); }
.lab-text span { border-radius: 3px; padding: 2px 0; }
.lab-line { min-height: 3.2em; font-size: var(--text-sm); overflow-wrap: anywhere; padding: 4px 0; }
.lab-scroll { overflow: auto; max-height: 80vh; position: relative; border: 1px solid var(--border-color-primary); }
.lab-scroll table { border-collapse: separate; border-spacing: 0; margin: 0; width: max-content;
  font: 12px/1.5 var(--font-mono); }
.lab-scroll td, .lab-scroll th { padding: 1px 4px; border: 0; white-space: pre; text-align: center; min-width: 2.9em;
  max-width: 9em; overflow: hidden; text-overflow: ellipsis; }
.lab-scroll th { font-weight: 400; background: var(--background-fill-secondary); }
.lab-scroll th.strong { font-weight: 700; }
.lab-scroll thead th { position: sticky; top: 0; z-index: 1; }
.lab-scroll tbody th, .lab-scroll thead th:first-child { position: sticky; left: 0; text-align: right;
  border-right: 1px solid var(--border-color-primary); }
.lab-scroll thead th:first-child { z-index: 2; }
"""

# delegated to the component's own element, which outlives its contents
POINT_JS = """
const show = (event) => {
  const cell = event.target.closest('[data-tip]');
  if (!cell) return;
  const line = element.querySelector('.lab-line');
  if (line) line.textContent = cell.dataset.tip;
  element.querySelectorAll('.at').forEach((old) => old.classList.remove('at'));
  cell.classList.add('at');
};
element.addEventListener('mouseover', show);
element.addEventListener('click', show);
const forward = () => {
  const box = element.querySelector('.lab-scroll');
  const start = element.querySelector('[data-start]');
  if (!box || !start || box.dataset.placed) return;
  box.dataset.placed = '1';
  box.scrollLeft = Math.max(0, start.offsetLeft - box.querySelector('th').offsetWidth);
};
new MutationObserver(forward).observe(element, { childList: true, subtree: true });
forward();
"""


class Cell(NamedTuple):
    """Text, colour in [0, 1], and what the line above says about it."""

    text: str
    heat: float
    tip: str


def view(value: str, label: str) -> gr.HTML:
    """A component for `token_text` or `heat_map`."""
    return gr.HTML(
        value, label=label, js_on_load=POINT_JS, elem_classes="lab-view", padding=False, apply_default_css=False
    )


def note(text: str) -> str:
    """A sentence in place of a map or a text."""
    return f'<div class="lab-line">{html.escape(text)}</div>'


def visible(text: str) -> str:
    """Token text in which spaces, line ends and what else has no shape can be seen; not yet escaped."""
    text = text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or "∅"


def token_text(cells: Iterable[Cell]) -> str:
    """Running text whose tokens are coloured."""
    spans = "".join(f"<span {_heat(cell)}>{html.escape(cell.text)}</span>" for cell in cells)
    return f'<div class="lab-line" aria-live="polite">{POINT}</div><div class="lab-text">{spans}</div>'


def write_text(title: str, prompt: str, text: str) -> str:
    """A prompt and what was written after it."""
    title, prompt, text = (html.escape(part) for part in (title, prompt, text))
    return (
        f'<strong>{title}</strong><div class="lab-text">{prompt}<span class="heat" style="--p:45">{text}</span></div>'
    )


def heat_map(
    corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], *, label: str, start: int = 0
) -> str:
    """
    A table that scrolls in its own box, with its heads in place.

    Args:
        corner (`str`): Head of the row heads.
        columns (`Sequence[str]`): Heads of the columns.
        rows (`Sequence[tuple[str, Sequence[Cell]]]`): Head and cells of each row.
        label (`str`): The table's name for those who hear it.
        start (`int`, *optional*, defaults to 0): This column's head and those after it stand out, and the box opens at
            the one before; 0 for none.
    """
    heads = "".join(f'<th scope="col"{_place(at, start)}>{html.escape(name)}</th>' for at, name in enumerate(columns))
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td {_heat(cell)}>{html.escape(cell.text)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="lab-line" aria-live="polite">{POINT}</div>'
        f'<div class="lab-scroll" tabindex="0" role="region" aria-label="{html.escape(label)}"><table>'
        f'<thead><tr><th scope="col">{html.escape(corner)}</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _place(at: int, start: int) -> str:
    return (" data-start" if at == start - 1 else "") + (' class="strong"' if 0 < start <= at else "")


def _heat(cell: Cell) -> str:
    share = round(100 * min(max(cell.heat, 0.0), 1.0))
    return f'class="heat" style="--p:{share}" data-tip="{html.escape(cell.tip)}"'


def read_example(page: str) -> dict[str, Any]:
    """The computed example of a page."""
    return json.loads((EXAMPLES / f"{page}.json").read_text(encoding="utf-8"))


def write_example(page: str, example: dict[str, Any]) -> Path:
    """Write it, at once and entirely."""
    target = EXAMPLES / f"{page}.json"
    part = target.with_suffix(".part")
    part.write_text(json.dumps(example, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    os.replace(part, target)
    return target
