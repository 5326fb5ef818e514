"""A page for a browser in one file: sections of words, pictures and tables, and nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself refuses to fetch anything."""

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --paper: #fff; --card: #f5f6f8;
  --line: #d9dce1; --good: #00704f; --bad: #b34700; --link: #0060a0;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --soft: #a2a6ad; --paper: #15171b; --card: #1f2228; --line: #3a3f48;
    --good: #4cc9a0; --bad: #ff9a57; --link: #6db8f2;
    --c0: #4aa8e8; --c1: #f08a45; --c2: #35c79b; --c3: #e29cc4; --c4: #f0b73f; --c5: #7fcbf5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
nav { font-size: .9rem; } nav a { margin-right: .6rem; display: inline-block; }
a { color: var(--link); }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.verdict { border-left: .35rem solid var(--soft); background: var(--card);
  padding: .5rem .8rem; margin: .6rem 0; max-width: 48rem; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.verdict b { display: block; } .verdict.good b { color: var(--good); }
.verdict.bad b { color: var(--bad); }
.figures { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); align-items: start; }
figure { margin: .5rem 0; min-width: 0; } figure.wide { grid-column: 1 / -1; }
figure svg { display: block; width: 100%; height: auto; max-width: 32rem; color: var(--ink); }
figure.wide { overflow-x: auto; } figure.wide svg { max-width: none; min-width: 44rem; }
figure svg.plain { background: #fff; color: #222; }
figure svg text { fill: currentColor; }
figure svg image, img { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; min-width: 4.5rem; }
pre { background: var(--card); padding: .6rem; overflow-x: auto;
  font-size: .8rem; margin: .5rem 0; }
.slides input { width: calc(100% - 10.5rem); max-width: 30rem; height: 2rem;
  vertical-align: middle; }
.slides button { font: inherit; min-width: 4.2rem; height: 2.2rem; vertical-align: middle; }
.slides output { display: inline-block; min-width: 4rem; text-align: right; }
.scripted .slide { display: none; } .scripted .slide.shown { display: block; }
.thumbs { display: flex; flex-wrap: wrap; gap: .6rem; margin: .3rem 0; }
.thumbs div { font-size: .75rem; text-align: center; max-width: 6.5rem; overflow-wrap: anywhere; }
.thumbs img { display: block; width: 4.5rem; height: 4.5rem; object-fit: contain; margin: auto;
  border: 1px solid var(--line); }
"""

_SCRIPT = """
for (const box of document.querySelectorAll(".slides")) {
  const slides = [...box.querySelectorAll(".slide")];
  const [range, button, label] = ["input", "button", "output"].map(n => box.querySelector(n));
  let timer = 0;
  const show = i => {
    slides.forEach((slide, k) => slide.classList.toggle("shown", k === i));
    label.textContent = slides[i].dataset.label;
    range.value = i;
  };
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
  range.oninput = () => { stop(); show(+range.value); };
  button.onclick = () => {
    if (timer) return stop();
    button.textContent = "Stop";
    timer = setInterval(() => show((+range.value + 1) % slides.length), 400);
  };
  range.max = slides.length - 1;
  box.classList.add("scripted");
  box.querySelector(".controls").hidden = false;
  show(0);
}
"""


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        title: its heading.
        body: HTML.
    """

    title: str
    body: str


class Slide(NamedTuple):
    """One of several pictures of which one is seen at a time.

    Attributes:
        label: shown beside the slider.
        svg: the picture.
    """

    label: str
    svg: str


def page(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """Return a whole page.

    Args:
        title: the heading.
        sections: in their order.
        lead: HTML before the first section.
    """
    links = " ".join(
        f'<a href="#s{i}">{html.escape(section.title)}</a>' for i, section in enumerate(sections)
    )
    body = "".join(
        f'<section id="s{i}"><h2>{html.escape(section.title)}</h2>{section.body}</section>\n'
        for i, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>{lead}<nav>{links}</nav>\n{body}"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def words(text: str, *, soft: bool = False) -> str:
    """Return a paragraph."""
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{html.escape(text)}</p>"


def verdict(head: str, text: str = "", *, good: bool | None = None) -> str:
    """Return a statement that stands out; ``good=None`` neither praises nor warns."""
    kind = {None: "", True: " good", False: " bad"}[good]
    return f'<div class="verdict{kind}"><b>{html.escape(head)}</b>{html.escape(text)}</div>'


def picture(svg: str, caption: str, *, wide: bool = False) -> str:
    """Return a figure with its caption."""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def side_by_side(parts: Iterable[str]) -> str:
    """Return figures that stand beside each other where there is room."""
    return f'<div class="figures">{"".join(parts)}</div>'


def slides(shown: Sequence[Slide], caption: str) -> str:
    """Return pictures with a slider; without a script all of them are seen."""
    pictures = "".join(
        f'<div class="slide" data-label="{html.escape(s.label)}">{s.svg}</div>' for s in shown
    )
    return (
        '<figure class="slides"><div class="controls" hidden><button type="button">Play</button> '
        f'<input type="range" min="0" value="0" aria-label="{html.escape(caption)}"> '
        f"<output></output></div>{pictures}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>'


def listing(text: str) -> str:
    """Return text whose columns must stay."""
    return f"<pre>{html.escape(text)}</pre>"


def thumbnails(shown: Iterable[tuple[str, str]]) -> str:
    """Return small pictures with a line below each.

    Args:
        shown: (address of the picture, or nothing; text).
    """
    cells = []
    for source, text in shown:
        image = f'<img src="{source}" alt="">' if source else ""
        cells.append(f"<div>{image}{html.escape(text)}</div>")
    return f'<div class="thumbs">{"".join(cells)}</div>'
