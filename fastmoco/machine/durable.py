"""Files that appear whole or not at all, and reading that never waits. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_TO_READ = os.O_RDONLY
for _name in ("O_CLOEXEC", "O_BINARY", "O_NONBLOCK"):  # a FIFO would wait
    _TO_READ |= getattr(os, _name, 0)


def partial_of(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def replace(path: Path, put: Callable[[Path], object]) -> None:
    """Let `put` write a neighbour of `path`, and rename it once it is on the disk.

    The data reaches the disk before the name does. Raises what `put` raises, and `OSError` if the
    file cannot be written; nothing of it is left then.
    """
    partial = partial_of(path)
    try:
        put(partial)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):  # where there could be no partial file either
            partial.unlink()


def require_writable(path: Path) -> None:
    """Raise `OSError` where `replace` could not write the file: to ask before hours of work."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    partial = partial_of(path)
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:  # of the name that people know
        raise OSError(error.errno, error.strerror, str(path)) from error


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # which cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_left(path: Path) -> bool:
    """Whether it has the name of a file that some process has not completed."""
    return bool(re.fullmatch(r"\..+\.\d+|.+\.partial", path.name))


def sweep(folder: Path) -> None:
    """Delete what writers that were killed left in a folder in which nobody writes now."""
    for left in folder.iterdir():
        if is_left(left) and left.is_file():
            with contextlib.suppress(OSError):
                left.unlink()


def what_it_is(mode: int) -> str:
    """The kind of something that is no regular file, from its `st_mode`."""
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def open_regular(path: str | Path) -> tuple[int, os.stat_result]:
    """Descriptor and status of a regular file.

    Raises `OSError`, also for what has its name and would wait for ever or never end: a pipe, a
    device.
    """
    descriptor = os.open(path, _TO_READ)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"{what_it_is(status.st_mode)}, not a regular file")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, status


def read_regular(path: str | Path) -> bytes:
    """All of a regular file. Raises `OSError` as `open_regular` does."""
    descriptor, _ = open_regular(path)
    with os.fdopen(descriptor, "rb") as opened:
        return opened.read()
