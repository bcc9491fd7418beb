"""The cache folder of this user, and who may write to it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


def cache_folder() -> Path:
    """The folder of everything that is computed once; see `fastmoco_kernels.cache`."""
    # Imported on demand: its package brings torch, which reader processes do without.
    from fastmoco_kernels import cache

    return cache.cache_folder()


TOLD_AFTER_S = 30.0
LIMIT_S = 3600.0
"""A process that has waited so long for another works for itself: a stopped one would hold it up
for ever. Decoding every image of a large set once (`data.verify`) takes part of that."""


@contextmanager
def exclusive(path: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """One process at a time, so that the ranks of a machine do not all scan the same folder.

    That only saves work: whoever cannot have the lock, or not within `LIMIT_S`, goes on without.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not for writing alone: a pipe of that name would wait for its reader.
        lock = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError:  # read-only: every process works for itself
        yield
        return
    with lock:
        with contextlib.suppress(ImportError, OSError):
            _wait_for(lock, path, say)
        yield


def _wait_for(lock: FileIO, path: Path, say: Callable[[str], None]) -> None:
    import fcntl

    began, told = time.monotonic(), False
    while (waited := time.monotonic() - began) < LIMIT_S:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if waited >= TOLD_AFTER_S and not told:
                told = True
                say(f"waiting for another process, which holds {path}")
        time.sleep(0.05)
    say(f"{path} was held by another process for {LIMIT_S:g} s: going on without it")
