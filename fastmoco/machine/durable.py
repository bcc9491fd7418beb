"""Files that appear whole or not at all, and reading that never waits. Standard library only."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, put: Callable[[Path], object]) -> None:
    """Let `put` write a neighbour of `path`, and rename it once it is on the disk.

    The data reaches the disk before the name does. Raises what `put` raises, and `OSError` if the
    file cannot be written; nothing of it is left then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        put(partial)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):  # where there could be no partial file either
            partial.unlink()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # which cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: str | Path) -> bytes:
    """All of a regular file.

    Raises `OSError`, also for what has its name and would wait for ever or never end: a pipe, a
    device.
    """
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        return opened.read()
