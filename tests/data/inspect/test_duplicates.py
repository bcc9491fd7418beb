"""Copies: what counts as one, and that none within reach is missed."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.inspect.duplicates import (
    NEAR,
    NO_HASH,
    find_across,
    find_copies,
    gray_32,
    near_pairs,
    perceptual_hash,
    spare,
)

FAR = (1 << 62) - 1


def scene(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    """Blots of many sizes, as photographs have low and high frequencies."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width))
    for cells in (3, 6, 12, 24):
        noise = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / cells**0.5
    return Image.fromarray(np.clip(128 + 60 * total, 0, 255).astype(np.uint8))


def hash_of(image: Image.Image) -> int:
    return perceptual_hash(gray_32(image))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


def bits(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def test_the_hash_has_the_signs_of_a_transform_written_out() -> None:
    gray = np.random.default_rng(0).uniform(0, 255, (32, 32))
    x = np.arange(32)
    low = [
        sum(
            gray[i, j] * np.cos(np.pi * u * (2 * i + 1) / 64) * np.cos(np.pi * v * (2 * j + 1) / 64)
            for i in x
            for j in x
        )
        for u in range(8)
        for v in range(8)
    ][1:]
    middle = sorted(low)[31]
    assert perceptual_hash(gray) == sum(1 << at for at, value in enumerate(low) if value > middle)


def test_copies_lie_near_and_other_pictures_far() -> None:
    scenes = [scene(seed) for seed in range(12)]
    hashes = [hash_of(one) for one in scenes]
    for one, known in zip(scenes, hashes, strict=True):
        assert bits(hash_of(jpeg(one, 60)), known) <= NEAR
        assert bits(hash_of(one.resize((100, 75), Image.Resampling.LANCZOS)), known) <= NEAR
        assert bits(hash_of(one.point(lambda value: value * 0.8 + 20)), known) <= NEAR
    assert min(bits(a, b) for a, b in combinations(hashes, 2)) > 3 * NEAR


def test_a_flat_picture_has_no_hash_and_is_like_no_other() -> None:
    noise = np.random.default_rng(0).normal(200, 1, (60, 60)).astype(np.uint8)
    assert hash_of(Image.fromarray(noise)) == NO_HASH
    assert find_copies([b"a", b"b"], [NO_HASH, NO_HASH]).near == []


def test_no_pair_within_reach_is_missed_and_none_beyond_it_found() -> None:
    rng = np.random.default_rng(1)
    base = [int(value) for value in rng.integers(1, 1 << 62, 40)]
    hashes = set(base)
    for one in base:
        for flips in range(1, 7):
            hashes.add(one ^ sum(1 << int(bit) for bit in rng.choice(63, flips, replace=False)))
    unique = np.array(sorted(hashes), np.uint64)
    expected = {
        (a, b, bits(int(unique[a]), int(unique[b])))
        for a, b in combinations(range(len(unique)), 2)
        if bits(int(unique[a]), int(unique[b])) <= NEAR
    }
    assert len(expected) > 60
    assert set(near_pairs(unique)) == expected


def test_exact_copies_are_not_counted_as_near_ones() -> None:
    #          0     1     2     3     4     5
    digests = [b"a", b"b", b"a", b"c", b"d", b"a"]
    hashes = [5, 5 ^ 0b11, 5, FAR, 5 ^ 0b1100000, 5]
    copies = find_copies(digests, hashes)
    assert copies.exact == [[0, 2, 5]]
    assert copies.near == [[0, 1, 4]]
    assert spare(copies.exact) == 2
    assert spare(copies.near) == 2


@pytest.mark.parametrize(
    ("digests", "hashes", "exact", "near"),
    [
        ("ab|ac", (5, 9, 5, FAR), [(0, 2)], []),
        ("ab|cd", (5, FAR, 5, 4), [], [(0, 2), (0, 3)]),  # equal hashes, and one bit apart
        # Two of the test set with the same bytes: each is near to the training picture.
        ("ab|cc", (5, FAR, 7, 7), [], [(0, 2), (0, 3)]),
        ("aa|ab", (5, 5, 5, 7), [(0, 2)], [(0, 3)]),
        ("ab|cd", (5, 5 ^ 0xFFFF, FAR, FAR ^ 1), [], []),  # alike within the test set
    ],
)
def test_copies_across_name_each_test_picture_once(
    digests: str,
    hashes: tuple[int, ...],
    exact: list[tuple[int, int]],
    near: list[tuple[int, int]],
) -> None:
    train, test = digests.split("|")
    names = [letter.encode() for letter in train + test]
    assert find_across(find_copies(names, hashes), len(train)) == (exact, near)
