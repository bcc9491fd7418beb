"""Array operations execute rows of the table on the CPU: PIL's results, faster than PIL.

The same arithmetic as PIL, roundings included, on whole planes at once: colour is bit-exact against
the reference but for rare ties; resize (torch's antialiased uint8 kernel) and blur (PIL's stacked
boxes with 8-bit weights) stay within about one level. docs/augmentation.md has the table.

Temporaries are preallocated: fresh ones of this size cost more page faults than arithmetic. Choices
between values are arithmetic with a mask: NumPy's `where` takes as long as fifty additions.

S side of a view, planes are (3, S, S).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import io as torchvision_io

from fastmoco.data.decode import JPEG_START, decode, is_turned
from fastmoco.data.pixels.banded import BOXES, box_radius
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.table import BRIGHTNESS, CONTRAST, HUE, UInt8, ViewTable

Float32 = NDArray[np.float32]
_PAD = 2  # the boxes of a blur with sigma up to 2.45 reach two pixels; the recipes end at 2
# Deprecated in torchvision 0.29; without it PIL decodes, to the same pixels in a tenth more time.
_decode_jpeg: Any = getattr(torchvision_io, "decode_jpeg", None)


class Canvas:
    """Scratch planes for views of one size. One thread uses it at a time."""

    def __init__(self, side: int, recipe: str) -> None:
        self.side, self.recipe = side, recipe
        plane = (side, side)
        self.rgb: Float32 = np.empty((3, *plane), np.float32)
        self.value, self.chroma, self.a, self.b, self.c = np.empty((5, *plane), np.float32)
        self.mask = np.empty(plane, np.bool_)
        padded = (3, side + 2 * _PAD, side + 2 * _PAD)
        self.blurred, self.sums, self.centre = np.zeros((3, *padded), np.uint16)

    def decode(self, data: bytes, rule: PixelRule) -> Tensor:
        """See `decode_tensor`."""
        return decode_tensor(data, rule)

    def execute(self, image: Tensor, table: ViewTable, row: int) -> UInt8:
        """One view of an RGB image, (3, H, W) uint8 to (S, S, 3) uint8."""
        np.copyto(self.rgb, crop(image, table, row, self.side), casting="unsafe")
        gray_first = self.recipe == "v1"
        if table.gray[row] and gray_first:
            self.rgb[:] = self.gray()
        if table.jitter[row]:
            for operation in table.order[row].tolist():
                self.colour(operation, float(table.factors[row, operation]))
        if table.gray[row] and not gray_first:
            self.rgb[:] = self.gray()
        planes: NDArray[Any] = self.rgb
        if table.sigma[row] > 0:
            planes = self.blur(float(table.sigma[row]))
        view = planes.transpose(1, 2, 0)
        return (view[:, ::-1] if table.flip[row] else view).astype(np.uint8)

    def gray(self) -> Float32:
        """PIL's luminance: 16-bit weights whose sums are exact in float32. Lives in scratch."""
        np.multiply(self.rgb[0], 19595.0, out=self.a)
        for plane, weight in ((1, 38470.0), (2, 7471.0)):
            np.multiply(self.rgb[plane], weight, out=self.b)
            self.a += self.b
        self.a += 32768.0
        self.a *= 1 / 65536
        return np.floor(self.a, out=self.a)

    def colour(self, operation: int, factor: float) -> None:
        """One operation of the colour jitter, in place."""
        if operation == HUE:
            if factor:
                self.shift_hue(math.trunc(factor * 255) % 256)
            return
        # x <- d + f (x - d), truncated and clipped: d is black, the mean gray, or the gray.
        other: Any = 0.0
        if operation != BRIGHTNESS:
            other = self.gray()
        if operation == CONTRAST:
            other = float(int(other.sum(dtype=np.float64) / other.size + 0.5))
        if operation != BRIGHTNESS:
            self.rgb -= other
        self.rgb *= factor
        if operation != BRIGHTNESS:
            self.rgb += other
        np.clip(self.rgb, 0.0, 255.0, out=self.rgb)
        np.floor(self.rgb, out=self.rgb)

    def shift_hue(self, amount: int) -> None:
        """PIL's way through HSV, with its roundings; amount in 1/256 turn."""
        value, chroma, a, b, c = self.value, self.chroma, self.a, self.b, self.c
        red, green, blue = self.rgb
        np.maximum(np.maximum(red, green, out=value), blue, out=value)
        np.minimum(np.minimum(red, green, out=chroma), blue, out=chroma)
        np.subtract(value, chroma, out=chroma)
        # a <- position on the hexagon times chroma: 0 at red, 2 at green, 4 at blue.
        np.subtract(red, green, out=a)
        np.multiply(chroma, 4.0, out=b)
        a += b
        np.equal(green, value, out=self.mask)
        np.subtract(blue, red, out=c)
        b *= 0.5
        c += b
        self._choose(a, c)
        np.equal(red, value, out=self.mask)
        np.subtract(green, blue, out=c)
        self._choose(a, c)
        np.maximum(chroma, 1.0, out=b)
        b *= 6.0
        a /= b
        a -= np.floor(a, out=c)
        a *= 255.0
        np.floor(a, out=a)
        a += amount
        np.greater_equal(a, 256.0, out=self.mask)
        np.multiply(self.mask, np.float32(256.0), out=c)
        a -= c
        a *= 6.0 / 255.0
        np.maximum(value, 1.0, out=b)
        chroma *= 255.0
        chroma /= b
        np.floor(chroma, out=chroma)
        chroma *= value
        chroma *= 1.0 / 255.0
        for plane, (full, sign) in enumerate(((3.0, -1.0), (2.0, 1.0), (4.0, 1.0))):
            self._fade(self.rgb[plane], full, sign)

    def _choose(self, a: Float32, b: Float32) -> None:
        """a <- b where the mask is set; exact for the integers that both hold. Changes b."""
        b -= a
        b *= self.mask
        a += b

    def _fade(self, plane: Float32, full: float, sign: float) -> None:
        """plane <- value - chroma times the ramp of a colour, rounded; angles in sixths of a turn.

        The ramp is 0 within one sixth of `full`, where the colour is complete, and 1 beyond two
        (sign 1); for red, whose angle is 0, it is the opposite of that around cyan (sign -1).
        """
        b = self.b
        np.subtract(self.a, full, out=b)
        np.abs(b, out=b)
        b *= sign
        b += 2.0 if sign < 0 else -1.0
        np.clip(b, 0.0, 1.0, out=b)
        b *= self.chroma
        np.subtract(self.value, b, out=plane)
        plane += 0.5
        np.floor(plane, out=plane)

    def blur(self, sigma: float) -> NDArray[np.uint16]:
        """Three boxes along each axis, of PIL's fractional length, rounded after each."""
        radius = box_radius(sigma)
        whole = int(radius)
        if whole + 1 > _PAD:  # 8 bits would be too few for the weights of wider boxes
            whole_view = Image.fromarray(self.rgb.astype(np.uint8).transpose(1, 2, 0))
            found = np.asarray(whole_view.filter(ImageFilter.GaussianBlur(sigma)))
            return found.transpose(2, 0, 1).astype(np.uint16)
        inner = 256.0 / (2.0 * radius + 1.0)
        outer = round((256.0 - (2 * whole + 1) * inner) / 2.0)
        inner_weight = (256 - 2 * outer) // (2 * whole + 1)
        rest = 256 - 2 * outer - (2 * whole + 1) * inner_weight
        inside = slice(_PAD, _PAD + self.side)
        image = self.blurred[:, inside, inside]
        np.copyto(image, self.rgb, casting="unsafe")
        for stride in (1, self.blurred.shape[2]):
            for _ in range(BOXES):
                self._extend(stride)
                self._box(stride, whole, (outer, inner_weight, rest))
        return image

    def _extend(self, stride: int) -> None:
        """Repeats the edge pixels into the padding along one axis."""
        first, last = _PAD, _PAD + self.side - 1
        lines = self.blurred if stride > 1 else self.blurred.transpose(0, 2, 1)
        lines[:, :first] = lines[:, first : first + 1]
        lines[:, last + 1 :] = lines[:, last : last + 1]

    def _box(self, stride: int, whole: int, weights: tuple[int, int, int]) -> None:
        """One box over the flat buffer; its padding takes whatever comes out."""
        flat, sums, centre = (x.reshape(-1) for x in (self.blurred, self.sums, self.centre))
        reach = (whole + 1) * stride
        middle = slice(reach, flat.size - reach)
        out, part = sums[middle], centre[middle]
        np.add(flat[: -2 * reach], flat[2 * reach :], out=out)
        out *= np.uint16(weights[0])
        np.multiply(flat[middle], np.uint16(weights[1] + weights[2]), out=part)
        out += part
        for step in range(1, whole + 1):
            near = step * stride
            np.add(
                flat[reach - near : flat.size - reach - near],
                flat[reach + near : flat.size - reach + near],
                out=part,
            )
            part *= np.uint16(weights[1])
            out += part
        out += np.uint16(128)
        np.right_shift(out, 8, out=flat[middle])


