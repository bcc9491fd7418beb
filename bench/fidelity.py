"""Levels by which the executors of the table differ from the PIL reference, and pictures of it.

    python -m bench.fidelity --root FOLDER_OF_IMAGES [--picture docs/augmentation.png]

One line per operation and executor: mean error in levels (0..255), the worst image's mean, the
99.9th percentile and the largest difference. The picture shows one image per operation: the
reference, both executors, and their differences times 16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.measure import terminal
from fastmoco.config import AugmentConfig
from fastmoco.data.backends.array import Canvas, decode_tensor
from fastmoco.data.backends.choose import has_dali
from fastmoco.data.backends.dali_rows import programme
from fastmoco.data.backends.pil import execute
from fastmoco.data.decode import decode
from fastmoco.data.reader import Reader
from fastmoco.data.sheet import Column, sheet
from fastmoco.data.sources.folder import open_folder
from fastmoco.data.table import UInt8, ViewTable, draw_uniforms, view_table

NOTHING = AugmentConfig(jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0)
STILL = replace(NOTHING, jitter_p=1, brightness=0, contrast=0, saturation=0, hue=0)
CASES: dict[str, AugmentConfig] = {
    "crop and resize": NOTHING,
    "+ flip": replace(NOTHING, flip_p=1),
    "+ brightness": replace(STILL, brightness=0.4),
    "+ contrast": replace(STILL, contrast=0.4),
    "+ saturation": replace(STILL, saturation=0.4),
    "+ hue 0.1": replace(STILL, hue=0.1),
    "+ hue 0.4": replace(STILL, hue=0.4),
    "+ jitter": replace(NOTHING, jitter_p=1),
    "+ grayscale": replace(NOTHING, grayscale_p=1),
    "+ blur": replace(NOTHING, blur_p=1),
    "v1 view": AugmentConfig(recipe="v1", hue=0.4, jitter_p=1, blur_p=0),
    "v2 view": AugmentConfig(),
}
_LIMIT = 10**9


def views(data: list[bytes], config: AugmentConfig) -> dict[str, UInt8]:
    """(N, S, S, 3) views of the same rows by every executor; the reference is called `PIL`."""
    images = [decode(one, _LIMIT) for one in data]
    sizes = np.array([image.size for image in images], np.int32)
    table = view_table(config, draw_uniforms(0, 0, 0, 0, len(data)), sizes)
    side, canvas = config.image_size, Canvas(config.image_size, config.recipe)
    found = {
        "PIL": [execute(im, table, k, side, config.recipe) for k, im in enumerate(images)],
        "array": [
            canvas.execute(decode_tensor(one, _LIMIT), table, k) for k, one in enumerate(data)
        ],
    }
    if has_dali():
        found["DALI"] = list(_by_dali(data, table, config))
    return {name: np.stack(batch) for name, batch in found.items()}


def _by_dali(data: list[bytes], table: ViewTable, config: AugmentConfig) -> UInt8:
    from fastmoco.data.backends import dali_graph

    rows = list(programme(table))
    images = [np.frombuffer(one, np.uint8) for one in data]
    delivery = images, rows, rows, [np.zeros(2, np.int64) for _ in data]
    shape = dali_graph.Shape(config.image_size, config.recipe, "cpu", False)
    by_dali: UInt8 = dali_graph.run_once(delivery, shape)[0].numpy()
    return by_dali


def difference(a: UInt8, b: UInt8) -> Any:
    """Absolute difference in levels, int64."""
    return np.abs(a.astype(np.int64) - b)


@terminal.command("fidelity")
def main(arguments: Sequence[str]) -> None:
    """Print the table; with --picture also draw it."""
    parser = argparse.ArgumentParser("bench.fidelity", description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--side", type=int, default=112, help="pixels of a view in the picture")
    options = parser.parse_args(arguments)
    source = open_folder(options.root, _LIMIT)
    reader = Reader(source, 0, _LIMIT)
    step = max(1, len(source.sizes) // options.images)
    data = [reader.load(k).data for k in range(0, len(source.sizes), step)][: options.images]
    print("| operation | executor | mean | worst image | p99.9 | max |\n|---|---|---|---|---|---|")
    columns: dict[str, list[UInt8]] = {}
    for number, (name, config) in enumerate(CASES.items()):
        found = views(data, config)
        truth = found.pop("PIL")
        for executor, batch in found.items():
            wrong = difference(truth, batch)
            worst = wrong.mean(axis=(1, 2, 3)).max()
            high = np.percentile(wrong, 99.9)
            print(
                f"| {name} | {executor} | {wrong.mean():.3f} | {worst:.2f} | {high:.0f} "
                f"| {wrong.max()} |"
            )
        if options.picture:
            one = [data[(7 * number) % len(data)]]
            drawn = views(one, replace(config, image_size=options.side))
            columns.setdefault("PIL", []).append(drawn["PIL"][0])
            for executor in found:
                batch = drawn[executor]
                columns.setdefault(executor, []).append(batch[0])
                amplified = np.minimum(16 * difference(drawn["PIL"], batch)[0], 255)
                columns.setdefault(f"{executor} x16", []).append(amplified.astype(np.uint8))
    if options.picture:
        page = sheet([Column(title, pictures) for title, pictures in columns.items()], options.side)
        page.convert("P", palette=Image.Palette.ADAPTIVE, colors=255).save(
            options.picture, optimize=True
        )


if __name__ == "__main__":
    sys.exit(main())
