"""The rule by which bytes become pixels, alike in training, evaluation and pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from PIL import Image

from fastmoco.config import DataConfig

# `data.max_pixels` decides alone, and it is looked at before anything is decoded. PIL's own limit
# would refuse what the option allows.
Image.MAX_IMAGE_PIXELS = None


class BadImage(Exception):
    """An image that cannot be used. The message is the reason, for `bad_samples.jsonl`."""


@dataclass(frozen=True)
class PixelRule:
    """What decides the pixels of a file besides its bytes; see the fields of `DataConfig`."""

    max_pixels: int = DataConfig.max_pixels
    alpha_over: tuple[int, int, int] = DataConfig.alpha_over
    exif: Literal["ignore", "apply"] = DataConfig.exif
    channels: int = DataConfig.channels
    intensity: tuple[float, float] | None = None
    """Values that become 0 and 255; None where pictures have 8 bits."""

    @classmethod
    def of(cls, data: DataConfig) -> PixelRule:
        """The rule of a configuration that `resolve_pixels` has returned."""
        found = None if isinstance(data.intensity, str) else data.intensity
        return cls(data.max_pixels, data.alpha_over, data.exif, data.channels, found)

    def into(self, data: DataConfig) -> DataConfig:
        """A configuration with this rule: what `of` takes from it."""
        intensity = "auto" if self.intensity is None else self.intensity
        return replace(data, **{**asdict(self), "intensity": intensity})

    @property
    def float_views(self) -> bool:
        """Whether views are float32 (S, S, C); else they are uint8 RGB (S, S, 3)."""
        return self.channels != 3 or self.intensity is not None


RGB8 = PixelRule()
"""8-bit RGB with the defaults: how the files of published weights were read."""


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raises `BadImage` for an image without pixels or of more than max_pixels."""
    if min(size) < 1:  # as tifffile reads a TIFF that has no tags
        raise BadImage(f"{size[0]} x {size[1]} pixels")
    if size[0] * size[1] > max_pixels:
        raise BadImage(f"{size[0]} x {size[1]} pixels exceed data.max_pixels {max_pixels}")
