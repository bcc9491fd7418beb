"""The smaller decode is chosen only where both crops allow it, and shows the same picture."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from bench.scaled_decoding import crops, facts, measure, scale_of


def boxes(first: list[int], second: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(first), np.array(second)


def jpeg() -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_the_smallest_side_of_both_boxes_decides() -> None:
    assert scale_of(boxes([0, 0, 448, 600], [9, 9, 900, 900]), 224) == 2
    assert scale_of(boxes([0, 0, 447, 600], [9, 9, 900, 900]), 224) == 1
    assert scale_of(boxes([0, 0, 2000, 2000], [9, 9, 1800, 1792]), 224) == 8


def test_scaled_crops_show_the_same_region() -> None:
    both = boxes([30, 100, 300, 400], [150, 60, 260, 256])
    full, scaled = (crops(jpeg(), both, 64, scaled) for scaled in (False, True))
    shifted = crops(jpeg(), boxes([46, 116, 300, 400], [166, 76, 260, 256]), 64, False)
    for a, b, c in zip(full, scaled, shifted, strict=True):
        error = np.abs(a.astype(int) - b).mean()
        assert 0 < error < 2  # another decode, the same place
        assert error < 0.3 * np.abs(a.astype(int) - c).mean()


def test_rows_say_how_many_images_gain() -> None:
    items = [
        (jpeg(), boxes([0, 0, 480, 640], [0, 0, 400, 400])),
        (jpeg(), boxes([0, 0, 480, 640], [0, 0, 100, 100])),
    ]
    assert facts(items, 64)["share_scaled"] == 0.5
    rows = measure(items, 64, 2)
    assert [row["case"]["images"] for row in rows] == ["all", "all", "smaller", "smaller"]
    assert all(row["n"] == 2 and row["p50"] > 0 for row in rows)
