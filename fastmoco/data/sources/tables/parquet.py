"""Parquet files with a column of images: `data.source` parquet.

Parquet is compressed, so that one image is read by decoding the row group that it is in. A reader
process keeps decoded row groups up to 256 MiB, the least recently used go first. A row group is
what `data.shuffle_window` reads together. Random order over the whole set decodes a row group for
nearly every image: that suits row groups of a few MB; `fastmoco pack` makes others fast.

N samples, G row groups.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.data.sources.index import (
    Index,
    Indexed,
    bad_of,
    kept_index,
    require_readable,
    starts_of,
)
from fastmoco.data.sources.listing import stamp_of
from fastmoco.data.sources.measure import CHUNK, in_order, in_parallel, progress
from fastmoco.data.sources.shards import require_unchanged, stamp, stamped
from fastmoco.data.sources.tables.columns import (
    NULL,
    Column,
    Measured,
    encoded,
    image_column,
    pyarrow,
    reason,
    table_files,
)

KEPT_BYTES = 1 << 28
_LARGE_GROUP = 16 << 20  # decoding it takes longer than decoding and augmenting an image
_PROCESSES_FROM = 1 << 28  # bytes: below, threads are faster than starting processes

Group = tuple[str, int, Column, int]
"""A file, the number of a row group in it, the column of images, and the number of rows."""


class ParquetSource(Indexed):
    """Images in the rows of Parquet files, in the order of files and rows."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._starts = np.concatenate(([0], np.cumsum(self.shard_sizes)))
        self._decoded: OrderedDict[int, Any] = OrderedDict()
        self._files: dict[str, Any] = {}
        self._lock = threading.Lock()  # evaluation reads from threads

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index,)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        return np.asarray(self.index.facts["counts"], dtype=np.int64)

    def _place(self, sample: int) -> tuple[int, int]:
        """Number of the row group, and of the row in it."""
        group = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return group, sample - int(self._starts[group])

    def read(self, sample: int) -> bytes:
        group, row = self._place(sample)
        with self._lock:
            values = self._decoded.get(group)
            if values is None:
                values = self._decoded[group] = self._decode(group)
                while len(self._decoded) > 1 and self._kept() > KEPT_BYTES:
                    self._decoded.popitem(last=False)
            self._decoded.move_to_end(group)
        value = values[row]
        if not value.is_valid:
            raise OSError(errno.EINVAL, NULL)
        return bytes(value.as_buffer())

    def _kept(self) -> int:
        return sum(values.nbytes for values in self._decoded.values())

    def _decode(self, group: int) -> Any:
        facts = self.index.facts
        file, number = facts["groups"][group]
        path, column = self._path(file), Column(*facts["column"])
        try:
            if path not in self._files:
                self._files.clear()
                require_unchanged(self.index, file, os.stat(path))
                self._files[path] = pyarrow("parquet").ParquetFile(path)
            return _values(self._files[path], number, column)
        except (pyarrow("").ArrowException, IndexError) as error:
            raise OSError(errno.EIO, f"row group {number} is damaged: {reason(error)}") from error

    def _path(self, file: int) -> str:
        """The local file of a number."""
        path: str = self.index.facts["files"][file]
        return path

    def _row(self, sample: int) -> tuple[str, int]:
        group, _ = self._place(sample)
        file = self.index.facts["groups"][group][0]
        return self.index.facts["files"][file], sample - self.index.facts["first"][file]

    def name(self, sample: int) -> str:
        """File and number of the row in it, from 0."""
        path, row = self._row(sample)
        return f"{path}:row {row}"

    def relative_names(self) -> Iterator[bytes]:
        """File, row and length of the image."""
        facts = self.index.facts
        above = os.path.commonpath([os.path.dirname(path) for path in facts["files"]])
        names = [os.fsencode(os.path.relpath(path, above)) for path in facts["files"]]
        ends = [*facts["first"][1:], len(self.sizes)]
        for name, first, end in zip(names, facts["first"], ends, strict=True):
            for at in range(first, end, CHUNK):
                lengths = self.index.arrays["lengths"][at : min(at + CHUNK, end)].tolist()
                for row, length in enumerate(lengths, at - first):
                    yield b"%s %d %d" % (name, row, length)

    def stamp(self, sample: int) -> list[int]:
        return stamp_of(self._row(sample)[0])


def open_parquet(
    root: str, max_pixels: int, *, shuffle_window: int = 0, rescan: bool = False
) -> ParquetSource:
    """The images of a Parquet file, of a pattern of files or of all below a folder.

    Raises `ConfigError` for files that are not, or have no column of images, or no image.
    """
    files = table_files(root, ".parquet")
    stamps = [stamp(path) for path in files]
    index = kept_index(
        repr((stamps, max_pixels)),
        holds=lambda index: "stamps" in index.facts,
        scan=lambda: stamped(scan_parquet(files, max_pixels), stamps),
        rescan=rescan,
    )
    require_readable(index, f"data.root {root}")
    largest, total = index.facts["largest"], int(index.arrays["lengths"].sum(dtype=np.int64))
    index.facts["warnings"] = []
    if not shuffle_window and largest > _LARGE_GROUP and total > KEPT_BYTES:
        index.facts["warnings"].append(
            f"A row group of {root} has up to {largest >> 20:,} MiB and is decoded for nearly "
            "every image: set data.shuffle_window, such as 2000, or use fastmoco pack first."
        )
    return ParquetSource(index)


