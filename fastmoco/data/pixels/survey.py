"""A look at a sample of the pictures before training: what a run should be told about them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from PIL import Image

from fastmoco.data.decode import BadImage, decode
from fastmoco.data.pixels.rgb import exif_orientation
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import read_sample
from fastmoco.data.sources.measure import in_order, in_parallel, progress
from fastmoco.data.sources.source import Source
from fastmoco.machine.cache import cache_folder, exclusive

SAMPLE = 64
"""Pictures that are looked at, evenly spaced over the data set."""
_FLAT = 2.0  # levels of 255: the standard deviation below which a picture is nearly one colour
_FLAT_SHARE = 0.1  # of the sample; a few blank pages are usual


@dataclass(frozen=True)
class Survey:
    """What a sample of the pictures says about a data set."""

    looked_at: int
    """Pictures of the sample that could be decoded."""
    turned: int
    """Of these, the ones whose EXIF orientation is not upright."""
    flat: int
    """Of these, the ones that are nearly one colour."""
    first_flat: str
    """The name of the first of those."""

    def warnings(self) -> list[str]:
        """What is likely not as meant; one sentence each."""
        if self.flat <= _FLAT_SHARE * self.looked_at:
            return []
        return [
            f"{self.flat} of {self.looked_at} sampled pictures are nearly one colour, the first is "
            f"{self.first_flat}: look at views.png; where a transparent background took the colour "
            "of the drawing, set data.alpha_over to another colour."
        ]


def survey(source: Source, rule: PixelRule) -> Survey:
    """Decodes the sample, or takes what was found for the same index and rule."""
    digest = hashlib.sha256(f"{source.fingerprint()} {rule}".encode()).hexdigest()[:20]
    kept = cache_folder() / "pixels" / f"{digest}.json"
    with exclusive(kept.with_suffix(".lock")):
        with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or half of one
            return Survey(**json.loads(kept.read_text()))
        found = _look(source, rule)
        with contextlib.suppress(OSError):  # nowhere to keep it
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(asdict(found)))
    return found


def sample_of(source: Source, count: int) -> list[int]:
    """Numbers of at most `count` pictures, evenly spaced, without those that are known as bad."""
    total = len(source.sizes)
    numbers = range(total) if total <= count else (total * at // count for at in range(count))
    return [number for number in numbers if number not in source.bad]


def _look(source: Source, rule: PixelRule) -> Survey:
    numbers = sample_of(source, SAMPLE)
    with in_parallel(many=False) as pool:
        seen = in_order(pool, partial(_glance, source, rule), numbers)
        found = list(progress(seen, lambda _: 1, "look", len(numbers)))
    good = [(number, one) for number, one in zip(numbers, found, strict=True) if one is not None]
    flat = [number for number, (_, flat) in good if flat]
    name = source.name(flat[0]) if flat else ""
    turned = sum(turned for _, (turned, _) in good)
    return Survey(len(good), turned, len(flat), name)


def _glance(source: Source, rule: PixelRule, number: int) -> tuple[bool, bool] | None:
    """Whether EXIF turns a picture, and whether it is nearly one colour; None for a bad one."""
    try:
        data = read_sample(source, number)
        picture = decode(data, rule)
    except BadImage:
        return None
    with Image.open(io.BytesIO(data)) as image:
        turned = exif_orientation(image) != 1
    return turned, float(np.asarray(picture).std(axis=(0, 1)).max()) < _FLAT
