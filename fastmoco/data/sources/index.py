"""The index of a folder: names and sizes of its images in flat arrays, cached on disk.

About 45 bytes per sample: the folder (4), the end of the name in one blob (8), the name itself, and
width and height (8). The cache is one file of raw arrays that every process maps, so readers share
its pages.

It is valid while no folder below the root has changed its modification time: one stat per folder,
none per file. Every added, removed or renamed file or folder changes that time. Where these times
say nothing, as on mounted buckets, the folders are listed again. Files that were bad are looked at
again when their size or time has changed, and so are links that led nowhere. Not noticed are

- a good file that is overwritten in place: the reader takes the size from the file itself, so its
  views are right, and one that is bad by then is replaced;
- another target of a link to a file;
- changes on network file systems that report modification times late.

`data.rescan` indexes anew; `FASTMOCO_CACHE` names the folder of the cache.

N samples, F folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as bound
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.data.sources.listing import open_regular
from fastmoco.machine import durable
from fastmoco.machine.cache import cache_folder, exclusive

_MAGIC = b"fastmoco index 4\n"  # 4: with checksums
_SUM = 32

_ALIGN = 64


@dataclass(frozen=True)
class Index:
    """Flat arrays that describe N samples, and what is needed to tell whether they still hold."""

    arrays: dict[str, NDArray[Any]]
    """Named arrays, among them `sizes`: int32 (N, 2), width and height, 0 where unreadable."""
    facts: dict[str, Any]
    """JSON: whatever the source needs to validate the index, and of bad samples `bad`: {sample:
    reason}, `stamps`: {sample: `stamp_of` its file} and `where`: {sample: line of a list}. The
    `stamps` of shards and tables are a list, of all files."""
    path: str = ""
    """The cache file that the arrays are mapped from; empty if they are in memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapped index travels to reader processes as its path: they share its pages.
        if self.path:
            return bound(load_index, check=False), (self.path,)
        return Index, (self.arrays, self.facts)

    @property
    def sizes(self) -> NDArray[np.int32]:
        return self.arrays["sizes"]

    def fingerprint(self) -> str:
        """Hash of all arrays and of the folders, files or objects that they number."""
        digest = hashlib.sha256()
        for name in sorted(self.arrays):
            digest.update(_bytes(self.arrays[name]))
        kinds = ("folders", "shards", "files", "objects")
        digest.update(json.dumps([self.facts.get(kind) for kind in kinds]).encode())
        stamps = self.facts.get("stamps")
        if isinstance(stamps, list):  # of all files; those of bad images alone come and go
            digest.update(json.dumps(stamps).encode())
        return digest.hexdigest()

    @property
    def bad(self) -> dict[int, str]:
        """Reasons of the samples that were found unreadable while indexing."""
        where = {int(sample): f"{line}: " for sample, line in self.facts.get("where", {}).items()}
        reasons = {int(sample): reason for sample, reason in self.facts.get("bad", {}).items()}
        return {sample: where.get(sample, "") + why for sample, why in reasons.items()}


def starts_of(counts: Sequence[int]) -> list[int]:
    """Number of the first sample of each part, when parts of these sizes follow each other."""
    return [0, *accumulate(counts)][: len(counts)]


