"""Arrow files with a column of images, as `datasets.save_to_disk` writes them: `data.source` arrow.

Arrow keeps the bytes of an image as they are, so that the index holds where they lie in the file
and a sample is one read, as of a tar shard: without pyarrow, decoding or a window.

N samples.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.data.sources.index import Index, kept_index, require_readable
from fastmoco.data.sources.measure import in_order, in_parallel, progress
from fastmoco.data.sources.shards import ShardSource, joined, stamp, stamped
from fastmoco.data.sources.tables.columns import (
    Measured,
    encoded,
    image_column,
    pyarrow,
    reason,
    table_files,
)

_PROCESSES_FROM = 1 << 28  # bytes


class ArrowSource(ShardSource):
    """Images in the rows of Arrow files, in the order of files and rows."""

    def name(self, sample: int) -> str:
        """File and number of the row in it, from 0."""
        number = int(self.index.arrays["shard_of"][sample])
        row = sample - int(self.shard_sizes[:number].sum())
        return f"{self.index.facts['shards'][number]}:row {row}"


def open_arrow(root: str, max_pixels: int, *, rescan: bool = False) -> ArrowSource:
    """The images of an Arrow file, of a pattern of files or of all below a folder.

    Raises `ConfigError` for files that are not, are compressed, or have no column of images.
    """
    files = table_files(root, ".arrow")
    stamps = [stamp(path) for path in files]
    index = kept_index(
        repr((stamps, max_pixels)),
        holds=lambda index: "stamps" in index.facts,
        scan=lambda: stamped(_scan(files, max_pixels), stamps),
        rescan=rescan,
    )
    require_readable(index, f"data.root {root}")
    return ArrowSource(index)


def arrow_batches(path: Path) -> tuple[Any, Any, Any]:
    """All bytes of the file, mapped, its schema and its record batches.

    Raises `ConfigError` where it is no Arrow file.
    """
    pa, ipc = pyarrow(""), pyarrow("ipc")
    try:
        file = pa.memory_map(str(path))
        whole = file.read_buffer(file.size())  # mapped, not copied: values lie in it
        if whole.size >= 6 and bytes(whole[:6]) == b"ARROW1":
            reader = ipc.open_file(whole)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
            return whole, reader.schema, batches
        stream = ipc.open_stream(whole)
        return whole, stream.schema, iter(stream)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def checked(batch: Any, name: str) -> Any:
    """A column of a batch. Raises pyarrow's exception where following it would end the process."""
    column = batch.column(name)
    column.validate(full=True)
    return column


def _damaged(path: Path, error: BaseException) -> ConfigError:
    return ConfigError(f"{path} cannot be read as Arrow ({reason(error)}): fetch it again.")


def _scan(files: list[Path], max_pixels: int) -> Index:
    size = sum(path.stat().st_size for path in files)
    with in_parallel(many=size > _PROCESSES_FROM) as pool:
        work = in_order(pool, partial(scan_arrow, max_pixels=max_pixels), files)
        parts = list(progress(work, lambda part: len(part.sizes), "index"))
    return joined([str(path.resolve()) for path in files], parts, any_name=False)


def scan_arrow(path: Path, max_pixels: int) -> Index:
    """Where the images of a file lie, and how large they are."""
    pa = pyarrow("")
    whole, schema, batches = arrow_batches(path)
    column = image_column(schema, path)
    places: list[NDArray[np.int64]] = [np.zeros((0, 2), np.int64)]
    measured = Measured(max_pixels)
    try:
        for batch in batches:
            values = encoded(checked(batch, column.name), column)
            places.append(_places(values, whole.address, whole.size, path))
            measured.add(values)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    found = np.concatenate(places)
    arrays: dict[str, NDArray[Any]] = {
        "sizes": measured.sizes,
        "offsets": found[:, 0],
        "lengths": found[:, 1].astype(np.uint32),
    }
    return Index(arrays, {"bad": measured.bad})


def _places(values: Any, start: int, size: int, path: Path) -> NDArray[np.int64]:
    """(n, 2): offset in the file and length of each value."""
    _, ends, data = values.buffers()
    if not len(values) or data is None or not data.size:
        return np.zeros((len(values), 2), np.int64)
    if not 0 <= data.address - start <= size - data.size:
        raise ConfigError(
            f"The record batches of {path} are compressed: write them without compression, or as "
            "Parquet."
        )
    kind = np.int64 if pyarrow("").types.is_large_binary(values.type) else np.int32
    at = np.frombuffer(ends, kind, values.offset + len(values) + 1)[values.offset :]
    places = np.stack([data.address - start + at[:-1], np.diff(at)], axis=1).astype(np.int64)
    places[~np.asarray(values.is_valid())] = 0
    return places
