"""The README's picture of a run: `python -m bench.pages.run_picture RUN_DIR docs/demo.png`.

Some views that the encoders saw, beside the curves of its loss and of its kNN
accuracy. Both are the run's own `views.png` and `curves.png`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

# Of the views, at 32 pixels: columns original, im_q and im_k, three images.
VIEWS = (0, 0, 560, 468)
# Of the curves, as shares of their page: loss and kNN accuracy.
CURVES = ((0.0, 0.06, 0.335, 0.53), (0.69, 0.06, 1.0, 0.53))


def compose(views: Image.Image, curves: Image.Image) -> Image.Image:
    """The shown parts side by side, as high as the views."""
    parts = [views.crop(VIEWS)]
    height = parts[0].height
    for left, top, right, bottom in CURVES:
        wide, high = curves.size
        shown = curves.crop((left * wide, top * high, right * wide, bottom * high))
        size = round(shown.width * height / shown.height), height
        parts.append(shown.resize(size, Image.Resampling.LANCZOS))
    picture = Image.new("RGB", (sum(part.width for part in parts), height), "white")
    left_edge = 0
    for part in parts:
        picture.paste(part, (left_edge, 0))
        left_edge += part.width
    return picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where the run has no pictures."""
    run, out = map(Path, sys.argv[1:] if arguments is None else arguments)
    try:
        pages = [Image.open(run / name).convert("RGB") for name in ("views.png", "curves.png")]
    except OSError as error:
        print(f"run_picture: {run} has no pictures of a finished run ({error})", file=sys.stderr)
        return 2
    compose(*pages).save(out, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
