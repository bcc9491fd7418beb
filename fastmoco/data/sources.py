"""Where encoded images come from. A source numbers its samples and knows their sizes.

Training never sees a label. A sample that was unreadable while indexing keeps its number, so that
one bad file does not change which samples the others are; readers replace it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import Config, ConfigError
from fastmoco.data.index import Index, Indexed, cache_folder, exclusive, load_index, save_index
from fastmoco.data.listing import list_stamp, scan_list
from fastmoco.data.scan import folders_unchanged, scan_folder
from fastmoco.data.shards import open_shards


class Source(Protocol):
    """N encoded images. Objects are small when pickled, so that reader processes start fast."""

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2): width and height in pixels; 0 where the image could not be read."""

    @property
    def bad(self) -> dict[int, str]:
        """Reason by sample, for those found unreadable while indexing."""

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of each run of neighbours that are fast to read together; they add up to N."""

    def read(self, sample: int) -> bytes:
        """Encoded bytes. Raises `OSError`."""

    def name(self, sample: int) -> str:
        """What to call the sample in a report."""

    def fingerprint(self) -> str:
        """Changes when a sample is added, removed, renamed or found to have another size."""


class FolderSource(Indexed):
    """Images below a folder: flat, nested or class folders, in sorted order."""

    def __init__(self, root: str, index: Index) -> None:
        self.root, self.index = root, index

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        return np.bincount(self.index.arrays["folder_of"]).astype(np.int64)

    def read(self, sample: int) -> bytes:
        with open(self.name(sample), "rb", buffering=0) as file:
            return file.read()

    def name(self, sample: int) -> str:
        arrays = self.index.arrays
        start = arrays["name_ends"][sample - 1] if sample else 0
        name = arrays["names"][start : arrays["name_ends"][sample]].tobytes()
        folder: str = self.index.facts["folders"][arrays["folder_of"][sample]][0]
        return os.path.join(self.root, folder, name.decode(*_NAMES))  # keeps absolute names


_NAMES = ("utf-8", "surrogateescape")  # file names are bytes; this round-trips all of them


def open_folder(root: str, max_pixels: int) -> FolderSource:
    """The images below a folder, from the cached index where that still holds.

    Raises `ConfigError` where the folder is missing or holds no image that can be read.
    """
    if not root:
        raise ConfigError("data.root is not set: name the folder of the training images.")
    if not Path(root).is_dir():
        raise ConfigError(f"data.root {root} is not a folder.")
    real = str(Path(root).resolve())
    try:
        index = _kept(
            f"{real} {max_pixels}",
            holds=lambda index: folders_unchanged(real, index),
            scan=lambda: scan_folder(real, max_pixels),
        )
    except OSError as error:
        if error.filename is None:  # about no path: a process or a pipe that could not be made
            raise
        raise ConfigError(
            f"data.root: the folder {error.filename} cannot be listed: {error.strerror}; "
            "make it readable or move it elsewhere."
        ) from error
    require_readable(index, f"data.root {root}")
    return FolderSource(real, index)


def open_list(root: str, max_pixels: int) -> FolderSource:
    """The images that a text or CSV file lists. Raises `ConfigError` as `open_folder` does."""
    if not root:
        raise ConfigError("data.root is not set: name the list of the training images.")
    path = Path(root).resolve()
    stamp = list_stamp(path)
    index = _kept(
        f"{path} {max_pixels}",
        holds=lambda index: index.facts.get("stamp") == stamp,
        scan=lambda: scan_list(path, max_pixels),
    )
    require_readable(index, f"data.root {root}")
    return FolderSource(str(path.parent), index)


def _kept(what: str, holds: Callable[[Index], bool], scan: Callable[[], Index]) -> Index:
    """The cached index of `what` where it holds, else a new one; one rank per machine scans."""
    digest = hashlib.sha256(what.encode(*_NAMES)).hexdigest()[:20]
    cached = cache_folder() / "index" / digest
    with exclusive(cached.with_suffix(".lock")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            index = load_index(str(cached))
            if holds(index):
                return index
        index = scan()
        if len(index.sizes):
            with contextlib.suppress(OSError):  # nowhere to cache: keep it in memory
                index = save_index(index, cached)
        return index


def require_readable(index: Index, what: str) -> None:
    """Raises `ConfigError` for an index without samples, or without a readable one."""
    if not len(index.sizes):
        raise ConfigError(f"{what} holds no image file.")
    if len(index.bad) == len(index.sizes):
        sample, reason = next(iter(index.bad.items()))
        raise ConfigError(
            f"{what} holds {len(index.sizes)} image files and none can be read; "
            f"number {sample}: {reason}."
        )


def open_source(config: Config) -> Source:
    """The source that `config.data` describes. Raises `ConfigError`."""
    data = config.data
    if data.source == "demo":
        # Imported on demand: rendering is needed on the first use only.
        rendered = importlib.import_module("fastmoco.data.demo").ensure_demo()
        return open_folder(str(rendered.train), data.max_pixels)
    if data.source == "folder":
        train = Path(data.root) / "train"
        root = str(train) if data.root and train.is_dir() else data.root
        return open_folder(root, data.max_pixels)
    if data.source == "list":
        return open_list(data.root, data.max_pixels)
    if data.source == "shards":
        shards = open_shards(data.root, data.max_pixels)
        require_readable(shards.index, f"data.root {data.root}")
        return shards
    raise ConfigError(f"data.source {data.source} has no files to read.")
