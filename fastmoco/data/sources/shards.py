"""Tar shards, as WebDataset writes them, read by offset without unpacking.

Every shard gets an index beside it (or in the cache folder where that cannot be written), which
holds while the shard keeps its size and modification time. The indices of all shards are joined
into one mapped file in the cache folder: 24 bytes per sample.

N samples, T shards.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.config.paths import matching
from fastmoco.data.decode import BadImage, image_size
from fastmoco.data.sources.index import (
    Index,
    Indexed,
    bad_of,
    kept_index,
    load_index,
    require_readable,
    save_index,
    starts_of,
)
from fastmoco.data.sources.listing import (
    Passed,
    in_words,
    open_regular,
    stamp_of,
    starts_like_image,
    walk,
)
from fastmoco.data.sources.measure import CHUNK, HEAD, in_order, in_parallel, progress
from fastmoco.data.sources.splits import require_one_split
from fastmoco.data.sources.tar import Member, Pictures, Tar, pictures
from fastmoco.machine import durable
from fastmoco.machine.cache import cache_folder

SUFFIX = ".fastmoco-index"
HEAD_BYTES = 4096
_OPEN_FILES = 64
_PACKED = (".tgz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


class OpenFile:
    """A file that closes itself once nobody holds it: a thread that reads it keeps it open."""

    def __init__(self, path: str) -> None:
        """Raises `OSError`."""
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.number >= 0:
            close(self.number)


class ShardSource(Indexed):
    """Images inside tar files, numbered shard by shard in the order of the archive.

    Threads may read at the same time.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: dict[int, OpenFile] = {}
        self._lock = threading.Lock()  # of the files; reading itself takes none
        self._named: tuple[int, list[str]] = (-1, [])  # a shard, its pictures

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index,)  # open files and their lock stay in their process

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        return np.asarray(self.index.facts["counts"], dtype=np.int64)

    def read(self, sample: int) -> bytes:
        arrays = self.index.arrays
        file = self._open(int(arrays["shard_of"][sample]))  # held, so that it stays open
        length, offset = int(arrays["lengths"][sample]), int(arrays["offsets"][sample])
        return os.pread(file.number, length, offset)

    def name(self, sample: int) -> str:
        """Shard and member; walks the shard, once for neighbours, as only reports need it."""
        number = int(self.index.arrays["shard_of"][sample])
        shard = self.index.facts["shards"][number]
        named, names = self._named  # both at once: threads may ask for names of other shards
        if named != number:
            names = []
            with contextlib.suppress(OSError, ConfigError):
                any_name = self.index.facts["any_name"]
                found = _pictures(Path(self._path(number)), any_name=any_name)[0].images
                names = [member.name for member in found]
            self._named = number, names
        at = sample - int(self.shard_sizes[:number].sum())
        return f"{shard}:{names[at] if at < len(names) else f'number {at}'}"

    def relative_names(self) -> Iterator[bytes]:
        """Shard, place in it and length: the index has no names, and reading them takes a walk."""
        arrays, shards = self.index.arrays, self.index.facts["shards"]
        above = os.path.commonpath([os.path.dirname(shard) for shard in shards])
        names = [os.fsencode(os.path.relpath(shard, above)) for shard in shards]
        for at in range(0, len(self.sizes), CHUNK):
            columns = (
                arrays[n][at : at + CHUNK].tolist() for n in ("shard_of", "offsets", "lengths")
            )
            for shard, offset, length in zip(*columns, strict=True):
                yield b"%s %d %d" % (names[shard], offset, length)

    def stamp(self, sample: int) -> list[int]:
        return stamp_of(self.index.facts["shards"][int(self.index.arrays["shard_of"][sample])])

    def _path(self, shard: int) -> str:
        """The local file of a shard."""
        path: str = self.index.facts["shards"][shard]
        return path

    def _open(self, shard: int) -> OpenFile:
        with self._lock:
            file = self._files.get(shard)
        if file is None:
            file = OpenFile(self._path(shard))
            require_unchanged(self.index, shard, os.fstat(file.number))
            with self._lock:
                while len(self._files) >= _OPEN_FILES:
                    del self._files[next(iter(self._files))]  # closed after those who read it
                file = self._files.setdefault(shard, file)
        return file


