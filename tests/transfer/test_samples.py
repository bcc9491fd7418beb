"""Which samples a step gets, and the random choices about them: functions of their key alone."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch

from fastmoco.transfer.samples import ANCHORS, PROPOSALS, Deliveries, Key, generator, uniforms


def test_every_epoch_delivers_every_sample_once_across_the_ends_of_batches() -> None:
    deliveries = Deliveries(10, 4, seed=3)
    keys = [key for step in range(10) for key in deliveries.of_step(step)]
    assert [key.epoch for key in keys] == [epoch for epoch in range(4) for _ in range(10)]
    orders = [[key.sample for key in keys[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert all(a != b for a, b in pairwise(orders))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_what_one_rank_gets(size: int) -> None:
    deliveries = Deliveries(10, 4, seed=3)
    alone = list(deliveries.of_rank(range(2, 7), 0, 1))
    parts = [list(deliveries.of_rank(range(2, 7), rank, size)) for rank in range(size)]
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == alone


def test_choices_differ_between_keys_and_purposes_and_come_again() -> None:
    keys = [Key(s, e, n) for s in range(2) for e in range(2) for n in range(3)]
    drawn = [uniforms(key, 3) for key in keys]
    assert drawn == [uniforms(key, 3) for key in keys]
    assert len({tuple(one) for one in drawn}) == len(keys)
    assert uniforms(keys[0], 5)[:3] == drawn[0]
    cpu = torch.device("cpu")
    seeds = {generator(k, p, cpu).initial_seed() for k in keys for p in (ANCHORS, PROPOSALS)}
    assert len(seeds) == 2 * len(keys)


def test_the_uniforms_are_uniform() -> None:
    values = torch.tensor([uniforms(Key(0, 0, n), 2) for n in range(4000)])
    assert bool(((values >= 0) & (values < 1)).all())
    # Three standard errors of a mean of 4000 are 0.014.
    torch.testing.assert_close(values.mean(0), torch.full((2,), 0.5), rtol=0, atol=0.014)
    assert abs(float(torch.corrcoef(values.T)[0, 1])) < 0.05
