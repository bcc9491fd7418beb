"""How pictures are read and normalized for an encoder: in every export, and back from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastmoco.config import DataConfig, parse_text
from fastmoco.network.encoder import pixel_statistics

HEADER = "pixels"
"""Name of the entry in the header of our safetensors files."""
_FIELDS = ("channels", "intensity", "alpha_over", "exif", "mean", "std")


def pixel_header(data: DataConfig) -> dict[str, str]:
    """Texts of a header: `num_channels`, `mean` and `std` for others, and all of it for us."""
    mean, std = pixel_statistics(data)
    return {
        "num_channels": str(data.channels),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        HEADER: json.dumps({name: getattr(data, name) for name in _FIELDS}),
    }


def pixels_of(config: str | None, header: Mapping[str, str], channels: int) -> DataConfig:
    """From the configuration in a checkpoint, or the header that `pixel_header` wrote.

    A file with neither was trained as published encoders are, but for its number of channels.
    """
    if config:
        return parse_text(config).data
    if HEADER not in header:
        return DataConfig(channels=channels)
    found = json.loads(header[HEADER])
    values: dict[str, Any] = {
        n: tuple(v) if isinstance(v, list) else v for n, v in found.items() if n in _FIELDS
    }
    return DataConfig(**values)
