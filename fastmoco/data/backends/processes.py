"""Processes that work ahead on the items of a dataset, by torch's loader, and how they end.

They are forked, and use neither CUDA nor the network. They end with their parent, which torch's
loader watches.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset, Sampler

from fastmoco.config import ConfigError, OneRankError
from fastmoco.data.backends.lifetime import outlast_the_trainer
from fastmoco.machine import limits


class _From(Sampler[int]):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _as_it_is(item: Any) -> Any:
    """Instead of torch's conversion, which makes a shared file of every small array."""
    return item


def _in_process(_: int) -> None:
    outlast_the_trainer()
    # NumPy's products of float views, else on as many threads as there are cores, in each worker.
    threadpool_limits(1, user_api="blas")


def work_ahead(
    dataset: Dataset[Any], first: int, processes: int, ahead: int, timeout_s: float
) -> Iterator[Any]:
    """Items first, first + 1, ... of the dataset, in order, from processes that start now.

    ahead: items in work of each process. timeout_s: after so much silence the next item raises;
    with 0 it waits for as long as the processes live.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_From(first),
        num_workers=processes,
        prefetch_factor=ahead,
        worker_init_fn=_in_process,
        collate_fn=_as_it_is,
        timeout=timeout_s,
        # Also in a process that was itself spawned, whose children would be spawned by default:
        # those import torch again, for seconds, and abort when they are told to end.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    return iter(loader)


def end(items: Iterator[Any]) -> None:
    """Ends the processes of `work_ahead`; any other iterator has none."""
    if hasattr(items, "_shutdown_workers"):
        items._shutdown_workers()


@contextmanager
def in_own_words() -> Iterator[None]:
    """Around the taking of an item: what went wrong in a process, in one sentence.

    Raises `OneRankError` where storage keeps failing or no sample is good, and `ChildProcessError`
    where a process died or is silent.
    """
    try:
        yield
    except ConfigError as error:  # PyTorch puts the worker's traceback before it
        name = f"{type(error).__name__}: "
        raise OneRankError(str(error).rpartition(name)[2].strip()) from None
    except RuntimeError as error:  # torch's words for both; any other is a fault of our own
        if not str(error).startswith(("DataLoader worker", "DataLoader timed out")):
            raise
        raise ChildProcessError(
            f"{str(error).splitlines()[0].rstrip('. ')}: look for too little memory, for other "
            f"programs that fill {limits.SHARED_MEMORY}, and for a disk that does not answer; "
            "the same command goes on."
        ) from error
