"""What the pages look like: escaped tokens, heat maps as tables, one style for light and dark.

- A heat map is an HTML table: every cell holds text that can be read, selected and spoken, and it scrolls inside its
  own box, so a page stays as wide as the phone.
- Colour is a share of one accent mixed into the background, so text keeps its contrast in both themes.
- Pointing at a cell (or touching it) writes its details into the line above the map: phones have no hover.
- A chart over layers is an inline SVG, with the same numbers in a table below it for those who cannot see it.
- Everything that comes from a model or a user is escaped here.
"""

import html
import json
import math
import os
from collections import Counter
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
.lab-scroll table:has(.words) { width: 100%; }
.lab-scroll td.words { text-align: left; white-space: normal; max-width: none; min-width: 18em; width: 100%; }
.lab-scroll td.heat.words { min-width: 9em; max-width: 24em; width: auto; }
.lab-key { font-size: var(--text-sm); display: flex; gap: 1.5em; }
.lab-key span::before { content: ""; display: inline-block; width: 2em; margin-right: .4em; vertical-align: middle;
  border-top: 2px var(--lab-dash) var(--lab-line); }
.lab-0 { --lab-line: var(--neutral-500); --lab-dash: dashed; }
.dark .lab-0 { --lab-line: var(--neutral-400); }
.lab-1 { --lab-line: var(--color-accent); --lab-dash: solid; }
.lab-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); gap: 8px 16px; }
.lab-charts figure { margin: 0; }
.lab-charts figcaption { font-size: var(--text-sm); padding: 4px 0; }
.lab-charts svg { width: 100%; height: auto; max-width: 400px; display: block; }
.lab-charts text { font-size: 11px; fill: var(--body-text-color); }
.lab-charts .grid { stroke: var(--border-color-primary); }
.lab-charts polyline { fill: none; stroke: var(--lab-line); stroke-width: 2; }
.lab-charts polyline.lab-0 { stroke-dasharray: 5 3; }
.lab-charts circle { fill: var(--lab-line); }
.lab-charts polygon { fill: var(--lab-heat); fill-opacity: .25; }
.lab-charts circle.dot { fill: var(--lab-heat); fill-opacity: .55; }
.lab-charts rect { fill: transparent; }
.lab-charts rect.at { fill: var(--lab-heat); fill-opacity: .35; outline: none; }
.lab-view summary { cursor: pointer; padding: 6px 0; }
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
    """Text, colour in [0, 1], and what the line above says about it; `words` may be long."""

    text: str
    heat: float
    tip: str
    words: bool = False


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


def token_text(cells: Iterable[Cell], title: str = "") -> str:
    """Running text whose tokens are coloured, below a title if there is one."""
    spans = "".join(f"<span {_heat(cell)}>{html.escape(cell.text)}</span>" for cell in cells)
    head = f"<strong>{html.escape(title)}</strong>" if title else ""
    return f'{head}<div class="lab-line" aria-live="polite">{POINT}</div><div class="lab-text">{spans}</div>'


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
    return f'<div class="lab-line" aria-live="polite">{POINT}</div>' + table(
        corner, columns, rows, label=label, start=start
    )


def table(
    corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], *, label: str, start: int = 0
) -> str:
    """`heat_map` without the line above it; a cell without a tip is plain words."""
    heads = "".join(f'<th scope="col"{_place(at, start)}>{html.escape(name)}</th>' for at, name in enumerate(columns))
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td {_heat(cell)}>{html.escape(cell.text)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="lab-scroll" tabindex="0" role="region" aria-label="{html.escape(label)}"><table>'
        f'<thead><tr><th scope="col">{html.escape(corner)}</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def key(names: Sequence[str]) -> str:
    """Which line of the charts is which."""
    return (
        '<div class="lab-key">'
        + "".join(f'<span class="lab-{at}">{html.escape(name)}</span>' for at, name in enumerate(names) if name)
        + "</div>"
    )


def line_chart(
    title: str,
    lines: Sequence[tuple[str, Sequence[float]]],
    *,
    axis: str = "layer",
    first: int = 0,
    length: int = 0,
    dots: Sequence[Sequence[float]] = (),
    band: Sequence[tuple[float, float]] = (),
    tips: Sequence[str] = (),
) -> str:
    """
    A small chart over layers or other steps, as wide as it may be, at most two lines; an empty line is left out.

    Args:
        title (`str`): What is measured, with its unit.
        lines (`Sequence[tuple[str, Sequence[float]]]`): Name and a value for each step; the first is dashed.
        axis (`str`, *optional*, defaults to `"layer"`): What a step is.
        first (`int`, *optional*, defaults to 0): Number of the first step.
        length (`int`, *optional*, defaults to 0): Steps that the chart has room for, where more are to come.
        dots (`Sequence[Sequence[float]]`, *optional*): At each step, values that are shown as dots,
            larger where several are equal.
        band (`Sequence[tuple[float, float]]`, *optional*): At each step, the ends of what is shaded.
        tips (`Sequence[str]`, *optional*): At each step, what is told beside the values of the lines.
    """
    left, top, width, height = 44, 8, 268, 112
    values = [value for line in (*(line for _, line in lines), *dots) for value in line]
    low, high = min(values), max(values)
    if high - low < 1e-6:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    steps = max(len(line) for _, line in lines)
    last = max(steps, length) - 1

    def place(step: int, value: float) -> tuple[float, float]:
        return left + width * step / max(last, 1), top + height * (high - value) / (high - low)

    parts = []
    for value in (low, (low + high) / 2, high):
        y = place(0, value)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for x, text in ((left, first), (left + width / 2, axis), (left + width, first + last)):
        parts.append(f'<text x="{x}" y="{top + height + 18}" text-anchor="middle">{html.escape(str(text))}</text>')
    edge = [place(step, below) for step, (below, _) in enumerate(band)]
    edge += [place(step, above) for step, (_, above) in reversed(list(enumerate(band)))]
    if edge:
        parts.append(f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in edge)}"/>')
    for step, some in enumerate(dots):
        for value, count in Counter(some).items():
            x, y = place(step, value)
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{min(2.5 * math.sqrt(count), 9):.1f}"/>')
    for at, (_, line) in enumerate(lines):
        points = [place(step, value) for step, value in enumerate(line)]
        parts.append(f'<polyline class="lab-{at}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        parts += [f'<circle class="lab-{at}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points]
    wide = width / max(last, 1)
    for step in range(steps):  # lines may lie on one another, so each step is pointed at as a whole
        shown = ", ".join(f"{name} {line[step]:.3f}" for name, line in lines if line)
        tip = f"{title}, {axis} {first + step}: {shown}{tips[step] if tips else ''}"
        x = place(step, low)[0] - wide / 2
        parts.append(
            f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{height}" data-tip="{html.escape(tip)}"/>'
        )
    title = html.escape(title)
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 324 142" role="img" aria-label="{title}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _place(at: int, start: int) -> str:
    return (" data-start" if at == start - 1 else "") + (' class="strong"' if 0 < start <= at else "")


def _heat(cell: Cell) -> str:
    if not cell.tip:
        return 'class="words"'
    share, kind = round(100 * min(max(cell.heat, 0.0), 1.0)), "heat words" if cell.words else "heat"
    return f'class="{kind}" style="--p:{share}" data-tip="{html.escape(cell.tip)}"'


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
