"""Numbers in place of `auto` in `data.intensity`, `data.mean` and `data.std`.

They become part of the configuration, hence of `config.yaml`, of every checkpoint and of every
export: whoever resumes or evaluates reads pictures by the same numbers. `data.intensity` stays
`auto` where the pictures have 8 bits, and `data.mean` and `data.std` stay `default` for 8-bit RGB.

C = `data.channels`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from fastmoco.config import Config, ConfigError, DataConfig
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.pixels.survey import Part, Survey, survey
from fastmoco.data.sources.choose import open_source
from fastmoco.data.sources.source import Source

# Noise of the synthetic source: uniform in 0..255.
_UNIFORM = 0.5, 12**-0.5


def resolve_pixels(
    config: Config, source: Source | None = None, begun: Config | None = None
) -> Config:
    """The same run with every number of its pixels spelled out.

    config: from `resolve_folders`. source: its images, where they are open already. begun: the
    configuration of the run that this one goes on with; what it had measured stays. Raises
    `ConfigError` for pictures without a range.
    """
    data, kept = config.data, begun.data if begun else None
    if data.source == "synthetic":
        return replace(config, data=_uniform(data))
    seen = survey(source or open_source(config), PixelRule.of(data))
    if isinstance(data.intensity, str):
        data = replace(data, intensity=_range(data, seen, kept.intensity if kept else None))
    needed = ("auto", "default") if data.float_views else ("auto",)
    if data.mean in needed or data.std in needed:
        mean, std = _statistics(seen, data)
        if kept is not None:
            mean = mean if isinstance(kept.mean, str) else kept.mean
            std = std if isinstance(kept.std, str) else kept.std
        data = replace(data, mean=mean if data.mean in needed else data.mean)
        data = replace(data, std=std if data.std in needed else data.std)
    return replace(config, data=data)


def _uniform(data: DataConfig) -> DataConfig:
    """Those of noise, where there is nothing to measure."""
    mean, std = ((value,) * data.channels for value in _UNIFORM)
    if data.channels != 3 or data.mean == "auto":
        data = replace(data, mean=mean if isinstance(data.mean, str) else data.mean)
    if data.channels != 3 or data.std == "auto":
        data = replace(data, std=std if isinstance(data.std, str) else data.std)
    return data


Intensity = Literal["auto", "percentiles"] | tuple[float, float]


def _range(data: DataConfig, seen: Survey, begun: Intensity | None) -> Intensity:
    """The values that become 0 and 255; `auto` where all pictures have 8 bits.

    begun: those of the run that this one goes on with. They stay, whatever was added to the set
    since, unless the sample shows that the run measured them by the other rule: then they are what
    was asked for now, and resuming refuses the difference.
    """
    deep, percentiles = seen.deep, data.intensity == "percentiles"
    rules = {False: (deep.low, deep.high), True: deep.percentiles} if deep else {}
    found = rules.pop(percentiles, None)
    refused = percentiles and begun == "auto"
    if begun is not None and begun not in rules.values() and not refused:
        return begun
    if found is None:
        if percentiles:
            raise ConfigError(
                "data.intensity is percentiles, but it is for pictures of more than 8 bits and no "
                "sampled picture has: leave it at auto."
            )
        return "auto"
    low, high = found
    if not low < high:
        raise ConfigError(
            f"All values of the sampled pictures are {low:g}: set data.intensity to the two "
            "values that are to become 0 and 255."
        )
    return low, high


def _statistics(survey: Survey, data: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (C,), where 255 is 1; 1 of a channel that does not vary."""
    ranges: list[tuple[Part | None, tuple[float, float]]] = [(survey.shallow, (0.0, 255.0))]
    if not isinstance(data.intensity, str):
        ranges.append((survey.deep, data.intensity))
    mean, square, total = np.zeros(data.channels), np.zeros(data.channels), 0
    for part, (low, high) in ranges:
        if part is not None:
            first, second, span = np.array(part.mean), np.array(part.square), high - low
            mean += part.pictures * (first - low) / span
            square += part.pictures * (second - 2 * low * first + low**2) / span**2
            total += part.pictures
    if not total:
        raise ConfigError(UNMEASURED)
    mean, square = mean / total, square / total
    std = np.sqrt(np.maximum(square - mean**2, 0))
    std = np.where(std > 1e-6, std, 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())


UNMEASURED = (
    "Every sampled picture has more than 8 bits, but the run that goes on was begun on pictures of "
    "8 bits: resume it on those, or set run.dir to a new folder."
)
