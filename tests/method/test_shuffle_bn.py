"""Shuffle-BN: what moves where, how often a key stays with its query, and what BN sees of it."""

from __future__ import annotations

from functools import partial
from itertools import chain, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.config import ShuffleBN
from fastmoco.machine.ranks import World
from fastmoco.method.shuffle_bn import (
    AllToAllShuffle,
    Arrangement,
    LoaderShuffle,
    balanced_arrangement,
    build_shuffle,
    uniform_arrangement,
)
from fastmoco.network.batchnorm import SplitBatchNorm2d
from tests.support.ranks import Ranks
from tests.support.tiny import CONFIG, ONE, Outcome, run_ours, with_strategy

SEED = 11
# Local batches that W divides, does not divide, and that are smaller than W.
LOCALS, WORLDS = (2, 3, 8, 13), (1, 2, 4, 7)
CPU = torch.device("cpu")


def a_world(rank: int, size: int) -> World:
    """A rank that has no process group: enough for everything that sends nothing."""
    return World(rank, rank, size, CPU, "none")


def moved_between(arrangement: np.ndarray, local: int, ranks: int) -> np.ndarray:
    """(W, W): rows that move from each rank to each rank, told from the arrangement alone."""
    counts = np.zeros((ranks, ranks), dtype=np.int64)
    for slot, row in enumerate(arrangement):
        counts[row // local, slot // local] += 1
    return counts


@pytest.mark.parametrize(("local", "ranks"), [*product(LOCALS, WORLDS)])
def test_balanced_arrangement_is_a_permutation_with_constant_counts(local: int, ranks: int) -> None:
    promised = np.array(
        [
            AllToAllShuffle(a_world(rank, ranks), local, lambda _: np.arange(0)).splits()
            for rank in range(ranks)
        ]
    )  # (W, send and receive, W)
    for micro_step in range(20):
        arrangement = balanced_arrangement(micro_step, seed=SEED, local=local, ranks=ranks)
        assert sorted(arrangement) == list(range(local * ranks))
        counts = moved_between(arrangement, local, ranks)
        assert (counts == promised[:, 0]).all()
        assert (counts == promised[:, 1].T).all()
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("arrange", ["uniform", "balanced"])
def test_arrangement_depends_on_seed_and_micro_step_only(arrange: str) -> None:
    def draw(micro_step: int, seed: int) -> Any:
        if arrange == "uniform":
            return uniform_arrangement(micro_step, seed=seed, batch=64).tolist()
        return balanced_arrangement(micro_step, seed=seed, local=16, ranks=4).tolist()

    first = draw(5, 1)
    np.random.seed(3)  # noqa: NPY002 -- the global generator must not matter
    draw(9, 1)
    assert draw(5, 1) == first
    assert len({tuple(draw(step, seed)) for step in range(50) for seed in range(4)}) == 200


def stays(arrangement: Arrangement, group: int, steps: int) -> tuple[float, float]:
    """Share of rows encoded in their query's BN group, and of pairs of mates that stay mates."""
    home = mates = rows = 0
    for micro_step in range(steps):
        order = arrangement(micro_step)
        key_group = np.argsort(order) // group
        query_group = np.arange(len(order)) // group
        home += int((key_group == query_group).sum())
        table = np.zeros((len(order) // group,) * 2, dtype=np.int64)
        np.add.at(table, (query_group, key_group), 1)
        mates += int((table * (table - 1)).sum())
        rows += len(order)
    return home / rows, mates / (rows * (group - 1))


@pytest.mark.parametrize(
    ("local", "ranks", "group"),
    [(2, 4, 2), (3, 4, 3), (5, 4, 5), (8, 4, 8), (8, 2, 4), (6, 7, 3), (32, 8, 32), (16, 1, 4)],
)
def test_no_arrangement_keeps_samples_together_more_often_than_chance(
    local: int, ranks: int, group: int
) -> None:
    batch, steps = local * ranks, 4000
    chance, mates = group / batch, (group - 1) / (batch - 1)
    balanced = partial(balanced_arrangement, seed=SEED, local=local, ranks=ranks)
    uniform = partial(uniform_arrangement, seed=SEED, batch=batch)
    for arrangement in (balanced, uniform):
        home, together = stays(arrangement, group, steps)
        assert home <= chance + 4 * (chance / (steps * batch)) ** 0.5
        assert together <= mates + 6 * (mates / (steps * batch)) ** 0.5


def test_split_moves_each_rank_its_own_way() -> None:
    orders = [
        tuple(build_shuffle("split", world=a_world(r, 4), local=16, seed=0).indices(s).tolist())
        for r in range(4)
        for s in range(5)
    ]
    assert len(set(orders)) == 20
    assert all(sorted(order[:16]) == list(range(16)) for order in orders)


# --- on real ranks -------------------------------------------------------------------------------


def identify(images: Tensor) -> Tensor:
    """An encoder whose key names its image: (N, S, S, 3) to (N, 3)."""
    return images[:, 0, 0].float()


def numbered(rows: np.ndarray) -> Tensor:
    """Images that carry their row number; (N, 2, 2, 3) uint8."""
    return torch.from_numpy(rows).to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)


def keys_come_home(world: World, local: int) -> list[list[int]]:
    """Row numbers of gathered and of local keys, and the rows encoded here, per strategy."""
    found = []
    for strategy in ("all_to_all", "loader", "split", "none"):
        shuffle = build_shuffle(strategy, world=world, local=local, seed=SEED)
        mine = np.arange(world.rank * local, (world.rank + 1) * local)
        for micro_step in range(3):
            rows = mine if shuffle.key_rows is None else shuffle.key_rows(micro_step)[mine]
            encoded: list[int] = []

            def encode(images: Tensor, into: list[int] = encoded) -> Tensor:
                into += identify(images)[:, 0].int().tolist()
                return identify(images)

            indices = shuffle.indices(micro_step)
            keys = shuffle(encode, shuffle.send(numbered(rows), indices), indices)
            found.append([*keys.gathered[:, 0].int().tolist(), *keys.local[:, 0].int().tolist()])
            found.append(encoded)
    return found


@pytest.mark.parametrize("local", [2, 3, 8])
def test_keys_come_home_in_query_order(four_ranks: Ranks, local: int) -> None:
    everyone = list(range(4 * local))
    per_rank = four_ranks.run(keys_come_home, local)
    for rank, found in enumerate(per_rank):
        mine = everyone[rank * local : (rank + 1) * local]
        assert all(order == everyone + mine for order in found[::2])
    for encoded in zip(*(found[1::2] for found in per_rank), strict=True):
        assert sorted(chain(*encoded)) == everyone  # each key is encoded once
    balanced = [
        balanced_arrangement(step, seed=SEED, local=local, ranks=4).tolist() for step in range(3)
    ]
    for step, order in enumerate(balanced):
        assert list(chain(*(found[1::2][step] for found in per_rank))) == order


def recovered_statistics(strategy: ShuffleBN, world: World, local: int, group: int) -> Tensor:
    """(2, steps * N): mean that normalized each sample's query, and mean that did its key.

    Nothing is assumed about groups: an output of BN without affine is (x - mean) / std, and the two
    pixels of a sample give two equations for the two unknowns.
    """
    norm = SplitBatchNorm2d(1, group).double().train()

    def statistics(images: Tensor) -> Tensor:
        x = images[..., :1].permute(0, 3, 1, 2).double()
        y = norm(x).detach()
        std = (x[:, 0, 0, 0] - x[:, 0, 0, 1]) / (y[:, 0, 0, 0] - y[:, 0, 0, 1])
        mean: Tensor = x[:, 0, 0, 0] - y[:, 0, 0, 0] * std
        return mean[:, None]

    shuffle = build_shuffle(strategy, world=world, local=local, seed=SEED)
    mine = slice(world.rank * local, (world.rank + 1) * local)
    pairs = []
    for micro_step in range(60):
        generator = torch.Generator().manual_seed(micro_step)
        left = torch.randint(0, 120, (local * world.size, 1, 1, 1), generator=generator)
        images = torch.cat([left, left + 100], dim=2).to(torch.uint8).expand(-1, 2, 2, 3)
        rows = np.arange(len(images))
        if shuffle.key_rows is not None:
            rows = shuffle.key_rows(micro_step)
        im_k = images[torch.from_numpy(rows)][mine]
        indices = shuffle.indices(micro_step)
        keys = shuffle(statistics, shuffle.send(im_k, indices), indices)
        pairs.append(torch.cat([statistics(images[mine]), keys.local], dim=1))
    return torch.cat(pairs).T


STRATEGIES: list[ShuffleBN] = ["all_to_all", "loader", "split", "none"]


def recover_all(world: World, local: int, group: int) -> list[Tensor]:
    return [recovered_statistics(strategy, world, local, group) for strategy in STRATEGIES]


@pytest.mark.parametrize(("local", "group"), [(8, 8), (8, 4)])
def test_only_without_shuffle_do_query_and_key_share_bn_statistics(
    two_ranks: Ranks, local: int, group: int
) -> None:
    per_rank = two_ranks.run(recover_all, local, group)
    for strategy, *parts in zip(STRATEGIES, *per_rank, strict=True):
        query, key = torch.cat(parts, dim=1)
        same = float((query - key).abs().lt(1e-6).double().mean())
        correlation = float(torch.corrcoef(torch.stack([query, key]))[0, 1])
        if strategy == "none" or (strategy == "split" and group == local):
            assert same == 1.0  # the leak; one group per device leaves split nothing to permute
        else:
            # Two means of G samples that share s of them correlate by s / G. A sample shares
            # itself, and each of its G - 1 mates by the chance of a uniform permutation.
            permuted = local if strategy == "split" else 2 * local
            chance = (1 + (group - 1) ** 2 / (permuted - 1)) / group
            assert same < 0.04
            assert correlation < chance + 0.1


def twin_runs(world: World) -> list[Outcome]:
    """The same steps with the exchange and with a loader that follows its arrangement."""
    local = 16 // world.size
    arrange = partial(balanced_arrangement, seed=3, local=local, ranks=world.size)
    twins = AllToAllShuffle(world, local, arrange), LoaderShuffle(world, local, arrange)
    return [run_ours(world, CONFIG, 4, shuffle=twin) for twin in twins]


def equal_bits(a: Outcome, b: Outcome) -> bool:
    tensors = [(a.queue, b.queue), *zip(a.grads, b.grads, strict=True)]
    tensors += [(a.q[name], b.q[name]) for name in a.q] + [(a.k[name], b.k[name]) for name in a.k]
    return a.losses == b.losses and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
def test_exchange_and_loader_agree_bit_for_bit(pool: str, request: pytest.FixtureRequest) -> None:
    ranks: Ranks = request.getfixturevalue(pool)
    for exchange, loader in ranks.run(twin_runs):
        assert equal_bits(exchange, loader)


def relative(mine: Tensor, truth: Tensor) -> float:
    return float((mine - truth).abs().max() / truth.abs().max().clamp_min(1e-3))


def test_twenty_steps_do_not_depend_on_the_number_of_ranks(
    two_ranks: Ranks, four_ranks: Ranks
) -> None:
    config = with_strategy("loader")
    # One rank permutes keys across groups of its own, by the same permutation.
    one = run_ours(ONE, with_strategy("split"), 20)
    assert equal_bits(one, run_ours(ONE, config, 20))
    for ranks in (two_ranks, four_ranks):
        outcomes = ranks.run(run_ours, config, 20)
        losses = np.mean([outcome.losses for outcome in outcomes], axis=0)
        np.testing.assert_allclose(losses, one.losses, rtol=2e-4)
        for outcome in outcomes:
            assert outcome.ptr == one.ptr
            assert relative(outcome.queue, one.queue) < 1e-3
            for mine, truth in ((outcome.q, one.q), (outcome.k, one.k)):
                weights = [n for n in truth if "running" not in n and "tracked" not in n]
                assert max(relative(mine[n], truth[n]) for n in weights) < 1e-3
        for name in (n for n in one.k if "running" in n):
            mean = torch.stack([outcome.k[name] for outcome in outcomes]).mean(0)
            assert relative(mean, one.k[name]) < 1e-3
