"""One self-contained page: pictures, tables, and parts in which one can point and click. It works from file://, offline.

`picture`, `words`, `attention` and `grid` make its parts, as HTML.
"""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from papagaio.files import write_whole


def picture(path: Path) -> str:
    """A PNG file, which becomes a part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(path.stem)}">'


def words(points: Any, names: list[str], groups: list[int], near: list[list[int]], colours: Sequence[str]) -> str:
    """Points (N, 2) with names and groups. A click on a word marks its nearest words, `near` (N, k) by number."""
    return _widget("words", points=_rounded(points), names=names, groups=groups, near=near, colours=colours)


def attention(tokens: list[str], weights: Any, habits: list[list[str]]) -> str:
    """Tokens, weights (L, H, T, T) and habits (L, H). A click on a token shows what it looks at, in the head that is chosen."""
    return _widget("attention", tokens=tokens, weights=_rounded(weights), habits=habits)


def grid(rows: list[str], columns: list[str], values: Any, texts: list[list[str]], details: list[list[str]]) -> str:
    """Cells with a value from 0 to 1 and a text; pointing at a cell shows its `details`."""
    return _widget("grid", rows=rows, columns=columns, values=_rounded(values), texts=texts, details=details)


def _rounded(values: Any) -> Any:
    return np.asarray(values, dtype=float).round(3).tolist()


def _widget(kind: str, **data: Any) -> str:
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text may end the script
    return f'<div class="widget" data-kind="{kind}"><script type="application/json">{text}</script></div>'


def write(path: Path, title: str, text: str, parts: Iterable[str]) -> None:
    """Write the page: its title, the text as in the terminal, and the parts."""
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(text)}</pre>", *parts])
    write_whole(path, PAGE.replace("TITLE", html.escape(title)).replace("BODY", body))


@dataclass
class Found:
    """What a command found: lines for standard output, pictures by name, and what the page has besides them."""

    lines: list[str] = field(default_factory=list)
    pictures: dict[str, Any] = field(default_factory=dict)  # figures of matplotlib
    parts: list[str] = field(default_factory=list)  # HTML


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<style>
body { font: 15px/1.45 sans-serif; margin: 1.5em auto; max-width: 76em; padding: 0 1em; color: #111; background: #fff }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto } img { max-width: 100% }
.widget { border: 1px solid #bbb; padding: .8em; margin: 1em 0; overflow-x: auto }
.token { display: inline-block; padding: .15em .3em; margin: .1em; border-radius: .25em; cursor: pointer; white-space: pre }
.token.chosen { outline: 2px solid #D55E00 } td { padding: .15em .35em; font-size: 12px; white-space: pre; cursor: default }
svg text { font-size: 10px; pointer-events: none } circle { cursor: pointer } .detail { min-height: 3em; white-space: pre-wrap }
</style></head><body>
BODY
<script>
const make = (parent, name, text) => { const e = document.createElement(name); if (text !== undefined) e.textContent = text;
  parent.appendChild(e); return e };
const SVG = "http://www.w3.org/2000/svg";
const shade = v => `rgba(0, 114, 178, ${Math.max(0, Math.min(1, v))})`;
const ink = v => v > 0.55 ? "#fff" : "#111";
const widgets = {
  grid(box, d) {
    const detail = make(box, "div", "point at a cell"), table = make(box, "table"); detail.className = "detail";
    const head = make(table, "tr"); make(head, "td"); d.columns.forEach(c => make(head, "td", c));
    d.rows.forEach((name, i) => { const row = make(table, "tr"); make(row, "td", name);
      d.texts[i].forEach((text, j) => { const cell = make(row, "td", text); cell.style.background = shade(d.values[i][j]);
        cell.style.color = ink(d.values[i][j]);
        cell.onmouseenter = cell.onclick = () => detail.textContent = `${name}, after ${d.columns[j]}: ${d.details[i][j]}` }) });
  },
  attention(box, d) {
    const line = make(box, "div", "layer and head: "), pick = make(line, "select"), text = make(box, "div");
    const note = make(box, "div", "click on a token: the darker a token, the more it is looked at"); note.className = "detail";
    d.habits.forEach((heads, i) => heads.forEach((habit, h) => {
      make(pick, "option", `${i + 1}.${h + 1}  ${habit}`).value = `${i},${h}` }));
    let chosen = d.tokens.length - 1;
    const tokens = d.tokens.map((t, i) => { const e = make(text, "span", t); e.className = "token";
      e.onclick = () => { chosen = i; show() }; return e });
    function show() { const [i, h] = pick.value.split(",").map(Number), row = d.weights[i][h][chosen];
      tokens.forEach((e, j) => { e.classList.toggle("chosen", j === chosen); e.style.background = shade(row[j] || 0);
        e.style.color = ink(row[j] || 0); e.title = (row[j] || 0).toFixed(3) });
      const best = row.map((w, j) => [w, j]).sort((a, b) => b[0] - a[0]).slice(0, 5);
      note.textContent = `${d.tokens[chosen]} looks at: ` + best.map(([w, j]) => `${d.tokens[j]} ${w.toFixed(2)}`).join(", ") }
    pick.onchange = show; show();
  },
  words(box, d) {
    const svg = box.appendChild(document.createElementNS(SVG, "svg")), note = make(box, "div", "click on a word");
    note.className = "detail"; svg.setAttribute("viewBox", "0 0 1000 640"); svg.style.width = "100%";
    const range = k => { const v = d.points.map(p => p[k]); return [Math.min(...v), Math.max(...v)] };
    const [x, y] = [range(0), range(1)];
    const at = p => [30 + 900 * (p[0] - x[0]) / (x[1] - x[0]), 610 - 580 * (p[1] - y[0]) / (y[1] - y[0])];
    const dots = d.points.map((p, i) => { const [cx, cy] = at(p), dot = document.createElementNS(SVG, "circle");
      const label = document.createElementNS(SVG, "text");
      dot.setAttribute("cx", cx); dot.setAttribute("cy", cy); dot.setAttribute("r", 4);
      dot.setAttribute("fill", d.colours[d.groups[i] % d.colours.length]);
      label.setAttribute("x", cx + 5); label.setAttribute("y", cy + 3); label.textContent = d.names[i];
      dot.onclick = () => { dots.forEach((e, j) => { const near = j === i || d.near[i].includes(j);
          e.setAttribute("r", near ? 7 : 3); e.setAttribute("opacity", near ? 1 : .35) });
        note.textContent = `${d.names[i]}: ` + d.near[i].map(j => d.names[j]).join(", ") };
      svg.append(dot, label); return dot });
  },
};
for (const box of document.querySelectorAll(".widget"))
  widgets[box.dataset.kind](box, JSON.parse(box.firstElementChild.textContent));
</script></body></html>
"""
