"""Which sample stands at which position of an epoch: pure functions of (seed, epoch, position).

An epoch is a keyed permutation of the index that is evaluated per position, so an epoch of a
billion samples costs no memory and a run resumes at any position. It is a Feistel network on
ceil(log2 size) bits; positions that it maps outside the index are mapped again until they fall
inside (cycle walking, at most 2 evaluations on average once the index has 128 samples).

Source of the construction: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

# Passes over both halves, and the fewest bits of the network: halves of one or two bits reach so
# few permutations that neighbours are 5 % too often neighbours again (tests/data/test_order.py).
_PASSES = 4
_LEAST_BITS = 7
_MULTIPLY = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_GOLDEN = 0x9E3779B97F4A7C15
_SHIFT = np.uint64(33)
_MASK = (1 << 64) - 1


def _mix(x: UInt64) -> UInt64:
    """The 64-bit finalizer of MurmurHash3: a bijection whose output bits look independent."""
    for multiplier in _MULTIPLY:
        x = (x ^ (x >> _SHIFT)) * multiplier
    mixed: UInt64 = x ^ (x >> _SHIFT)
    return mixed


def stream_key(*words: int) -> int:
    """A 64-bit key for a tuple of integers, such as (seed, epoch, purpose)."""
    key = np.array([_GOLDEN], dtype=np.uint64)
    for word in words:
        key = _mix(key ^ np.uint64((word * _GOLDEN + 1) & _MASK))
    return int(_mix(key)[0])


def permute(positions: Int64, size: Int64 | int, key: UInt64 | int) -> Int64:
    """Image of every position under the keyed permutation of range(size).

    positions: int64 (n,), each in [0, size). size and key: scalars, or one of each per position,
    for many independent permutations at once. Returns int64 (n,). Raises `ValueError` for a
    position outside its range.
    """
    at = np.asarray(positions, dtype=np.int64)
    limit = np.broadcast_to(np.asarray(size, dtype=np.int64), at.shape)
    if at.size and (at.min() < 0 or bool((at >= limit).any())):
        raise ValueError(f"position outside [0, size): {at.min()}..{at.max()}, size {size}")
    bits = np.maximum(_bit_length(limit - 1), _LEAST_BITS)
    low_bits = (bits + 1) // 2
    masks = _ones(low_bits), _ones(bits - low_bits)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), at.shape)
    value = _network(at.astype(np.uint64), low_bits.astype(np.uint64), masks, keys)
    outside = np.flatnonzero(value >= limit.astype(np.uint64))
    while outside.size:
        again = _network(
            value[outside],
            low_bits[outside].astype(np.uint64),
            (masks[0][outside], masks[1][outside]),
            keys[outside],
        )
        value[outside] = again
        outside = outside[again >= limit[outside].astype(np.uint64)]
    return value.astype(np.int64)


def _bit_length(x: Int64) -> Int64:
    """Bits of each x; float64 logarithms would be wrong near 2^53, so compare with the powers."""
    powers = np.left_shift(np.int64(1), np.arange(63, dtype=np.int64))
    return np.searchsorted(powers, x, side="right").astype(np.int64)


def _ones(bits: Int64) -> UInt64:
    return (np.left_shift(np.uint64(1), bits.astype(np.uint64)) - np.uint64(1)).astype(np.uint64)


def _network(value: UInt64, low_bits: UInt64, masks: tuple[UInt64, UInt64], key: UInt64) -> UInt64:
    """The Feistel network: each half in turn is changed by a keyed hash of the other."""
    low, high = value & masks[0], value >> low_bits
    for number in range(_PASSES):
        low ^= _mix(high ^ (key + np.uint64((2 * number * _GOLDEN) & _MASK))) & masks[0]
        high ^= _mix(low ^ (key + np.uint64(((2 * number + 1) * _GOLDEN) & _MASK))) & masks[1]
    joined: UInt64 = (high << low_bits) | low
    return joined


@dataclass(frozen=True)
class EpochOrder:
    """The order of every epoch of one run.

    With `window` 0 an epoch is one permutation of the whole index. With a window it reads shards
    one after another, in an order permuted per epoch, and permutes only inside windows of that
    many consecutive samples of the stream, so that a reader touches few shards at a time. The cuts
    between windows move by a random offset per epoch, so that no two samples stay in different
    windows for ever.
    """

    num_samples: int
    seed: int
    window: int = 0
    shard_sizes: tuple[int, ...] | NDArray[np.int64] = ()

    def __post_init__(self) -> None:
        sizes = np.asarray(self.shard_sizes, dtype=np.int64)
        if self.window and int(sizes.sum()) != self.num_samples:
            raise ValueError(f"shards hold {int(sizes.sum())} samples, not {self.num_samples}")
        object.__setattr__(self, "shard_sizes", sizes)

    def samples(self, epoch: int, positions: Int64) -> Int64:
        """Sample index at each position of the epoch; int64 (n,) to int64 (n,)."""
        if not self.window:
            return permute(positions, self.num_samples, stream_key(self.seed, epoch, 0))
        return self._from_stream(epoch, self._inside_windows(epoch, positions))

    def _inside_windows(self, epoch: int, positions: Int64) -> Int64:
        """Place in the shard stream of each position."""
        offset = stream_key(self.seed, epoch, 1) % self.window
        block = (positions + offset) // self.window
        first = np.maximum(block * self.window - offset, 0)
        last = np.minimum((block + 1) * self.window - offset, self.num_samples)
        keys = _mix(block.astype(np.uint64) ^ np.uint64(stream_key(self.seed, epoch, 2)))
        return first + permute(positions - first, last - first, keys)

    def _from_stream(self, epoch: int, places: Int64) -> Int64:
        """Sample index of each place of the stream of shards in this epoch's shard order."""
        sizes = np.asarray(self.shard_sizes, dtype=np.int64)
        order = permute(
            np.arange(len(sizes), dtype=np.int64), len(sizes), stream_key(self.seed, epoch, 3)
        )
        ends = np.cumsum(sizes[order])
        nth = np.searchsorted(ends, places, side="right")
        inside = places - (ends[nth] - sizes[order][nth])
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        sample: Int64 = starts[order[nth]] + inside
        return sample
