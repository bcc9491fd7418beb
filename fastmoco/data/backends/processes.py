"""Processes that work ahead on the items of a dataset, by torch's loader, and how they end.

They are forked, and use neither CUDA nor the network. They end with their parent, which torch's
loader watches.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any

from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset, Sampler

from fastmoco.config import ConfigError, OneRankError
from fastmoco.data.backends.lifetime import outlast_the_trainer
from fastmoco.machine import limits

# Free for programs: USR1 and USR2 are those of batch systems.
_WHERE = getattr(signal, "SIGRTMIN", None)
# A process that runs writes its stack at once; one that a disk holds in the kernel never does.
_PATIENCE_S = 2
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)


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
    _stacks()  # before the fork: a process may also be silent at its very beginning
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
    with nothing_collected():
        return iter(loader)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Processes that are forked in the block never collect what is garbage of this one by then.

    They have its memory and none of its threads, for which many a destructor waits, as DALI's.
    """
    frozen = gc.get_freeze_count()  # by a caller, for good
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def end(items: Iterator[Any]) -> None:
    """Ends the processes of `work_ahead`; any other iterator has none."""
    if hasattr(items, "_shutdown_workers"):
        items._shutdown_workers()


@cache
def _stacks() -> IO[bytes] | None:
    """The file to which a process that gets the signal writes its stack, this one or a child."""
    if _WHERE is None or signal.getsignal(_WHERE) is not signal.SIG_DFL:
        return None
    file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this process lives
    faulthandler.register(_WHERE, file)
    return file


def silent_at(items: Iterator[Any]) -> str:
    """Where the process is that owes the next item: the innermost of its calls, after a comma.

    Empty where that cannot be known.
    """
    file = _stacks()
    try:
        process = items._workers[items._task_info[items._rcvd_idx][0]]  # type: ignore[attr-defined]
    except (AttributeError, LookupError):
        return ""
    if file is None or _WHERE is None or not process.is_alive():
        return ""
    file.seek(0)  # of the processes as well, which share the place
    file.truncate()
    os.kill(process.pid, _WHERE)
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and not os.fstat(file.fileno()).st_size:
        time.sleep(0.05)
    time.sleep(0.05)  # it is in the middle of writing
    # Of several threads the main thread is the last.
    stack = os.pread(file.fileno(), 1 << 16, 0).decode(errors="replace").rpartition("hread 0x")[2]
    calls = [
        f"{name} ({os.path.basename(path)}:{line})"
        for path, line, name in _FRAME.findall(stack)[:3]
    ]
    return f", in {', called by '.join(calls)}" if calls else ""


@contextmanager
def in_own_words(items: Iterator[Any]) -> Iterator[None]:
    """Around the taking of one of the items: what went wrong in a process, in one sentence.

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
        where = silent_at(items) if "timed out" in str(error) else ""
        raise ChildProcessError(
            f"{str(error).splitlines()[0].rstrip('. ')}{where}: look for too little memory, for "
            f"other programs that fill {limits.SHARED_MEMORY}, and for a disk that does not "
            "answer; the same command goes on."
        ) from error