def bad_of(starts: Sequence[int], bad: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """The bad samples of parts that begin at these numbers, under their numbers in the whole."""
    return {
        start + sample: why
        for start, part in zip(starts, bad, strict=True)
        for sample, why in part.items()
    }


class Indexed:
    """What all sources on top of an index have in common."""

    index: Index
    ahead: tuple[int, ...] = ()
    """How many micro-batches ahead `expect` is told of; none where reading is fast."""

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2): width and height in pixels; 0 where the image could not be read."""
        return self.index.sizes

    @property
    def bad(self) -> dict[int, str]:
        """Reason by sample, for those found unreadable while indexing."""
        return self.index.bad

    @property
    def notes(self) -> list[str]:
        """What indexing found that a user may want to know, one sentence each."""
        return list(self.index.facts.get("notes", []))

    @property
    def warnings(self) -> list[str]:
        """What indexing left out that a user should act on, one sentence each."""
        return list(self.index.facts.get("warnings", []))

    def fingerprint(self) -> str:
        """Changes when a sample is added, removed, renamed or found to have another size."""
        return self.index.fingerprint()

    def expect(self, samples: NDArray[np.int64]) -> None:
        """These will be read soon: a source far away fetches them in the background."""


def _bytes(array: NDArray[Any]) -> memoryview:
    """The memory of an array, without a copy of it."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def save_index(index: Index, path: Path) -> Index:
    """Writes the index atomically and returns it mapped from there. Raises `OSError`."""
    layout: dict[str, Any] = {}
    at = 0
    for name, array in index.arrays.items():
        layout[name] = [array.dtype.str, list(array.shape), at]
        at += -(-array.nbytes // _ALIGN) * _ALIGN
    sums = [zlib.crc32(_bytes(array)) for array in index.arrays.values()]
    head = json.dumps({"facts": index.facts, "layout": layout, "sums": sums}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = durable.partial_of(path)
    try:
        with open(partial, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(head).digest())
            file.write(len(head).to_bytes(8, "little") + head)
            file.write(b"\0" * (-file.tell() % _ALIGN))
            for array in index.arrays.values():
                file.write(_bytes(array))
                file.write(b"\0" * (-file.tell() % _ALIGN))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return load_index(str(path))


def load_index(path: str, *, check: bool = True) -> Index:
    """Maps an index file.

    check: compare its arrays with their checksums: 10 ms for a million images, which readers save.

    Raises `OSError` if it is missing or no regular file, `ValueError` if it is damaged or foreign.
    """
    with open_regular(path) as file:
        start = file.read(len(_MAGIC) + _SUM + 8)
        if not start.startswith(_MAGIC):
            raise ValueError(f"{path} is not an index of this version")
        size = int.from_bytes(start[-8:], "little")
        head = file.read(min(size, os.fstat(file.fileno()).st_size))
        if hashlib.sha256(head).digest() != start[len(_MAGIC) : -8]:
            raise ValueError(f"{path} is damaged")
        data = -(-file.tell() // _ALIGN) * _ALIGN
    try:
        return _mapped(path, json.loads(head), data, check=check)
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no index ({type(error).__name__})") from error


def _mapped(path: str, head: dict[str, Any], data: int, *, check: bool) -> Index:
    arrays: dict[str, NDArray[Any]] = {}
    for (name, (kind, shape, at)), total in zip(head["layout"].items(), head["sums"], strict=True):
        dtype = np.dtype(kind)
        if dtype.kind not in "iuS" or min(shape, default=0) < 0 or at < 0:
            raise ValueError(f"{path} holds no numbers in {name}")
        empty = 0 in shape  # a mapping cannot be empty
        arrays[name] = (
            np.zeros(shape, dtype)
            if empty
            # A plain array over the mapping: indexing np.memmap itself takes five times as long.
            else np.asarray(np.memmap(path, dtype, "r", offset=data + at, shape=tuple(shape)))
        )
        if check and zlib.crc32(_bytes(arrays[name])) != total:
            raise ValueError(f"{path} is damaged in {name}")
    return Index(arrays, head["facts"], path)


FILE_NAMES = ("utf-8", "surrogateescape")  # file names are bytes; this round-trips all of them


_BEGAN = time.time()


def begin_anew() -> None:
    """A run begins: to `rescan`, what this process has indexed before is old from now on."""
    global _BEGAN
    _BEGAN = time.time()


def kept_index(
    what: str,
    holds: Callable[[Index], bool],
    scan: Callable[[], Index],
    again: Callable[[Index], Index | None] = lambda index: None,
    *,
    rescan: bool = False,
) -> Index:
    """The cached index of `what` where it holds, else a new one; one rank per machine scans.

    again: a better index where files that were bad have changed. rescan: use none that is older
    than this process, or its run; another rank may have made one since.
    """
    digest = hashlib.sha256(what.encode(*FILE_NAMES)).hexdigest()[:20]
    cached = cache_folder() / "index" / digest
    with exclusive(cached.with_suffix(".lock")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            index = load_index(str(cached))
            if (not rescan or cached.stat().st_mtime > _BEGAN) and holds(index):
                better = again(index)
                return index if better is None else _kept(better, cached)
        return _kept(scan(), cached)


def _kept(index: Index, cached: Path) -> Index:
    if len(index.facts.get("bad", {})) < len(index.sizes):  # a disk may be missing: look again
        with contextlib.suppress(OSError):  # nowhere to cache: keep it in memory
            return save_index(index, cached)
    return index


def require_readable(index: Index, what: str, *, by_name: bool = False) -> None:
    """Raises `ConfigError` for an index without samples, or without a readable one.

    by_name: files were counted by their names, so that content may find more.
    """
    if not len(index.sizes):
        notes, warnings = (index.facts.get(kind, []) for kind in ("notes", "warnings"))
        seen = f" ({'; '.join(note.rstrip('.') for note in notes + warnings)})"
        hint = "; data.any_name true counts images by their content" if by_name and notes else ""
        raise ConfigError(f"{what} holds no image file{seen * bool(notes + warnings)}{hint}.")
    if len(index.bad) == len(index.sizes):
        sample, reason = next(iter(index.bad.items()))
        raise ConfigError(
            f"{what} holds {len(index.sizes)} image files and none can be read; "
            f"number {sample}: {reason}."
        )
