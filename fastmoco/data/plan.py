"""What every micro-batch consists of: samples and uniforms, as pure functions of its number.

Micro-batch m belongs to step m // accumulate. A step covers `global_batch` consecutive positions of
its epoch, a micro-batch `micro_batch` of those, and rank r queries with rows [r n, (r + 1) n) of
it. Its keys are the second views of the same rows, or of the rows that `key_rows` names: then the
loader is the shuffle of shuffle-BN, and no image crosses the network.

Pre-training drops the incomplete last batch of an epoch. Training on labels keeps it: its missing
rows repeat the first samples of the epoch and are not `counted`.

n local batch, N rows of the global micro-batch (n times the number of ranks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastmoco.data.order import EpochOrder
from fastmoco.data.table import Float64, Int64, draw_uniforms

KeyRows = Callable[[int], NDArray[np.int64]]
QUERY, KEY = 0, 1


@dataclass(frozen=True)
class Draw:
    """n samples and the uniforms of the view that each becomes."""

    samples: Int64
    """(n,) numbers in the source."""
    uniforms: Float64
    """(n, WORDS) in [0, 1)."""

    def part(self, rows: slice) -> Draw:
        """The same draw, cut to some of its rows."""
        return Draw(self.samples[rows], self.uniforms[rows])


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one rank."""

    order: EpochOrder
    seed: int
    steps_per_epoch: int
    accumulate: int
    local_batch: int
    """n."""
    rank: int = 0
    world_size: int = 1
    key_rows: KeyRows | None = None
    """Permutation of the N rows by micro-batch number, the same on every rank; picklable."""
    views: int = 2
    """1: there are no keys; who trains on labels sees each image once per epoch."""

    def locate(self, micro_step: int) -> tuple[int, int]:
        """Epoch and first position of the global micro-batch."""
        step, micro = divmod(micro_step, self.accumulate)
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        micro_batch = self.local_batch * self.world_size
        return epoch, (step_of_epoch * self.accumulate + micro) * micro_batch

    def counted(self, micro_step: int) -> tuple[int, int]:
        """How many rows are new in this epoch: the first so many of this rank's n, and all ranks'.

        n and N but for the last step of an epoch that keeps its incomplete batch.
        """
        _, start = self.locate(micro_step)
        left = self.order.num_samples - start
        mine = min(max(left - self.rank * self.local_batch, 0), self.local_batch)
        return mine, min(left, self.local_batch * self.world_size)

    def queries(self, micro_step: int) -> Draw:
        """This rank's rows, first view."""
        epoch, start = self.locate(micro_step)
        start += self.rank * self.local_batch
        positions = np.arange(start, start + self.local_batch) % self.order.num_samples
        uniforms = draw_uniforms(self.seed, epoch, QUERY, start, self.local_batch)
        return Draw(self.order.samples(epoch, positions), uniforms)

    def keys(self, micro_step: int, queries: Draw) -> Draw:
        """The second views: of the queries' samples, or of those that `key_rows` assigns."""
        if self.views == 1:
            return queries.part(slice(0))
        epoch, start = self.locate(micro_step)
        mine = slice(self.rank * self.local_batch, (self.rank + 1) * self.local_batch)
        if self.key_rows is None:
            first = start + mine.start
            uniforms = draw_uniforms(self.seed, epoch, KEY, first, self.local_batch)
            return Draw(queries.samples, uniforms)
        rows = np.asarray(self.key_rows(micro_step), dtype=np.int64)[mine]
        whole = self.local_batch * self.world_size
        uniforms = draw_uniforms(self.seed, epoch, KEY, start, whole)[rows]
        return Draw(self.order.samples(epoch, start + rows), uniforms)
