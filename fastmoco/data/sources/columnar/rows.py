"""Images in a column of Parquet or Arrow files, numbered file by file in the order of their rows.

The index, in the cache folder, holds while all files keep their sizes and modification times: 8
bytes per row, and where the groups begin. A group of a Parquet file is decoded whole, so that the
latest few are kept in memory; a row of an Arrow file is read alone.

N samples, G groups.
"""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.config.paths import matching
from fastmoco.data.decode import BadImage, image_size
from fastmoco.data.sources.columnar.arrow import ArrowGroups
from fastmoco.data.sources.columnar.columns import image_column, label_column, numbered
from fastmoco.data.sources.columnar.parquet import ParquetGroups
from fastmoco.data.sources.index import Index, Indexed, kept_index, require_readable
from fastmoco.data.sources.listing import Passed, is_hidden, stamp_of, walk
from fastmoco.data.sources.measure import Found, in_order, in_parallel, progress

Groups = ParquetGroups | ArrowGroups
_OPEN: dict[str, Callable[[str], Groups]] = {"parquet": ParquetGroups, "arrow": ArrowGroups}
_SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow"}
_HELD_BYTES = 256 << 20  # decoded groups that a process keeps, and at least one
_OPEN_FILES = 64
_AT_ONCE = 4096  # rows that a process of the scan measures at once; a file is opened for each
_LARGE_GROUP = 32 << 20  # decoding this much for one picture takes longer than the picture itself
_PROCESSES_FROM = 20_000
_TRAIN, _OTHERS = "train-", ("test-", "val-", "valid-", "validation-", "dev-")

Part = tuple[str, str, str, list[int]]
"""Kind, file, column and the groups to measure."""


class RowSource(Indexed):
    """Images in the rows of files."""

    def __init__(self, index: Index) -> None:
        self.index = index
        rows, file = index.arrays["group_rows"], index.arrays["group_file"]
        self._first = np.concatenate(([0], np.cumsum(rows)))
        per_file = np.bincount(file, rows, len(index.facts["shards"])).astype(np.int64)
        self._first_of_file = np.concatenate(([0], np.cumsum(per_file)))
        self._files: OrderedDict[int, Groups] = OrderedDict()
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()  # evaluation reads with threads

    def __reduce__(self) -> tuple[Any, ...]:
        return RowSource, (self.index,)  # open files stay in their process

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        return np.asarray(self.index.arrays["group_rows"], dtype=np.int64)

    def read(self, sample: int) -> bytes:
        import pyarrow as pa

        group = self._group(sample)
        with self._lock:
            try:
                column = self._column(group)
            except (ConfigError, pa.ArrowException) as error:
                raise OSError(str(error).partition("\n")[0].rstrip(".")) from error
            value = column[sample - int(self._first[group])].as_py()
        if value is None:
            raise OSError("the row holds no image")
        return bytes(value)

    def name(self, sample: int) -> str:
        file, row = self._place(sample)
        return f"{self.index.facts['shards'][file]}:row {row}"

    def relative_names(self) -> Iterator[bytes]:
        """File and row."""
        files = self.index.facts["shards"]
        above = os.path.commonpath([os.path.dirname(file) for file in files])
        names = [os.fsencode(os.path.relpath(file, above)) for file in files]
        for name, rows in zip(names, np.diff(self._first_of_file).tolist(), strict=True):
            for row in range(rows):
                yield b"%s %d" % (name, row)

    def stamp(self, sample: int) -> list[int]:
        return stamp_of(self.index.facts["shards"][self._place(sample)[0]])

    def labels(self) -> tuple[list[int], list[str]]:
        """The class number of each row, and the class names. Raises `ConfigError`."""
        kind, files = self.index.facts["kind"], self.index.facts["shards"]
        found: list[Any] = []
        names: list[str] = []
        for file in files:
            groups = _OPEN[kind](file)
            column, names = label_column(groups.schema, file)
            for group in range(len(groups.rows)):
                found += groups.read(group, column).to_pylist()
        return numbered(found, names, files[0] if len(files) == 1 else os.path.dirname(files[0]))

    def _group(self, sample: int) -> int:
        return int(np.searchsorted(self._first, sample, side="right")) - 1

    def _place(self, sample: int) -> tuple[int, int]:
        """File, and row in it."""
        file = int(self.index.arrays["group_file"][self._group(sample)])
        return file, sample - int(self._first_of_file[file])

    def _column(self, group: int) -> Any:
        """The encoded images of a group, from memory if they are there."""
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        number = int(self.index.arrays["group_file"][group])
        first = int(np.searchsorted(self.index.arrays["group_file"], number))
        column = _images(self._open(number), group - first, self.index.facts["columns"][number])
        self._held[group] = column
        while len(self._held) > 1 and sum(c.nbytes for c in self._held.values()) > _HELD_BYTES:
            self._held.popitem(last=False)
        return column

    def _open(self, number: int) -> Groups:
        if number not in self._files:
            path = self.index.facts["shards"][number]
            if stamp_of(path) != self.index.facts["file_stamps"][number]:
                raise OSError(f"{path} has changed since it was indexed")
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)
            self._files[number] = _OPEN[self.index.facts["kind"]](path)
        return self._files[number]


