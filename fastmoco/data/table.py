"""The parameter table of the two views: every random choice of the augmentation.

A row is a pure function of (seed, epoch, position, view) and of the size of the image that it is
applied to. The uniforms behind it come from NumPy's Philox, whose counter is the position: a bulk
draw for a range of positions costs one call, and drawing any part of the range gives the same rows.

N rows. Sizes and boxes are in pixels of the decoded image, hue in turns, sigma in view pixels.
Source of the distributions: the MoCo v1 and v2 recipes as published, with torchvision's
RandomResizedCrop (ten tries, then the largest centred box of admissible ratio) and ColorJitter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import AugmentConfig
from fastmoco.data.order import stream_key

UInt8 = NDArray[np.uint8]
Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(permutations(range(4))), dtype=np.int64)

_TRIES = 10
_CROP_WORDS = 4 * _TRIES
_USED_WORDS = _CROP_WORDS + 10
_COUNTERS = -(-_USED_WORDS // 4)  # a Philox counter yields four 64-bit words
WORDS = 4 * _COUNTERS
_LOG_RATIO = np.log(3 / 4), np.log(4 / 3)
COLUMNS = 16


@dataclass(frozen=True)
class ViewTable:
    """N rows of one view; every array has N rows."""

    crop: Int64
    """(N, 4): top, left, height, width of the box that is resized to the view."""
    jitter: Bool
    """(N,): whether the four colour operations are applied at all."""
    order: Int64
    """(N, 4): BRIGHTNESS, CONTRAST, SATURATION and HUE in their order of application."""
    factors: Float32
    """(N, 4): brightness, contrast and saturation factor, hue shift in turns."""
    gray: Bool
    """(N,): whether the view turns gray."""
    sigma: Float32
    """(N,): standard deviation of the blur in pixels; 0 where the view is not blurred."""
    flip: Bool
    """(N,): whether the view is mirrored horizontally."""

    def __len__(self) -> int:
        return len(self.flip)

    def pack(self) -> Float32:
        """(N, COLUMNS) float32, the form in which rows travel; exact, as boxes are below 2^24."""
        columns = (self.crop, self.jitter, self.order, self.factors, self.gray, self.sigma)
        return np.column_stack([*columns, self.flip]).astype(np.float32)

    @staticmethod
    def unpack(rows: Float32) -> ViewTable:
        """Inverse of `pack`; rows: float32 (N, COLUMNS)."""
        return ViewTable(
            crop=rows[:, 0:4].astype(np.int64),
            jitter=rows[:, 4] > 0,
            order=rows[:, 5:9].astype(np.int64),
            factors=rows[:, 9:13],
            gray=rows[:, 13] > 0,
            sigma=rows[:, 14],
            flip=rows[:, 15] > 0,
        )


def draw_uniforms(seed: int, epoch: int, view: int, start: int, count: int) -> Float64:
    """Uniforms in [0, 1) for positions start .. start + count - 1; float64 (count, WORDS)."""
    key = np.array([stream_key(seed, epoch), stream_key(view, 1)], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=start * _COUNTERS)
    raw = generator.random_raw(count * WORDS).reshape(count, WORDS)
    uniforms: Float64 = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms


def view_table(config: AugmentConfig, uniforms: Float64, sizes: NDArray[np.int32]) -> ViewTable:
    """The rows that the uniforms stand for on images of these sizes.

    uniforms: float64 (N, WORDS) from `draw_uniforms`. sizes: (N, 2), width and height.
    """
    rest = uniforms[:, _CROP_WORDS:]
    spread = np.array([config.brightness, config.contrast, config.saturation])
    low: Float64 = np.maximum(0.0, 1.0 - spread)
    factors: Float64 = np.empty((len(uniforms), 4))
    factors[:, :3] = low + rest[:, 1:4] * (1.0 + spread - low)
    factors[:, HUE] = config.hue * (2.0 * rest[:, 4] - 1.0)
    sigma = config.blur_min + rest[:, 8] * (config.blur_max - config.blur_min)
    return ViewTable(
        crop=_crops(uniforms[:, :_CROP_WORDS], sizes, config.min_area),
        jitter=rest[:, 0] < config.jitter_p,
        order=ORDERS[(rest[:, 5] * len(ORDERS)).astype(np.int64)],
        factors=factors.astype(np.float32),
        gray=rest[:, 6] < config.grayscale_p,
        sigma=np.where(rest[:, 7] < config.blur_p, sigma, 0.0).astype(np.float32),
        flip=rest[:, 9] < config.flip_p,
    )


def _crops(uniforms: Float64, sizes: NDArray[np.int32], min_area: float) -> Int64:
    """Box of each row: the first of ten tries that fits the image, else the centred fallback."""
    tries = uniforms.reshape(-1, _TRIES, 4)
    width, height = (sizes[:, axis].astype(np.float64) for axis in (0, 1))
    area = (width * height)[:, None] * (min_area + tries[..., 0] * (1.0 - min_area))
    ratio = np.exp(_LOG_RATIO[0] + tries[..., 1] * (_LOG_RATIO[1] - _LOG_RATIO[0]))
    wide = np.rint(np.sqrt(area * ratio))
    high = np.rint(np.sqrt(area / ratio))
    fits = (wide > 0) & (high > 0) & (wide <= width[:, None]) & (high <= height[:, None])
    row = np.arange(len(tries))
    first = fits.argmax(axis=1)
    box_height, box_width = high[row, first], wide[row, first]
    top = np.floor(tries[row, first, 2] * (height - box_height + 1))
    left = np.floor(tries[row, first, 3] * (width - box_width + 1))
    boxes = np.stack([top, left, box_height, box_width], axis=1)
    return np.where(fits.any(axis=1)[:, None], boxes, _fallback(width, height)).astype(np.int64)


def _fallback(width: Float64, height: Float64) -> Float64:
    """The largest centred box whose ratio lies in the range: (N, 4), in whole pixels."""
    ratio = width / height
    high = np.where(ratio < 3 / 4, np.rint(width / (3 / 4)), height)
    wide = np.where(ratio > 4 / 3, np.rint(height * (4 / 3)), width)
    return np.stack([(height - high) // 2, (width - wide) // 2, high, wide], axis=1)
