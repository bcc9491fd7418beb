"""A picture of any depth and number of channels, mapped to 0..255 without rounding or clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.data.pixels.rule import BadImage, PixelRule
from fastmoco.data.pixels.stored import Values, stored

Float32 = NDArray[np.float32]
_EXACT = (np.uint8, np.int8, np.uint16, np.int16, np.float16, np.float32)  # in float32


@dataclass(frozen=True)
class Deep:
    """Values as their file stores them, and the two of them that become 0 and 255."""

    values: Values
    """(C, H, W); the channels of gray as RGB share their memory."""
    low: float
    high: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.values.shape[2], self.values.shape[1]

    def box(self, top: int, left: int, height: int, width: int) -> Float32:
        """A part, mapped: float32 (C, height, width); (1, height, width) if all C are equal.

        What lies outside of low..high lies outside of 0..255.
        """
        values = self.values[:1] if self.values.strides[0] == 0 else self.values
        part = values[:, top : top + height, left : left + width]
        exact: Any = np.float32 if part.dtype.type in _EXACT else np.float64
        scaled = np.subtract(part, exact(self.low), dtype=exact, order="C")
        scaled *= exact(255 / (self.high - self.low))
        mapped: Float32 = scaled.astype(np.float32, copy=False)
        return mapped


def decode_deep(data: bytes, rule: PixelRule) -> Deep:
    """The picture in its file. Pictures of 8 bits keep 0..255, all others take `data.intensity`.

    Raises `BadImage`, also for more than 8 bits where the rule has no range for them.
    """
    values = stored_or_bad(data, rule)
    if values.dtype == np.uint8:
        return Deep(values, 0.0, 255.0)
    if rule.intensity is None:
        raise BadImage(UNEXPECTED)
    return Deep(values, *rule.intensity)


UNEXPECTED = (
    "more than 8 bits, for which training has no range: set its data.intensity to [LOW, HIGH], the "
    "values that become 0 and 255"
)


def stored_or_bad(data: bytes, rule: PixelRule) -> Values:
    """`stored`, with every failure as a `BadImage`."""
    try:
        return stored(data, rule)
    except BadImage:
        raise
    except Exception as error:  # decoders raise nearly every type on hostile bytes
        raise BadImage(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def resized(part: Float32, height: int, width: int) -> Float32:
    """Bilinear with antialiasing, as all resizing here: float32 (c, H, W) to (c, height, width)."""
    import torch  # on demand: the processes of a scan do without it

    out = torch.nn.functional.interpolate(
        torch.from_numpy(part)[None], size=(height, width), mode="bilinear", antialias=True
    )
    found: Float32 = out[0].numpy()
    return found


def visible(view: NDArray[Any]) -> NDArray[np.uint8]:
    """A view as people can look at it: (S, S, C) to uint8 RGB (S, S, 3).

    One channel as gray, of more than three the first three; here, and only here, clipped.
    """
    if view.dtype == np.uint8 and view.shape[2] == 3:
        return view
    three = np.repeat(view[..., :1], 3, axis=2) if view.shape[2] < 3 else view[..., :3]
    shown: NDArray[np.uint8] = np.clip(np.rint(three), 0, 255).astype(np.uint8)
    return shown
