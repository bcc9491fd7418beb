"""What `fastmoco pack` costs in fidelity: views of packed images against those of the originals.

    python -m bench.packing --packed FOLDER_OF_THE_PACK --root FOLDER_OF_IMAGES

PSNR in dB of v2 views of 224 pixels, two per image, by the reference (PIL). Both images get the
same random numbers, so that a box of the table covers the same part of them to a pixel of each.
Images that were packed with their own bytes are left out.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.loader import megapixels
from bench.measure.program import Options, command, parser
from bench.measure.rows import Row, spread
from fastmoco.config import AugmentConfig, DataConfig
from fastmoco.data.backends.pil import execute
from fastmoco.data.decode import decode
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.table import UInt8, draw_uniforms, view_table

V2 = AugmentConfig()
RULE = PixelRule.of(DataConfig())


def view_of(data: bytes, size: list[int], number: int, view: int) -> UInt8:
    """A view (S, S, 3) of an encoded image (W, H): the one of this position in the first epoch."""
    uniforms = draw_uniforms(0, 0, view, number, 1)
    table = view_table(V2, uniforms, np.array([size], np.int32))
    return execute(decode(data, RULE), table, 0, V2.image_size, V2.recipe)


def psnr(one: UInt8, other: UInt8) -> float:
    """Peak signal-to-noise ratio in dB; of the same pictures infinite."""
    error = np.square(one.astype(np.float64) - other).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ratios(packed: Path, root: Path) -> list[float]:
    """PSNR of each view of each image that the pack has made smaller."""
    found: list[float] = []
    for manifest in sorted(packed.glob("*.jsonl")):
        with tarfile.open(manifest.with_suffix(".tar")) as tar:
            for number, text in enumerate(manifest.read_text("utf-8").splitlines()):
                line = json.loads(text)
                if line.get("kept", True):
                    continue
                small, original = tar.extractfile(line["member"]), root / line["source"]
                assert small is not None
                data = small.read()
                whole = original.read_bytes()
                for view in (0, 1):
                    one = view_of(data, line["size"], number, view)
                    found += [psnr(one, view_of(whole, line["original_size"], number, view))]
    return found


PARSER = parser("packing", __doc__, only=False, steps=False)
PARSER.add_argument("--packed", required=True)
PARSER.add_argument("--root", required=True)


@command(PARSER, trains=False)
def main(own: Options) -> Iterator[list[Row]]:
    """One row: the spread over views."""
    asked = json.loads((Path(own.packed) / "pack.json").read_text())
    case: Row = {"part": "views of a pack", "unit": "dB", "recipe": V2.recipe}
    case |= {name: asked[name] for name in ("short_side", "quality")}
    case["megapixels"] = round(megapixels(own.root), 2)
    found = ratios(Path(own.packed), Path(own.root))
    yield [{"benchmark": "packing", "case": case, "contestant": "packed", **spread(found, 2)}]


if __name__ == "__main__":
    sys.exit(main())
