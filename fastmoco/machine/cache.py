"""The cache folder of this user, and who may write to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """The folder of everything that is computed once; see `fastmoco_kernels.cache`."""
    # Imported on demand: its package brings torch, which reader processes do without.
    from fastmoco_kernels import cache

    return cache.cache_folder()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time, so that the ranks of a machine do not all scan the same folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115
    except OSError:  # read-only: every process works for itself
        yield
        return
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield
