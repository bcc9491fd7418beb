"""Training samples: which ones a step gets, the random choices about them, and who reads them.

Each choice is a function of (seed, epoch, sample) and of what it is for. So a resumed run makes
those of the run that was stopped, on any number of ranks. The uniforms come from NumPy's Philox, as
those of `fastmoco.data.table` do, and the order of samples from `fastmoco.data.order`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastmoco.config import ConfigError
from fastmoco.data.backends.processes import nothing_collected
from fastmoco.data.order import EpochOrder, stream_key
from fastmoco.machine.stopping import SIGNALS

VIEW, ANCHORS, PROPOSALS = range(3)
"""What choices are for: the view of a picture, and the parts of a detector that sample."""
_PURPOSE = 19  # apart from the streams of pre-training


class Key(NamedTuple):
    """One delivery of one sample."""

    seed: int
    epoch: int
    sample: int


def uniforms(key: Key, count: int) -> list[float]:
    """For the view: `count` numbers in [0, 1); more of them begin with the same ones."""
    words = np.array([_stream(key, VIEW), stream_key(_PURPOSE)], dtype=np.uint64)
    raw = np.random.Philox(key=words).random_raw(count)
    values: list[float] = ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).tolist()
    return values


def generator(key: Key, purpose: int, device: torch.device) -> torch.Generator:
    """A generator of torch for this delivery and purpose alone."""
    return torch.Generator(device).manual_seed(_stream(key, purpose) >> 1)


def _stream(key: Key, purpose: int) -> int:
    return stream_key(key.seed, key.epoch, key.sample, _PURPOSE, purpose)


@dataclass(frozen=True)
class Deliveries:
    """Which samples each step trains on, the same for any number of ranks.

    Epochs follow each other without a gap: the last batch of one goes on in the next.
    """

    samples: int
    batch_size: int
    """Over all ranks."""
    seed: int

    def of_step(self, step: int) -> list[Key]:
        """The keys of the global batch."""
        places = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epochs, positions = places // self.samples, places % self.samples
        order = EpochOrder(self.samples, self.seed)
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            found[inside] = order.samples(epoch, positions[inside])
        return [
            Key(self.seed, epoch, sample)
            for epoch, sample in zip(epochs.tolist(), found.tolist(), strict=True)
        ]

    def of_rank(self, steps: range, rank: int, size: int) -> Iterator[list[Key]]:
        """The keys of this rank in each of `steps`; together, in rank order, the global batch."""
        local = self.batch_size // size
        for step in steps:
            yield self.of_step(step)[rank * local : (rank + 1) * local]


Sample = Any
"""What `prepare` makes of an item of a data set."""


class Prepared(Dataset[Sample]):
    """Item `key` is a prepared sample, or, for one that cannot be read, a text that says why.

    An error that a reader process raises would reach the user as the traceback of two processes.
    """

    def __init__(self, data: Dataset[Any], prepare: Callable[[Any, Key], Sample]) -> None:
        self._data, self._prepare = data, prepare

    def __getitem__(self, key: Key) -> Sample | str:
        try:
            return self._prepare(self._data[key.sample], key)
        except (ConfigError, OSError) as error:
            return str(error)


class _Keys(Sampler[list[Key]]):
    def __init__(self, deliveries: Deliveries, steps: range, rank: int, size: int) -> None:
        self._deliveries, self._steps, self._rank, self._size = deliveries, steps, rank, size

    def __iter__(self) -> Iterator[list[Key]]:
        return self._deliveries.of_rank(self._steps, self._rank, self._size)

    def __len__(self) -> int:
        return len(self._steps)


def _as_they_are(samples: list[Sample]) -> list[Sample]:
    return samples


def _deaf(_: int) -> None:
    """Signals are for the process that trains: it ends its readers when it has saved."""
    for name in SIGNALS:
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)


def batches(
    samples: Prepared, deliveries: Deliveries, steps: range, *, rank: int, size: int, workers: int
) -> Iterator[list[Sample]]:
    """The samples of this rank, a list for each of `steps`; read by `workers` processes.

    0 workers read in this process.
    """
    loader = DataLoader(
        samples,
        batch_sampler=_Keys(deliveries, steps, rank, size),
        num_workers=workers,
        collate_fn=_as_they_are,
        worker_init_fn=_deaf if workers else None,
        pin_memory=False,
    )
    with nothing_collected():
        return iter(loader)
