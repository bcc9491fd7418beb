"""How pictures are read and normalized for an encoder: in every export, and back from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastmoco.config import Config, ConfigError, DataConfig, check_pixels, parse_text, validated
from fastmoco.config.parsing import UNREADABLE
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


def pixels_of(
    config: str | None, header: Mapping[str, str], channels: int, place: str
) -> DataConfig:
    """From the configuration in a checkpoint, or the header that `pixel_header` wrote.

    A file with neither was trained as published encoders are, but for its number of channels.
    Raises `ConfigError`, naming `place`, where one of them is broken, or of other channels.
    """
    if not config and HEADER not in header:
        return DataConfig(channels=channels)
    what = "configuration" if config else f"header {HEADER}"
    try:
        data = parse_text(config).data if config else _from_header(header[HEADER])
        check_pixels(data)
        if data.channels != channels:
            raise ConfigError(f"data.channels is {data.channels}, its weights are for {channels}.")
    except (ConfigError, *UNREADABLE) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigError(
            f"{place} has a {what} that cannot be used ({reason}): it is damaged or of another "
            "version of fastmoco; save its state_dict alone to use it."
        ) from error
    return data


def _from_header(text: str) -> DataConfig:
    found = json.loads(text)
    if None in found.values():
        raise ValueError("one of its values is null")
    values: dict[str, Any] = {
        n: tuple(v) if isinstance(v, list) else v for n, v in found.items() if n in _FIELDS
    }
    return validated(Config(data=DataConfig(**values))).data
