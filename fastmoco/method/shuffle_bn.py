"""Shuffle-BN: keys are normalized in other BN groups than their queries.

Source: arXiv 1911.05722, section 3.3.

Every permutation is a pure function of (seed, micro-step), drawn with a counter-based generator,
so that all ranks know it without a message. An *arrangement* lists, for every slot of the
shuffled global batch (rank d owns slots d*N .. d*N + N - 1), the query row whose key view is
encoded there.

N local batch, W ranks, B = N * W global micro-batch, S image side, C feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco.config import ShuffleBN
from fastmoco.machine.collectives import all_gather, all_to_all
from fastmoco.machine.ranks import World

Encode = Callable[[Tensor], Tensor]
Rows = NDArray[np.int64]
Arrangement = Callable[[int], Rows]


class Keys(NamedTuple):
    """Keys in query order."""

    local: Tensor
    """(N, C): the positives of this rank's queries."""
    gathered: Tensor
    """(B, C): those of the global micro-batch, equal on all ranks, for the queue."""


class Shuffle(Protocol):
    """A strategy, built once; the loop calls it without asking which one it is."""

    @property
    def key_rows(self) -> Arrangement | None:
        """Rows whose key views the loader hands to the ranks; None keeps them with the queries."""
        ...

    def indices(self, micro_step: int) -> Tensor:
        """int64 row indices that `__call__` needs in this micro-step, on the CPU."""
        ...

    def send(self, im_k: Tensor, indices: Tensor) -> Tensor:
        """Begin to move key images (N, S, S, 3); the queries' forward may run meanwhile."""
        ...

    def __call__(self, encode: Encode, sent: Tensor, indices: Tensor) -> Keys:
        """Encode what `send` returned; a key shares its query's BN group only by chance."""
        ...


def _generator(seed: int, micro_step: int) -> np.random.Generator:
    # The last counter word separates these draws from those of the sample order and the views.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, micro_step, 0x5B4]))


def uniform_arrangement(micro_step: int, *, seed: int, batch: int) -> Rows:
    """A uniform permutation of the B rows that does not depend on the number of ranks."""
    return _generator(seed, micro_step).permutation(batch)


def balanced_arrangement(micro_step: int, *, seed: int, local: int, ranks: int) -> Rows:
    """A permutation that moves the same number of rows between each pair of ranks every step.

    Rank s permutes its N rows and deals row i to rank (i + s + 1) mod W; each rank then permutes
    what it received. Counts stay constant although W need not divide N, so shapes are static for
    the compiler. Home is dealt to last: a row stays there with probability floor(N/W) / N, never
    more often than the 1/W of a uniform permutation, also when N is smaller than W.
    """
    generator = _generator(seed, micro_step)
    rows = generator.permuted(np.arange(ranks * local).reshape(ranks, local), axis=1)
    owner = (np.arange(local) + np.arange(ranks)[:, None] + 1) % ranks
    received = np.stack([rows[owner == rank] for rank in range(ranks)])
    return generator.permuted(received, axis=1).reshape(-1)


@dataclass(frozen=True)
class NoShuffle:
    """Keys stay in the BN group of their queries: the paper's ablation."""

    world: World
    key_rows: Arrangement | None = None

    def indices(self, micro_step: int) -> Tensor:
        """Empty: nothing moves."""
        return torch.empty(0, dtype=torch.int64)

    def send(self, im_k: Tensor, indices: Tensor) -> Tensor:
        """No image leaves the rank."""
        return im_k

    def __call__(self, encode: Encode, sent: Tensor, indices: Tensor) -> Keys:
        """Encode in place."""
        local = encode(sent)
        return Keys(local, all_gather(local, self.world))


