"""Images as PIL itself reads them: what our decoders are compared with."""

from __future__ import annotations

import io

from PIL import Image


def open_rgb(data: bytes) -> Image.Image:
    """The RGB image of encoded bytes; transparency over white."""
    with Image.open(io.BytesIO(data)) as image:
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