def _images(groups: Groups, group: int, column: str) -> Any:
    """The encoded bytes of a group: the column, or the field bytes of it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = groups.read(group, column)
    return pc.struct_field(found, "bytes") if pa.types.is_struct(found.type) else found


def kind_of(root: str) -> str:
    """`parquet` or `arrow` where a file, a pattern or a folder is of such files, else empty."""
    if not Path(root).is_dir():
        return _SUFFIXES.get(Path(root).suffix.lower(), "")
    inside = [path for path in sorted(Path(root).iterdir()) if not is_hidden(path.name)]
    kinds = [_SUFFIXES[path.suffix.lower()] for path in inside if path.suffix.lower() in _SUFFIXES]
    classes = any(path.is_dir() for path in inside)  # a table beside class folders describes them
    return kinds[0] if kinds and not classes else ""


def open_rows(kind: str, root: str, max_pixels: int, *, rescan: bool = False) -> RowSource:
    """The images in the rows of a file, or of all such files below a folder, in sorted order.

    kind: `parquet` or `arrow`. root: may be a pattern of several. rescan: measure all anew.

    Raises `ConfigError` for no file, one that cannot be read, and no image column in one.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"data.source {kind} needs pyarrow: pip install 'fastmoco[parquet]'.")
    if not root:
        raise ConfigError(f"data.root is not set: name a {kind.title()} file, or their folder.")
    passed = Passed()
    files = [file for place in matching(root) for file in _files(Path(place), kind, passed)]
    if not files:
        raise ConfigError(f"data.root {root} holds no .{kind} file.")
    stamps = [stamp_of(str(file)) for file in files]
    names = [str(file.resolve()) for file in files]
    index = kept_index(
        repr((kind, names, stamps, max_pixels)),
        holds=lambda index: True,
        scan=lambda: _scan(kind, names, stamps, max_pixels),
        rescan=rescan,
    )
    index.facts["warnings"] = [*passed.warnings(), *index.facts["warnings"]]
    require_readable(index, f"data.root {root}")
    return RowSource(index)


def _files(place: Path, kind: str, passed: Passed) -> list[Path]:
    """The files below a folder, or the file itself. Raises `ConfigError`."""
    if not place.exists():
        raise ConfigError(f"data.root {place} does not exist: name a .{kind} file or a folder.")
    if not place.is_dir():
        return [place]
    if listed := _said_by_datasets(place):
        return listed
    suffixes = tuple(suffix for suffix, of in _SUFFIXES.items() if of == kind)
    try:
        found = list(walk(str(place), passed, counts=lambda name: name.lower().endswith(suffixes)))
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be listed: {error.strerror}.") from error
    files = sorted(place / folder / name for folder, _, names in found for name in names)
    train = [file for file in files if file.name.startswith(_TRAIN)]
    if train and any(file.name.startswith(_OTHERS) for file in files):
        raise ConfigError(
            f"data.root {place} holds several splits: name the one to train on, "
            f"{train[0].parent}/{_TRAIN}*.{kind}, and the labelled test split in knn.test_root."
        )
    return files


def _said_by_datasets(place: Path) -> list[Path]:
    """The files of a `save_to_disk` folder, where caches of later work lie too; else none."""
    try:
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        return [place / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _scan(kind: str, files: Sequence[str], stamps: list[list[int]], max_pixels: int) -> Index:
    """Measures every image. Raises `ConfigError` for a file that cannot be read."""
    rows: list[tuple[int, int]] = []  # of each group: file, rows
    columns: list[str] = []
    parts: list[Part] = []
    for number, file in enumerate(files):
        groups = _OPEN[kind](file)
        columns.append(image_column(groups.schema, file))
        rows += [(number, n) for n in groups.rows]
        parts += [(kind, file, columns[-1], few) for few in _together(groups.rows)]
    total = sum(n for _, n in rows)
    measured: list[tuple[list[Found], int]] = []
    with in_parallel(many=total >= _PROCESSES_FROM) as pool:
        work = in_order(pool, partial(_measure, max_pixels=max_pixels), parts)
        measured += progress(work, lambda part: len(part[0]), "index", total)
    found = [one for part, _ in measured for one in part]
    arrays = {
        "sizes": np.array([one[:2] for one in found], np.int32).reshape(-1, 2),
        "group_file": np.array([file for file, _ in rows], np.int64),
        "group_rows": np.array([n for _, n in rows], np.int64),
    }
    facts = {
        "kind": kind,
        "shards": list(files),
        "columns": columns,
        "file_stamps": stamps,
        "bad": {at: one[2] for at, one in enumerate(found) if one[2]},
        "warnings": _of_large_groups(kind, max((n for _, n in measured), default=0)),
    }
    return Index(arrays, facts)


def _of_large_groups(kind: str, largest: int) -> list[str]:
    if kind == "arrow" or largest < _LARGE_GROUP:
        return []
    return [
        f"The largest row group holds {largest / 2**20:.0f} MiB of images, and all of it is decoded"
        " for one: set data.shuffle_window, or lay the images into shards with fastmoco pack."
    ]


def _together(rows: Sequence[int]) -> Iterator[list[int]]:
    """Neighbouring groups that one process measures."""
    few: list[int] = []
    for group in range(len(rows)):
        few.append(group)
        if sum(rows[g] for g in few) >= _AT_ONCE:
            yield few
            few = []
    if few:
        yield few


def _measure(part: Part, max_pixels: int) -> tuple[list[Found], int]:
    """The images of some groups, and the bytes of the largest group."""
    import pyarrow as pa

    kind, file, column, few = part
    groups = _OPEN[kind](file)
    found: list[Found] = []
    largest = 0
    for group in few:
        try:
            images = _images(groups, group, column)
        except (OSError, pa.ArrowException) as error:
            why = str(error).partition("\n")[0].rstrip(".")
            found += [(0, 0, f"OSError: {why}")] * groups.rows[group]
            continue
        largest = max(largest, images.nbytes)
        found += [_probe(value.as_py(), max_pixels) for value in images]
    return found, largest


def _probe(data: bytes | None, max_pixels: int) -> Found:
    if data is None:
        return 0, 0, "OSError: the row holds no image"
    try:
        return (*image_size(data, max_pixels), "")
    except BadImage as bad:
        return 0, 0, str(bad)
