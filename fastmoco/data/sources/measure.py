"""Sizes of many images, read from their headers on all cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import numpy as np

from fastmoco.data.decode import BadImage, image_size
from fastmoco.data.sources.listing import is_image_name, open_regular, starts_like_image

HEAD = 1 << 16


CHUNK = 512


# Below this many files threads are faster: processes take a second to start.
_PROCESSES_FROM = 20_000


_AHEAD = 64


Found = tuple[int, int, str]
"""Width, height and, for an unreadable image, why."""


Item = TypeVar("Item")


Result = TypeVar("Result")


OTHER = "no image"
"""The reason of a file that is no image by its name nor by its content: it does not count."""


def probe_file(path: str, max_pixels: int, *, any_name: bool = False) -> Found:
    """Size of an image file from its first bytes; the whole file only where those do not tell.

    any_name: a file that is not named like an image must start like one, else it is `OTHER`.
    """
    try:
        with open_regular(path) as file:
            head = file.read(HEAD)
            starts = starts_like_image(head)
            if any_name and not starts and not is_image_name(path):
                return 0, 0, OTHER
            try:
                return (*image_size(head, max_pixels), "")
            except BadImage:
                if len(head) < HEAD or not starts:  # nothing that follows makes it an image
                    raise
                return (*image_size(head + file.read(), max_pixels), "")
    except BadImage as bad:
        return 0, 0, str(bad)
    except OSError as error:
        return 0, 0, f"{type(error).__name__}: {error.strerror}"


def probe_chunk(paths: Sequence[str], max_pixels: int, *, any_name: bool = False) -> list[Found]:
    """`probe_file` of several paths: the unit of work of one process."""
    return [probe_file(path, max_pixels, any_name=any_name) for path in paths]


def measure(
    probe: Callable[[Sequence[str]], list[Found]], paths: Iterable[str], total: int
) -> tuple[Any, dict[int, str]]:
    """Sizes, int32 (N, 2), and the reasons of unreadable files, found with all cores."""
    sizes = np.zeros((total, 2), np.int32)
    bad: dict[int, str] = {}
    remaining = iter(paths)
    chunks = iter(lambda: list(islice(remaining, CHUNK)), [])
    with in_parallel(many=total >= _PROCESSES_FROM) as pool:
        at = 0
        for found in progress(in_order(pool, probe, chunks), len, "index", total):
            for width, height, reason in found:
                if reason:
                    bad[at] = reason
                else:
                    sizes[at] = width, height
                at += 1
    return sizes, bad


DIED = (
    "A process that was to read or render images died: free some memory, or, in a script, call "
    'fastmoco below `if __name__ == "__main__":`.'
)


@contextlib.contextmanager
def in_parallel(*, many: bool, workers: int = 0) -> Iterator[Executor]:
    """So many workers, or one for each core: processes for much work, and threads where processes
    would take longer to start.

    Whatever leaves the block, work that nobody began by then is dropped, not waited for. An error
    or Ctrl-C ends the processes in the middle of theirs. They do not outlive this one either.
    """
    workers = workers or _cores()
    pool, started = _processes(workers) if many else (ThreadPoolExecutor(workers), ())
    try:
        yield pool
    except BaseException as error:
        for process in started:
            process.terminate()
        if not isinstance(error, BrokenProcessPool):
            raise
        # Imported on demand: it brings the command line, which the processes of a scan do without.
        from fastmoco.config import ConfigError

        raise ConfigError(DIED) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _processes(workers: int) -> tuple[Executor, Collection[BaseProcess]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _in_process)
    with _interrupts_held():  # started here, all processes hold them from their first moment
        others = set(multiprocessing.active_children())
        for _ in range(workers):
            pool.submit(int)
        started = set(multiprocessing.active_children()) - others
    # Taken now: a pool that shuts down forgets it.
    results = pool._result_queue._writer  # type: ignore[attr-defined]
    threading.Thread(target=_end_together, args=(started, results), daemon=True).start()
    return pool, started


def _end_together(started: Collection[BaseProcess], results: Connection) -> None:
    """The first that does not end well ends all.

    It may have died in the middle of a result. Then the others wait for the lock it held, and the
    pool for the rest of the message, as long as anybody could still write it into `results`.
    """
    waiting = {process.sentinel: process for process in started}
    while waiting:
        for sentinel in multiprocessing.connection.wait(list(waiting)):
            code = waiting[sentinel].exitcode  # type: ignore[index]
            if code is None:  # the pool's own thread is asking for it
                time.sleep(0.01)
            elif code == 0:
                del waiting[sentinel]  # type: ignore[arg-type]
            else:
                for process in started:
                    process.terminate()
                results.close()
                return


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; for processes that are started in it, for ever.

    Their imports take seconds on a busy machine, and would end in a traceback each.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cores() -> int:
    """Cores of all ranks of this machine: one scans while the others wait for its index."""
    # Imported on demand: it brings torch, which the processes of a scan do without.
    from fastmoco.machine.host import machine_cores

    return int(machine_cores())


def _in_process() -> None:
    """Ctrl-C reaches all processes: the one that started these says so and ends them.

    One that was killed cannot, and its processes would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def in_order(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`pool.map` that takes an item only when its turn is near, so that few are in memory."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) == _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def progress(
    work: Iterable[Result],
    count: Callable[[Result], int],
    label: str,
    total: int | None = None,
    unit: str = "image",
) -> Iterator[Result]:
    """The same items with a progress bar on standard error; `count` says what each adds to it.

    A terminal shows the bar at once, a log file a line per minute if it takes longer than that.
    """
    from tqdm import tqdm

    pause = 0.1 if sys.stderr.isatty() else 60.0
    delay = 0.0 if sys.stderr.isatty() else 60.0
    options = {"mininterval": pause, "maxinterval": 2 * pause, "delay": delay}
    with tqdm(desc=label, total=total, unit=unit, unit_scale=True, **options) as bar:
        for item in work:
            yield item
            bar.update(count(item))
