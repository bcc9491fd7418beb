"""A look at a sample of the pictures before training: their range, and what a run should be told.

Every picture of the sample counts alike, whatever its size.

C = `data.channels`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.data.decode import BadImage
from fastmoco.data.pixels.deep import stored_or_bad
from fastmoco.data.pixels.rgb import exif_orientation
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import read_sample
from fastmoco.data.sources.measure import in_order, in_parallel, progress
from fastmoco.data.sources.source import Source
from fastmoco.machine.cache import cache_folder, exclusive

SAMPLE = 256
"""Pictures that are looked at, evenly spaced over the data set."""
PERCENTILES = 0.1, 99.9
_VALUES = 4096  # at least so many pixels of a picture, evenly spaced, stand for all but low, high
_FLAT = 2.0  # levels of 255: the standard deviation below which a picture is nearly one colour
_FLAT_SHARE = 0.1  # of the sample; a few blank pages are usual


NO_SURVEY = ValueError, TypeError, KeyError, AttributeError, RecursionError


@dataclass(frozen=True)
class Part:
    """The pictures of the sample that have 8 bits, or those that have more."""

    pictures: int
    low: float
    """The smallest value, and `high` the largest, in the units of the files."""
    high: float
    percentiles: tuple[float, float]
    """See `PERCENTILES`."""
    mean: tuple[float, ...]
    """(C,), in the units of the files."""
    square: tuple[float, ...]
    """(C,): the mean of the squares."""


@dataclass(frozen=True)
class Survey:
    """What a sample of the pictures says about a data set."""

    shallow: Part | None
    """8 bits and fewer; None where there is none."""
    deep: Part | None
    """More than 8 bits; None where there is none."""
    turned: int
    """Pictures whose EXIF orientation is not upright."""
    flat: int
    """Pictures that are nearly one colour."""
    first_flat: str
    """The name of the first of those."""

    @property
    def looked_at(self) -> int:
        """Pictures of the sample that could be decoded."""
        return sum(part.pictures for part in (self.shallow, self.deep) if part)

    def warnings(self) -> list[str]:
        """What is likely not as meant; one sentence each."""
        if self.flat <= _FLAT_SHARE * self.looked_at:
            return []
        return [
            f"{self.flat} of {self.looked_at} sampled pictures are nearly one colour, the first is "
            f"{self.first_flat}: where a transparent background took the colour of the drawing, "
            "set data.alpha_over to another colour."
        ]


def survey(source: Source, rule: PixelRule) -> Survey:
    """Decodes the sample, or takes what was found for the same index and rule.

    Raises `ConfigError` where no picture of the sample can be used.
    """
    rule = replace(rule, intensity=None)
    digest = hashlib.sha256(f"{source.fingerprint()} {rule}".encode()).hexdigest()[:20]
    kept = cache_folder() / "pixels" / f"{digest}.json"
    with exclusive(kept.with_suffix(".lock")):
        with contextlib.suppress(OSError, *NO_SURVEY):  # none, or half of one
            return _read(json.loads(kept.read_text()))
        found = _look(source, rule)
        with contextlib.suppress(OSError):  # nowhere to keep it
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(asdict(found)))
    return found


def _read(kept: dict[str, Any]) -> Survey:
    """What `asdict` made of a survey, lists for tuples. Raises one of `NO_SURVEY`."""
    for name in ("shallow", "deep"):
        if kept[name] is not None:
            values: dict[str, Any] = kept[name]
            lists = {n: tuple(v) for n, v in values.items() if isinstance(v, list)}
            kept[name] = Part(**{**values, **lists})
            numbers = [n for v in vars(kept[name]).values() for n in np.atleast_1d(v)]
            if not all(isinstance(n, np.number) for n in numbers):
                raise ValueError(f"{name} holds more than numbers")
    found = Survey(**kept)
    if not type(found.turned) is type(found.flat) is int:
        raise ValueError("no numbers of pictures")
    return found


def sample_of(source: Source, count: int) -> list[int]:
    """Numbers of at most `count` pictures, evenly spaced, without those that are known as bad."""
    total = len(source.sizes)
    numbers = range(total) if total <= count else (total * at // count for at in range(count))
    return [number for number in numbers if number not in source.bad]


class Glance(NamedTuple):
    """One picture of the sample, in the units of its file."""

    deep: bool
    turned: bool
    low: float
    high: float
    values: np.ndarray
    """Some of its values."""
    mean: np.ndarray
    """(C,) float64."""
    square: np.ndarray
    """(C,) float64: the mean of the squares."""


def _look(source: Source, rule: PixelRule) -> Survey:
    numbers = sample_of(source, SAMPLE)
    with in_parallel(many=False) as pool:
        seen = in_order(pool, partial(_glance, source, rule), numbers)
        found = list(progress(seen, lambda _: 1, "look", len(numbers)))
    good = [(n, one) for n, one in zip(numbers, found, strict=True) if isinstance(one, Glance)]
    if not good:
        first = source.name(numbers[0]) if numbers else "none"
        raise ConfigError(
            f"None of {len(numbers)} sampled pictures can be used; the first, {first}: "
            f"{found[0] if found else 'unreadable'}."
        )
    shallow, deep = (_part([one for _, one in good if one.deep == kind]) for kind in (False, True))
    flat = []
    for number, one in good:
        unit = (deep.high - deep.low) / 255 if one.deep and deep else 1.0
        spread = np.sqrt(np.maximum(one.square - one.mean**2, 0)).max()
        if spread < _FLAT * unit:
            flat.append(number)
    turned = sum(one.turned for _, one in good)
    return Survey(shallow, deep, turned, len(flat), source.name(flat[0]) if flat else "")


def _part(seen: Sequence[Glance]) -> Part | None:
    if not seen:
        return None
    low, high = np.percentile(np.concatenate([one.values for one in seen]), PERCENTILES)
    return Part(
        len(seen),
        min(one.low for one in seen),
        max(one.high for one in seen),
        (float(low), float(high)),
        tuple(np.mean([one.mean for one in seen], axis=0).tolist()),
        tuple(np.mean([one.square for one in seen], axis=0).tolist()),
    )


def _glance(source: Source, rule: PixelRule, number: int) -> Glance | str:
    """One picture of the sample, or the reason why it is bad."""
    try:
        data = read_sample(source, number)
        stored = stored_or_bad(data, rule)
    except BadImage as bad:
        return str(bad)
    turned = False
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        turned = exif_orientation(image) != 1
    channels = stored.reshape(len(stored), -1)
    some = channels[:, :: max(1, channels.shape[1] // _VALUES)].astype(np.float64)
    return Glance(
        stored.dtype != np.uint8,
        turned,
        float(channels.min()),
        float(channels.max()),
        some.reshape(-1),
        some.mean(axis=1),
        (some**2).mean(axis=1),
    )
