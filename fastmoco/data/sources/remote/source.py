"""Tar shards, Parquet and Arrow files of a bucket as sources: `data.root` s3://, gs:// or https://.

The index is made from each object once and kept on this machine; the index that `fastmoco pack`
wrote beside a shard is read from the bucket instead of the shard. Objects are told apart by URL,
size and ETag, so that a sample is the same bytes for as long as a run lasts, or the run stops.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError, DataConfig
from fastmoco.data.sources import shards
from fastmoco.data.sources.index import Index, kept_index, require_readable
from fastmoco.data.sources.measure import in_order, progress
from fastmoco.data.sources.remote.cache import Cache
from fastmoco.data.sources.remote.store import Object, fetch, head, listed, there
from fastmoco.data.sources.source import Source
from fastmoco.data.sources.splits import require_one_split
from fastmoco.data.sources.tables import parquet
from fastmoco.data.sources.tables.arrow import ArrowSource, scan_arrow

AHEAD = (4, 16, 64)
"""Micro-batches ahead whose objects are fetched: some of a second to some tens of seconds."""
_TOGETHER = 4
_ROOM = 2 * _TOGETHER  # objects of the largest size that the cache must hold


class _Far:
    """What sources in a bucket have in common: numbered objects, of which some are here."""

    index: Index
    ahead: tuple[int, ...] = AHEAD

    def __init__(self, index: Index, cache: Cache) -> None:
        super().__init__(index)  # type: ignore[call-arg]
        self._cache = cache

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index, self._cache)

    def _object(self, number: int) -> Object:
        return Object(*self.index.facts["objects"][number])

    def _path(self, number: int) -> str:
        return str(self._cache.path(self._object(number)))

    def _numbers(self, samples: NDArray[np.int64]) -> NDArray[Any]:
        return np.asarray(self.index.arrays["shard_of"][samples])

    def expect(self, samples: NDArray[np.int64]) -> None:
        """Fetches the objects of these samples in the background."""
        self._cache.expect(self._object(n) for n in np.unique(self._numbers(samples)).tolist())


class RemoteShards(_Far, shards.ShardSource):
    """Images in the tar shards of a bucket."""

    def _open(self, shard: int) -> shards.OpenFile:
        with self._lock:
            if shard not in self._files:
                # Those thrown out of the cache take room on the disk until they are closed.
                self._files = {
                    n: file for n, file in self._files.items() if os.fstat(file.number).st_nlink
                }
        while True:
            try:
                return super()._open(shard)
            except FileNotFoundError:  # another process made room between fetching and opening
                continue


class RemoteArrow(RemoteShards, ArrowSource):
    """Images in the Arrow files of a bucket."""


class RemoteParquet(_Far, parquet.ParquetSource):
    """Images in the Parquet files of a bucket."""

    def _numbers(self, samples: NDArray[np.int64]) -> NDArray[Any]:
        return np.searchsorted(self.index.facts["first"], samples, side="right") - 1

    def _decode(self, group: int) -> Any:
        while True:
            try:
                return super()._decode(group)
            except FileNotFoundError:  # another process made room between fetching and opening
                continue


_KINDS: dict[str, tuple[str, Callable[[Index, Cache], Source]]] = {
    "shards": (".tar", RemoteShards),
    "parquet": (".parquet", RemoteParquet),
    "arrow": (".arrow", RemoteArrow),
}


def open_remote(data: DataConfig) -> Source:
    """The images in a bucket. Raises `ConfigError`, also where the cache is too small for them."""
    if data.source not in _KINDS:
        raise ConfigError(
            f"data.source {data.source} reads local disks: for {data.root} set data.source to one "
            f"of {', '.join(_KINDS)}; fastmoco pack makes shards of any source."
        )
    suffix, make = _KINDS[data.source]
    objects, cache = listed(data.root, suffix), Cache()
    require_one_split(data.root, [one.url for one in objects])
    _require_room(objects, cache, data)
    index = kept_index(
        repr((objects, data.max_pixels, data.any_name)),
        holds=lambda index: "objects" in index.facts,
        scan=lambda: _scan(objects, cache, data),
        rescan=data.rescan,
    )
    require_readable(index, f"data.root {data.root}")
    return make(index, cache)


def _require_room(objects: Sequence[Object], cache: Cache, data: DataConfig) -> None:
    total, largest = sum(one.size for one in objects), max(one.size for one in objects)
    said = f"{data.root} holds {total / 1e9:,.2f} GB and the cache {cache.folder} at most "
    said += f"{cache.limit / 1e9:,.2f} (FASTMOCO_REMOTE_GB)"
    if total > cache.limit and not data.shuffle_window:
        raise ConfigError(
            f"{said}: set data.shuffle_window, so that objects are read one after another, or give "
            "the cache more."
        )
    if cache.limit < min(total, _ROOM * largest):
        raise ConfigError(f"{said}: it needs room for {_ROOM} objects of {largest / 1e6:,.1f} MB.")


def _scan(objects: Sequence[Object], cache: Cache, data: DataConfig) -> Index:
    work = partial(_indexed, cache=cache, data=data)
    with ThreadPoolExecutor(_TOGETHER) as pool:
        try:
            found = in_order(pool, work, objects)
            parts = list(progress(found, lambda part: len(part.sizes), "index"))
        finally:
            pool.shutdown(cancel_futures=True)
    urls = [one.url for one in objects]
    if data.source == "parquet":
        index = parquet.joined(urls, parts)
    else:
        index = shards.joined(urls, parts, any_name=data.any_name)
    return Index(index.arrays, {**index.facts, "objects": [list(one) for one in objects]})


def _indexed(one: Object, cache: Cache, data: DataConfig) -> Index:
    """The index of one object. Raises `ConfigError`, with the name of the object."""
    if data.source == "shards" and (packed := _packed(one, data.max_pixels)) is not None:
        return packed
    while True:
        path = cache.path(one)
        try:
            index = _scanned(one, path, data)
        except (ConfigError, OSError) as error:
            if not path.exists():
                continue  # another process made room between fetching and opening
            if isinstance(error, ConfigError):
                raise ConfigError(str(error).replace(str(path), one.url)) from error
            raise
        if end := index.facts.get("end"):
            index.facts["end"] = end.replace(str(path), one.url)
        return index


def _scanned(one: Object, path: Path, data: DataConfig) -> Index:
    if data.source == "shards":
        return shards.scan_shard(path, list(one), data.max_pixels, any_name=data.any_name)
    scan = scan_arrow if data.source == "arrow" else _scan_parquet
    return scan(path, data.max_pixels)


def _scan_parquet(path: Path, max_pixels: int) -> Index:
    return parquet.scan_parquet([path], max_pixels)


def _packed(one: Object, max_pixels: int) -> Index | None:
    """The index that `fastmoco pack` wrote beside a shard, if it belongs to this one."""
    beside = there(str(one.url) + shards.SUFFIX)
    if beside is None:
        return None
    folder = tempfile.mkdtemp()
    try:
        path = Path(folder) / "index"
        with open(path, "wb") as file:
            fetch(beside, file)
        index = shards.load_shard_index(str(path))
        digest = hashlib.sha256(head(one.url, min(shards.HEAD_BYTES, one.size))).hexdigest()
        if shards.came_with(index, [one.size, digest], max_pixels):
            arrays = {name: np.array(array) for name, array in index.arrays.items()}
            return Index(arrays, index.facts)
    except (OSError, ValueError, KeyError):
        pass  # no index of this version: read the shard
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None
