"""What was found, as a page with pictures: a contact sheet, and copies beside each other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmoco.data.inspect.findings import Findings, Section, examples, sections
from fastmoco.data.inspect.look import evenly_spaced, picture_of
from fastmoco.data.page import document, embedded, words
from fastmoco.data.pixels.deep import Deep, visible
from fastmoco.data.pixels.rule import BadImage, PixelRule
from fastmoco.data.reader import read_sample
from fastmoco.data.sources.measure import progress
from fastmoco.data.sources.source import Source

CONTACTS = 60
PAIRS = 4  # of each kind
_THUMB = 128
_QUALITY = 80
STRETCH = 1, 99  # percentiles
STYLE = """
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px}
th,td{text-align:left;padding:.25em 1em .25em 0;border-bottom:1px solid var(--line);
vertical-align:top}
th{font-weight:600;color:var(--faint)}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td:last-child{overflow-wrap:anywhere;min-width:3.5em}
@media (max-width:480px){table{font-size:12.5px}th,td{padding-right:.6em}}
pre{border:1px solid var(--line);border-radius:6px;padding:.7em 1em;font-size:13px}
p,li{overflow-wrap:anywhere}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(96px,1fr));gap:6px}
.sheet img,.pair img{display:block;width:100%;aspect-ratio:1;object-fit:contain;
background:var(--line);border-radius:3px;image-rendering:auto}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr));gap:16px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:4px}
.pairs figcaption{font-size:13px}
.pairs p{overflow-wrap:anywhere;font-size:12px}
"""


def page_of(found: Findings) -> str:
    """The whole HTML text."""
    rule = PixelRule.of(found.config.data)
    body = [f"<h1>{escape(found.root)}</h1>"]
    body += [_section(section) for section in sections(found)]
    body += [_advice(found), _pairs(found, rule), _sheet(found, rule)]
    name = Path(found.root).name or found.root
    return document(name, "fastmoco inspect", "".join(body), STYLE)


def _section(section: Section) -> str:
    told = "".join(f"<p>{words(one)}</p>" for one in section.sentences)
    return f"<h2>{escape(section.title)}</h2>{_table(section.header, section.rows)}{told}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    numbers = [all(row[at].replace(",", "").isdigit() for row in rows) for at in range(len(header))]

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="n"' if number else "" for number in numbers)
        inside = (f"<{tag}{k}>{words(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inside)}</tr>"

    top = line(header, "th") if any(header) else ""
    return f'<div class="wide"><table>{top}{"".join(line(row, "td") for row in rows)}</table></div>'


def _advice(found: Findings) -> str:
    advice = found.advice
    told = "".join(f"<p>{words(note)}</p>" for note in advice.notes)
    if not advice.lines:
        return f"<h2>Recommended</h2>{told}"
    return (
        f"<h2>Recommended</h2><p>As a file for <code>--config</code>:</p>"
        f"<pre>{escape(advice.yaml())}</pre><p>The same as options:</p>"
        f"<pre>{escape(advice.command())}</pre>{told}"
    )


def _pairs(found: Findings, rule: PixelRule) -> str:
    figures = []
    for kind, a, b in examples(found, PAIRS):
        both = "".join(_thumbnail(*_of(found, place), rule) for place in (a, b))
        names = "<br>".join(escape(found.name_at(place)) for place in (a, b))
        caption = f"<figcaption>{escape(kind)}</figcaption>"
        figures.append(f'<figure>{caption}<div class="pair">{both}</div><p>{names}</p></figure>')
    return f'<h2>Copies</h2><div class="pairs">{"".join(figures)}</div>' if figures else ""


def _of(found: Findings, place: int) -> tuple[Source, int]:
    sample = found.duplicates.looks[place].sample
    test = found.test if place >= found.duplicates.training else None
    return test or found.source, sample


def _sheet(found: Findings, rule: PixelRule) -> str:
    """Good pictures, evenly spaced."""
    good = found.contents.good
    chosen = [good[at].sample for at in evenly_spaced(len(good), CONTACTS)]
    drawn = progress(chosen, lambda _: 1, "contact sheet", len(chosen))
    images = "".join(_thumbnail(found.source, sample, rule) for sample in drawn)
    return f'<h2>Contact sheet</h2><div class="sheet">{images}</div>' if images else ""


def _thumbnail(source: Source, sample: int, rule: PixelRule) -> str:
    try:
        picture = picture_of(read_sample(source, sample), rule)
    except BadImage:  # gone since
        return ""
    image = Image.fromarray(_stretched(picture)) if isinstance(picture, Deep) else picture.copy()
    image.thumbnail((_THUMB, _THUMB))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return embedded(source.name(sample), "jpeg", file.getvalue())


def _stretched(picture: Deep) -> NDArray[np.uint8]:
    """(H, W, 3). Above 8 bits each channel over its own range: bands differ in brightness."""
    width, height = picture.size
    whole = picture.box(0, 0, height, width)
    if picture.values.dtype != np.uint8:
        low, high = np.percentile(whole, STRETCH, axis=(1, 2), keepdims=True)
        whole = (whole - low) * (255 / np.maximum(high - low, 1e-6))
    return visible(whole.transpose(1, 2, 0))
