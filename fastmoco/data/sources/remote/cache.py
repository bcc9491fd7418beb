"""A bounded cache of whole objects on a local disk, shared by the ranks of a machine.

Whole objects and not ranges: shards and row groups are read sample by sample, for which ranges
would pay the latency of the store each time, and a whole object can be checked against its ETag.
The least recently opened objects go first. `FASTMOCO_REMOTE_GB` bounds the cache; without it, it
takes half of what the disk has free. One process fetches an object, others wait for it. Hosts may
share the folder: a part of an object that is on its way is named after who writes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG

from fastmoco.config import ConfigError
from fastmoco.data.sources.remote.store import Object, fetch
from fastmoco.machine.cache import cache_folder, exclusive
from fastmoco.machine.owner import start_of, this_host

SILENCE_S = 3600.0
"""A part that did not grow for so long is given up: failed requests are repeated for minutes."""
_TOGETHER = 4  # objects that a process fetches ahead at a time


class Cache:
    """Local files of objects."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = cache_folder() / "remote" if folder is None else folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._limit = limit
        self._ahead: tuple[int, ThreadPoolExecutor] | None = None
        self._asked: set[Object] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Cache], tuple[Path, int | None]]:
        return Cache, (self.folder, self._limit)

    @property
    def limit(self) -> int:
        """Bytes that the objects may take. Raises `ConfigError` for no size in the variable."""
        if self._limit is None:
            text = os.environ.get("FASTMOCO_REMOTE_GB", "")
            try:
                free = shutil.disk_usage(self.folder).free
                self._limit = int(float(text) * 1e9) if text else (free + self._used()) // 2
                if text and self._limit <= 0:
                    raise ValueError
            except (ValueError, OverflowError) as error:
                raise ConfigError(
                    f"FASTMOCO_REMOTE_GB is {text}, which is no size in GB: take one above 0, or "
                    "none for half of the disk."
                ) from error
        return self._limit

    def place(self, one: Object) -> Path:
        """Where the object lies once it is here."""
        name = hashlib.sha256("\0".join(map(str, one)).encode()).hexdigest()[:32]
        return self.folder / f"{name}{Path(one.url).suffix}"

    def path(self, one: Object) -> Path:
        """The local file, fetched where it is not here. Raises `ConfigError`."""
        place = self.place(one)
        with contextlib.suppress(FileNotFoundError):
            with contextlib.suppress(PermissionError):  # another user's: it is read as it is
                os.utime(place)
            return place
        with exclusive(place.with_suffix(".lock")):
            if not place.exists():
                self._fetch(one, place)
        return place

    def expect(self, objects: Iterable[Object]) -> None:
        """Fetch these in the background; what fails is tried again when it is read."""
        if self._ahead is None or self._ahead[0] != os.getpid():  # threads do not survive a fork
            self._ahead = os.getpid(), ThreadPoolExecutor(_TOGETHER, "read-ahead")
            self._asked, self._lock = set(), threading.Lock()
        for one in objects:
            with self._lock:
                if one in self._asked or self.place(one).exists():
                    continue
                self._asked.add(one)
            self._ahead[1].submit(self._expected, one)

    def _expected(self, one: Object) -> None:
        try:
            with contextlib.suppress(ConfigError, OSError):
                self.path(one)
        finally:
            with self._lock:
                self._asked.discard(one)

    def _fetch(self, one: Object, place: Path) -> None:
        if one.size > self.limit:
            raise ConfigError(
                f"{one.url} has {one.size / 1e9:,.1f} GB and the cache {self.folder} at most "
                f"{self.limit / 1e9:,.1f}: make room, or set FASTMOCO_REMOTE_GB."
            )
        partial = place.with_suffix(f".{_writer()}.part")
        try:
            while True:
                try:
                    self._write(one, partial)
                    os.replace(partial, place)
                    return
                except OSError as error:
                    gone = isinstance(error, FileNotFoundError) and self.folder.is_dir()
                    full = error.errno in (errno.ENOSPC, errno.EDQUOT) and self._evict_one()
                    if not gone and not full:  # gone: another host took this one for dead
                        raise self._unwritable(error) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _write(self, one: Object, partial: Path) -> None:
        """Fetch an object once there is room for it, to the disk. Raises `OSError`."""
        partial.unlink(missing_ok=True)
        while not self._reserve(partial, one.size):
            time.sleep(0.02)  # until others have fetched theirs, which then can be thrown out
        with open(partial, "r+b") as file:
            fetch(one, file)
            file.flush()
            os.fsync(file.fileno())

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"The cache {self.folder} cannot be written ({error.strerror}): make room, or name "
            "another folder in FASTMOCO_CACHE; the run goes on from its last checkpoint."
        )

    def _kept(self) -> list[tuple[float, int, Path]]:
        """Time of last opening, size and path of every object here, the oldest first."""
        found = []
        for path in self.folder.iterdir():
            if path.suffix != ".lock":
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if S_ISREG(status.st_mode):
                        found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _used(self) -> int:
        return sum(size for _, size, _ in self._kept())

    def _reserve(self, partial: Path, size: int) -> bool:
        """Make room for an object, and a file of its size; False while there is none."""
        with exclusive(self.folder / "evict.lock"):
            kept = self._kept()
            used = sum(size for _, size, _ in kept)
            for changed, its_size, path in kept:
                if used + size <= self.limit:
                    break
                if path.suffix != ".part" or not _is_written(path, changed):
                    path.unlink(missing_ok=True)
                    used -= its_size
            if used + size > self.limit:
                return False
            with open(partial, "wb") as file:
                file.truncate(size)
            return True

    def _evict_one(self) -> bool:
        """Make room where others filled the disk. Returns whether there was anything to delete."""
        for _, _, path in self._kept():
            if path.suffix != ".part":
                with contextlib.suppress(OSError):
                    path.unlink()
                    return True
        return False


def _writer() -> str:
    """Tells this thread from all others of every host, now and later."""
    process = os.getpid()
    return f"{_machine()}-{process}-{start_of(process) or ''}-{threading.get_ident()}"


def _machine() -> str:
    """Tells apart where numbers of processes mean the same: hosts, their starts and containers."""
    numbers = ""
    with contextlib.suppress(OSError):
        numbers = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{this_host()} {numbers}".encode()).hexdigest()[:12]


def _is_written(partial: Path, changed: float) -> bool:
    """Whether somebody still writes a part; one that was killed leaves half of an object.

    Of a writer whom nobody here can look up, such as one on another host, it takes an hour without
    a change to tell; changed: when the last was.
    """
    writer = partial.stem.rpartition(".")[2].split("-")
    if len(writer) == 4 and writer[0] == _machine() and writer[1].isdecimal() and writer[2]:
        return start_of(int(writer[1])) == writer[2]
    return time.time() - changed < SILENCE_S
