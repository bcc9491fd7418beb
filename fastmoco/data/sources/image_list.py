"""A list of images: a text file with one path per line, or a CSV file with a column of paths.

Relative paths start at the list's folder. In a CSV file the column is `path`, `file`, `filename` or
`image` if the first line names one of them, else the first column.
"""

from __future__ import annotations

import csv
import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np

from fastmoco.config import ConfigError
from fastmoco.data.sources.folder import FolderSource
from fastmoco.data.sources.index import Index, kept_index, require_readable
from fastmoco.data.sources.measure import measure, probe_chunk

_COLUMNS = ("path", "file", "filename", "image")


def listed_paths(path: Path) -> list[str]:
    """The paths in the list, as they are written. Raises `ConfigError` if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            if path.suffix.lower() != ".csv":
                return [line.strip() for line in file if line.strip()]
            rows = [row for row in csv.reader(file) if row]
    except (OSError, csv.Error) as error:
        raise ConfigError(
            f"data.root {path} cannot be read as a list of images: {error}"
        ) from error
    if not rows:
        return []
    names = [name.strip().lower() for name in rows[0]]
    column = next((names.index(name) for name in _COLUMNS if name in names), None)
    if column is None:
        return [row[0].strip() for row in rows]
    return [row[column].strip() for row in rows[1:] if len(row) > column]


def list_stamp(path: Path) -> str:
    """Changes when the list does."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"data.root {path} cannot be read: {error.strerror}.") from error
    return hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()


def scan_list(path: Path, max_pixels: int) -> Index:
    """The index of the listed images, in the order of the list."""
    names = listed_paths(path)
    encoded = [os.fsencode(name) for name in names]
    files = (os.path.join(path.parent, name) for name in names)
    sizes, bad = measure(partial(probe_chunk, max_pixels=max_pixels), files, len(names))
    arrays = {
        "folder_of": np.zeros(len(names), np.uint32),
        "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.uint64),
        "names": np.frombuffer(b"".join(encoded), np.uint8),
        "sizes": sizes,
    }
    return Index(arrays, {"folders": [["", 0]], "bad": bad, "stamp": list_stamp(path)})


def open_list(root: str, max_pixels: int) -> FolderSource:
    """The images that a text or CSV file lists. Raises `ConfigError` as `open_folder` does."""
    if not root:
        raise ConfigError("data.root is not set: name the list of the training images.")
    path = Path(root).resolve()
    stamp = list_stamp(path)
    index = kept_index(
        f"{path} {max_pixels}",
        holds=lambda index: index.facts.get("stamp") == stamp,
        scan=lambda: scan_list(path, max_pixels),
    )
    require_readable(index, f"data.root {root}")
    return FolderSource(str(path.parent), index)
