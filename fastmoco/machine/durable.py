"""Files that appear whole or not at all, also after a power loss. Standard library only."""

from __future__ import annotations

import contextlib
import os
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