class Cropper:
    """Decodes and crops only: for runs whose GPU does the rest of the row."""

    def __init__(self, side: int, recipe: str) -> None:
        self.side = side

    def decode(self, data: bytes, rule: PixelRule) -> Tensor:
        """See `decode_tensor`."""
        return decode_tensor(data, rule)

    def execute(self, image: Tensor, table: ViewTable, row: int) -> UInt8:
        """The crop of an RGB image, (3, H, W) uint8, as (S, S, 3) uint8."""
        return crop(image, table, row, self.side).transpose(1, 2, 0)


def decode_tensor(data: bytes, rule: PixelRule) -> Tensor:
    """(3, H, W) uint8 RGB, as PIL decodes it. Raises `BadImage` where PIL does not."""
    turned = rule.exif == "apply" and is_turned(data)
    if _decode_jpeg is not None and data.startswith(JPEG_START) and not turned:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            # The same libjpeg-turbo settings as PIL's, without PIL's copies of the pixels.
            decoded: Tensor = _decode_jpeg(buffer, torchvision_io.ImageReadMode.RGB)
            return decoded
        except RuntimeError:
            pass  # PIL decides, and has the reason
    return torch.from_numpy(np.array(decode(data, rule))).permute(2, 0, 1)


def crop(image: Tensor, table: ViewTable, row: int, side: int) -> UInt8:
    """The row's box, resized with antialiased bilinear interpolation: (3, S, S) uint8."""
    top, left, height, width = table.crop[row].tolist()
    box = image[None, :, top : top + height, left : left + width]
    resized = torch.nn.functional.interpolate(
        box, size=(side, side), mode="bilinear", antialias=True
    )
    view: UInt8 = resized[0].numpy()
    return view
