"""From whatever PIL opens to RGB of 8 bits: one row of docs/data.md for each kind of file."""

from __future__ import annotations

from PIL import Image

from fastmoco.data.pixels.rule import PixelRule

ORIENTATION = 274  # the tag of TIFF and EXIF; 1 is upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each other orientation upright."""


def to_rgb(image: Image.Image, rule: PixelRule) -> Image.Image:
    """The first frame as 8-bit RGB.

    Transparency, that of a palette or of one colour too, is composed over `alpha_over`. EXIF turns
    the image if the rule says so; PIL itself always follows the tag of a TIFF. Every other mode
    goes by PIL's `convert`, LAB to sRGB. Colour profiles are ignored, as torchvision ignores them.
    """
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*rule.alpha_over, 255))
        rgb = Image.alpha_composite(ground, rgba).convert("RGB")
    elif image.mode != "RGB":
        rgb = image.convert("RGB")
    else:
        image.load()  # `convert` would copy
        rgb = image
    if rule.exif == "apply" and (orientation := exif_orientation(image)) != 1:
        rgb = rgb.transpose(TURNS[orientation])
    return rgb


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, and of a TIFF, which PIL has turned."""
    try:
        found = 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises many types on hostile bytes, which say nothing then
        return 1
    return found if found in TURNS else 1