@dataclass(frozen=True)
class SplitShuffle:
    """Permute keys across the BN groups of one device; no image leaves it."""

    world: World
    local: int
    seed: int
    key_rows: Arrangement | None = None

    def indices(self, micro_step: int) -> Tensor:
        """(2N,): the permutation of the local rows, then its inverse."""
        # A stream per rank: groups of different ranks must not move in step.
        stream = micro_step * self.world.size + self.world.rank
        order = uniform_arrangement(stream, seed=self.seed, batch=self.local)
        return torch.from_numpy(np.concatenate([order, np.argsort(order)]))

    def send(self, im_k: Tensor, indices: Tensor) -> Tensor:
        """No image leaves the rank."""
        return im_k

    def __call__(self, encode: Encode, sent: Tensor, indices: Tensor) -> Keys:
        """Permute, encode, permute back."""
        order, inverse = indices.split(self.local)
        local = encode(sent[order])[inverse]
        return Keys(local, all_gather(local, self.world))


@dataclass(frozen=True)
class LoaderShuffle:
    """The loader gives rank d the key views of its slots: no image crosses the network.

    The all-gather of keys that the queue needs anyway brings every positive home.
    """

    world: World
    local: int
    key_rows: Arrangement

    def indices(self, micro_step: int) -> Tensor:
        """(B,): the slot in which each query row's key was encoded."""
        return torch.from_numpy(np.argsort(self.key_rows(micro_step)))

    def send(self, im_k: Tensor, indices: Tensor) -> Tensor:
        """No image leaves the rank."""
        return im_k

    def __call__(self, encode: Encode, sent: Tensor, indices: Tensor) -> Keys:
        """Encode what the loader brought, gather, unshuffle."""
        return _unshuffle(encode(sent), indices, self.local, self.world)


@dataclass(frozen=True)
class AllToAllShuffle:
    """Each rank sends every other rank only the uint8 rows it is to encode."""

    world: World
    local: int
    arrangement: Arrangement
    key_rows: Arrangement | None = None

    def indices(self, micro_step: int) -> Tensor:
        """(2N + B,): rows in sending order, order of arrival to slots, slots of the query rows."""
        arrangement = self.arrangement(micro_step)
        n, rank = self.local, self.world.rank
        mine = arrangement[arrangement // n == rank] - rank * n  # in slot order: by destination
        source = arrangement[rank * n : (rank + 1) * n] // n
        arrival = np.argsort(np.argsort(source, kind="stable"), kind="stable")
        return torch.from_numpy(np.concatenate([mine, arrival, np.argsort(arrangement)]))

    def splits(self) -> tuple[list[int], list[int]]:
        """Rows that this rank sends to and receives from each rank, the same in every step."""
        ranks, rank = self.world.size, self.world.rank
        send = [len(range((d - rank - 1) % ranks, self.local, ranks)) for d in range(ranks)]
        receive = [len(range((rank - s - 1) % ranks, self.local, ranks)) for s in range(ranks)]
        return send, receive

    def send(self, im_k: Tensor, indices: Tensor) -> Tensor:
        """Begin to exchange images."""
        send, receive = self.splits()
        return all_to_all(im_k[indices[: self.local]], send, receive, self.world)

    def __call__(self, encode: Encode, sent: Tensor, indices: Tensor) -> Keys:
        """Encode what arrived, gather, unshuffle."""
        arrival, home = indices[self.local : 2 * self.local], indices[2 * self.local :]
        return _unshuffle(encode(sent[arrival]), home, self.local, self.world)


def _unshuffle(encoded: Tensor, home: Tensor, local: int, world: World) -> Keys:
    gathered = all_gather(encoded, world)[home]
    return Keys(gathered[world.rank * local : (world.rank + 1) * local], gathered)


def build_shuffle(strategy: ShuffleBN, *, world: World, local: int, seed: int) -> Shuffle:
    """The strategy for `local` samples per rank and micro-batch; `auto` must be resolved before."""
    if strategy == "all_to_all":
        arrange = partial(balanced_arrangement, seed=seed, local=local, ranks=world.size)
        return AllToAllShuffle(world, local, arrange)
    if strategy == "loader":
        uniform = partial(uniform_arrangement, seed=seed, batch=local * world.size)
        return LoaderShuffle(world, local, uniform)
    if strategy == "split":
        return SplitShuffle(world, local, seed)
    return NoShuffle(world)
