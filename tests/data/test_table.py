"""The table: torchvision's crop rule on the same draws, the published distributions, purity."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torchvision.transforms.transforms as transforms
from PIL import Image

from fastmoco.config import AugmentConfig
from fastmoco.data import table as tables
from fastmoco.data.table import ViewTable, draw_uniforms, view_table

official: Any = transforms  # its annotations name tensors only
V1 = AugmentConfig(recipe="v1", hue=0.4, jitter_p=1.0, blur_p=0.0)
V2 = AugmentConfig()


class ScriptedTorch:
    """Stands in for torch inside torchvision and deals the given uniforms, in order."""

    def __init__(self, uniforms: np.ndarray) -> None:
        self.deck = iter(uniforms.tolist())
        self.try_: list[float] = []

    def _next(self, name: int) -> float:
        # torchvision draws area and ratio of a try, and the corner only when the try fits.
        if name == 0:
            self.try_ = [next(self.deck) for _ in range(4)]
        return self.try_[name]

    def tensor(self, x: Any) -> np.ndarray:
        return np.asarray(x, dtype=np.float64)

    def log(self, x: Any) -> Any:
        return np.log(x)

    def exp(self, x: Any) -> Any:
        return np.exp(x)

    def empty(self, _: int) -> Any:
        outer = self

        class Slot:
            def uniform_(self, low: float, high: float) -> Any:
                which = 1 if low < 0 else 0
                return np.float64(low + outer._next(which) * (high - low))

        return Slot()

    def randint(self, low: int, high: int, size: tuple[int]) -> Any:
        drawn = getattr(self, "corner", 2)
        self.corner = 3 if drawn == 2 else 2
        return np.int64(low + math.floor(self.try_[drawn] * (high - low)))


@pytest.mark.parametrize("min_area", [0.2, 0.08, 0.9])
def test_crop_is_torchvisions(monkeypatch: pytest.MonkeyPatch, min_area: float) -> None:
    rng = np.random.default_rng(1)
    sizes = np.concatenate(
        [
            rng.integers(1, 700, (150, 2)),
            [[500, 375], [1, 1], [2, 900], [900, 2], [10, 600], [224, 224], [600, 10], [3, 4]],
        ]
    ).astype(np.int32)
    uniforms = draw_uniforms(0, 0, 0, 0, len(sizes))
    table = view_table(dataclasses.replace(V2, min_area=min_area), uniforms, sizes)
    fallbacks = 0
    for row, (width, height) in enumerate(sizes.tolist()):
        script = ScriptedTorch(uniforms[row])
        monkeypatch.setattr(official, "torch", script)
        image = Image.new("RGB", (width, height))
        box = official.RandomResizedCrop.get_params(image, [min_area, 1.0], [3 / 4, 4 / 3])
        assert tuple(table.crop[row]) == box, (width, height)
        fallbacks += not hasattr(script, "corner")
    assert fallbacks >= 4


def test_rows_are_a_function_of_the_position() -> None:
    whole = draw_uniforms(5, 2, 1, 0, 1000)
    assert np.array_equal(draw_uniforms(5, 2, 1, 640, 64), whole[640:704])
    far = 10**12
    assert np.array_equal(draw_uniforms(5, 2, 1, far, 8)[5], draw_uniforms(5, 2, 1, far + 5, 1)[0])


@pytest.mark.parametrize("other", [(6, 2, 1), (5, 3, 1), (5, 2, 0)])
def test_seed_epoch_and_view_give_unrelated_rows(other: tuple[int, int, int]) -> None:
    a = draw_uniforms(5, 2, 1, 0, 400).ravel()
    b = draw_uniforms(*other, 0, 400).ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert not np.isin(a, b).any()


@pytest.mark.parametrize("config", [V1, V2], ids=["v1", "v2"])
def test_distributions_are_the_recipes(config: AugmentConfig) -> None:
    n = 40_000
    sizes = np.tile(np.array([[500, 375]], dtype=np.int32), (n, 1))
    table = view_table(config, draw_uniforms(0, 0, 0, 0, n), sizes)
    share = 4 * math.sqrt(0.25 / n)  # four deviations of a share
    assert abs(table.jitter.mean() - config.jitter_p) < share
    assert abs(table.gray.mean() - 0.2) < share
    assert abs(table.flip.mean() - 0.5) < share
    assert abs((table.sigma > 0).mean() - config.blur_p) < share
    if config.blur_p:
        blurred = table.sigma[table.sigma > 0]
        assert 0.1 <= blurred.min() < 0.11
        assert 1.99 < blurred.max() <= 2.0
        assert abs(blurred.mean() - 1.05) < 0.02
    for column, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-config.hue, config.hue)]):
        drawn = table.factors[:, column]
        assert low <= drawn.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.01
    orders, counts = np.unique(table.order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 23 + 4 * math.sqrt(46)
    area = table.crop[:, 2] * table.crop[:, 3] / (500 * 375)
    assert area.min() > 0.195
    assert area.max() <= 1
    independent = np.corrcoef(np.column_stack([table.factors, table.gray, table.flip]).T)
    assert np.abs(independent - np.eye(6)).max() < 0.03


def test_a_spread_above_one_does_not_go_below_zero() -> None:
    config = dataclasses.replace(V2, brightness=1.5)
    table = view_table(config, draw_uniforms(0, 0, 0, 0, 5000), np.full((5000, 2), 64, np.int32))
    assert 0 <= table.factors[:, 0].min() < 0.01
    assert 2.49 < table.factors[:, 0].max() <= 2.5


def test_pack_round_trip_is_exact() -> None:
    sizes = np.full((100, 2), 60_000, np.int32)
    table = view_table(V2, draw_uniforms(0, 0, 0, 0, 100), sizes)
    packed = table.pack()
    assert packed.shape == (100, tables.COLUMNS)
    assert packed.dtype == np.float32
    again = ViewTable.unpack(packed)
    for field in dataclasses.fields(ViewTable):
        assert np.array_equal(getattr(again, field.name), getattr(table, field.name)), field.name
