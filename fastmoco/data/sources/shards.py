"""Tar shards, as WebDataset writes them, read by offset without unpacking.

Every shard gets an index beside it (or in the cache folder where that cannot be written), which
holds while the shard keeps its size and modification time. The indices of all shards are joined
into one mapped file in the cache folder: 24 bytes per sample.

N samples, T shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.data.decode import BadImage, image_size
from fastmoco.data.sources.index import Index, Indexed, load_index, require_readable, save_index
from fastmoco.data.sources.listing import is_hidden_path, is_image_name
from fastmoco.data.sources.measure import HEAD, in_order, in_parallel, progress
from fastmoco.machine.cache import cache_folder, exclusive

_SUFFIX = ".fastmoco-index"
_OPEN_FILES = 64


class ShardSource(Indexed):
    """Images inside tar files, numbered shard by shard in the order of the archive."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: dict[int, int] = {}
        self._named: tuple[int, dict[int, str]] = (-1, {})  # a shard, its members by offset

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSource, (self.index,)  # open files stay in their process

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        return np.asarray(self.index.facts["counts"], dtype=np.int64)

    def read(self, sample: int) -> bytes:
        arrays = self.index.arrays
        file = self._open(int(arrays["shard_of"][sample]))
        return os.pread(file, int(arrays["lengths"][sample]), int(arrays["offsets"][sample]))

    def name(self, sample: int) -> str:
        """Shard and member; walks the shard, once for neighbours, as only reports need it."""
        number = int(self.index.arrays["shard_of"][sample])
        shard = self.index.facts["shards"][number]
        if self._named[0] != number:
            names: dict[int, str] = {}
            with contextlib.suppress(OSError, tarfile.TarError), tarfile.open(shard, "r:") as tar:
                names = {member.offset_data: member.name for member in tar}
            self._named = number, names
        offset = int(self.index.arrays["offsets"][sample])
        return f"{shard}:{self._named[1].get(offset, f'@{offset}')}"

    def _open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            file = os.open(self.index.facts["shards"][shard], os.O_RDONLY)
            self._files[shard] = file
        return file


def open_shards(root: str, max_pixels: int) -> ShardSource:
    """The images in a tar file or in all tar files below a folder, in sorted order.

    Raises `ConfigError` for no shard, a compressed or unreadable one, or no image in them.
    """
    path = Path(root)
    if not root or not path.exists():
        raise ConfigError(f"data.root {root or '(empty)'} does not exist: name a folder of shards.")
    shards = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
    if not shards:
        raise ConfigError(f"data.root {root} holds no .tar file.")
    stamps = [_stamp(shard) for shard in shards]
    digest = hashlib.sha256(repr((stamps, max_pixels)).encode()).hexdigest()[:20]
    cached = cache_folder() / "index" / digest
    with exclusive(cached.with_suffix(".lock")):
        try:
            index = load_index(str(cached))
        except (OSError, ValueError, KeyError):
            index = _join(shards, max_pixels)
            with contextlib.suppress(OSError):  # nowhere to cache: keep it in memory
                index = save_index(index, cached)
    require_readable(index, f"data.root {root}")
    return ShardSource(index)


def _stamp(shard: Path) -> list[Any]:
    status = shard.stat()
    return [str(shard.resolve()), status.st_size, status.st_mtime_ns]


def _join(shards: Sequence[Path], max_pixels: int) -> Index:
    """One index of all shards, each from its own where that still holds."""
    work = partial(_indexed, max_pixels=max_pixels)
    with in_parallel(many=len(shards) > 8) as pool:
        indexed = in_order(pool, work, shards)
        parts = list(progress(indexed, lambda part: len(part.sizes), "index"))
    counts = [len(part.sizes) for part in parts]
    if not sum(counts):
        raise ConfigError(f"the {len(shards)} shards of data.root hold no image file.")
    first = np.concatenate(([0], np.cumsum(counts)[:-1])).tolist()
    bad = {
        start + sample: why
        for start, part in zip(first, parts, strict=True)
        for sample, why in part.bad.items()
    }
    arrays = {
        name: np.concatenate([part.arrays[name] for part in parts])
        for name in ("sizes", "offsets", "lengths")
    }
    arrays["shard_of"] = np.repeat(np.arange(len(parts), dtype=np.uint32), counts)
    names = [str(shard.resolve()) for shard in shards]
    return Index(arrays, {"shards": names, "counts": counts, "bad": bad})


def _indexed(shard: Path, max_pixels: int) -> Index:
    """The index of one shard, built unless the one beside it still holds."""
    stamp = [*_stamp(shard), max_pixels]
    beside = shard.with_name(shard.name + _SUFFIX)
    spare = cache_folder() / "index" / hashlib.sha256(str(stamp[0]).encode()).hexdigest()[:20]
    for place in (beside, spare):
        with contextlib.suppress(OSError, ValueError, KeyError):
            index = load_index(str(place))
            if index.facts["stamp"] == stamp:
                return index
    index = _scan(shard, stamp, max_pixels)
    for place in (beside, spare):
        with contextlib.suppress(OSError):
            return save_index(index, place)
    return index


def _scan(shard: Path, stamp: list[Any], max_pixels: int) -> Index:
    offsets, lengths, sizes = [], [], []
    bad: dict[int, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar, open(shard, "rb", buffering=0) as file:
            for member in tar:
                if not member.isfile() or is_hidden_path(member.name):
                    continue
                if not is_image_name(member.name):
                    continue
                offsets.append(member.offset_data)
                lengths.append(member.size)
                try:
                    sizes.append(_size(file.fileno(), member, max_pixels))
                except BadImage as error:
                    bad[len(sizes)] = str(error)
                    sizes.append((0, 0))
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(
            f"shard {shard} cannot be read as an uncompressed tar: {error}"
        ) from error
    arrays: dict[str, NDArray[Any]] = {
        "sizes": np.array(sizes, np.int32).reshape(-1, 2),
        "offsets": np.array(offsets, np.int64),
        "lengths": np.array(lengths, np.uint32),
    }
    return Index(arrays, {"stamp": stamp, "bad": bad})


def _size(file: int, member: tarfile.TarInfo, max_pixels: int) -> tuple[int, int]:
    head = os.pread(file, min(HEAD, member.size), member.offset_data)
    try:
        return image_size(head, max_pixels)
    except BadImage:
        if member.size <= HEAD:
            raise
        whole = os.pread(file, member.size, member.offset_data)
        return image_size(whole, max_pixels)
