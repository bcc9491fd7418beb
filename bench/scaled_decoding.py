"""JPEG decoding at 1/2, 1/4 or 1/8 where the crops allow it: `python -m bench.scaled_decoding`.

libjpeg decodes to a fraction of the size at a fraction of the cost (PIL's `draft`). A view loses
nothing by it only where its box is at least that many times as large as the view, in both views of
the image. Measures how often that is so on the images below `--root`, CPU milliseconds per image of
decoding and cropping both views, and the levels by which the views then differ.

    --rounds N     passes over the images, in turns (11)
    --publish      append rows to bench/results/scaled_decoding.jsonl; refused for a dirty tree
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.measure import terminal
from bench.measure.case import origin
from bench.measure.harness import RESULTS, spread, write_rows
from fastmoco.config import AugmentConfig
from fastmoco.data.decode import image_size
from fastmoco.data.sources.folder import open_folder
from fastmoco.data.table import Int64, UInt8, draw_uniforms, view_table

ROWS = RESULTS / "scaled_decoding.jsonl"
SCALES = (8, 4, 2)
Boxes = tuple[Int64, Int64]
"""Top, left, height and width of both views' crops."""
Item = tuple[bytes, Boxes]
"""A JPEG and the boxes of its views."""


def scale_of(boxes: Boxes, side: int) -> int:
    """The largest reduction that leaves every box at least as large as the view; 1 for none."""
    least = min(int(box[2:].min()) for box in boxes)
    return next((scale for scale in SCALES if least >= scale * side), 1)


def crops(data: bytes, boxes: Boxes, side: int, scaled: bool) -> list[UInt8]:
    """Both views of a JPEG before any colour operation: decoded, cut and resized by PIL."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        scale = scale_of(boxes, side) if scaled else 1
        if scale > 1:
            image.draft("RGB", (width // scale, height // scale))
        pixels = image.convert("RGB")
    x, y = pixels.width / width, pixels.height / height
    views = []
    for top, left, high, wide in (box.tolist() for box in boxes):
        box = (left * x, top * y, (left + wide) * x, (top + high) * y)
        views.append(np.asarray(pixels.resize((side, side), Image.Resampling.BILINEAR, box=box)))
    return views


def work(root: str, side: int) -> list[Item]:
    """Every image below root with the boxes of its two v2 views in epoch 0."""
    source = open_folder(root, 10**9)
    data = [source.read(sample) for sample in range(len(source.sizes))]
    sizes = np.array([image_size(one, 10**9) for one in data], np.int32)
    config = AugmentConfig(image_size=side)
    both = [
        view_table(config, draw_uniforms(0, 0, view, 0, len(data)), sizes).crop for view in (0, 1)
    ]
    return [(one, (both[0][row], both[1][row])) for row, one in enumerate(data)]


def milliseconds(items: Sequence[Item], side: int, scaled: bool) -> float:
    """CPU milliseconds per image."""
    began = time.process_time()
    for data, boxes in items:
        crops(data, boxes, side, scaled)
    return (time.process_time() - began) / len(items) * 1e3


def facts(items: Sequence[Item], side: int) -> dict[str, Any]:
    """Share of the images with a smaller decode, and what their views lose, in levels."""
    errors = []
    for data, boxes in items:
        if scale_of(boxes, side) > 1:
            pairs = zip(
                crops(data, boxes, side, True), crops(data, boxes, side, False), strict=True
            )
            errors += [float(np.abs(a.astype(int) - b).mean()) for a, b in pairs]
    share = len(errors) / 2 / len(items)
    found: dict[str, Any] = {"images": len(items), "share_scaled": round(share, 4)}
    if errors:
        found |= {"error_levels": round(float(np.mean(errors)), 3)}
        found |= {"worst_image_levels": round(max(errors), 2)}
    return found


def measure(items: Sequence[Item], side: int, rounds: int) -> list[dict[str, Any]]:
    """A row per way to decode, for all images and for those that one way decodes smaller."""
    smaller = facts(items, side)
    rows = []
    groups = {"all": items, "smaller": [item for item in items if scale_of(item[1], side) > 1]}
    for group, chosen in groups.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds if chosen else 0):
            for scaled, values in times.items():
                values.append(milliseconds(chosen, side, scaled))
        case = {"image_size": side, "recipe": "v2", "images": group, "unit": "CPU ms/image"}
        rows += [
            {
                "benchmark": "scaled_decoding",
                "case": case,
                "contender": "scaled where the crops allow it" if scaled else "full size",
                **spread(values),
                "smaller": smaller,
            }
            for scaled, values in times.items()
            if values
        ]
    return rows


@terminal.command("scaled_decoding")
def main(arguments: Sequence[str]) -> None:
    """Print the percentiles; with --publish also append the rows."""
    parser = argparse.ArgumentParser("bench.scaled_decoding", description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args(arguments)
    where = origin(torch.device("cpu"), options.publish)
    rows = [
        row | {"environment": where}
        for side in (224, 112)
        for row in measure(work(options.root, side), side, options.rounds)
    ]
    for row in rows:
        case = row["case"]
        print(f"{case['image_size']} px, {case['images']}, {row['contender']}: {row['p50']:.3f} ms")
    print(*dict.fromkeys(f"{r['case']['image_size']} px: {r['smaller']}" for r in rows), sep="\n")
    if options.publish:
        write_rows(ROWS, rows)


if __name__ == "__main__":
    sys.exit(main())