def open_shards(
    root: str, max_pixels: int, *, any_name: bool = False, rescan: bool = False
) -> ShardSource:
    """The images in a tar file or in all tar files below a folder, in sorted order.

    root: may be a pattern of several. any_name: members count by their content too. rescan: read
    all shards anew.

    Raises `ConfigError` for no shard, shards of several splits, a compressed or unreadable one, or
    no image in them.
    """
    if not root:
        raise ConfigError("data.root is not set: name a folder of shards, or one of them.")
    passed = Passed()
    shards = [shard for place in matching(root) for shard in _shards(Path(place), passed)]
    if not shards:
        raise ConfigError(f"data.root {root} holds no .tar file.")
    require_one_split(root, [str(shard) for shard in shards])
    stamps = [stamp(shard) for shard in shards]
    index = kept_index(
        repr((stamps, max_pixels, any_name)),
        holds=lambda index: "stamps" in index.facts,
        scan=lambda: stamped(_join(shards, max_pixels, any_name=any_name, rescan=rescan), stamps),
        rescan=rescan,
    )
    index.facts["warnings"] = [*passed.warnings(), *index.facts["warnings"]]
    require_readable(index, f"data.root {root}", by_name=not any_name)
    return ShardSource(index)


def _shards(place: Path, passed: Passed) -> list[Path]:
    """The shards in a folder, below linked folders too, or the file itself.

    Raises `ConfigError` where there is nothing, or a shard is packed and not unpacked beside it.
    """
    if not place.exists():
        raise ConfigError(f"data.root {place} does not exist: name a folder of shards.")
    if not place.is_dir():
        return [place]
    try:
        listed = list(walk(str(place), passed, counts=_is_shard_name))
    except OSError as error:
        raise ConfigError(
            f"data.root: the folder {error.filename} cannot be listed: {error.strerror}; "
            "make it readable or move it elsewhere."
        ) from error
    found = sorted(place / folder / name for folder, _, names in listed for name in names)
    plain = {path for path in found if path.name.lower().endswith(".tar")}
    for path in found:
        if path not in plain and not {path.with_suffix(""), path.with_suffix(".tar")} & plain:
            return [path]  # reading it is refused with the command that unpacks it
    return [path for path in found if path in plain]


def _is_shard_name(name: str) -> bool:
    return name.lower().endswith((".tar", *_PACKED))


def index_beside(shard: Path) -> Path:
    """Where the index of a shard lies, unless its folder cannot be written."""
    return shard.with_name(shard.name + SUFFIX)


def head_of(shard: Path) -> list[Any]:
    """Size and a hash of the first bytes: by these a shard of `fastmoco pack` knows its index.

    Unlike a time they are the same after any copy. Raises `OSError`.
    """
    with open(shard, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()]


def load_shard_index(path: str) -> Index:
    """The index of one shard. It may come from anybody, as the shard does.

    Raises `OSError` as `load_index` does, `KeyError` and `ValueError` for what `scan_shard` would
    not make.
    """
    index = load_index(path)
    count, facts = len(index.sizes), index.facts
    shapes = {"sizes": ("i4", (count, 2)), "offsets": ("i8", (count,)), "lengths": ("u4", (count,))}
    for name, (kind, shape) in shapes.items():
        array = index.arrays[name]
        if array.dtype != np.dtype(kind) or array.shape != shape or (array < 0).any():
            raise ValueError(f"{path} has other {name} than a shard")
    kinds = {"bad": dict, "others": dict, "beside": int, "end": str}
    if not (
        all(isinstance(facts[name], kind) for name, kind in kinds.items())
        and all(isinstance(number, int) for number in facts["others"].values())
        and all(0 <= sample < count and isinstance(why, str) for sample, why in index.bad.items())
    ):
        raise ValueError(f"{path} has other notes than a shard")
    return index


def came_with(index: Index, head: list[Any], max_pixels: int) -> bool:
    """Whether the index came with the shard that has this `head_of`, wherever both lie now."""
    if index.facts.get("packed") != head:
        return False
    pixels = index.sizes.astype(np.int64).prod(axis=1)
    return bool((pixels <= max_pixels).all())


def stamp(shard: Path) -> list[Any]:
    """Place, size and modification time of a shard.

    Raises `ConfigError` without them, and for a pipe, which reading would wait for.
    """
    try:
        status = shard.stat()
    except OSError as error:
        raise ConfigError(f"The shard {shard} cannot be read: {error.strerror}.") from error
    if not S_ISREG(status.st_mode):
        kind = durable.what_it_is(status.st_mode)
        raise ConfigError(f"The shard {shard} is {kind}, not a regular file.")
    return [str(shard.resolve()), status.st_size, status.st_mtime_ns]


def stamped(index: Index, stamps: list[list[Any]]) -> Index:
    """The index with the stamps of its files, kept with it: processes that are spawned load it."""
    return Index(index.arrays, {**index.facts, "stamps": stamps})


def require_unchanged(index: Index, file: int, status: os.stat_result) -> None:
    """Raises `OSError` for a file, by its number, that is not the one that was indexed.

    Files of a bucket have no stamps: the cache looks after them.
    """
    stamps = index.facts.get("stamps")
    if stamps and stamps[file][1:] != [status.st_size, status.st_mtime_ns]:
        raise OSError(errno.ESTALE, f"{stamps[file][0]} was changed after it was indexed")


