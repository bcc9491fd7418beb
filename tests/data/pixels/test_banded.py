"""Products with banded matrices against the same operations in float64, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from fastmoco.data.pixels.banded import blur, resize
from tests.support.oracles import float_oracle


@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((1, 1), (3, 5)),
        ((7, 90), (40, 33)),  # the last block of rows is shorter
        ((90, 7), (40, 33)),
        ((64, 65), (32, 33)),  # at twice the side blocks become shorter
        ((500, 333), (41, 9)),
        ((41, 41), (41, 41)),
    ],
)
def test_resize(size: tuple[int, int], to: tuple[int, int]) -> None:
    planes = np.random.default_rng(0).random((2, *size), np.float32)
    expected = float_oracle.resize(planes.transpose(1, 2, 0).astype(np.float64), *to)
    found = resize(planes[:, ::-1], *to)[:, ::-1]  # not contiguous, as parts of pictures are
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("side", [1, 8, 19, 70])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.0, 2.0, 5.5])
def test_blur(side: int, sigma: float) -> None:
    planes = np.random.default_rng(0).random((2, side, side), np.float32)
    expected = float_oracle.blur(planes.transpose(1, 2, 0).astype(np.float64), sigma)
    np.testing.assert_allclose(blur(planes, sigma), expected.transpose(2, 0, 1), atol=1e-6)
