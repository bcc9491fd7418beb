"""A folder of images, flat, nested or class folders: `data.source` folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.data.decode import is_image_name
from fastmoco.data.sources.index import FILE_NAMES, Index, Indexed, kept_index, require_readable
from fastmoco.data.sources.measure import CHUNK, measure, probe_chunk, progress

# Kernels stamp files with the time of the last clock tick, of which there are 100 or more a second.
_TICK_S = 0.02


Listed = tuple[str, int, list[str]]
"""A folder's path relative to the root, modification time in ns, sorted names of its images."""


def walk(root: str) -> Iterator[Listed]:
    """Every folder below root, itself included, in depth-first sorted order.

    Links are followed; a folder that was already visited is not visited again. Folders without
    images are yielded too, because a file added to one later must be noticed. Raises `OSError` for
    a folder that cannot be listed: leaving it out would train on less than the user named.
    """
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        place = os.path.join(root, folder)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        _let_tick_pass(status.st_mtime_ns)
        inner, images = [], []
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "lost+found":
                    continue
                if entry.is_dir():
                    inner.append(os.path.join(folder, entry.name))
                elif is_image_name(entry.name):
                    images.append(entry.name)
        yield folder, status.st_mtime_ns, sorted(images)
        pending += sorted(inner, reverse=True)


def _let_tick_pass(changed: int) -> None:
    """Waits until a change from now on gives the folder another modification time than this one."""
    if abs(time.time_ns() - changed) < _TICK_S * 1e9:
        time.sleep(_TICK_S)


def scan_folder(root: str, max_pixels: int) -> Index:
    """The index of all images below root, with a progress bar on a terminal.

    Raises `OSError` for a folder that cannot be listed.
    """
    folders: list[tuple[str, int]] = []
    folder_of, ends, blobs, end = [], [], [], 0
    for number, (folder, changed, names) in enumerate(progress(walk(root), _images, "list")):
        folders.append((folder, changed))
        encoded = [os.fsencode(name) for name in names]
        folder_of.append(np.full(len(names), number, np.uint32))
        ends.append(end + np.cumsum([len(name) for name in encoded], dtype=np.uint64))
        blobs.append(b"".join(encoded))
        end += len(blobs[-1])
    arrays: dict[str, Any] = {
        "folder_of": np.concatenate(folder_of or [np.zeros(0, np.uint32)]),
        "name_ends": np.concatenate(ends or [np.zeros(0, np.uint64)]).astype(np.uint64),
        "names": np.frombuffer(b"".join(blobs), np.uint8),
    }
    paths = _paths(root, folders, arrays)
    probe = partial(probe_chunk, max_pixels=max_pixels)
    sizes, bad = measure(probe, paths, len(arrays["folder_of"]))
    return Index({**arrays, "sizes": sizes}, {"folders": folders, "bad": bad})


def _images(listed: Listed) -> int:
    return len(listed[2])


def _paths(root: str, folders: list[tuple[str, int]], arrays: dict[str, Any]) -> Iterator[str]:
    blob, start = arrays["names"].tobytes(), 0
    for at in range(0, len(arrays["folder_of"]), CHUNK):  # a list of all would take 80 bytes each
        part = slice(at, at + CHUNK)
        folder_of, ends = (arrays[name][part].tolist() for name in ("folder_of", "name_ends"))
        for folder, end in zip(folder_of, ends, strict=True):
            yield os.path.join(root, folders[folder][0], os.fsdecode(blob[start:end]))
            start = end


def folders_unchanged(root: str, index: Index) -> bool:
    """Whether every folder of the index still has the modification time that it had."""
    try:
        return all(
            os.stat(os.path.join(root, folder)).st_mtime_ns == changed
            for folder, changed in index.facts["folders"]
        )
    except (OSError, KeyError):
        return False


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
        return os.path.join(self.root, folder, name.decode(*FILE_NAMES))  # keeps absolute names


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
        index = kept_index(
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
