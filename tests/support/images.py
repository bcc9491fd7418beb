"""Images as PIL itself reads them: what our decoders are compared with."""

from __future__ import annotations

import io

from PIL import Image


def open_rgb(data: bytes) -> Image.Image:
    """The RGB image of encoded bytes."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")