def parquet_file(path: Path) -> Any:
    """The open file. Raises `ConfigError` where it is none."""
    try:
        return pyarrow("parquet").ParquetFile(str(path))
    except (pyarrow("").ArrowException, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as Parquet ({reason(error)}): fetch it again."
        ) from error


def _values(file: Any, group: int, column: Column) -> Any:
    """The encoded images of a row group."""
    table = file.read_row_group(group, columns=[column.path], use_threads=False)
    array = table.column(0).combine_chunks()
    chunks = getattr(array, "chunks", [array])  # more than 2 GiB stay apart
    if len(chunks) == 1:
        return encoded(chunks[0], column)
    return pyarrow("").chunked_array([encoded(chunk, column) for chunk in chunks])


def scan_parquet(files: list[Path], max_pixels: int) -> Index:
    """The index of files, from the first bytes of every image. Raises `ConfigError`."""
    groups: list[tuple[int, int]] = []
    counts: list[int] = []
    first, tasks, largest, column = [], list[Group](), 0, None
    for number, path in enumerate(files):
        file = parquet_file(path)
        found = image_column(file.schema_arrow, path)
        if column not in (None, found):
            raise ConfigError(f"{path} and {files[0]} have other columns of images: name one set.")
        column = found
        first.append(sum(counts))
        at = [str(name) for name in _leaves(file)].index(found.path)
        for group in range(file.num_row_groups):
            row_group = file.metadata.row_group(group)
            groups.append((number, group))
            counts.append(row_group.num_rows)
            tasks.append((str(path), group, found, row_group.num_rows))
            largest = max(largest, row_group.column(at).total_uncompressed_size)
    size = sum(path.stat().st_size for path in files)
    with in_parallel(many=size > _PROCESSES_FROM) as pool:
        work = in_order(pool, partial(_measure, max_pixels=max_pixels), tasks)
        parts = list(progress(work, lambda part: len(part[0]), "index", sum(counts)))
    bad = bad_of(starts_of(counts), [part[2] for part in parts])
    arrays: dict[str, NDArray[Any]] = {
        "sizes": np.concatenate([np.zeros((0, 2), np.int32), *(part[0] for part in parts)]),
        "lengths": np.concatenate([np.zeros(0, np.uint32), *(part[1] for part in parts)]),
    }
    names = [str(path.resolve()) for path in files]
    facts = {"files": names, "first": first, "groups": groups, "counts": counts, "bad": bad}
    return Index(arrays, {**facts, "column": list(column or ()), "largest": largest})


def joined(files: Sequence[str], parts: Sequence[Index]) -> Index:
    """One index of files from the index of each. Raises `ConfigError` for different columns."""
    if len({tuple(part.facts["column"]) for part in parts}) > 1:
        raise ConfigError(f"{files[0]} and others have other columns of images: name one set.")
    first = starts_of([len(part.sizes) for part in parts])
    numbered = enumerate(parts)
    facts = {
        "files": list(files),
        "first": first,
        "groups": [(n, group) for n, part in numbered for _, group in part.facts["groups"]],
        "counts": [count for part in parts for count in part.facts["counts"]],
        "bad": bad_of(first, [part.bad for part in parts]),
        "column": parts[0].facts["column"],
        "largest": max(part.facts["largest"] for part in parts),
    }
    names = ("sizes", "lengths")
    return Index({n: np.concatenate([part.arrays[n] for part in parts]) for n in names}, facts)


def _leaves(file: Any) -> list[str]:
    return [file.schema.column(at).path for at in range(len(file.schema.names))]


def _measure(
    task: Group, max_pixels: int
) -> tuple[NDArray[np.int32], NDArray[np.uint32], dict[int, str]]:
    """Sizes, lengths and reasons of the bad ones of a row group, in batches of a few rows.

    Rows that cannot be decoded are bad: the others of the set are used.
    """
    path, group, column, rows = task
    values, bad, damage = Measured(max_pixels), dict[int, str](), ""
    try:
        file = pyarrow("parquet").ParquetFile(path)
        batches = file.iter_batches(CHUNK, [group], columns=[column.path], use_threads=False)
        for batch in batches:
            values.add(encoded(batch.column(0), column))
    except FileNotFoundError:
        raise  # thrown out of the cache of a bucket: the rows are not bad
    except (pyarrow("").ArrowException, OSError) as error:
        damage = f"row group {group} is damaged: {reason(error)}"
    if not damage and len(values.lengths) != rows:
        damage = f"row group {group} is damaged: it has {len(values.lengths)} of {rows} rows"
    sizes, lengths = np.zeros((rows, 2), np.int32), np.zeros(rows, np.uint32)
    if damage:  # a row is read by decoding its whole row group
        bad = dict.fromkeys(range(rows), damage)
    else:
        sizes[:], lengths[:], bad = values.sizes, values.lengths, values.bad
    return sizes, lengths, bad
