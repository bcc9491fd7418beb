"""Scans a folder of images into an index: walks it, then reads every header in parallel."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from fastmoco.data.header import BadImage, image_size
from fastmoco.data.index import Index

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".bmp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
    ".gif",
)
HEAD = 1 << 16
CHUNK = 512
# Below this many files threads are faster: processes take a second to start.
_PROCESSES_FROM = 20_000
_AHEAD = 64
# Kernels stamp files with the time of the last clock tick, of which there are 100 or more a second.
_TICK_S = 0.02

Found = tuple[int, int, str]
"""Width, height and, for an unreadable image, why."""
Listed = tuple[str, int, list[str]]
"""A folder's path relative to the root, modification time in ns, sorted names of its images."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def probe_file(path: str, max_pixels: int) -> Found:
    """Size of an image file from its first bytes; the whole file only where those do not tell."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(HEAD)
            try:
                return (*image_size(head, max_pixels), "")
            except BadImage:
                if len(head) < HEAD:
                    raise
                return (*image_size(head + file.read(), max_pixels), "")
    except BadImage as bad:
        return 0, 0, str(bad)
    except OSError as error:
        return 0, 0, f"{type(error).__name__}: {error.strerror}"


def probe_chunk(paths: Sequence[str], max_pixels: int) -> list[Found]:
    """`probe_file` of several paths: the unit of work of one process."""
    return [probe_file(path, max_pixels) for path in paths]


def walk(root: str) -> Iterator[Listed]:
    """Every folder below root, itself included, in depth-first sorted order.

    Links are followed; a folder that was already visited is not visited again. Folders without
    images are yielded too, because a file added to one later must be noticed. Raises `OSError` for
    a folder that cannot be listed: leaving it out would train on less than the user named.
    """
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        place = os.path.join(root, folder)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        _let_tick_pass(status.st_mtime_ns)
        inner, images = [], []
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "lost+found":
                    continue
                if entry.is_dir():
                    inner.append(os.path.join(folder, entry.name))
                elif entry.name.lower().endswith(EXTENSIONS):
                    images.append(entry.name)
        yield folder, status.st_mtime_ns, sorted(images)
        pending += sorted(inner, reverse=True)


def _let_tick_pass(changed: int) -> None:
    """Waits until a change from now on gives the folder another modification time than this one."""
    if abs(time.time_ns() - changed) < _TICK_S * 1e9:
        time.sleep(_TICK_S)


def scan_folder(root: str, max_pixels: int) -> Index:
    """The index of all images below root, with a progress bar on a terminal.

    Raises `OSError` for a folder that cannot be listed.
    """
    folders: list[tuple[str, int]] = []
    folder_of, ends, blobs, end = [], [], [], 0
    for number, (folder, changed, names) in enumerate(progress(walk(root), _images, "list")):
        folders.append((folder, changed))
        encoded = [os.fsencode(name) for name in names]
        folder_of.append(np.full(len(names), number, np.uint32))
        ends.append(end + np.cumsum([len(name) for name in encoded], dtype=np.uint64))
        blobs.append(b"".join(encoded))
        end += len(blobs[-1])
    arrays: dict[str, Any] = {
        "folder_of": np.concatenate(folder_of or [np.zeros(0, np.uint32)]),
        "name_ends": np.concatenate(ends or [np.zeros(0, np.uint64)]).astype(np.uint64),
        "names": np.frombuffer(b"".join(blobs), np.uint8),
    }
    paths = _paths(root, folders, arrays)
    probe = partial(probe_chunk, max_pixels=max_pixels)
    sizes, bad = measure(probe, paths, len(arrays["folder_of"]))
    return Index({**arrays, "sizes": sizes}, {"folders": folders, "bad": bad})


def _images(listed: Listed) -> int:
    return len(listed[2])


def _paths(root: str, folders: list[tuple[str, int]], arrays: dict[str, Any]) -> Iterator[str]:
    blob, start = arrays["names"].tobytes(), 0
    for at in range(0, len(arrays["folder_of"]), CHUNK):  # a list of all would take 80 bytes each
        part = slice(at, at + CHUNK)
        folder_of, ends = (arrays[name][part].tolist() for name in ("folder_of", "name_ends"))
        for folder, end in zip(folder_of, ends, strict=True):
            yield os.path.join(root, folders[folder][0], os.fsdecode(blob[start:end]))
            start = end


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
def in_parallel(*, many: bool) -> Iterator[Executor]:
    """All cores: processes for much work, threads where processes would take longer to start.

    Whatever leaves the block, work that nobody began by then is dropped, not waited for.
    """
    pool = _processes(_cores()) if many else ThreadPoolExecutor(_cores())
    try:
        yield pool
    except BrokenProcessPool as error:
        # Imported on demand: it brings the command line, which the processes of a scan do without.
        from fastmoco.config import ConfigError

        raise ConfigError(DIED) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _processes(workers: int) -> Executor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _ignore_interrupts)


def _cores() -> int:
    """Cores of all ranks of this machine: one scans while the others wait for its index."""
    # Imported on demand: it brings torch, which the processes of a scan do without.
    return int(importlib.import_module("fastmoco.host").machine_cores())


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes: the one that started these says so and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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


def folders_unchanged(root: str, index: Index) -> bool:
    """Whether every folder of the index still has the modification time that it had."""
    try:
        return all(
            os.stat(os.path.join(root, folder)).st_mtime_ns == changed
            for folder, changed in index.facts["folders"]
        )
    except (OSError, KeyError):
        return False
