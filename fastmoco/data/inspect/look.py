"""Every picture of an even sample, read and decoded once with all cores.

n pictures that were looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastmoco.data.decode import BadImage, decode
from fastmoco.data.inspect.duplicates import NO_HASH, gray_32, perceptual_hash
from fastmoco.data.inspect.kinds import Kind, kind_of
from fastmoco.data.pixels.deep import Deep, decode_deep
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import read_sample
from fastmoco.data.sources.measure import in_order, in_parallel, progress
from fastmoco.data.sources.source import Source

_CHUNK = 16
# Threads start at once; processes are faster from here on.
_PROCESSES_FROM = 500


class Look(NamedTuple):
    """One picture."""

    sample: int
    """Its number in the source."""
    kind: Kind | None
    """None where its bytes do not say."""
    bad: str
    """Why it cannot be used; empty if it can."""
    size: int
    """Of the file, in bytes."""
    digest: bytes
    """Of its bytes."""
    hash: int
    """See `perceptual_hash`."""


def evenly_spaced(total: int, count: int) -> Sequence[int]:
    """Numbers of at most `count` pictures of `total`, evenly spaced; of all where count is 0."""
    if not count or total <= count:
        return range(total)
    return [total * at // count for at in range(count)]


def kinds_of(source: Source, samples: Sequence[int]) -> list[Kind]:
    """The kinds of those that have one."""
    found = []
    for sample in samples:
        try:
            found.append(kind_of(read_sample(source, sample)))
        except BadImage:
            continue
    return found


def look_at(source: Source, samples: Sequence[int], rule: PixelRule, label: str) -> list[Look]:
    """Looks at these, with a progress bar. Those that indexing found unreadable say why."""
    known = source.bad
    chunks = (
        [(sample, known.get(sample, "")) for sample in samples[at : at + _CHUNK]]
        for at in range(0, len(samples), _CHUNK)
    )
    work = partial(_look_at, source=source, rule=rule)
    with in_parallel(many=len(samples) >= _PROCESSES_FROM) as pool:
        seen = progress(in_order(pool, work, chunks), len, label, len(samples))
        kinds: dict[Kind | None, Kind | None] = {}  # few: one object for all pictures of a kind
        return [
            look._replace(kind=kinds.setdefault(look.kind, look.kind))
            for part in seen
            for look in part
        ]


def _look_at(samples: Sequence[tuple[int, str]], source: Source, rule: PixelRule) -> list[Look]:
    """The unit of work of one process."""
    return [_look(sample, bad, source, rule) for sample, bad in samples]


def _look(sample: int, bad: str, source: Source, rule: PixelRule) -> Look:
    if bad:
        return Look(sample, None, bad, 0, b"", NO_HASH)
    kind, size, digest, number = None, 0, b"", NO_HASH
    try:
        data = read_sample(source, sample)
        size, digest = len(data), hashlib.blake2b(data, digest_size=16).digest()
        kind = kind_of(data)
        number = perceptual_hash(gray_32(gray(picture_of(data, rule))))
    except BadImage as error:
        bad = str(error)
    return Look(sample, kind, bad, size, digest, number)


def picture_of(data: bytes, rule: PixelRule) -> Image.Image | Deep:
    """What training decodes. Raises `BadImage`."""
    return decode_deep(data, rule) if rule.float_views else decode(data, rule)


def gray(picture: Image.Image | Deep) -> Image.Image:
    """The mean of the channels, in levels of 255: PIL's mode L, or F."""
    if isinstance(picture, Image.Image):
        return picture.convert("L")
    width, height = picture.size
    return Image.fromarray(picture.box(0, 0, height, width).mean(axis=0, dtype=np.float32))
