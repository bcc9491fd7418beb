"""The epoch order: a permutation, uniform, independent of how it is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from fastmoco.data.order import EpochOrder, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 100, 257, 4096, 50_003])
def test_every_sample_appears_once(size: int) -> None:
    order = EpochOrder(size, seed=3)
    for epoch in range(3):
        drawn = order.samples(epoch, np.arange(size))
        assert np.array_equal(np.sort(drawn), np.arange(size))


def test_position_alone_decides() -> None:
    order = EpochOrder(10_007, seed=1)
    whole = order.samples(4, np.arange(10_007))
    some = np.array([9_999, 0, 17, 5_000, 17])
    assert np.array_equal(order.samples(4, some), whole[some])


def test_seed_and_epoch_change_the_order() -> None:
    at = np.arange(1_000)
    first = EpochOrder(1_000, seed=0).samples(0, at)
    for other in (EpochOrder(1_000, 1).samples(0, at), EpochOrder(1_000, 0).samples(1, at)):
        # Two random permutations agree in one place on average.
        assert (first == other).sum() < 8


@pytest.mark.parametrize("size", [3, 5, 6, 8, 11])
def test_uniform_over_epochs(size: int) -> None:
    """Chi-square of (position, sample) counts over 20,000 epochs, and of ordered neighbours."""
    epochs = 20_000
    keys = np.random.default_rng(0).integers(0, 2**63, epochs, dtype=np.uint64)
    at = np.tile(np.arange(size), epochs)
    drawn = permute(at, size, np.repeat(keys, size)).reshape(epochs, size)
    counts = np.zeros((size, size))
    pairs = np.zeros((size, size))
    for position in range(size):
        counts[position] = np.bincount(drawn[:, position], minlength=size)
        following = drawn[:, (position + 1) % size]
        np.add.at(pairs, (drawn[:, position], following), 1)
    expected = epochs / size
    freedom = (size - 1) ** 2
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # Mean = freedom, deviation = sqrt(2 freedom); 4.5 deviations.
    assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom)
    assert (np.diag(pairs) == 0).all()
    off = pairs[~np.eye(size, dtype=bool)]
    expected = epochs * size / (size * (size - 1))
    chi2 = ((off - expected) ** 2 / expected).sum()
    assert chi2 < len(off) + 5 * np.sqrt(2 * len(off))


def test_no_correlation_with_the_position() -> None:
    size = 1_281_167
    drawn = EpochOrder(size, seed=0).samples(7, np.arange(200_000)).astype(float)
    at = np.arange(200_000)
    assert abs(np.corrcoef(at, drawn)[0, 1]) < 0.01
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01
    assert abs(drawn.mean() / size - 0.5) < 0.003


def test_a_billion_samples_without_a_list() -> None:
    order = EpochOrder(10**9, seed=0)
    drawn = order.samples(0, np.arange(10**9 - 100_000, 10**9))
    assert len(np.unique(drawn)) == 100_000
    assert drawn.min() >= 0
    assert drawn.max() < 10**9


def test_outside_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        permute(np.array([10]), 10, 0)


def test_window_order_is_a_permutation_that_reads_few_shards_at_a_time() -> None:
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 60, 400)
    total = int(sizes.sum())
    order = EpochOrder(total, seed=2, window=500, shard_sizes=sizes)
    drawn = order.samples(3, np.arange(total))
    assert np.array_equal(np.sort(drawn), np.arange(total))
    shard = np.searchsorted(np.cumsum(sizes), drawn, side="right")
    touched = [len(np.unique(shard[i : i + 64])) for i in range(0, total - 64, 64)]
    ids = [np.unique(shard[i : i + 500]) for i in range(0, total - 500, 500)]
    # Two windows can meet inside 500 positions; each spans about 500 / 30 shards.
    assert max(len(x) for x in ids) < 70
    assert np.mean(touched) > 10  # inside a window the order is mixed
    assert not np.array_equal(drawn, order.samples(4, np.arange(total)))


def test_window_order_scales_and_is_pure() -> None:
    sizes = np.full(100_000, 10_000)
    order = EpochOrder(10**9, seed=0, window=1_000_000, shard_sizes=sizes)
    at = np.arange(512_345_678, 512_345_678 + 4096)
    whole = order.samples(1, at)
    assert np.array_equal(order.samples(1, at[100:200]), whole[100:200])
    assert len(np.unique(whole)) == 4096


def test_window_needs_the_shards() -> None:
    with pytest.raises(ValueError, match="shards hold"):
        EpochOrder(10, seed=0, window=4, shard_sizes=(3, 3))
