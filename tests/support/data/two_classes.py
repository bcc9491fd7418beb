"""Pictures of two classes that colour tells apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def two_classes(
    folder: Path, count: int, seed: int, *, size: tuple[int, int] = (40, 50), suffix: str = "jpg"
) -> None:
    """`count` pictures of (height, width) in `folder/green` and `folder/red`, in turns."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        where = folder / ("red" if index % 2 else "green")
        where.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 120, (*size, 3), dtype=np.uint8)
        pixels[..., index % 2] += 120
        Image.fromarray(pixels).save(where / f"{index}.{suffix}", quality=95)
