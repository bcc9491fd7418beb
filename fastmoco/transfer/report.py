"""The page about one transfer: scores, curves, and pictures with what was found in them.

H W of a picture, n objects on it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmoco.data.page import document, picture, write_page
from fastmoco.run.page.html_report import NAME, STYLE
from fastmoco.run.page.html_report import Picture as Picture
from fastmoco.run.page.svg_plot import Line, number, plot, swatch
from fastmoco.run.record import METRICS, Record, read_records
from fastmoco.transfer.datasets.detection import pycocotools
from fastmoco.transfer.datasets.segmentation import IGNORE

PICTURES = 8
"""So many test pictures are drawn, evenly spaced."""
LEAST_SCORE = 0.5
"""Of a detection that is drawn."""
# Okabe and Ito's colours: they stay apart for colour-blind readers. Further classes begin again.
COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)
_WIDTH = 480  # of a drawn picture
_GAP = 8


def colour(label: int) -> tuple[int, int, int]:
    """Of a class, from 1 on."""
    return COLOURS[(label - 1) % len(COLOURS)]


def draw_objects(image: Tensor, found: Mapping[str, Any], names: Sequence[str]) -> Image.Image:
    """A picture, uint8 (3, H, W), with boxes, and masks and keypoints where there are some.

    found: a target, or a prediction whose masks are run lengths; its rows are all drawn.
    """
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
    labels = [int(label) for label in found["labels"]]
    for mask, label in zip(_masks(found), labels, strict=False):
        pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(colour(label), np.float32)
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    scale = _WIDTH / drawn.width
    drawn = drawn.resize((_WIDTH, max(1, round(scale * drawn.height))), Image.Resampling.BILINEAR)
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(13)
    scores = found.get("scores", [None] * len(labels))
    for box, label, score in zip(found["boxes"].tolist(), labels, scores, strict=True):
        corners = [scale * x for x in box]
        pen.rectangle(corners, outline=colour(label), width=3)
        text = names[label - 1] + ("" if score is None else f" {100 * float(score):.0f} %")
        place = (corners[0], max(0.0, corners[1] - 16))
        pen.rectangle(pen.textbbox(place, text, font=font), fill=colour(label))
        pen.text(place, text, fill="white", font=font)
    for points, label in zip(found.get("keypoints", ()), labels, strict=False):
        for x, y, seen in points.tolist():
            if seen > 0:
                x, y = scale * (x + 0.5), scale * (y + 0.5)
                pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour(label), outline="white")
    return drawn


def _masks(found: Mapping[str, Any]) -> list[np.ndarray]:
    masks = found.get("masks", ())
    if isinstance(masks, Tensor):
        return [mask.numpy() > 0 for mask in masks]
    return [pycocotools().mask.decode(one) > 0 for one in masks]


def draw_classes(image: Tensor, labels: Tensor) -> Image.Image:
    """A picture under the colours of its classes: uint8 (3, H, W) and (H, W); 0 has none."""
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
    for label in labels.unique().tolist():
        if label:
            paint = (255, 255, 255) if label == IGNORE else colour(label)
            inside = (labels == label).numpy()
            pixels[inside] = 0.4 * pixels[inside] + 0.6 * np.array(paint, np.float32)
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    height = max(1, round(_WIDTH / drawn.width * drawn.height))
    return drawn.resize((_WIDTH, height), Image.Resampling.NEAREST)


def beside(pictures: Sequence[Image.Image]) -> bytes:
    """PNG of pictures of one height in a row."""
    width = sum(one.width + _GAP for one in pictures) - _GAP
    row = Image.new("RGB", (width, max(one.height for one in pictures)), "white")
    left = 0
    for one in pictures:
        row.paste(one, (left, 0))
        left += one.width + _GAP
    drawn = io.BytesIO()
    row.save(drawn, "PNG")
    return drawn.getvalue()


def chosen(count: int) -> list[int]:
    """Numbers of the pictures that are drawn, of `count`."""
    most = min(PICTURES, count)
    return [i * count // most for i in range(most)]


def confident(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """The detections of a picture that are drawn."""
    kept = (prediction["scores"] >= LEAST_SCORE).nonzero().flatten().tolist()
    return {
        name: rows[torch.tensor(kept, dtype=torch.int64)]
        if isinstance(rows, Tensor)
        else [rows[i] for i in kept]
        for name, rows in prediction.items()
    }


def write_report(
    out: Path,
    title: str,
    sentence: str,
    options: Mapping[str, Any],
    pictures: Sequence[Picture],
) -> Path:
    """Write the page about the run in `out` from its records; where it is.

    Raises `ConfigError` where it cannot be written.
    """
    records = read_records(out / METRICS)
    body = [f"<h1>{escape(title)}</h1>", f'<p class="summary">{escape(sentence)}</p>']
    body += [_table(records)]
    body += ['<h2>Curves over steps</h2><div class="panels">', *_panels(records), "</div>"]
    if pictures:
        figures = [picture(name, caption, "png", png) for name, caption, png in pictures]
        body += ['<h2>Test pictures</h2><div class="pictures">', *figures, "</div>"]
    told = "\n".join(f"{name}: {value}" for name, value in sorted(options.items()))
    body += [f"<details><summary>Options</summary><pre>{escape(told)}</pre></details>"]
    write_page(out / NAME, document(title, "fastmoco report", "".join(body), STYLE + _TABLE))
    return out / NAME


_TABLE = "table{border-collapse:collapse}td,th{padding:.2em .9em .2em 0;text-align:left}"


def _table(records: Sequence[Record]) -> str:
    """The last scores: those of all classes, then those of each."""
    tests = [record for record in records if record.kind == "test"]
    if not tests:
        return '<p class="calm">Not tested yet.</p>'
    last = tests[-1]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{value:.2f}</td></tr>"
        for name, value in last.values.items()
    )
    return f"<h2>Scores at step {last.step} (%)</h2><table><tbody>{rows}</tbody></table>"


def _panels(records: Sequence[Record]) -> list[str]:
    """Losses, scores, learning rate and speed; a figure for what was recorded."""
    train = [record for record in records if record.kind == "train"]
    tests = [record for record in records if record.kind == "test"]
    losses = sorted({n for r in train for n in r.values if n.startswith("loss_")})
    scores = sorted({n for r in tests for n in r.values if "/" not in n})
    panels = (
        ("Loss", train, ["loss"]),
        ("Parts of the loss", train, losses[:6]),
        ("Scores (%)", tests if len(tests) > 1 else [], scores[:6]),
        ("Learning rate", train, ["lr"]),
        ("Pictures per second", train, ["images_per_second"]),
        ("Time spent waiting for data (%)", train, ["data_wait_percent"]),
    )
    return [_panel(title, rows, names) for title, rows, names in panels if rows and names]


def _panel(title: str, rows: Sequence[Record], names: Sequence[str]) -> str:
    lines, legend = [], []
    for style, name in enumerate(names):
        with_it = [record for record in rows if name in record.values]
        values = [record.values[name] for record in with_it]
        lines.append(Line(name, [float(record.step) for record in with_it], values, style))
        legend.append(f"<li>{swatch(style)}{escape(name)} <b>{number(values[-1])}</b></li>")
    low = 0.0 if all(y >= 0 for line in lines for y in line.y) else None
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{plot(title, lines, [], low=low)}"
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )
