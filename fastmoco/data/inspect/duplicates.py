"""Pictures that are there more than once: the same bytes, or nearly the same picture.

Nearly the same is decided by a perceptual hash: the signs of 63 low frequencies of the picture at
32 x 32. Of 250 photographs of ImageNet, copies of half the size or JPEG quality 30 differ in 2 bits
at most (all but one: 4), different photographs in 16 and more.

n pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UInt64 = NDArray[np.uint64]
NO_HASH = 0
"""Of a picture that is nearly one colour: the hash of noise would say nothing."""
NEAR = 3
"""Bits in which the hashes of near duplicates differ at most; below `_BANDS`."""
_SIDE, _LOW = 32, 8
_BANDS, _BAND_BITS = 4, 16
# Neighbours in a bucket that are compared: sets of a million blank forms stay affordable.
_NEIGHBOURS = 64
_FLAT = 2.0  # levels of 255


def _cosines() -> NDArray[np.float64]:
    """(8, 32): the lowest rows of the discrete cosine transform."""
    frequency, place = np.arange(_LOW)[:, None], np.arange(_SIDE)[None]
    found: NDArray[np.float64] = np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))
    return found


_COSINES = _cosines()
_POWERS = 2 ** np.arange(63, dtype=np.uint64)


def perceptual_hash(gray: NDArray[np.float64]) -> int:
    """63 bits of a gray picture (32, 32) in levels of 255; `NO_HASH` of one that is nearly flat.

    Bit i: whether the i-th of the 8 x 8 lowest frequencies but the mean exceeds their median.
    """
    if gray.std() < _FLAT:
        return NO_HASH
    low = (_COSINES @ gray @ _COSINES.T).reshape(-1)[1:]
    return int(_POWERS[low > np.median(low)].sum())


def gray_32(image: Image.Image) -> NDArray[np.float64]:
    """A picture of PIL's mode L or F as (32, 32)."""
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(small, np.float64)


def distance(a: UInt64, b: UInt64) -> NDArray[Any]:
    """Bits in which hashes differ, one number for each pair of elements."""
    differing = np.atleast_1d(a ^ b)
    bits = np.unpackbits(differing.view(np.uint8).reshape(-1, 8), axis=1)
    found: NDArray[Any] = bits.sum(axis=1)
    return found


def near_pairs(hashes: UInt64) -> Iterator[tuple[int, int, int]]:
    """Places of different hashes at most `NEAR` bits apart, and these bits.

    hashes: (n,), each once. Hashes so close agree in one of four bands of 16 bits.
    """
    seen: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        keys = (hashes >> np.uint64(band * _BAND_BITS)) & np.uint64((1 << _BAND_BITS) - 1)
        order = np.lexsort((hashes, keys))
        sorted_keys, sorted_hashes = keys[order], hashes[order]
        for gap in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            (at,) = np.nonzero(sorted_keys[gap:] == sorted_keys[:-gap])
            if not len(at):
                break
            bits = distance(sorted_hashes[at], sorted_hashes[at + gap])
            for place, differing in zip(at[bits <= NEAR], bits[bits <= NEAR], strict=True):
                a, b = sorted((int(order[place]), int(order[place + gap])))
                if (a, b) not in seen:
                    seen.add((a, b))
                    yield a, b, int(differing)


def groups_of(n: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Places that pairs join, directly or through others, in groups of two and more."""
    above = list(range(n))

    def top(place: int) -> int:
        while above[place] != place:
            above[place] = above[above[place]]
            place = above[place]
        return place

    for a, b in pairs:
        one, other = sorted((top(a), top(b)))
        above[other] = one
    groups: dict[int, list[int]] = {}
    for place in range(n):
        groups.setdefault(top(place), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


class Copies(NamedTuple):
    """What is there more than once among n pictures, by their places."""

    exact: list[list[int]]
    """Groups with the same bytes."""
    near: list[list[int]]
    """Groups of nearly the same picture; of those with the same bytes only the first."""


def spare(groups: Iterable[Sequence[int]]) -> int:
    """Pictures that could be left out: all of each group but one."""
    return sum(len(group) - 1 for group in groups)


def find_copies(digests: Sequence[bytes], hashes: Sequence[int]) -> Copies:
    """Groups of copies among n pictures, given the digest of the bytes and the hash of each."""
    by_digest: dict[bytes, list[int]] = {}
    for place, digest in enumerate(digests):
        by_digest.setdefault(digest, []).append(place)
    exact = [group for group in by_digest.values() if len(group) > 1]
    heads = [group[0] for group in by_digest.values()]  # of equal bytes, one stands for all
    by_hash: dict[int, list[int]] = {}
    for place in heads:
        if hashes[place] != NO_HASH:
            by_hash.setdefault(hashes[place], []).append(place)
    chosen = [group[0] for group in by_hash.values()]
    joined = [(group[0], other) for group in by_hash.values() for other in group[1:]]
    unique = np.array(list(by_hash), np.uint64)
    joined += [(chosen[a], chosen[b]) for a, b, _ in near_pairs(unique)]
    return Copies(exact, groups_of(len(digests), joined))


Pairs = list[tuple[int, int]]
"""Places of an earlier and a later picture."""


def find_across(copies: Copies, first: int) -> tuple[Pairs, Pairs]:
    """Exact and near copies between the pictures before the place `first` and those from it on.

    Each later picture once, with one of the earlier.
    """
    same = {group[0]: group for group in copies.exact}
    exact = _across(copies.exact, first)
    found = {later for _, later in exact}
    whole = ([one for place in group for one in same.get(place, [place])] for group in copies.near)
    return exact, [pair for pair in _across(whole, first) if pair[1] not in found]


def _across(groups: Iterable[Sequence[int]], first: int) -> Pairs:
    pairs = []
    for group in groups:
        before = [place for place in group if place < first]
        if before:
            pairs += [(before[0], place) for place in group if place >= first]
    return pairs
