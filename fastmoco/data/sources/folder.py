"""A folder of images, flat, nested or class folders: `data.source` folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.data.sources.index import FILE_NAMES, Index, Indexed, kept_index, require_readable
from fastmoco.data.sources.listing import Listed, Passed, read_file, suffix_of, walk
from fastmoco.data.sources.measure import CHUNK, OTHER, measure, probe_chunk, progress


def scan_folder(root: str, max_pixels: int, *, any_name: bool = False) -> Index:
    """The index of all images below root, with a progress bar on a terminal.

    Raises `OSError` for a folder that cannot be listed.
    """
    passed = Passed()
    folders: list[tuple[str, int]] = []
    folder_of, ends, blobs, end = [], [], [], 0
    listed = progress(walk(root, passed, any_name=any_name), _images, "list")
    for number, (folder, changed, names) in enumerate(listed):
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
    probe = partial(probe_chunk, max_pixels=max_pixels, any_name=any_name)
    sizes, bad = measure(probe, paths, len(arrays["folder_of"]))
    arrays["sizes"] = sizes
    other = [sample for sample, reason in bad.items() if reason == OTHER]
    if other:
        arrays, bad = _without(other, arrays, bad, passed)
    facts = {"folders": folders, "bad": bad, "lost": passed.lost, "shut": passed.shut}
    return Index(arrays, {**facts, "notes": passed.notes(), "warnings": passed.warnings()})


def _without(
    other: list[int], arrays: dict[str, Any], bad: dict[int, str], passed: Passed
) -> tuple[dict[str, Any], dict[int, str]]:
    """The arrays without files that are no images by name nor content; these are counted."""
    ends = arrays["name_ends"].astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    for sample in other:
        name = arrays["names"][ends[sample] - lengths[sample] : ends[sample]].tobytes()
        passed.suffixes[suffix_of(os.fsdecode(name))] += 1
    stays = np.ones(len(ends), bool)
    stays[other] = False
    kept = {
        "folder_of": arrays["folder_of"][stays],
        "name_ends": np.cumsum(lengths[stays]).astype(np.uint64),
        "names": arrays["names"][np.repeat(stays, lengths)],
        "sizes": arrays["sizes"][stays],
    }
    number = np.cumsum(stays) - 1
    return kept, {int(number[at]): why for at, why in bad.items() if stays[at]}


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
        return read_file(self.name(sample))

    def name(self, sample: int) -> str:
        arrays = self.index.arrays
        start = arrays["name_ends"][sample - 1] if sample else 0
        name = arrays["names"][start : arrays["name_ends"][sample]].tobytes()
        folder: str = self.index.facts["folders"][arrays["folder_of"][sample]][0]
        return os.path.join(self.root, folder, name.decode(*FILE_NAMES))  # keeps absolute names


def open_folder(root: str, max_pixels: int, *, any_name: bool = False) -> FolderSource:
    """The images below a folder, from the cached index where that still holds.

    any_name: files without the suffix of an image count too if their content is one.

    Raises `ConfigError` where the folder is missing or holds no image that can be read.
    """
    if not root:
        raise ConfigError("data.root is not set: name the folder of the training images.")
    if not Path(root).is_dir():
        raise ConfigError(f"data.root {root} is not a folder.")
    real = str(Path(root).resolve())
    try:
        index = kept_index(
            f"{real} {max_pixels} {any_name}",
            holds=lambda index: folders_unchanged(real, index),
            scan=lambda: scan_folder(real, max_pixels, any_name=any_name),
        )
    except OSError as error:
        if error.filename is None:  # about no path: a process or a pipe that could not be made
            raise
        raise ConfigError(
            f"data.root: the folder {error.filename} cannot be listed: {error.strerror}; "
            "make it readable or move it elsewhere."
        ) from error
    require_readable(index, f"data.root {root}", by_name=not any_name)
    return FolderSource(real, index)