def _join(shards: Sequence[Path], max_pixels: int, *, any_name: bool, rescan: bool) -> Index:
    """One index of all shards, each from its own where that still holds."""
    work = partial(_indexed, max_pixels=max_pixels, any_name=any_name, rescan=rescan)
    with in_parallel(many=len(shards) > 8) as pool:
        indexed = in_order(pool, work, shards)
        parts = list(progress(indexed, lambda part: len(part.sizes), "index"))
    names = [str(shard.resolve()) for shard in shards]
    return joined(names, parts, any_name=any_name)


def joined(shards: Sequence[str], parts: Sequence[Index], *, any_name: bool) -> Index:
    """One index of all shards from the index of each."""
    counts = [len(part.sizes) for part in parts]
    arrays = {
        name: np.concatenate([part.arrays[name] for part in parts])
        for name in ("sizes", "offsets", "lengths")
    }
    arrays["shard_of"] = np.repeat(np.arange(len(parts), dtype=np.uint32), counts)
    facts = {
        "shards": list(shards),
        "counts": counts,
        "bad": bad_of(starts_of(counts), [part.bad for part in parts]),
        "any_name": any_name,
        "notes": _notes(parts),
        "warnings": [part.facts["end"] for part in parts if part.facts.get("end")],
    }
    return Index(arrays, facts)


def _notes(parts: Sequence[Index]) -> list[str]:
    notes = []
    others: Counter[str] = Counter()
    for part in parts:
        others.update(part.facts.get("others", {}))
    if others:
        notes.append(f"members not counted as images: {in_words(others)}")
    if beside := sum(part.facts.get("beside", 0) for part in parts):
        notes.append(
            f"{beside:,} pictures have the key of another and are left out, as masks are: one per "
            "key counts, a JPEG first"
        )
    return notes


def _indexed(shard: Path, max_pixels: int, *, any_name: bool, rescan: bool) -> Index:
    """The index of one shard, built unless the one beside it still holds."""
    stamped = [*stamp(shard), max_pixels, any_name]
    beside = index_beside(shard)
    spare = cache_folder() / "index" / hashlib.sha256(os.fsencode(stamped[0])).hexdigest()[:20]
    for place in (beside, spare):
        with contextlib.suppress(OSError, ValueError, KeyError):
            index = load_shard_index(str(place))
            holds = index.facts["stamp"] == stamped or came_with(index, head_of(shard), max_pixels)
            if holds and not rescan:
                return index
    index = scan_shard(shard, stamped, max_pixels, any_name=any_name)
    for place in (beside, spare):
        with contextlib.suppress(OSError):
            return save_index(index, place)
    return index


def _pictures(shard: Path, *, any_name: bool) -> tuple[Pictures, str]:
    """What a shard holds, and a sentence if it does not end as it should."""
    with open_regular(str(shard)) as file:
        tar = Tar(str(shard), file.fileno())
        return pictures(tar, any_name=any_name), tar.end


def scan_shard(shard: Path, stamp: list[Any], max_pixels: int, *, any_name: bool) -> Index:
    """The index of one shard, from its headers. Raises `ConfigError`."""
    try:
        (found, beside, others), end = _pictures(shard, any_name=any_name)
        sizes, bad = _measure(shard, found, max_pixels)
    except OSError as error:
        raise ConfigError(f"The shard {shard} cannot be read: {error.strerror}.") from error
    arrays: dict[str, NDArray[Any]] = {
        "sizes": np.array(sizes, np.int32).reshape(-1, 2),
        "offsets": np.array([member.offset for member in found], np.int64),
        "lengths": np.array([member.size * (not member.fault) for member in found], np.uint32),
    }
    facts = {"stamp": stamp, "bad": bad, "end": end, "others": others, "beside": beside}
    return Index(arrays, facts)


def _measure(
    shard: Path, found: Sequence[Member], max_pixels: int
) -> tuple[list[tuple[int, int]], dict[int, str]]:
    sizes: list[tuple[int, int]] = []
    bad: dict[int, str] = {}
    with open_regular(str(shard)) as file:
        for sample, member in enumerate(found):
            try:
                if member.fault:
                    raise BadImage(member.fault)
                sizes.append(_size(file.fileno(), member, max_pixels))
            except BadImage as error:
                bad[sample] = str(error)
                sizes.append((0, 0))
    return sizes, bad


def _size(file: int, member: Member, max_pixels: int) -> tuple[int, int]:
    head = os.pread(file, min(HEAD, member.size), member.offset)
    try:
        return image_size(head, max_pixels)
    except BadImage:
        if member.size <= HEAD or not starts_like_image(head):
            raise
        return image_size(os.pread(file, member.size, member.offset), max_pixels)
