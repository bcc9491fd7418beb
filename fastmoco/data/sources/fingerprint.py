"""What a data set consists of, in 12 bytes per image: is it the one that a run began with?

A sample is a number, so that an image that came, went or got another name makes all later numbers
mean other images. A checkpoint holds the fingerprint, and ranks compare theirs.

The cost for a million images is 2 s of hashing names on a core of an EPYC Milan (from the index, no
file is touched), the reading of 64 files and 12 MB in a checkpoint.

N samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastmoco.data.sources.source import Source

READ = 64
"""Files whose content is part of it, spread evenly over the samples."""
_UNREADABLE = 0
_NAMED = 3


@dataclass(frozen=True)
class Fingerprint:
    """N images, by number."""

    names: NDArray[np.int64]
    """(N,): a hash of each name."""
    sizes: NDArray[np.int32]
    """(N,): a hash of each width and height; 0 where the image could not be read."""
    contents: NDArray[np.int64]
    """(min(N, READ),): a hash of the bytes of some; 0 where they could not be read."""

    @property
    def digest(self) -> str:
        """A short text that is equal for equal data sets."""
        digest = hashlib.sha256()
        for part in (self.names, self.sizes, self.contents):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


def fingerprint(source: Source) -> Fingerprint:
    """The fingerprint of a source."""
    sizes = source.sizes.astype(np.uint64)
    mixed = (sizes[:, 0] * np.uint64(0x9E3779B97F4A7C15)) ^ (sizes[:, 1] * np.uint64(0xC2B2AE3D))
    folded = (mixed ^ (mixed >> np.uint64(32))).astype(np.uint32).view(np.int32)
    return Fingerprint(
        names=np.fromiter((_hash(n) for n in source.relative_names()), np.int64, len(sizes)),
        sizes=np.where(source.sizes.min(axis=1) > 0, folded | np.int32(1), np.int32(_UNREADABLE)),
        contents=np.array([_content(source, n) for n in _read(len(sizes))], np.int64),
    )


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _content(source: Source, sample: int) -> int:
    if not source.sizes[sample].all():
        return _UNREADABLE
    try:
        return _hash(source.read(sample)) or 1
    except OSError:
        return _UNREADABLE


def _read(samples: int) -> list[int]:
    """Numbers of the samples whose content is part of a fingerprint."""
    count = min(samples, READ)
    return [at * samples // count for at in range(count)]


def changes(then: Fingerprint, now: Fingerprint, source: Source) -> str:
    """What differs now, with names where the source knows them: `2 added: a.jpg, b.jpg; 1 gone`.

    Empty where nothing does. An image that could not be read, then or now, keeps its number and is
    replaced as it is read: that is no change.
    """
    return "; ".join(_changes(then, now, source))


def _changes(then: Fingerprint, now: Fingerprint, source: Source) -> Iterator[str]:
    if not np.array_equal(then.names, now.names):
        added = np.flatnonzero(~np.isin(now.names, then.names)).tolist()
        gone = int((~np.isin(then.names, now.names)).sum())
        if added:
            yield f"{len(added):,} added: {_names(added, source)}"
        if gone:
            yield f"{gone:,} gone"
        if not added and not gone:
            yield f"the {len(now.names):,} images stand in another order or another number of times"
        return
    both = (then.sizes != _UNREADABLE) & (now.sizes != _UNREADABLE)
    replaced = set(np.flatnonzero(both & (then.sizes != now.sizes)).tolist())
    read = (then.contents != _UNREADABLE) & (now.contents != _UNREADABLE)
    differ = np.flatnonzero(read & (then.contents != now.contents)).tolist()
    replaced |= {_read(len(now.names))[at] for at in differ}
    if replaced:
        yield f"{len(replaced):,} replaced: {_names(sorted(replaced), source)}"


def _names(samples: list[int], source: Source) -> str:
    """The first names; a name in a shard takes a walk, so that no others are asked for."""
    more = f" and {len(samples) - _NAMED:,} more" if len(samples) > _NAMED else ""
    return ", ".join(source.name(sample) for sample in samples[:_NAMED]) + more
